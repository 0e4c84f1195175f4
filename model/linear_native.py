"""Matrix products by the C kernel of model/native/linear.c: packed once, and the same bits at any load by construction.

The layout of a packed weight and the promise of equal bits are written at the top of the C file. Shape letters: M rows,
I inputs, O outputs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from model.huge_pages import HugePages
from model.native.library import open_library

CACHE_BYTES = 24 << 20
"""Weights of all matrices together that a last-level cache may be expected to keep from one step to the next."""


class _Matrix(ctypes.Structure):
    """The C struct `Matrix` of linear.c, field by field."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("num_outputs", "num_words", "is_bf16")),
    )


class NativeLinears:
    """Packs matrices of one dtype; `level` names the instruction set in use.

    `is_cached` says whether all of them are small enough together to stay in a cache.
    """

    def __init__(self, dtype: torch.dtype, level: str | None = None) -> None:
        """Opens the kernel, at the given level of model/native/levels.py or the fastest one.

        Raises ValueError for a dtype that it does not take, or when it is not built or cannot run here.
        """
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"native linears take bfloat16 and float32, not {dtype}")
        library, found = open_library("linear", level)
        self.level = found.name
        self.tile: int = library.quire_linear_tile()
        self.dtype = dtype
        self.memory = HugePages()
        self.is_cached = True
        self._num_bytes = 0
        self.widens = dtype is torch.bfloat16 and bool(library.quire_linear_widens())
        self.multiply = library.quire_linear
        self.multiply.argtypes = (ctypes.POINTER(_Matrix), *(ctypes.c_void_p,) * 3, *(ctypes.c_int,) * 3)
        self.multiply.restype = None

    def pack(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> NativeLinear:
        """Packs one matrix. The weight may be released afterwards."""
        self._num_bytes += weight_OI.nbytes
        self.is_cached = self._num_bytes <= CACHE_BYTES
        return NativeLinear(self, weight_OI, bias_O)


class NativeLinear:
    """One packed matrix."""

    def __init__(self, kernel: NativeLinears, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        assert weight_OI.dtype is kernel.dtype
        self._kernel = kernel
        self._num_outputs, self._num_inputs = weight_OI.shape
        self._words = pack_words(weight_OI, kernel.tile, kernel.memory)
        num_tiles, num_words, _ = self._words.shape
        self._bias = torch.zeros(num_tiles * kernel.tile)
        if bias_O is not None:
            self._bias[: self._num_outputs] = bias_O
        sizes = (self._num_outputs, num_words, kernel.dtype is torch.bfloat16)
        self._matrix = _Matrix(self._words.data_ptr(), self._bias.data_ptr(), *sizes)

    def __call__(self, x_MI: Tensor, residual_MO: Tensor | None = None) -> Tensor:
        """See model.linear.Linear."""
        kernel, (num_rows, num_inputs) = self._kernel, x_MI.shape
        assert num_inputs == self._num_inputs and x_MI.dtype is kernel.dtype and x_MI.is_contiguous()
        y_MO = x_MI.new_empty(num_rows, self._num_outputs)
        residual = None
        if residual_MO is not None:
            assert residual_MO.shape == y_MO.shape and residual_MO.dtype is kernel.dtype and residual_MO.is_contiguous()
            residual = residual_MO.data_ptr()
        if kernel.dtype is torch.bfloat16 and num_inputs % 2:
            x_MI = functional.pad(x_MI, (0, 1))
        if kernel.widens:
            x_MI = x_MI.float()
        pointers = (x_MI.data_ptr(), residual, y_MO.data_ptr())
        kernel.multiply(self._matrix, *pointers, num_rows, kernel.is_cached, torch.get_num_threads())
        return y_MO


def pack_words(weight_OI: Tensor, tile: int, memory: HugePages) -> Tensor:
    """The weight as int32 words [tiles, words of a row, tile]: float32 each, or bfloat16 pairs; padded with zeros."""
    num_outputs, num_inputs = weight_OI.shape
    per_word = 4 // weight_OI.itemsize
    if num_inputs % per_word:
        weight_OI = functional.pad(weight_OI, (0, 1))
    words_OW = weight_OI.contiguous().view(torch.int32)
    num_tiles, num_words = -(-num_outputs // tile), words_OW.shape[1]
    packed_TWO = memory.zeros(num_tiles, num_words, tile, dtype=torch.int32)
    num_whole = num_outputs // tile
    packed_TWO[:num_whole] = words_OW[: num_whole * tile].view(num_whole, tile, num_words).transpose(1, 2)
    if num_whole < num_tiles:
        rest_OW = words_OW[num_whole * tile :]
        packed_TWO[num_whole, :, : rest_OW.shape[0]] = rest_OW.T
    return packed_TWO
