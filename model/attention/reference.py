"""Attention that is slow and obvious: the specification that every other backend is tested against.

It gathers each row's keys and values by the block table, and computes one query head at a time in float32 with an
explicit causal mask. It knows nothing about speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.base import AttentionPlan, Layout


class ReferenceAttention:
    """Any dtype, any head size, any block size."""

    name = "reference"
    layout = Layout.PLAIN

    def attend(self, q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        out_THD = torch.empty_like(q_THD)
        starts = plan.query_starts.tolist()
        for row, context_len in enumerate(plan.context_lens.tolist()):
            tokens = slice(starts[row], starts[row + 1])
            k_SKD = gather(k_cache, plan.block_tables[row], context_len)
            v_SKD = gather(v_cache, plan.block_tables[row], context_len)
            out_THD[tokens] = attend_row(q_THD[tokens].float(), k_SKD, v_SKD, scale).to(q_THD.dtype)
        return out_THD


def gather(cache: Tensor, block_table: Tensor, context_len: int) -> Tensor:
    """Copies one row's positions [0, context_len) out of a cache [num_blocks, K, block_size, D]: float32 [S, K, D]."""
    block_size = cache.shape[2]
    num_blocks = -(-context_len // block_size)
    blocks = cache[block_table[:num_blocks].long()].transpose(1, 2)
    return blocks.flatten(0, 1)[:context_len].float()


def attend_row(q_QHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, scale: float) -> Tensor:
    """Attention of the last Q of S positions over all S, float32 [Q, H, D] (Vaswani et al., 2017, section 3.2)."""
    num_queries, num_heads, _ = q_QHD.shape
    context_len, num_kv_heads, _ = k_SKD.shape
    query_positions = torch.arange(context_len - num_queries, context_len)
    is_future_QS = torch.arange(context_len)[None, :] > query_positions[:, None]
    out_QHD = torch.empty_like(q_QHD)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        scores_QS = scale * (q_QHD[:, head] @ k_SKD[:, kv_head].T)
        scores_QS = scores_QS.masked_fill(is_future_QS, float("-inf"))
        out_QHD[:, head] = scores_QS.softmax(dim=-1) @ v_SKD[:, kv_head]
    return out_QHD
