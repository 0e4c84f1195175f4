"""Generate text from a prompt on a running server, streamed as it comes."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from service.cli.answer import Answer, note
from service.cli.connection import add_connection, connected, failure
from service.cli.options import add_options, named_by_flag, options_of
from service.client.blocking import BlockingClient, Stream
from service.client.errors import QuireClientError
from service.client.types import Delta, Finished, Message, Options, Prompt, Started
from service.errors import StartupError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help='default, or "-": read from standard input')
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's message")
    parser.add_argument("--system", metavar="TEXT", help="instructions for the conversation; implies --chat")
    parser.add_argument("--json", action="store_true", help="print one JSON document at the end")
    parser.add_argument("--top-logprobs", type=int, metavar="N", help="with --json: log-probabilities, and of N others")
    add_connection(parser)
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if arguments.top_logprobs is not None and not arguments.json:
        raise StartupError("--top-logprobs: only with --json")
    prompt, options = _prompt(arguments), options_of(arguments)
    if arguments.json:
        options["return_token_ids"], options["top_logprobs"] = True, arguments.top_logprobs
    is_terminal = sys.stdout.isatty() and not arguments.json
    is_typed = arguments.prompt in (None, "-") and sys.stdin.isatty()
    shown = prompt if is_terminal and isinstance(prompt, str) and not is_typed else ""
    answer = Answer(prompt=shown, is_printed=not arguments.json)
    with connected(arguments.address) as client:
        try:
            with open_stream(client, prompt, options, arguments.timeout) as events:
                answer.read(events)
        except QuireClientError as error:
            raise failure(error, client, answer.num_tokens) from None
    if arguments.json:
        _print_document(answer)
    elif is_terminal and sys.stderr.isatty() and (cut := answer.cut()):
        note(f"[{cut}]")
    return 0


def open_stream(client: BlockingClient, prompt: Prompt, options: Options, timeout: float | None) -> Stream:
    """Asks for a generation. Raises StartupError for a value that cannot be sent."""
    try:
        return client.stream(prompt, timeout_seconds=timeout, **options)
    except ValueError as error:
        raise StartupError(named_by_flag(str(error))) from None


def _print_document(answer: Answer) -> None:
    deltas = [event for event in answer.events if isinstance(event, Delta)]
    (started,) = [event for event in answer.events if isinstance(event, Started)]
    (finished,) = [event for event in answer.events if isinstance(event, Finished)]
    document = {
        "text": answer.text,
        "token_ids": [token_id for delta in deltas for token_id in delta.token_ids],
        "finish_reason": finished.reason,
        "stop_match": finished.stop_match,
        "seed": started.seed,
        "model": started.model,
        "generation_id": started.generation_id,
        "usage": asdict(finished.usage),
        "timing": asdict(finished.timing),
    }
    logprobs = [asdict(entry) for delta in deltas for entry in delta.logprobs]
    json.dump(document | ({"logprobs": logprobs} if logprobs else {}), sys.stdout, ensure_ascii=False, indent=2)
    sys.stdout.write("\n")


def _prompt(arguments: argparse.Namespace) -> Prompt:
    given = arguments.prompt
    text = _standard_input() if given in (None, "-") else str(given)
    if not arguments.chat and arguments.system is None:
        return text
    system = [] if arguments.system is None else [Message("system", arguments.system)]
    # The line end that a shell or an editor leaves is not part of what was said.
    return [*system, Message("user", text.rstrip("\n") if given in (None, "-") else text)]


def _standard_input() -> str:
    """All of it, untouched: in a prompt every blank counts."""
    if sys.stdin.isatty():
        print("quire: type the prompt, then Ctrl-D", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise StartupError("standard input is not UTF-8 text") from None
