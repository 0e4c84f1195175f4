"""Matrix products on a card in Triton, whose rows' bits do not depend on the number of rows: x W^T + b.

It owns the kernel and the choice of its tiles. It does not know what the matrices are for, nor libraries.

Every result is summed in float32 over its inputs from the first to the last, the same number of them at a time, by one
program: nothing splits the inputs. So a row's bits depend on its own numbers, the weight and the bias, and on how the
multiplying instruction adds up within its 16 inputs. That is one way for tiles of 64 rows and more (wgmma, at compute
capability 9.0); a tile of 16 rows goes by mma.sync there, which need not be the same. Who uses sets of tiles of both
kinds tries whether they agree (model/gpu/products.py); ONE_TILE holds by construction.

Programs that share rows of the weight run beside one another, so that it is read from memory once:

    program       0  1  2 .. | 8 ..         rows of a group of GROUP_ROWS tiles run first, then the next outputs
    rows          0  1  2    |
    outputs       0  0  0    | 1

    M rows      O outputs      I inputs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from model.gpu.operators import ALIGNMENT_BYTES, IS_INTERPRETED, narrow, widen
from model.gpu.variant import Variant

BLOCK_INPUTS = {2: 128, 4: 32}
"""Inputs of a step of the sum, by the bytes of one.

Of bfloat16, two lines of memory of each row, so that few steps keep enough of it on its way; float32 goes without
tensor cores, and more would not find registers.
"""
GROUP_ROWS = 8
MIN_PROGRAMS = 128
"""As many as a large card has multiprocessors, about; a tile that gives fewer leaves some without work."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes, and how."""

    num_rows: int
    num_outputs: int
    num_warps: int
    num_stages: int
    min_rows: int
    """From how many rows on it is worth its rows that are padding."""

    @property
    def shared_bytes(self) -> int:
        """Of a block, at most: in each stage but one, rows of both factors, of the type that takes more.

        With wgmma in all stages; a card of 9.0, which has it, has room for each of the tiles below.
        """
        row_bytes = max(size * num_inputs for size, num_inputs in BLOCK_INPUTS.items())
        return (self.num_stages - 1) * (self.num_rows + self.num_outputs) * row_bytes


LARGE = Tile(num_rows=128, num_outputs=128, num_warps=8, num_stages=3, min_rows=65)
MIDDLE = Tile(num_rows=64, num_outputs=64, num_warps=4, num_stages=3, min_rows=33)
NARROW = Tile(num_rows=64, num_outputs=32, num_warps=4, num_stages=4, min_rows=17)
FEW = Tile(num_rows=16, num_outputs=32, num_warps=4, num_stages=6, min_rows=1)

ALL_TILES = (LARGE, MIDDLE, NARROW, FEW)
WGMMA_TILES = (LARGE, MIDDLE, NARROW)
ONE_TILE = (NARROW,)
"""Has room in any card's shared memory: of 8.0 and up, those of compute capability 8.6 and 8.9 have least, 99 KiB."""


