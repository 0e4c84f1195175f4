"""Which tiles attention computes with: the fastest whose keys and values have room in a card's shared memory.

It owns the order of preference; model/gpu/attention.py says what a tile is. Wide heads, float32 and smaller cards take
narrower tiles. The same model on the same kind of card always gets the same ones, and so the same bits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton

from model.gpu.attention import DECODE, PREFILL, Tile

BLOCK_SIZE = 64
"""Positions of a block, where nothing else is asked for: a tile of keys lies in one block."""
PROGRAMS_PER_MULTIPROCESSOR = 2
"""Of attention: as many of its decode tiles as have room in shared memory."""
SMALL_DECODE = replace(DECODE, num_stages=2)
SMALL_PREFILL = replace(PREFILL, num_lanes=64, num_stages=2)
FEW_LANES = replace(DECODE, split=PREFILL.split)
"""Of prefill in float32, whose products have no tensor cores: larger tiles have no room in the registers."""
SMALL_FEW_LANES = replace(FEW_LANES, num_stages=2)


def choose_tiles(head_dim: int, group: int, dtype: torch.dtype, shared_bytes: int) -> tuple[Tile, Tile]:
    """Decode's and prefill's, for so many query heads of a key/value head, within a block's shared memory.

    Raises ValueError where none fits.
    """
    few = [FEW_LANES, SMALL_FEW_LANES]
    decode, prefill = [DECODE, SMALL_DECODE], few if dtype is torch.float32 else [PREFILL, SMALL_PREFILL, *few]
    sizes = head_dim, group, dtype, shared_bytes
    return _first_that_fits(decode, *sizes), _first_that_fits(prefill, *sizes)


def _first_that_fits(tiles: list[Tile], head_dim: int, group: int, dtype: torch.dtype, shared_bytes: int) -> Tile:
    for tile in tiles:
        tile = replace(tile, num_lanes=max(tile.num_lanes, triton.next_power_of_2(group)))
        if shared_bytes_of(tile, head_dim, dtype) <= shared_bytes:
            return tile
    raise ValueError(f"heads of {head_dim} numbers have no room in this card's shared memory")


def shared_bytes_of(tile: Tile, head_dim: int, dtype: torch.dtype) -> int:
    """At most so much shared memory a tile takes: its queries, and keys and values of each stage."""
    row_bytes: int = triton.next_power_of_2(head_dim) * dtype.itemsize
    return row_bytes * (tile.num_lanes + 2 * tile.num_stages * tile.num_keys)
