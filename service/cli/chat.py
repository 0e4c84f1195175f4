"""Talk with a running server's model. Ctrl-C stops an answer, Ctrl-D leaves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress

from service.cli.answer import Answer, note
from service.cli.connection import add_connection, connected, explain
from service.cli.generate import open_stream
from service.cli.options import add_options, named_by_flag, options_of
from service.cli.parser import CommandFailed
from service.client.blocking import BlockingClient
from service.client.errors import QuireClientError
from service.client.types import Message, Options
from service.errors import StartupError

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"
COMMANDS = ("/reset", "/help", "/exit", "/quit")


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
            note(f"{model.name}, context {model.context_length:,} tokens; {HELP}")
        conversation = Conversation(client, options_of(arguments), arguments.system, arguments.timeout)
        for line in _lines(is_terminal):
            if line in ("/exit", "/quit"):
                break
            if line == "/reset":
                conversation.reset()
                note("forgotten")
            elif line == "/help":
                note(HELP)
            elif line.split()[0] in COMMANDS:
                note(f"{line.split()[0]} stands alone, without other words; {HELP}")
            elif line.startswith("/") and " " not in line:
                note(f"no such command: {line}; {HELP}")
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
        """Sends a message and prints the answer. False if it failed; then the message is forgotten, too.

        Raises QuireClientError if the server refuses a flag: the next message would fare no better.
        """
        question = Message("user", text)
        while True:
            answer = Answer()
            try:
                self._ask(question, answer)
            except QuireClientError as error:
                if any(named_by_flag(f"{bad.field}:").startswith("--") for bad in error.violations):
                    raise
                if error.reason == "CONTEXT_LENGTH_EXCEEDED" and self._turns:
                    # The server says no before it generates anything, so asking again repeats no text.
                    del self._turns[0]
                    note("the conversation no longer fits the context: its oldest exchange was dropped")
                    continue
                print(f"quire: error: {explain(error, self._client, answer.num_tokens)}", file=sys.stderr)
                return False
            self._turns.append((question, Message("assistant", answer.text)))
            return True

    def _ask(self, question: Message, answer: Answer) -> None:
        """Reads the answer; what there is of it when Ctrl-C stops it."""
        messages = [*self._system, *(message for turn in self._turns for message in turn), question]
        try:
            with open_stream(self._client, messages, self._options, self._timeout) as events:
                answer.read(events)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            note("stopped")
        if cut := answer.cut():
            note(f"[{cut}]")


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
