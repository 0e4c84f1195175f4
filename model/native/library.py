"""Finds and opens the compiled kernels, by name and instruction set level.

It never compiles: a missing or stale library is a ValueError that says what to run. The caller must have imported torch
first, so that the libraries bind to the OpenMP runtime (libgomp.so.1) that torch brought and share its threads.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from model.native.levels import Level, library_path, runnable_levels, source_digest


def open_library(source: str, level_name: str | None = None) -> tuple[ctypes.CDLL, Level]:
    """Opens the library of `source` at a level; without a name at the fastest level that is built and runs here.

    Raises ValueError when this machine cannot execute the level, or the library is not built from the present sources.
    """
    runnable = [level for level in runnable_levels() if level_name in (None, level.name)]
    if not runnable:
        raise ValueError(f"this machine cannot execute kernels of level {level_name!r}")
    for level in runnable:
        path = library_path(source, level)
        if path.exists():
            return _open(path, source, level), level
    raise ValueError(f"the native library {source!r} is not built: run `python -m model.native.build`")


def _open(path: Path, source: str, level: Level) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.quire_source_digest.restype = ctypes.c_char_p
    if library.quire_source_digest() != source_digest(source, level).encode():
        raise ValueError(f"{path.name} is older than its sources: run `python -m model.native.build`")
    return library
