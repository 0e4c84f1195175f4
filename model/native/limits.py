"""What the compiled kernels take, whatever their level. Standard library only."""

from __future__ import annotations

DTYPES = ("bfloat16", "float32")
MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8
GROUP = 16
"""Positions whose keys lie together in the cache; a block is made of whole groups."""


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
