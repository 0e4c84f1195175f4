"""Matrix products by the C kernels of model/native: packed once, and the same bits at any load by construction.

The layout of a packed weight and the promise of equal bits are written at the top of model/native/matrix.h. Shape
letters: M rows, I inputs, O outputs, F outputs of each half of a gated matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from model.huge_pages import HugePages
from model.native.library import Kernels
from model.native.limits import check_inputs
from model.quantize import Coded, encode

WORD_BYTES = 4
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
ROWS_AT_ONCE = 4096
MAX_ESCAPED_SHARE = 0.1
"""Of a matrix's groups; with more, keeping them beside the others saves too little."""


class Numbers(IntEnum):
    """What a packed matrix holds: the C enum of matrix.h."""

    FLOATS = 0
    BF16S = 1
    CODES = 2
    SHORT_BF16S = 3


class Matrix(ctypes.Structure):
    """The C struct `Matrix` of matrix.h, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in ("words", "bias", "scales", "offsets")),
        *((name, _POINTER) for name in ("palettes", "escape_starts", "escapes", "escaped")),
        *((name, _INT) for name in ("num_outputs", "num_words", "numbers", "is_gated")),
    )


class _Shortening(ctypes.Structure):
    """The C struct `Shortening` of shorts.h, field by field."""

    _fields_ = (
        ("words", _POINTER),
        *((name, _INT) for name in ("num_tiles", "num_words")),
        *((name, _POINTER) for name in ("palettes", "num_escapes", "escape_starts", "escapes", "escaped", "groups")),
    )


class PackedWords(NamedTuple):
    """A packed matrix: plain words, or groups of bfloat16 in 12 bits and what else model/native/shorts.h says."""

    words: Tensor
    palettes: Tensor | None = None
    escape_starts: Tensor | None = None
    escapes: Tensor | None = None
    escaped: Tensor | None = None


class NativeLinears:
    """Packs matrices with inputs and results of one dtype: as they are, in 12 bits without loss, or in 8-bit codes."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype, *, has_codes: bool = False) -> None:
        """Raises ValueError for a dtype that the kernels do not take."""
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"native linears take bfloat16 and float32, not {dtype}")
        library = kernels.library
        self.dtype = dtype
        self.level = kernels.level
        self.has_codes = has_codes
        self.tile: int = library.quire_tile()
        self.row_words: int = library.quire_row_words()
        self.code_offset: int = library.quire_code_offset()
        self.shortens = bool(library.quire_has_shorts()) and dtype is torch.bfloat16 and not has_codes
        """Whether bfloat16 is kept in 12 bits, where that can be and saves room; see model/native/shorts.h."""
        self.short_palette: int = library.quire_short_palette()
        self.group_words: int = library.quire_group_words()
        self.group_bytes: int = library.quire_group_bytes()
        self.memory = HugePages()
        self.multiply = library.quire_multiply
        self.multiply.argtypes = (ctypes.POINTER(Matrix), *(_POINTER,) * 5, *(_INT,) * 5)
        self._choose_palettes, self._shorten = library.quire_choose_palettes, library.quire_shorten
        self._choose_palettes.argtypes = self._shorten.argtypes = (ctypes.POINTER(_Shortening), _INT)
        self.multiply.restype = self._choose_palettes.restype = self._shorten.restype = None

    def pack(
        self, weight_OI: Tensor, bias_O: Tensor | None = None, *, is_gated: bool = False, keeps_float32: bool = False
    ) -> NativeLinear:
        """Packs one matrix. The weight may be released afterwards.

        A gated one [2 F, I] holds gate and up, one after the other, and gives silu(gate) * up [M, F]. `keeps_float32`:
        results are not rounded to the dtype.
        """
        return NativeLinear(self, weight_OI, bias_O, is_gated, keeps_float32)

    def pack_rows(self, rows_OI: Tensor) -> PackedWords:
        """Whole tiles of rows, in 12 bits where this `shortens`, they have whole groups and few escapes."""
        zeros = torch.zeros if self.shortens else self.memory.zeros
        words_TWO = pack_words(rows_OI, self.tile, self.row_words, zeros)
        if not self.shortens:
            return PackedWords(words_TWO)
        short = self._pack_short(words_TWO)
        return short or PackedWords(self.memory.zeros(*words_TWO.shape, dtype=torch.int32).copy_(words_TWO))

    def _pack_short(self, words_TWO: Tensor) -> PackedWords | None:
        """The same numbers in 12 bits each; None where that would not save much, or rows are not of whole groups."""
        num_tiles, per_row, _ = words_TWO.shape
        if per_row % self.group_words:
            return None
        num_groups, num_threads = per_row // self.group_words, torch.get_num_threads()
        palettes = torch.empty(num_tiles, self.short_palette, dtype=torch.uint8)
        num_escapes = torch.empty(num_tiles, dtype=torch.int32)
        work = _Shortening(words_TWO.data_ptr(), num_tiles, per_row, palettes.data_ptr(), num_escapes.data_ptr())
        self._choose_palettes(work, num_threads)
        num_escaped = int(num_escapes.sum())
        if num_escaped > MAX_ESCAPED_SHARE * num_tiles * num_groups:
            return None
        # Each tile's list has an end beside its escapes.
        starts = (num_escapes + 1).cumsum(0, dtype=torch.int32) - num_escapes - 1
        escapes = torch.empty(num_escaped + num_tiles, dtype=torch.int32)
        # One at least: the kernels step through it from its address, which an empty tensor has not.
        escaped = torch.empty(max(1, num_escaped), self.group_words, self.tile, dtype=torch.int32)
        groups = self.memory.zeros(num_tiles, num_groups, self.group_bytes, dtype=torch.uint8)
        work.escape_starts, work.escapes = starts.data_ptr(), escapes.data_ptr()
        work.escaped, work.groups = escaped.data_ptr(), groups.data_ptr()
        self._shorten(work, num_threads)
        return PackedWords(groups, palettes, starts, escapes, escaped)


