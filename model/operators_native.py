"""The operators of model/operators.py by the C kernels of model/native.

It checks shapes and types, for the kernels trust their pointers; it does not know how they compute.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.attention.base import AttentionPlan, Layout
from model.kv_cache import KVCache
from model.native.library import Kernels
from model.operators import Operators

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int


class _Rotation(ctypes.Structure):
    """The C struct `Rotation` of rowwise.h, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "cosines", "sines", "positions", "q")),
        *((name, _POINTER) for name in ("k_cache", "v_cache", "blocks", "offsets")),
        *((name, _INT) for name in ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "block_size")),
    )


class NativeOperators:
    """The kernels for one dtype."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        library = kernels.library
        self._dtype = dtype
        self._is_bf16 = dtype is torch.bfloat16
        self._rms_norm, self._rotate = library.quire_rms_norm, library.quire_rotate
        self._rms_norm.argtypes = (_POINTER, _POINTER, _POINTER, _INT, _INT, ctypes.c_float, _INT, _INT)
        self._rotate.argtypes = (ctypes.POINTER(_Rotation), _INT, _INT)
        self._rms_norm.restype = self._rotate.restype = None

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, epsilon: float) -> Tensor:
        """See model.operators.rms_norm."""
        num_tokens, width = x_TE.shape
        assert weight_E.shape == (width,)
        self._check(x_TE, weight_E)
        y_TE = torch.empty_like(x_TE)
        threads = torch.get_num_threads()
        pointers = (x_TE.data_ptr(), weight_E.data_ptr(), y_TE.data_ptr())
        self._rms_norm(*pointers, num_tokens, width, epsilon, self._is_bf16, threads)
        return y_TE

    def rotate_and_write(
        self, qkv_TND: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache, layer: int, plan: AttentionPlan
    ) -> Tensor:
        """See model.operators.rotate_and_write."""
        cos_T1D, signed_sin_T1D = rotation
        k_cache, v_cache = cache.k[layer], cache.v[layer]
        num_tokens, num_all_heads, head_dim = qkv_TND.shape
        num_heads = num_all_heads - 2 * cache.num_kv_heads
        assert num_heads > 0 and cache.head_dim == head_dim and head_dim % 2 == 0
        assert cache.layout is Layout.DOTS
        self._check(qkv_TND, k_cache, v_cache)
        for table in rotation:
            assert table.dtype is torch.float32 and table.shape == (num_tokens, 1, head_dim) and table.is_contiguous()
        for places in (plan.write_blocks_T, plan.write_offsets_T):
            assert places.dtype is torch.int64 and places.shape == (num_tokens,) and places.is_contiguous()
        q_THD = qkv_TND.new_empty(num_tokens, num_heads, head_dim)
        work = _Rotation(
            *(tensor.data_ptr() for tensor in (qkv_TND, cos_T1D, signed_sin_T1D)),
            None,
            *(tensor.data_ptr() for tensor in (q_THD, k_cache, v_cache, plan.write_blocks_T, plan.write_offsets_T)),
            *(num_tokens, num_heads, cache.num_kv_heads, head_dim, cache.block_size),
        )
        self._rotate(work, self._is_bf16, torch.get_num_threads())
        return q_THD

    def _check(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            assert tensor.dtype is self._dtype and tensor.is_contiguous()


def load(kernels: Kernels, dtype: torch.dtype) -> Operators:
    """The kernels as operators. Raises ValueError for a dtype that they do not take."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"native operators take bfloat16 and float32, not {dtype}")
    native = NativeOperators(kernels, dtype)
    return Operators(native.rms_norm, native.rotate_and_write)
