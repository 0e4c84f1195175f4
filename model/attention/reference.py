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

    def attend(
        self,
        q_THD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: AttentionPlan,
        scale: float,
        *,
        window: int | None = None,
        soft_cap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """As AttentionBackend.attend; for the options see `attend_row`."""
        out_THD = torch.empty_like(q_THD)
        starts = plan.query_starts.tolist()
        for row, context_len in enumerate(plan.context_lens.tolist()):
            tokens = slice(starts[row], starts[row + 1])
            k_SKD = gather(k_cache, plan.block_tables[row], context_len)
            v_SKD = gather(v_cache, plan.block_tables[row], context_len)
            out_QHD = attend_row(
                q_THD[tokens].float(), k_SKD, v_SKD, scale, window=window, soft_cap=soft_cap, sinks_H=sinks_H
            )
            out_THD[tokens] = out_QHD.to(q_THD.dtype)
        return out_THD


def gather(cache: Tensor, block_table: Tensor, context_len: int) -> Tensor:
    """Copies one row's positions [0, context_len) out of a cache [num_blocks, K, block_size, D]: float32 [S, K, D]."""
    block_size = cache.shape[2]
    num_blocks = -(-context_len // block_size)
    blocks = cache[block_table[:num_blocks].long()].transpose(1, 2)
    return blocks.flatten(0, 1)[:context_len].float()


def attend_row(
    q_QHD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of the last Q of S positions over all S, float32 [Q, H, D] (Vaswani et al., 2017, section 3.2).

    A token sees `window` positions, its own with them. A score s becomes soft_cap * tanh(s / soft_cap). A sink is one
    more score of each head, which takes its share of the weights and has no value.
    """
    num_queries, num_heads, _ = q_QHD.shape
    context_len, num_kv_heads, _ = k_SKD.shape
    query_positions = torch.arange(context_len - num_queries, context_len)
    is_hidden_QS = torch.arange(context_len)[None, :] > query_positions[:, None]
    if window is not None:
        is_hidden_QS |= torch.arange(context_len)[None, :] <= query_positions[:, None] - window
    out_QHD = torch.empty_like(q_QHD)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        scores_QS = scale * (q_QHD[:, head] @ k_SKD[:, kv_head].T)
        if soft_cap:
            scores_QS = soft_cap * torch.tanh(scores_QS / soft_cap)
        scores_QS = scores_QS.masked_fill(is_hidden_QS, float("-inf"))
        if sinks_H is not None:
            scores_QS = torch.cat([scores_QS, sinks_H[head].float().expand(num_queries, 1)], dim=-1)
        out_QHD[:, head] = scores_QS.softmax(dim=-1)[:, :context_len] @ v_SKD[:, kv_head]
    return out_QHD
