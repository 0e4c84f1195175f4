"""What the parts of a check of a card find: JSON lines in one file, appended as they come. Standard library only.

    {"part": "steps 8B", "kind": "decode", "batch": 64, ...}

A part that dies leaves what it had found. The command line that all parts share is here, too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIGITS = 6
"""Of a figure that is kept."""

Record = Mapping[str, Any]

ALONE_SECONDS = 120.0
"""What a part takes at most that no check has started."""


class Records:
    """One part's pen on the file."""

    def __init__(self, file: Path, part: str) -> None:
        self.file = file
        self._part = part

    def write(self, kind: str, **fields: Any) -> None:
        """Appends a line, and shows it. Numbers are rounded to a few digits."""
        rounded = {name: _rounded(value) for name, value in fields.items()}
        line = json.dumps({"part": self._part, "kind": kind, **rounded})
        with self.file.open("a") as file:
            file.write(line + "\n")
        print(f"{kind}: " + ", ".join(f"{name} {value}" for name, value in rounded.items()), flush=True)


def read_records(file: Path) -> list[Record]:
    """All lines; one that a part's end cut short is left out. Without a file there are none."""
    return list(_parsed(file.read_text().splitlines())) if file.exists() else []


def _parsed(lines: Sequence[str]) -> Iterator[Record]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    return value


@dataclass(frozen=True, slots=True)
class PartOptions:
    """What a part is told."""

    records: Records
    is_dry: bool
    """Tiny shapes on the CPU, which show that the part works."""
    model: str
    models: Path
    """Folder of the models."""
    deadline: float
    """When the part is ended, in seconds of time.monotonic."""

    def left(self) -> float:
        """Seconds until then."""
        return self.deadline - time.monotonic()


def parse_part(module: str, arguments: Sequence[str] | None) -> PartOptions:
    """A part's command line. Exits with 2 for mistakes."""
    parser = argparse.ArgumentParser(prog=f"python -m loadtest.gpu.{module}")
    parser.add_argument("--records", type=Path, required=True, help="file to append JSON lines to")
    parser.add_argument("--part", default=module, help="name of the part in them (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--model", default="8B", help="name of the shape (default: %(default)s)")
    parser.add_argument("--models", type=Path, default=Path("loadtest/out/models"), help="default: %(default)s")
    parser.add_argument("--until", type=float, help="when the part is ended, on the machine's monotonic clock")
    given = parser.parse_args(arguments)
    records = Records(given.records, given.part)
    until = time.monotonic() + ALONE_SECONDS if given.until is None else given.until
    return PartOptions(records, given.dry, given.model, given.models, until)
