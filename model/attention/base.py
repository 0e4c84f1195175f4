"""What an attention backend is: a plan of one step, one method, and a dict of names.

This module does not know how any backend computes. `reference` is the specification; every other backend must equal it.

A row of one step brings the tokens [query_starts[r], query_starts[r + 1]) and sees the positions [0, context_lens[r]),
which lie in the blocks that its table names, block_size positions in each:

    position       0 ........... bs | bs ........ 2 bs | 2 bs ..... context_len
    block table    block_tables[r,0]  block_tables[r,1]  block_tables[r,2]
    queries                                     |<- the row's tokens -->|       the last token is at context_len - 1

Shape letters: T tokens of the step, R rows, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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

    def attend(self, q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        """Returns softmax(scale * q k^T) v for every token and query head: [T, H, D] in the dtype of `q_THD`.

        `k_cache` and `v_cache` are [num_blocks, K, block_size, D]; the step's own keys and values are in them already.
        H is a multiple of K: query heads [g * H / K, (g + 1) * H / K) read key/value head g. The token at position p
        sees positions 0..p. The caches are not modified.
        """


def load_attention(name: str, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    """Finds a backend by name for a cache of `dtype` and `head_dim`; "auto" takes the fastest one that works here.

    Raises ValueError when the name is unknown, or the backend is not built or does not support these numbers.
    """
    if name == "auto":
        try:
            return _load("native", dtype, head_dim)
        except ValueError as reason:
            # Slow, and torch's products do not keep a row's bits apart from the load's.
            _logger.warning("attention runs on the slow reference, without the promise of equal bits: %s", reason)
            return _load("reference", dtype, head_dim)
    return _load(name, dtype, head_dim)


_logger = logging.getLogger(__name__)

_MODULES = {"native": "model.attention.native", "reference": "model.attention.reference"}


def _load(name: str, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    if name not in _MODULES:
        raise ValueError(f"unknown attention backend {name!r}: expected one of {['auto', *_MODULES]}")
    load: Callable[[torch.dtype, int], AttentionBackend] = importlib.import_module(_MODULES[name]).load
    return load(dtype, head_dim)