class NativeLinear:
    """One packed matrix."""

    def __init__(
        self, linears: NativeLinears, weight_OI: Tensor, bias_O: Tensor | None, is_gated: bool, keeps_float32: bool
    ) -> None:
        assert weight_OI.dtype is linears.dtype
        self._linears = linears
        self._result_dtype = torch.float32 if keeps_float32 else linears.dtype
        num_outputs, self._num_inputs = weight_OI.shape
        check_inputs(self._num_inputs, str(linears.dtype).removeprefix("torch."), linears.has_codes, linears.level)
        half = linears.tile // 2 if is_gated else None
        self._bias = _in_tiles(weight_OI.new_zeros(num_outputs) if bias_O is None else bias_O, linears.tile, half)
        self._bias = self._bias.float()
        self._scales = self._offsets = None
        if linears.has_codes:
            codes_OI, scales_O = _encode_in_parts(weight_OI)
            rows_OI = _in_tiles(codes_OI, linears.tile, half)
            self._scales = _in_tiles(scales_O, linears.tile, half)
            sums_O = codes_OI.sum(1, dtype=torch.int32)
            self._offsets = _in_tiles(linears.code_offset * sums_O, linears.tile, half)
        else:
            rows_OI = _in_tiles(weight_OI, linears.tile, half)
        self.packed = linears.pack_rows(rows_OI)
        """Kept alive for `struct`, which has the addresses."""
        numbers = Numbers.CODES if linears.has_codes else _NUMBERS[linears.dtype]
        if self.packed.palettes is not None:
            numbers = Numbers.SHORT_BF16S
        self._num_outputs = num_outputs // 2 if is_gated else num_outputs
        words, *of_shorts = map(_pointer, self.packed)
        self.struct = Matrix(
            *(words, *map(_pointer, (self._bias, self._scales, self._offsets)), *of_shorts),
            *(self._num_outputs, words_per_row(rows_OI), numbers, is_gated),
        )
        """For the kernels; it lives as long as this object."""

    @property
    def num_bytes(self) -> int:
        """Memory that the packed matrix takes."""
        tensors = (*self.packed, self._bias, self._scales, self._offsets)
        return sum(one.nbytes for one in tensors if one is not None)

    def __call__(self, x_MI: Tensor, residual_MO: Tensor | None = None) -> Tensor:
        """See model.linear.Linear."""
        linears, (num_rows, num_inputs) = self._linears, x_MI.shape
        assert num_inputs == self._num_inputs and x_MI.dtype is linears.dtype and x_MI.is_contiguous()
        y_MO = x_MI.new_empty(num_rows, self._num_outputs, dtype=self._result_dtype)
        if residual_MO is not None:
            assert residual_MO.shape == y_MO.shape and residual_MO.dtype is y_MO.dtype and residual_MO.is_contiguous()
        codes = scales = None
        num_words = self.struct.num_words
        if linears.has_codes:
            codes = torch.empty(num_rows, num_words * WORD_BYTES, dtype=torch.uint8)
            scales = torch.empty(num_rows)
        elif num_inputs * x_MI.itemsize != num_words * WORD_BYTES:
            x_MI = torch.nn.functional.pad(x_MI, (0, 1))
        pointers = (_pointer(tensor) for tensor in (x_MI, residual_MO, y_MO, codes, scales))
        types = (linears.dtype is torch.bfloat16, y_MO.dtype is torch.bfloat16)
        linears.multiply(self.struct, *pointers, num_rows, num_inputs, *types, torch.get_num_threads())
        return y_MO


