"""Finds and opens the compiled kernels at an instruction set level: whether they compute a model here is decided here.

It never compiles: a missing or stale library is a ValueError that says what to run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.config import ModelConfig
from model.interface import Quantization
from model.native import limits
from model.native.levels import LEVELS, Level, library_path, runnable_levels, source_digest


@dataclass(frozen=True, slots=True)
class Kernels:
    """An open library, and the name of the level that it was compiled for."""

    library: ctypes.CDLL
    level: str

    def keep_to_cpus(self, cpus: Sequence[int]) -> None:
        """Ties thread i of those that start from now on to the CPU cpus[i]; the first is the caller's, which is not."""
        self.library.quire_keep_to_cpus((ctypes.c_int * len(cpus))(*cpus), len(cpus))


def open_kernels(level_name: str | None = None) -> Kernels:
    """Opens the library of a level; without a name that of the fastest level that is built and runs here.

    Raises ValueError when the level is unknown, this machine cannot execute it or does not let this process, or it is
    not built from the present sources.
    """
    if level_name not in (None, *(level.name for level in LEVELS)):
        raise ValueError(f"unknown instruction set level {level_name!r}: one of {[level.name for level in LEVELS]}")
    runnable = [level for level in runnable_levels() if level_name in (None, level.name)]
    if not runnable:
        raise ValueError(f"this machine cannot execute kernels of level {level_name!r}")
    built = [level for level in runnable if library_path(level).exists()]
    if not built:
        raise ValueError("the native kernels are not built: run `python -m model.native.build`")
    for level in built:
        library = _open(library_path(level), level)
        if library.quire_permit():
            return Kernels(library, level.name)
    raise ValueError(f"the system does not let this process execute kernels of level {built[-1].name!r}")


def open_kernels_for(
    config: ModelConfig, dtype: str, quantization: Quantization, block_size: int, level_name: str | None = None
) -> Kernels:
    """As `open_kernels`; raises ValueError also where they do not take such a model. The dtype is its name."""
    kernels = open_kernels(level_name)
    limits.check_attention(dtype, config.head_dim)
    limits.check_block_size(block_size)
    widest = max(config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
    limits.check_inputs(widest, dtype, quantization is Quantization.INT8, kernels.level)
    return kernels


def _open(path: Path, level: Level) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ValueError(f"{path.name} cannot be opened: {error}") from None
    library.quire_source_digest.restype = ctypes.c_char_p
    if library.quire_source_digest() != source_digest(level).encode():
        raise ValueError(f"{path.name} is older than its sources: run `python -m model.native.build`")
    return library
