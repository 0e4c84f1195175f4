"""Finds the first stop string in a text that arrives in pieces. Owns the text that may still become a stop string.

Plain search, no regular expressions: callers choose the strings. It knows neither tokens nor why else a text may end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """`text` may be shown now. `matched` is the stop string that ended it, None while none has."""

    text: str
    matched: str | None


class StopMatcher:
    """Matches stop strings over any split of the text, at a cost linear in the text whatever the strings.

    The first string to be complete wins; of several complete at the same character, the longest. With `include` the
    text ends after it, otherwise before it. Each string keeps how much of its beginning the text ends with, and only
    the longest of these is held back (Knuth, Morris, Pratt 1977).
    """

    def __init__(self, stop_strings: Sequence[str], include: bool = False) -> None:
        assert all(stop_strings), "an empty stop string matches everything; the door refuses it"
        # Longest first, so that the first complete one is the longest.
        self._strings = sorted(set(stop_strings), key=len, reverse=True)
        self._borders = [_borders(string) for string in self._strings]
        self._progress = [0] * len(self._strings)
        self._include = include
        self._held = ""

    def push(self, text: str, can_match: bool = True) -> StopMatch:
        """Takes more text and returns what may be shown. After a match the rest is dropped; do not push again.

        With `can_match` False, strings that become complete in this text are passed over (min_tokens).
        """
        if not self._strings:
            return StopMatch(text, None)
        for position, character in enumerate(text, start=len(self._held) + 1):
            complete = self._advance(character)
            if complete is not None and can_match:
                end = position if self._include else position - len(complete)
                shown, self._held = (self._held + text)[:end], ""
                return StopMatch(shown, complete)
        known = self._held + text
        shown_chars = len(known) - max(self._progress)
        self._held = known[shown_chars:]
        return StopMatch(known[:shown_chars], None)

    def finish(self) -> str:
        """The text still held back: it ended before it became a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Moves every string on by one character; the longest complete one, if any."""
        complete = None
        for index, string in enumerate(self._strings):
            borders, progress = self._borders[index], self._progress[index]
            while progress and string[progress] != character:
                progress = borders[progress]
            progress += string[progress] == character
            if progress == len(string):
                complete = complete or string
                progress = borders[progress]
            self._progress[index] = progress
        return complete


def _borders(string: str) -> list[int]:
    """For each length n, the longest proper prefix of string[:n] that is also its suffix."""
    borders = [0] * (len(string) + 1)
    length = 0
    for index in range(1, len(string)):
        while length and string[index] != string[length]:
            length = borders[length]
        length += string[index] == string[length]
        borders[index + 1] = length
    return borders
