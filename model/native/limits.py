"""What the compiled kernels take. Standard library only: a command asks, too."""

from __future__ import annotations

from model.native.levels import LEVELS

DTYPES = ("bfloat16", "float32")
MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8
GROUP = 16
"""Positions whose keys lie together in the cache; a block is made of whole groups."""
MAX_CODED_INPUTS = (2**31 - 1) // (255 * 127)
"""Products of codes, one of them up to 255 where it is kept with 128 added, are summed in 32 bits."""
MAX_WIDENED_BYTES = 7 << 18
"""Of a block of rows of x as float32, where a level has no dots of bfloat16.

A helper has them on its stack (`multiply_part_widened` in multiply.h), which is 2 MiB (STACK_BYTES in team.h); a step
takes about 0.1 MiB beside them. More rows than a block go there up to 1 MiB only, and codes take less than that limit.
"""


def check_attention(dtype: str, head_dim: int) -> None:
    """Raises ValueError for a dtype or head size that attention does not take."""
    if dtype not in DTYPES:
        raise ValueError(f"native attention takes {' and '.join(DTYPES)}, not {dtype}")
    if head_dim % HEAD_DIM_STEP or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"native attention takes head sizes 8, 16, … {MAX_HEAD_DIM}, not {head_dim}")


def check_block_size(block_size: int) -> None:
    """Raises ValueError for blocks that are not whole groups."""
    if block_size % GROUP:
        raise ValueError(f"block_size: the native backend takes multiples of {GROUP}, not {block_size}")


def check_inputs(num_inputs: int, dtype: str, has_codes: bool, level_name: str) -> None:
    """Raises ValueError for a matrix of more inputs than the kernels of a level take."""
    most = max_inputs(dtype, has_codes, level_name)
    if most is not None and num_inputs > most:
        kind = "8-bit codes" if has_codes else f"{dtype} matrices"
        raise ValueError(f"kernels of level {level_name} take {kind} of {most} inputs at most, not {num_inputs}")


def max_inputs(dtype: str, has_codes: bool, level_name: str) -> int | None:
    """Inputs of a matrix at most; None where there may be as many as one wants."""
    if has_codes:
        return MAX_CODED_INPUTS
    (features,) = (level.features for level in LEVELS if level.name == level_name)
    if dtype != "bfloat16" or "avx512_bf16" in features:
        return None
    rows_of_a_block = 8 if "avx512f" in features else 6  # MAX_ROWS in matrix.h
    return MAX_WIDENED_BYTES // rows_of_a_block // 4
