"""The instruction set levels that tests run on: those that are built, run here, and `--cpu-level` leaves."""

from __future__ import annotations

import ctypes
from functools import cache

import pytest

from model.native import library
from model.native.levels import Level, library_path
from model.native.library import Kernels


def is_permitted(level: Level) -> bool:
    """Whether the system lets this process run it; a library too old to ask is left to fail by itself."""
    permit = getattr(ctypes.CDLL(str(library_path(level))), "quire_permit", None)
    return permit is None or bool(permit())


LEVELS = [level.name for level in library.runnable_levels() if library_path(level).exists() and is_permitted(level)]
"""Fastest first."""

SHORTENING_LEVELS = ("v4_amx", "v4_bf16", "v4_vnni", "v4", "v3")
"""Those that keep bfloat16 weights in 12 bits."""

needs_kernels = pytest.mark.skipif(not LEVELS, reason="native kernels are not built: python -m model.native.build")


@cache
def kernels_of(level: str) -> Kernels:
    """Opens a level's library once."""
    return library.open_kernels(level)