class TiledProduct:
    """A product by tiles of one set, the largest first."""

    def __init__(self, tiles: Sequence[Tile] = ALL_TILES) -> None:
        self._tiles = tuple(tiles)

    def __call__(self, x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_MO: Tensor) -> None:
        """out = x W^T + b, rounded once to the dtype of `out_MO`, float32 or that of the others.

        `x_MI`, `weight_OI` and `bias_O` have one dtype, bfloat16 or float32. All are contiguous and begin at multiples
        of 16 bytes. There is at least one row.
        """
        (num_rows, num_inputs), num_outputs = x_MI.shape, weight_OI.shape[0]
        assert weight_OI.shape[1] == num_inputs and out_MO.shape == (num_rows, num_outputs)
        for tensor in (x_MI, weight_OI, bias_O, out_MO):
            assert tensor is None or tensor.is_contiguous(), "buffers are contiguous"
            assert tensor is None or tensor.data_ptr() % ALIGNMENT_BYTES == 0, "buffers are aligned"
        tile = tile_for(self._tiles, num_rows, num_outputs)
        grid = triton.cdiv(num_rows, tile.num_rows) * triton.cdiv(num_outputs, tile.num_outputs)
        _product_kernel[(grid,)](
            x_MI,
            weight_OI,
            bias_O,
            out_MO,
            num_rows,
            **_constants_of(tile, num_outputs, num_inputs, x_MI.element_size()),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def tile_for(tiles: Sequence[Tile], num_rows: int, num_outputs: int) -> Tile:
    """The first of some tiles that is worth it and gives all of a card work; the last one otherwise."""
    for tile in tiles[:-1]:
        num_programs = triton.cdiv(num_rows, tile.num_rows) * triton.cdiv(num_outputs, tile.num_outputs)
        if num_rows >= tile.min_rows and num_programs >= MIN_PROGRAMS:
            return tile
    return tiles[-1]


def tiles_within(tiles: Sequence[Tile], shared_bytes: int) -> tuple[Tile, ...]:
    """Those that have room in a block's shared memory."""
    return tuple(tile for tile in tiles if tile.shared_bytes <= shared_bytes)


def _constants_of(tile: Tile, num_outputs: int, num_inputs: int, element_bytes: int) -> dict[str, Any]:
    return {
        "O": num_outputs,
        "I": num_inputs,
        "BLOCK_M": tile.num_rows,
        "BLOCK_O": tile.num_outputs,
        "BLOCK_I": BLOCK_INPUTS[element_bytes],
        "GROUP": GROUP_ROWS,
    }


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    O: tl.constexpr,  # noqa: E741
    I: tl.constexpr,  # noqa: E741
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program a tile of rows and outputs."""
    num_tiles_O: tl.constexpr = tl.cdiv(O, BLOCK_O)
    program = tl.program_id(0)
    first_tile = program // (GROUP * num_tiles_O) * GROUP
    num_in_group = tl.minimum(tl.cdiv(num_rows, BLOCK_M) - first_tile, GROUP)
    in_group = program % (GROUP * num_tiles_O)
    first_row = (first_tile + in_group % num_in_group) * BLOCK_M
    first_output = in_group // num_in_group * BLOCK_O

    # Rows and outputs that are not there are not read either: padding costs no memory's time.
    row_M, output_O, input_I = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I)
    is_row_M = row_M < num_rows - first_row
    is_output_O = output_O < O - first_output
    x_ptrs = x_ptr + first_row.to(tl.int64) * I + row_M[:, None] * I + input_I[None, :]
    weight_ptrs = weight_ptr + first_output.to(tl.int64) * I + output_O[:, None] * I + input_I[None, :]
    acc_MO = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for start in tl.range(0, I, BLOCK_I):
        is_x, is_weight = is_row_M[:, None], is_output_O[:, None]
        if I % BLOCK_I:
            is_input = (input_I < I - start)[None, :]
            is_x, is_weight = is_x & is_input, is_weight & is_input
        x_MI = tl.load(x_ptrs + start, mask=is_x, other=0.0)
        if O % BLOCK_O or I % BLOCK_I:
            weight_OI = tl.load(weight_ptrs + start, mask=is_weight, other=0.0)
        else:
            weight_OI = tl.load(weight_ptrs + start)
        if IS_INTERPRETED:  # whose products of bfloat16 are wrong
            x_MI, weight_OI = widen(x_MI), widen(weight_OI)
        acc_MO = tl.dot(x_MI, tl.trans(weight_OI), acc_MO, input_precision="ieee")

    if bias_ptr is not None:
        acc_MO += widen(tl.load(bias_ptr + first_output + output_O, mask=is_output_O, other=0.0))[None, :]
    out_ptrs = out_ptr + first_row.to(tl.int64) * O + first_output + row_M[:, None] * O + output_O[None, :]
    tl.store(out_ptrs, narrow(acc_MO, out_ptr.dtype.element_ty), mask=is_row_M[:, None] & is_output_O[None, :])


def variants() -> list[Variant]:
    """The matrices of Llama 3.1 8B and 3.2 1B by each tile, logits in float32, and what is ragged or float32."""
    shapes = {"qkv 8b": (6144, 4096), "down 8b": (4096, 14336), "gate_up 8b": (28672, 4096), "down 1b": (2048, 8192)}
    listed = []
    for name, tile in {"large": LARGE, "middle": MIDDLE, "narrow": NARROW, "few": FEW}.items():
        listed += [_variant(f"product {matrix} {name}", tile, *shape) for matrix, shape in shapes.items()]
        listed += [
            _variant(f"product logits {name}", tile, 128256, 4096, out="*fp32"),
            _variant(f"product ragged, bias {name}", tile, 1000, 1000, has_bias=True),
            _variant(f"product float32 {name}", tile, 4096, 4096, dtype="*fp32", out="*fp32"),
        ]
    return listed


def _variant(
    name: str,
    tile: Tile,
    num_outputs: int,
    num_inputs: int,
    *,
    dtype: str = "*bf16",
    out: str = "*bf16",
    has_bias: bool = False,
) -> Variant:
    tensors = {"x_ptr": dtype, "weight_ptr": dtype, "out_ptr": out} | ({"bias_ptr": dtype} if has_bias else {})
    constants = _constants_of(tile, num_outputs, num_inputs, element_bytes=2 if dtype == "*bf16" else 4)
    return Variant(
        name,
        _product_kernel,
        tensors | {"num_rows": "i32"},
        constants | ({} if has_bias else {"bias_ptr": None}),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        uses_wgmma=tile.num_rows >= 64 and dtype == "*bf16",
        aligned=tuple(tensors),
    )
