"""What attention on a card is measured with: one layer's cache, and steps over it that read blocks in random places."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loadtest.gpu.measure import Call, num_programs, num_sets, random_tensor, relative_error, unwritten
from loadtest.models import ModelShape
from loadtest.roofline import MachineRates
from model.attention.reference import attend_row, gather
from model.gpu.attention import Heads, PagedAttention, Tile
from model.gpu.attention_base import Attention
from model.gpu.flash_attention import FlashAttention
from model.gpu.tiles import BLOCK_SIZE, PROGRAMS_PER_MULTIPROCESSOR

DRY_BLOCK_SIZE = 16
CHECKED_TOKENS = 32
"""Of a row, its last ones: float32 on a CPU is slow."""


@dataclass(frozen=True, slots=True)
class Spans:
    """A step: rows that are alike."""

    num_rows: int
    context: int
    num_tokens: int = 1
    """New ones of each row, the last of its context."""

    @property
    def is_decode(self) -> bool:
        """Whether each row brings one token."""
        return self.num_tokens == 1

    def least_seconds(self, shape: ModelShape, rates: MachineRates) -> float:
        """One layer's limit: keys and values read once, or the products of those that are seen."""
        kv_width = 2 * shape.num_kv_heads * shape.head_dim
        reading = 2 * self.num_rows * self.context * kv_width / rates.bytes_read
        before = self.context - self.num_tokens
        seen = self.num_tokens * before + self.num_tokens * (self.num_tokens + 1) / 2
        operations = 4 * self.num_rows * seen * shape.num_heads * shape.head_dim
        return max(reading, operations / rates.attention_operations)


class Way(Protocol):
    """What computes attention."""

    def attention(self, heads: Heads, spans: Spans, device: torch.device) -> Attention:
        """Made for one kind of step. Raises ValueError where it cannot compute it."""


class Flash3:
    """FlashAttention-3."""

    def attention(self, heads: Heads, spans: Spans, device: torch.device) -> Attention:
        """See Way."""
        return FlashAttention(heads, spans.num_rows, device)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Our own kernels, with what may be chosen."""

    decode: Tile
    prefill: Tile
    per_multiprocessor: int = PROGRAMS_PER_MULTIPROCESSOR
    """Programs of the constant grid."""

    def attention(self, heads: Heads, spans: Spans, device: torch.device) -> Attention:
        """See Way."""
        return PagedAttention(
            heads,
            max_rows=spans.num_rows,
            max_tokens=spans.num_rows * spans.num_tokens,
            max_context=spans.context,
            num_programs=num_programs(device, self.per_multiprocessor),
            device=device,
            decode=self.decode,
            prefill=self.prefill,
        )

    def tile_of(self, phase: str) -> Tile:
        """Of "decode" or "prefill"."""
        return self.decode if phase == "decode" else self.prefill

    def with_tile(self, phase: str, tile: Tile) -> Tiles:
        """Another tile for "decode" or "prefill"."""
        return replace(self, decode=tile) if phase == "decode" else replace(self, prefill=tile)


class Cache:
    """One layer's keys and values, random, with room for `num_tokens` positions."""

    def __init__(self, shape: ModelShape, num_tokens: int, device: torch.device) -> None:
        self.block_size = DRY_BLOCK_SIZE if device.type == "cpu" else BLOCK_SIZE
        self.shape = shape
        self.device = device
        self.num_blocks = -(-num_tokens // self.block_size)
        place = self.num_blocks, shape.num_kv_heads, self.block_size, shape.head_dim
        self.k, self.v = (random_tensor(*place, device=device) for _ in range(2))

    def tables(self, num_rows: int, context: int, seed: int) -> Tensor:
        """A block table for each row, int32 [num_rows, blocks]: no block twice, if there are enough."""
        num_wanted = num_rows * -(-context // self.block_size)
        order = np.random.default_rng(seed).permutation(self.num_blocks)
        blocks = np.resize(order, num_wanted).reshape(num_rows, -1).astype(np.int32)
        return torch.from_numpy(blocks).to(self.device)


class Case:
    """Attention of one kind of step, over sets of inputs that the card's last cache does not hold."""

    def __init__(self, cache: Cache, spans: Spans, way: Way) -> None:
        """Raises ValueError for tiles that do not fit."""
        shape, device = cache.shape, cache.device
        self._cache, self._spans = cache, spans
        scale = shape.head_dim**-0.5
        self._heads = Heads(shape.num_heads, shape.num_kv_heads, shape.head_dim, cache.block_size, scale)
        self._attention = way.attention(self._heads, spans, device)
        self._plan = torch.from_numpy(self._attention.plan(*_lengths(spans))).to(device)
        self._q = random_tensor(spans.num_rows * spans.num_tokens, shape.num_heads, shape.head_dim, device=device)
        self._out = unwritten(*self._q.shape, device=device)
        kv_bytes = 4 * spans.num_rows * spans.context * shape.num_kv_heads * shape.head_dim
        sets = range(num_sets(kv_bytes, device))
        self._tables = [cache.tables(spans.num_rows, spans.context, seed) for seed in sets]

    def calls(self) -> list[Call]:
        """One for each set of inputs."""
        return [lambda table=table: self._attend(table) for table in self._tables]  # type: ignore[misc]

    def _attend(self, tables: Tensor) -> None:
        tensors = self._q, self._cache.k, self._cache.v, tables, self._out
        self._attention.attend(*tensors, is_decode_only=self._spans.is_decode, plan=self._plan)

    def error(self) -> float:
        """How far the ends of the first and the last row are from float32 on a CPU; NaN where nothing was written."""
        self._attend(self._tables[0])
        spans, found, expected = self._spans, [], []
        num_checked = min(spans.num_tokens, CHECKED_TOKENS)
        for row in {0, spans.num_rows - 1}:
            end = (row + 1) * spans.num_tokens
            table = self._tables[0][row]
            k, v = (gather(cache, table, spans.context).cpu() for cache in (self._cache.k, self._cache.v))
            q = self._q[end - num_checked : end].float().cpu()
            expected.append(attend_row(q, k, v, self._heads.scale))
            found.append(self._out[end - num_checked : end].cpu())
        return relative_error(torch.cat(found), torch.cat(expected))


def _lengths(spans: Spans) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Where each row's tokens begin in the step, int32 [R + 1], and the rows' contexts and prompts, int32 [R]."""
    starts = np.array([0, *accumulate([spans.num_tokens] * spans.num_rows)], np.int32)
    contexts = np.full(spans.num_rows, spans.context, np.int32)
    return starts, contexts, contexts * (not spans.is_decode)