_NUMBERS = {torch.float32: Numbers.FLOATS, torch.bfloat16: Numbers.BF16S}


def _encode_in_parts(weight_OI: Tensor) -> Coded:
    """Codes of some rows at a time, which are not in need of each other: on the way they take four bytes a number."""
    parts = [encode(weight_OI[row : row + ROWS_AT_ONCE]) for row in range(0, len(weight_OI), ROWS_AT_ONCE)]
    return Coded(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _in_tiles(outputs: Tensor, tile: int, half: int | None) -> Tensor:
    """Rows in the order in which tiles hold them, filled up with zeros to whole tiles.

    Those of a gated matrix alternate: `half` rows of the gate, then the same rows of the other.
    """
    parts = [outputs] if half is None else list(outputs.chunk(2))
    padded = [torch.nn.functional.pad(part, _padding(part, half or tile)) for part in parts]
    if half is None:
        return padded[0].contiguous()
    gate, up = (part.view(-1, half, *part.shape[1:]) for part in padded)
    return torch.cat((gate, up), dim=1).flatten(0, 1)


def _padding(rows: Tensor, multiple: int) -> tuple[int, ...]:
    """For `pad`, which counts dimensions from the last: zeros behind the first dimension."""
    return (*(0, 0) * (rows.dim() - 1), 0, -len(rows) % multiple)


def words_per_row(rows_OI: Tensor) -> int:
    """Words of each row: the last one may be filled up."""
    return -(-rows_OI.shape[1] * rows_OI.itemsize // WORD_BYTES)


def pack_words(rows_OI: Tensor, tile: int, row_words: int, zeros: Callable[..., Tensor]) -> Tensor:
    """Whole tiles of rows as int32 words [tiles, words of a row, tile], in memory that `zeros` gives.

    Rows are filled up with zeros to multiples of `row_words` whole words.
    """
    per_row = row_words * WORD_BYTES // rows_OI.itemsize
    padded_OI = torch.nn.functional.pad(rows_OI, (0, -rows_OI.shape[1] % per_row))
    words_TOW = padded_OI.contiguous().view(torch.int32).view(len(rows_OI) // tile, tile, -1)
    packed_TWO = zeros(words_TOW.shape[0], words_TOW.shape[2], tile, dtype=torch.int32)
    return packed_TWO.copy_(words_TOW.transpose(1, 2))
