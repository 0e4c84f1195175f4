"""The instruction set levels that tests run on: those that are built, run here, and `--cpu-level` leaves."""

from __future__ import annotations

from functools import cache

import pytest

from model.native import library
from model.native.levels import library_path
from model.native.library import Kernels

LEVELS = [level.name for level in library.runnable_levels() if library_path(level).exists()]
"""Fastest first."""

needs_kernels = pytest.mark.skipif(not LEVELS, reason="native kernels are not built: python -m model.native.build")


@cache
def kernels_of(level: str) -> Kernels:
    """Opens a level's library once."""
    return library.open_kernels(level)
