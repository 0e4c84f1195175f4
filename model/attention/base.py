"""What an attention backend is: a plan of one step, and one method.

This module does not know how any backend computes. `reference` is the specification; every other backend must equal it.

A row of one step brings the tokens [query_starts[r], query_starts[r + 1]) and sees the positions [0, context_lens[r]),
which lie in the blocks that its table names, block_size positions in each:

    position       0 ........... bs | bs ........ 2 bs | 2 bs ..... context_len
    block table    block_tables[r,0]  block_tables[r,1]  block_tables[r,2]
    queries                                     |<- the row's tokens -->|       the last token is at context_len - 1

Shape letters: T tokens of the step, R rows, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor


class Layout(Enum):
    """How a block's keys and values lie in memory. K key/value heads, S positions of a block, D head size."""

    PLAIN = "plain"
    """Position after position: [num_blocks, K, S, D]."""
    DOTS = "dots"
    """As dot products read them, in words of w numbers (two bfloat16, or one float32): keys [num_blocks, K, S / 16,
    D / w, 16, w], values [num_blocks, K, S / w, D, w]. See model/native/attention.h."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What a backend needs to know about one step. All tensors are on the CPU and contiguous."""

    query_starts: Tensor
    """int32 [R + 1]: the tokens of row r are [query_starts[r], query_starts[r + 1])."""
    context_lens: Tensor
    """int32 [R]: positions visible to the row's last token, that is start + num_tokens."""
    block_tables: Tensor
    """int32 [R, most blocks of any row in this step]."""
    write_blocks_T: Tensor
    """int64 [T]: the block that takes each new token's keys and values."""
    write_offsets_T: Tensor
    """int64 [T]: the position within that block."""


class AttentionBackend(Protocol):
    """Causal attention of a ragged step over the paged cache of one layer."""

    name: str
    layout: Layout
    """How the cache must lie in memory."""

    def attend(self, q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        """Returns softmax(scale * q k^T) v for every token and query head: [T, H, D] in the dtype of `q_THD`.

        `k_cache` and `v_cache` are one layer's of a KVCache of this layout; the step's own are in them already.
        H is a multiple of K: query heads [g * H / K, (g + 1) * H / K) read key/value head g. The token at position p
        sees positions 0..p. The caches are not modified.
        """
