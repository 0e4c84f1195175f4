"""The paged keys and values of all layers, and how large a pool a budget buys.

It owns the memory and does not know which sequence has which block: that is the scheduler's. Shape letters: T tokens,
K key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.base import AttentionPlan
from model.config import ModelConfig
from model.interface import Dtype


class KVCache:
    """Keys and values of each layer: [num_blocks, K, block_size, D], zero at first.

    A released block keeps its old content; its next owner writes a position before any row sees it.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        """Raises ValueError when there is no memory for so many blocks."""
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        try:
            self.k = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_layers)]
            self.v = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_layers)]
        except RuntimeError:
            raise ValueError(f"no memory for a key/value cache of {num_blocks} blocks") from None

    def write(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, plan: AttentionPlan) -> None:
        """Stores the step's new keys and values at the places that the plan names."""
        self.k[layer][plan.write_blocks_T, :, plan.write_offsets_T] = k_TKD
        self.v[layer][plan.write_blocks_T, :, plan.write_offsets_T] = v_TKD


def affordable_blocks(config: ModelConfig, budget_bytes: int, block_size: int, dtype: Dtype) -> int:
    """How many blocks fit into a budget. Raises ValueError when not even one does."""
    block_bytes = block_size * config.kv_bytes_per_token(dtype)
    if budget_bytes < block_bytes:
        raise ValueError(f"the key/value cache needs {block_bytes} bytes for one block, the budget is {budget_bytes}")
    return budget_bytes // block_bytes
