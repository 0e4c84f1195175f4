"""Talk with a running server's model. Ctrl-C stops an answer, Ctrl-D leaves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress

from service.cli.connection import add_connection, connected, explain
from service.cli.generate import open_stream
from service.cli.options import add_options, options_of
from service.cli.parser import CommandFailed
from service.client.blocking import BlockingClient
from service.client.errors import QuireClientError
from service.client.types import Delta, Finished, FinishReason, Message, Options
from service.errors import StartupError

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--system", metavar="TEXT", help="instructions for the conversation")
    add_connection(parser)
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code: 1 when a piped conversation had an answer that failed."""
    with connected(arguments.address) as client:
        model = client.get_model(arguments.model or "", timeout_seconds=arguments.timeout)
        if not model.has_chat_template:
            raise CommandFailed(f"{model.name} has no chat template; use quire generate")
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if is_terminal:
            _note(f"{model.name}, context {model.context_length:,} tokens; {HELP}")
        conversation = Conversation(client, options_of(arguments), arguments.system, arguments.timeout)
        for line in _lines(is_terminal):
            if line in ("/exit", "/quit"):
                break
            if line == "/reset":
                conversation.reset()
                _note("forgotten")
            elif line == "/help":
                _note(HELP)
            elif line.startswith("/") and " " not in line:
                _note(f"no such command: {line}; {HELP}")
            elif not conversation.say(line) and not is_terminal:
                return 1
    return 0


class Conversation:
    """The messages so far, and the exchange that adds to them. Owns nothing of the server's."""

    def __init__(self, client: BlockingClient, options: Options, system: str | None, timeout: float | None) -> None:
        self._client, self._options, self._timeout = client, options, timeout
        self._system = [] if system is None else [Message("system", system)]
        self._turns: list[tuple[Message, Message]] = []
        """What was asked and answered, oldest first."""

    def reset(self) -> None:
        """Forgets everything but the instructions."""
        self._turns.clear()

    def say(self, text: str) -> bool:
        """Sends a message and prints the answer. False if there was none; then the message is forgotten, too."""
        question = Message("user", text)
        while True:
            try:
                answer = self._ask(question)
            except QuireClientError as error:
                if error.reason == "CONTEXT_LENGTH_EXCEEDED" and self._turns:
                    # The server says no before it generates anything, so asking again repeats no text.
                    del self._turns[0]
                    _note("the conversation no longer fits the context: its oldest exchange was dropped (/reset: all)")
                    continue
                _note(f"quire: error: {explain(error, self._client)}")
                return False
            self._turns.append((question, Message("assistant", answer)))
            return True

    def _ask(self, question: Message) -> str:
        """The answer, printed as it comes; what there is of it when Ctrl-C stops it."""
        messages = [*self._system, *(message for turn in self._turns for message in turn), question]
        answer = ""
        try:
            with open_stream(self._client, messages, self._options, self._timeout) as events:
                for event in events:
                    if isinstance(event, Delta):
                        answer += event.text
                        sys.stdout.write(event.text)
                        sys.stdout.flush()
                    elif isinstance(event, Finished):
                        _end_answer(event)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            _note("stopped")
        return answer


def _end_answer(event: Finished) -> None:
    sys.stdout.write("\n")
    sys.stdout.flush()
    if event.reason is FinishReason.CONTEXT_LENGTH:
        _note("the context is full, so the answer was cut; /reset starts anew")


def _lines(is_terminal: bool) -> Iterator[str]:
    """What is said, line by line, without empty lines, until Ctrl-D or the end of the pipe."""
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 (gives input() a history and editing)
    while True:
        try:
            line = input("\n> ") if is_terminal else sys.stdin.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # at the prompt: drops the line
            print()
            continue
        except UnicodeDecodeError:
            raise StartupError("standard input is not UTF-8 text") from None
        if not is_terminal and not line:
            return
        if line.strip():
            yield line.strip()


def _note(text: str) -> None:
    """Says something that is no part of the conversation."""
    sys.stdout.flush()
    print(text, file=sys.stderr)
