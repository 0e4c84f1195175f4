"""Writes the models that the engine is measured with, unless they are there.

    python -m loadtest.gpu.models --records FILE --models DIR

The last file of a model is its mark of being whole, so that what was cut short is written anew.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from loadtest.gpu.records import parse_part
from loadtest.gpu.shapes import shape_of
from loadtest.models import write_model

MODELS = ("8B", "1B")
MARK = "whole"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes. Returns the exit code."""
    options = parse_part("models", arguments)
    for name in MODELS:
        folder, started_at = options.models / name, time.monotonic()
        is_there = (folder / MARK).exists()
        if not is_there:
            write_model(shape_of(name, options.is_dry), folder)
            (folder / MARK).touch()
        num_bytes = (folder / "model.safetensors").stat().st_size
        seconds = time.monotonic() - started_at
        options.records.write("model", model=name, was_there=is_there, gigabytes=num_bytes / 1e9, seconds=seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
