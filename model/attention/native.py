"""Attention by the C kernel of model/native: walks the block tables in place, on as many threads as torch uses.

It checks shapes and types, for the kernel trusts its pointers, and hands them over; it does not know how the kernel
computes. The layout of the cache and the promise of equal bits are written at the top of model/native/attention.h.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.attention.base import AttentionPlan, Layout
from model.native.library import Kernels
from model.native.limits import check_attention


class _Attention(ctypes.Structure):
    """The C struct `Attention` of attention.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k_cache", "v_cache", "out")),
        *((name, ctypes.c_void_p) for name in ("query_starts", "context_lens", "block_tables", "slots")),
        *((name, ctypes.c_void_p) for name in ("tile_rows", "tile_firsts")),
        ("table_stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("num_rows", "num_heads", "num_kv_heads", "head_dim", "block_size")),
        ("scale", ctypes.c_float),
    )


class NativeAttention:
    """Paged attention in C for one cache dtype and head size."""

    name = "native"
    layout = Layout.DOTS

    def __init__(self, kernels: Kernels, dtype: torch.dtype, head_dim: int) -> None:
        """Raises ValueError for a dtype or head size that the kernel does not take."""
        check_attention(str(dtype).removeprefix("torch."), head_dim)
        self._dtype = dtype
        self._attend = kernels.library.quire_attend
        self._attend.argtypes = (ctypes.POINTER(_Attention), ctypes.c_int, ctypes.c_int)
        self._attend.restype = None

    def attend(self, q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        """See AttentionBackend."""
        num_tokens, num_heads, head_dim = q_THD.shape
        num_kv_heads, block_size = self._check(q_THD, k_cache, v_cache, plan)
        out_THD = torch.empty_like(q_THD)
        tiles = torch.empty(2, max(1, num_tokens), dtype=torch.int32)
        work = _Attention(
            *(tensor.data_ptr() for tensor in (q_THD, k_cache, v_cache, out_THD)),
            *(tensor.data_ptr() for tensor in (plan.query_starts, plan.context_lens, plan.block_tables)),
            None,
            *(tensor.data_ptr() for tensor in tiles),
            plan.block_tables.shape[1],
            *(plan.context_lens.shape[0], num_heads, num_kv_heads, head_dim, block_size),
            scale,
        )
        self._attend(work, self._dtype is torch.bfloat16, torch.get_num_threads())
        return out_THD

    def _check(self, q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> tuple[int, int]:
        """Asserts everything the kernel takes for granted that costs no look into the tensors' contents.

        Returns the cache's key/value heads and the positions of a block.
        """
        _, num_heads, head_dim = q_THD.shape
        _, num_kv_heads, num_groups, num_words, group, per_word = k_cache.shape
        block_size = num_groups * group
        assert q_THD.dtype == k_cache.dtype == v_cache.dtype == self._dtype, "one dtype for queries and cache"
        assert v_cache.shape == (len(k_cache), num_kv_heads, block_size // per_word, head_dim, per_word)
        assert head_dim == num_words * per_word
        assert num_heads % num_kv_heads == 0
        assert all(tensor.is_contiguous() for tensor in (q_THD, k_cache, v_cache))
        for tensor in (plan.query_starts, plan.context_lens, plan.block_tables):
            assert tensor.dtype is torch.int32
            assert tensor.is_contiguous()
        return num_kv_heads, block_size
