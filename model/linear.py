"""Matrix products whose bits do not depend on the load: a row's result is the same alone and among any others.

The compiled backend "native" adds up each result in one fixed order, so that it holds by construction. The others are
a library's: that picks its kernel by the number of rows, and kernels add up in different orders. So each is asked, on
this machine and for each shape, from which multiple of rows on all its answers agree; calls are then padded with zero
rows to that multiple. Where no multiple agrees, the rows go through in tiles of one fixed size, which is slower.

This module does not know what the matrices are for. Shape letters: M rows, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from model.interface import Quantization
from model.linear_native import NativeLinears
from model.native.library import Kernels
from model.operators import silu_mul
from model.quantize import encode, multiply

Product = Callable[[Tensor], Tensor]
"""x [M, I] to x W^T + b [M, O], same dtype, for a weight and bias that it holds."""

MULTIPLES = (1, 2, 4, 8, 16, 32)
TILE_ROWS = 32
COMMON_ROWS = 64
COMMON_MULTIPLE = 8
TEST_ROWS = 260
TEST_COUNTS = (*range(1, 10), 12, 13, 16, 23, 32, 47, 65, 100, 130, 257)
TEST_WINDOWS = 8
"""About so many calls of one row are tried, half as many of two, and so on."""
TEST_FLOPS = 5e8
"""Bounds the sample by the work of one product over all of it."""


@dataclass(frozen=True, slots=True)
class RowRule:
    """How many rows a product may be called with: a multiple of `multiple`, or exactly `tile` where that is not 0."""

    multiple: int
    tile: int = 0

    def padded(self, num_rows: int) -> int:
        """The number of rows to compute for `num_rows` wanted ones.

        Above COMMON_ROWS it grows in larger steps: the library keeps one compiled product for each number of rows, and
        prompts would bring them all.
        """
        multiple = self.multiple if num_rows <= COMMON_ROWS else math.lcm(self.multiple, COMMON_MULTIPLE)
        return -(-num_rows // multiple) * multiple


class Linear(Protocol):
    """One matrix, packed."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""

    def __call__(self, x_MI: Tensor, residual_MO: Tensor | None = None) -> Tensor:
        """residual + (x W^T + b) for M >= 1 rows: [M, O]; the product is rounded to the dtype before it is added.

        Both must be contiguous; the input from the start of its storage.
        """


class RuledLinear:
    """A product of a library, and the row rule that makes its bits independent of the load."""

    def __init__(self, product: Product, rule: RowRule, num_bytes: int = 0) -> None:
        self._product = product
        self._rule = rule
        self.num_bytes = num_bytes

    def __call__(self, x_MI: Tensor, residual_MO: Tensor | None = None) -> Tensor:
        """See Linear."""
        y_MO = self._multiply(x_MI)
        return y_MO if residual_MO is None else residual_MO + y_MO

    def _multiply(self, x_MI: Tensor) -> Tensor:
        num_rows = x_MI.shape[0]
        num_padded = self._rule.padded(num_rows)
        if num_padded != num_rows:
            x_MI = functional.pad(x_MI, (0, 0, 0, num_padded - num_rows))
        if not self._rule.tile:
            return self._product(x_MI)[:num_rows]
        # Cloned, so that every tile starts at the allocator's alignment: kernels may add up differently elsewhere.
        return torch.cat([self._product(tile.clone()) for tile in torch.split(x_MI, self._rule.tile)])[:num_rows]


class CodedLinear:
    """8-bit codes by torch's own operators, one row like another: slow, and what the compiled one must equal."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._weight = encode(weight_OI)
        self._bias_O = bias_O
        self.num_bytes = self._weight.codes.nbytes + self._weight.scales.nbytes

    def __call__(self, x_MI: Tensor, residual_MO: Tensor | None = None) -> Tensor:
        """See Linear."""
        y_MO = multiply(encode(x_MI), self._weight, self._bias_O).to(x_MI.dtype)
        return y_MO if residual_MO is None else residual_MO + y_MO


class GatedLinear:
    """Two matrices in one: silu(gate) * up of a linear whose outputs are gate and up."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self.num_bytes = linear.num_bytes

    def __call__(self, x_MI: Tensor, residual_MO: Tensor | None = None) -> Tensor:
        """See Linear; O is half of the matrix's outputs."""
        assert residual_MO is None, "nothing is added to a gated product"
        return silu_mul(self._linear(x_MI))


