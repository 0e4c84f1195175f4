"""An answer on its way to standard output: its text as it comes, and what is said when it was cut.

It knows neither flags nor the server. What is only said to a person is dimmed where a terminal shows it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO

from service.client.types import Delta, Event, Finished, FinishReason, Started

CUTS = {FinishReason.MAX_TOKENS: "--max-tokens", FinishReason.CONTEXT_LENGTH: "the context is full"}
"""Reasons for which a generation ends other than by itself."""


class Answer:
    """The events of one generation so far. Its text is printed as it comes, after `prompt` if there is one."""

    def __init__(self, *, prompt: str = "", is_printed: bool = True) -> None:
        self.events: list[Event] = []
        self._prompt, self._is_printed = prompt, is_printed
        self._printed = ""
        """The last text printed; empty before the first."""

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def num_tokens(self) -> int:
        return sum(event.num_tokens for event in self.events if isinstance(event, Delta))

    def read(self, events: Iterable[Event]) -> None:
        """Reads to the end, and ends the line. Raises what the events raise, the line then being ended, too.

        Only an interrupted answer stays as it is: nobody may be reading.
        """
        try:
            for event in events:
                self.events.append(event)
                if isinstance(event, Started):
                    self._print(self._prompt, dim(self._prompt, sys.stdout))
                elif isinstance(event, Delta):
                    self._print(event.text, event.text)
        except Exception:
            if self._printed:
                self._end_line()
            raise
        self._end_line()

    def cut(self) -> str | None:
        """What to say of an answer that did not end by itself."""
        for event in self.events:
            if isinstance(event, Finished) and event.reason in CUTS:
                return f"stopped after {count(event.usage.completion_tokens)}: {CUTS[event.reason]}"
        return None

    def _print(self, text: str, shown: str) -> None:
        if self._is_printed and text:
            self._printed = text
            sys.stdout.write(shown)
            sys.stdout.flush()

    def _end_line(self) -> None:
        if self._is_printed and not self._printed.endswith("\n"):
            self._print("\n", "\n")


def count(num_tokens: int) -> str:
    return "1 token" if num_tokens == 1 else f"{num_tokens:,} tokens"


def dim(text: str, stream: TextIO) -> str:
    """The text as `stream` shows it beside what matters more: only a terminal can."""
    return f"\x1b[2m{text}\x1b[22m" if text and stream.isatty() else text


def note(text: str) -> None:
    """Says something that is no part of the answer."""
    sys.stdout.flush()
    print(dim(text, sys.stderr), file=sys.stderr)
