"""The operators of model/operators.py by the C kernels of model/native/rowwise.c.

It checks shapes and types, for the kernels trust their pointers; it does not know how they compute.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.attention.base import AttentionPlan
from model.kv_cache import KVCache
from model.native.library import open_library
from model.operators import Operators

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int


class _Rotation(ctypes.Structure):
    """The C struct `Rotation` of rowwise.c, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "cosines", "sines", "q", "k_cache", "v_cache", "blocks", "offsets")),
        *((name, _INT) for name in ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "block_size")),
    )


class NativeOperators:
    """The kernels for one dtype; `level` names the instruction set in use."""

    def __init__(self, dtype: torch.dtype, level: str | None = None) -> None:
        """Opens them, at the given level of model/native/levels.py or the fastest one.

        Raises ValueError when they are not built or cannot run here.
        """
        library, found = open_library("rowwise", level)
        self.level = found.name
        self._dtype = dtype
        self._is_bf16 = dtype is torch.bfloat16
        self._rms_norm, self._silu_mul, self._rotate = (
            library.quire_rms_norm,
            library.quire_silu_mul,
            library.quire_rotate,
        )
        self._rms_norm.argtypes = (_POINTER, _POINTER, _POINTER, _INT, _INT, ctypes.c_float, _INT, _INT)
        self._silu_mul.argtypes = (_POINTER, _POINTER, _INT, _INT, _INT, _INT)
        self._rotate.argtypes = (ctypes.POINTER(_Rotation), _INT, _INT)
        for function in (self._rms_norm, self._silu_mul, self._rotate):
            function.restype = None

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

    def silu_mul(self, gate_up_TF2: Tensor) -> Tensor:
        """See model.operators.silu_mul."""
        num_tokens, width = gate_up_TF2.shape
        assert width % 2 == 0
        self._check(gate_up_TF2)
        y_TF = gate_up_TF2.new_empty(num_tokens, width // 2)
        threads = torch.get_num_threads()
        self._silu_mul(gate_up_TF2.data_ptr(), y_TF.data_ptr(), num_tokens, width // 2, self._is_bf16, threads)
        return y_TF

    def rotate_and_write(
        self, qkv_TND: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache, layer: int, plan: AttentionPlan
    ) -> Tensor:
        """See model.operators.rotate_and_write."""
        cos_T1D, signed_sin_T1D = rotation
        k_cache, v_cache = cache.k[layer], cache.v[layer]
        num_tokens, num_all_heads, head_dim = qkv_TND.shape
        _, num_kv_heads, block_size, cache_head_dim = k_cache.shape
        num_heads = num_all_heads - 2 * num_kv_heads
        assert num_heads > 0 and cache_head_dim == head_dim and head_dim % 2 == 0
        assert k_cache.shape == v_cache.shape
        self._check(qkv_TND, k_cache, v_cache)
        for table in rotation:
            assert table.dtype is torch.float32 and table.shape == (num_tokens, 1, head_dim) and table.is_contiguous()
        for places in (plan.write_blocks_T, plan.write_offsets_T):
            assert places.dtype is torch.int64 and places.shape == (num_tokens,) and places.is_contiguous()
        q_THD = qkv_TND.new_empty(num_tokens, num_heads, head_dim)
        tensors = (qkv_TND, cos_T1D, signed_sin_T1D, q_THD, k_cache, v_cache, plan.write_blocks_T, plan.write_offsets_T)
        pointers = (tensor.data_ptr() for tensor in tensors)
        work = _Rotation(*pointers, num_tokens, num_heads, num_kv_heads, head_dim, block_size)
        self._rotate(work, self._is_bf16, torch.get_num_threads())
        return q_THD

    def _check(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            assert tensor.dtype is self._dtype and tensor.is_contiguous()


def load(dtype: torch.dtype, level: str | None = None) -> Operators:
    """The kernels, at the given level or their fastest one. Raises ValueError for a dtype that they do not take."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"native operators take bfloat16 and float32, not {dtype}")
    kernels = NativeOperators(dtype, level)
    return Operators(kernels.rms_norm, kernels.silu_mul, kernels.rotate_and_write)