class LinearPacker:
    """Makes the linears of one backend; tests each shape of a library's once and remembers the rule that held."""

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        quantization: Quantization = Quantization.NONE,
        kernels: Kernels | None = None,
    ) -> None:
        """Takes "native" (compiled, needs `kernels`), "onednn" (prepacked), "plain", or "torch": the better of the two.

        Raises ValueError when the name is unknown, or the backend is not available here.
        """
        if name == "torch":
            name = "onednn" if dtype is torch.bfloat16 and _has_onednn(dtype) else "plain"
        if name != "native" and name not in _LIBRARIES:
            raise ValueError(f"unknown linear backend {name!r}: expected one of {['native', 'torch', *_LIBRARIES]}")
        if name == "onednn" and not _has_onednn(dtype):
            raise ValueError(f"linear backend 'onednn' does not compute {dtype} on this machine")
        self.name = name
        self._has_codes = quantization is Quantization.INT8
        self._native: NativeLinears | None = None
        if name == "native":
            assert kernels is not None, "native linears need the kernels"
            self._native = NativeLinears(kernels, dtype, has_codes=self._has_codes)
        self._rules: dict[tuple[int, int, bool], RowRule] = {}

    def pack(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> Linear:
        """Packs one matrix. The weight may be released afterwards."""
        if self._native is not None:
            return self._native.pack(weight_OI, bias_O)
        if self._has_codes:
            return CodedLinear(weight_OI, bias_O)
        product = _LIBRARIES[self.name](weight_OI, bias_O)
        key = (*weight_OI.shape, bias_O is not None)
        if key not in self._rules:
            self._rules[key] = find_rule(product, weight_OI, bias_O)
        return RuledLinear(product, self._rules[key], weight_OI.nbytes)

    def pack_gated(self, gate_up: Tensor, bias: Tensor | None = None) -> Linear:
        """Packs gate and up [2 F, I] to one linear that gives silu(gate) * up [M, F]."""
        if self._native is not None:
            return self._native.pack(gate_up, bias, is_gated=True)
        return GatedLinear(self.pack(gate_up, bias))

    def pack_unembedding(self, weight_VE: Tensor) -> Linear:
        """Packs the last matrix, whose results are logits: float32 that nothing has rounded, where the backend can."""
        if self._native is not None:
            return self._native.pack(weight_VE, keeps_float32=True)
        return self.pack(weight_VE)

    @property
    def num_tiled(self) -> int:
        """How many shapes fell back to tiles."""
        return sum(rule.tile > 0 for rule in self._rules.values())


def find_rule(product: Product, weight_OI: Tensor, bias_O: Tensor | None = None) -> RowRule:
    """The cheapest rule under which a product gives equal bits for every number and position of rows that is tried."""
    affordable = int(TEST_FLOPS / (2 * weight_OI.numel()))
    x_MI = cancelling_rows(weight_OI, bias_O, max(TILE_ROWS, min(TEST_ROWS, affordable)))
    for rule in _candidates():
        if holds(RuledLinear(product, rule), x_MI):
            return rule
    return RowRule(multiple=1, tile=1)  # One row at a time holds by construction: there is one shape only.


def cancelling_rows(weight_OI: Tensor, bias_O: Tensor | None, num_rows: int) -> Tensor:
    """Input rows [num_rows, I] of which each makes one output cancel to almost nothing, the outputs taken evenly.

    What is left there is the rounding of the partial sums, so that another order of addition shows. In outputs of
    ordinary size it hardly would: rounding to bfloat16 hides all but one difference in ten thousand.
    """
    num_outputs, num_inputs = weight_OI.shape
    generator = torch.Generator().manual_seed(0)
    x_MI = torch.randn(num_rows, num_inputs, generator=generator).to(weight_OI)
    targets_M = torch.arange(num_rows, device=weight_OI.device) * num_outputs // num_rows
    w_MI = weight_OI[targets_M].double()
    bias_M1 = 0.0 if bias_O is None else bias_O[targets_M].double().unsqueeze(1)
    pivots = w_MI.abs().topk(min(3, num_inputs), dim=1).indices
    for pivot_M1 in torch.split(pivots, 1, dim=1):
        rest_M1 = (x_MI.double() * w_MI).sum(1, keepdim=True) + bias_M1
        step_M1 = (rest_M1 / w_MI.gather(1, pivot_M1)).nan_to_num(0.0, 0.0, 0.0)
        x_MI.scatter_(1, pivot_M1, (x_MI.gather(1, pivot_M1).double() - step_M1).to(x_MI.dtype))
    return x_MI


def holds(linear: Product, x_MI: Tensor) -> bool:
    """Whether the rows of a sample have the same bits in calls of various sizes, wherever the call starts."""
    expected_MO = linear(x_MI)
    most = x_MI.shape[0]
    for num_rows in (count for count in (*TEST_COUNTS, most - 1) if 0 < count < most):
        for start in range(0, most - num_rows + 1, max(1, (most - num_rows) * num_rows // TEST_WINDOWS)):
            rows = slice(start, start + num_rows)
            if not torch.equal(linear(x_MI[rows].clone()), expected_MO[rows]):
                return False
    return True


def _candidates() -> Iterator[RowRule]:
    """Cheapest first. Libraries share rows out to threads, so a multiple that serves each thread comes as well."""
    threads = torch.get_num_threads()
    for multiple in sorted({*MULTIPLES, *(threads * multiple for multiple in MULTIPLES[:4])}):
        yield RowRule(multiple)
    yield RowRule(TILE_ROWS, tile=TILE_ROWS)


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack_onednn(weight_OI: Tensor, bias_O: Tensor | None) -> Product:
    """Reorders the weight once into the layout that oneDNN's kernels read."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, None)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def product(x_MI: Tensor) -> Tensor:
        y_MO: Tensor = multiply(x_MI, packed, bias_O, "none", [], "")
        return y_MO

    return product


def _pack_plain(weight_OI: Tensor, bias_O: Tensor | None) -> Product:
    """Keeps the weight as it is."""
    return lambda x_MI: functional.linear(x_MI, weight_OI, bias_O)


_LIBRARIES: dict[str, Callable[[Tensor, Tensor | None], Product]] = {"onednn": _pack_onednn, "plain": _pack_plain}
