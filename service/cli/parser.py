"""What all commands share in parsing: one-line refusals, and types of flags."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn


class CommandFailed(Exception):
    """A command that could not do its work, through no fault of the user's: one line, exit code 1."""


class Parser(argparse.ArgumentParser):
    """Refuses in one line, and takes no abbreviations: a flag added later must not change what a script means."""

    def __init__(self, *, prog: str, description: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"quire: error: {message}; see {self.prog} --help\n")


def positive_seconds(text: str) -> float:
    """A duration that gRPC can hold."""
    seconds = float(text)
    if not (math.isfinite(seconds) and 0 < seconds <= 1e6):
        raise argparse.ArgumentTypeError("must be more than 0 and at most 1000000 seconds")
    return seconds


def positive_int(text: str) -> int:
    """A count of at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
