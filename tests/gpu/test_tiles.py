"""Attention's tiles by head size, precision and card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.gpu.attention import DECODE, PREFILL, Tile
from model.gpu.tiles import FEW_LANES, SMALL_DECODE, SMALL_FEW_LANES, SMALL_PREFILL, choose_tiles

KIB = 2**10
H100, A100, SMALL = 227 * KIB, 163 * KIB, 99 * KIB
"""Shared memory of a block at compute capabilities 9.0, 8.0, and 8.6 and 8.9."""


@pytest.mark.parametrize(
    ("head_dim", "dtype", "shared_bytes", "decode", "prefill"),
    [
        (128, torch.bfloat16, H100, DECODE, PREFILL),
        (64, torch.bfloat16, SMALL, DECODE, PREFILL),
        (128, torch.bfloat16, A100, DECODE, PREFILL),
        (128, torch.bfloat16, SMALL, SMALL_DECODE, SMALL_PREFILL),
        (96, torch.bfloat16, SMALL, SMALL_DECODE, SMALL_PREFILL),
        (256, torch.bfloat16, H100, DECODE, SMALL_PREFILL),
        (128, torch.float32, H100, DECODE, FEW_LANES),
        (128, torch.float32, A100, SMALL_DECODE, SMALL_FEW_LANES),
    ],
    ids=str,
)
def test_the_first_that_has_room(
    head_dim: int, dtype: torch.dtype, shared_bytes: int, decode: Tile, prefill: Tile
) -> None:
    assert choose_tiles(head_dim, 4, dtype, shared_bytes) == (decode, prefill)


def test_a_whole_group_has_a_place() -> None:
    decode, prefill = choose_tiles(64, 24, torch.bfloat16, H100)
    assert (decode, prefill) == (replace(DECODE, num_lanes=32), PREFILL)


def test_heads_that_have_no_room_are_refused() -> None:
    with pytest.raises(ValueError, match="heads of 512 numbers have no room"):
        choose_tiles(512, 4, torch.float32, H100)
