"""The paged keys and values of all layers, and how large a pool a budget buys.

It owns the memory and does not know which sequence has which block: that is the scheduler's. Shape letters: T tokens,
K key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.base import AttentionPlan, Layout
from model.config import ModelConfig
from model.huge_pages import HugePages
from model.interface import Dtype
from model.native.limits import GROUP, check_block_size

WORD_BYTES = 4


class KVCache:
    """Keys and values of each layer, zero at first.

    A released block keeps its old content; its next owner writes a position before any row sees it.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        layout: Layout = Layout.PLAIN,
    ) -> None:
        """Raises ValueError when there is no memory for so many blocks, or the layout does not take their size."""
        if layout is Layout.DOTS:
            check_block_size(block_size)
        self.layout = layout
        self.block_size = block_size
        self.num_kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        k_shape: tuple[int, ...] = (block_size, self.head_dim)
        v_shape = k_shape
        self._per_word = WORD_BYTES // dtype.itemsize
        if layout is Layout.DOTS:
            k_shape = (block_size // GROUP, self.head_dim // self._per_word, GROUP, self._per_word)
            v_shape = (block_size // self._per_word, self.head_dim, self._per_word)
        memory, heads = HugePages(), (num_blocks, self.num_kv_heads)
        try:
            self.k = [memory.zeros(*heads, *k_shape, dtype=dtype) for _ in range(config.num_layers)]
            self.v = [memory.zeros(*heads, *v_shape, dtype=dtype) for _ in range(config.num_layers)]
        except ValueError:
            raise ValueError(f"no memory for a key/value cache of {num_blocks} blocks") from None

    def write(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, plan: AttentionPlan) -> None:
        """Stores the step's new keys and values at the places that the plan names."""
        blocks_T, offsets_T = plan.write_blocks_T, plan.write_offsets_T
        if self.layout is Layout.PLAIN:
            self.k[layer][blocks_T, :, offsets_T] = k_TKD
            self.v[layer][blocks_T, :, offsets_T] = v_TKD
            return
        words_TKWN = k_TKD.reshape(*k_TKD.shape[:2], -1, self._per_word)
        self.k[layer][blocks_T, :, offsets_T // GROUP, :, offsets_T % GROUP] = words_TKWN
        # The second of a pair is read, with weight zero, before it is written: it must not be a former owner's NaN.
        self.v[layer][blocks_T, :, offsets_T // self._per_word, :, self._per_word - 1] = 0
        self.v[layer][blocks_T, :, offsets_T // self._per_word, :, offsets_T % self._per_word] = v_TKD


def affordable_blocks(config: ModelConfig, budget_bytes: int, block_size: int, dtype: Dtype) -> int:
    """How many blocks fit into a budget. Raises ValueError when not even one does."""
    block_bytes = block_size * config.kv_bytes_per_token(dtype)
    if budget_bytes < block_bytes:
        raise ValueError(f"the key/value cache needs {block_bytes} bytes for one block, the budget is {budget_bytes}")
    return budget_bytes // block_bytes
