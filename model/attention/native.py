"""Attention by the C kernel of model/native: walks the block tables in place, on as many threads as torch uses.

It checks shapes and types, for the kernel trusts its pointers, and hands them over; it does not know how the kernel
computes. The layout of the cache and the promise of equal bits are written at the top of model/native/attention.c.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.attention.base import AttentionPlan
from model.native.library import open_library

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8


class _Step(ctypes.Structure):
    """The C struct `Step` of attention.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k_cache", "v_cache", "out")),
        *((name, ctypes.c_void_p) for name in ("query_starts", "context_lens", "block_tables")),
        ("table_stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("num_rows", "num_heads", "num_kv_heads", "head_dim", "block_size")),
        ("scale", ctypes.c_float),
    )


class NativeAttention:
    """Paged attention in C for one cache dtype; `level` names the instruction set in use."""

    name = "native"

    def __init__(self, dtype: torch.dtype, level: str | None = None) -> None:
        """Opens the kernel, at the given level of model/native/levels.py or the fastest one.

        Raises ValueError when it is not built or cannot run here.
        """
        library, found = open_library("attention", level)
        self.level = found.name
        self._dtype = dtype
        self._attend = library.quire_attend
        self._attend.argtypes = (ctypes.POINTER(_Step), ctypes.c_int, ctypes.c_int)
        self._attend.restype = ctypes.c_int

    def attend(self, q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        """See AttentionBackend. Raises MemoryError when the kernel gets no memory for its work list."""
        num_heads, num_kv_heads, block_size, head_dim = self._check(q_THD, k_cache, v_cache, plan)
        out_THD = torch.empty_like(q_THD)
        step = _Step(
            q_THD.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out_THD.data_ptr(),
            plan.query_starts.data_ptr(),
            plan.context_lens.data_ptr(),
            plan.block_tables.data_ptr(),
            plan.block_tables.shape[1],
            plan.context_lens.shape[0],
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            scale,
        )
        if self._attend(step, self._dtype is torch.bfloat16, torch.get_num_threads()):
            raise MemoryError("no memory for the attention work list")
        return out_THD

    def _check(self, q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> tuple[int, int, int, int]:
        """Asserts everything the kernel takes for granted that costs no look into the tensors' contents."""
        _, num_heads, head_dim = q_THD.shape
        _, num_kv_heads, block_size, cache_head_dim = k_cache.shape
        assert q_THD.dtype == k_cache.dtype == v_cache.dtype == self._dtype, "one dtype for queries and cache"
        assert k_cache.shape == v_cache.shape
        assert head_dim == cache_head_dim
        assert num_heads % num_kv_heads == 0
        assert all(tensor.is_contiguous() for tensor in (q_THD, k_cache, v_cache))
        for tensor in (plan.query_starts, plan.context_lens, plan.block_tables):
            assert tensor.dtype is torch.int32
            assert tensor.is_contiguous()
        return num_heads, num_kv_heads, block_size, head_dim


def load(dtype: torch.dtype, head_dim: int) -> NativeAttention:
    """Opens the kernel at its fastest level. Raises ValueError for a dtype or head size that it does not take."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"native attention takes bfloat16 and float32, not {dtype}")
    if head_dim % HEAD_DIM_STEP or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"native attention takes head sizes 8, 16, … {MAX_HEAD_DIM}, not {head_dim}")
    return NativeAttention(dtype)
