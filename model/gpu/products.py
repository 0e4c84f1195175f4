"""Which matrix product a step uses on this card: one whose rows' bits do not depend on the number of rows.

It owns the trial at the start and what that decided for each kind of matrix. It does not know layers or steps. The
library (cuBLASLt) picks its kernel by the number of rows, and kernels add up in different orders; so it is tried, on
the card at hand, with rows whose results show the order of their sums (model/linear.py). The first that holds is taken:

    library                 as it is, without splits of the inputs
    library, padded         with rows up to a multiple, for which it may keep to one kernel
    tiles                   our own kernel (model/gpu/matmul.py) with all of its tiles that the card has room for
    tiles of wgmma          without the one that multiplies by another instruction
    one tile                which holds by construction

What was tried is many numbers of rows and not all: a library may hold for those and not for another. Whoever must not
rely on it gives the tiles alone as candidates. Nothing is timed, or answers would depend on what a clock said.

    M rows      O outputs      I inputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from model.gpu.matmul import ALL_TILES, ONE_TILE, WGMMA_TILES, TiledProduct, tiles_within
from model.linear import TEST_ROWS, cancelling_rows, holds

Product = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
"""(x [M, I], weight [O, I], bias [O] or None, out [M, O]): out = x W^T + b, rounded once to out's dtype.

That is the dtype of the others, or float32. All are contiguous and begin at multiples of 16 bytes; M >= 1.
"""

TEST_COUNTS = (17, 24, 48, 64, 96, 128, 160, 192, 224, 256, 384, 512, 777, 1024, 2048, 4096, 8192)
"""Besides those of model.linear.holds: what graphs are captured for, and what prompts bring."""
MAX_OUT_BYTES = 2**30
"""Of results in a trial, on a card that holds the weights already."""
MULTIPLES = (64, 128)
"""At 790 TFLOP/s and 4.3 TB/s, an H200's, a step is bound by its weights up to 184 rows (reckoned, not measured)."""


class Kind(NamedTuple):
    """Everything, besides the number of rows, that a product is chosen by."""

    num_outputs: int
    num_inputs: int
    has_bias: bool
    dtype: torch.dtype
    out_dtype: torch.dtype

    def __str__(self) -> str:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.out_dtype)]
        return f"[{self.num_outputs}, {self.num_inputs}]{' + bias' if self.has_bias else ''} {' to '.join(dtypes)}"


@dataclass(frozen=True, slots=True)
class Use:
    """A matrix, and how it is multiplied."""

    weight_OI: Tensor
    bias_O: Tensor | None = None
    out_dtype: torch.dtype | None = None
    """The weight's by default."""
    max_rows: int | None = None
    """Of this matrix, where it is less than of the others: logits are for the rows that want a token."""

    @property
    def kind(self) -> Kind:
        """What is tried once for all that have it."""
        return _kind_of(self.weight_OI, self.bias_O, self.out_dtype or self.weight_OI.dtype)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A product that may be chosen, by its name for the log."""

    name: str
    product: Product


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided for one kind of matrix."""

    kind: Kind
    name: str
    """Of the candidate."""
    holds: bool
    """Whether its rows had equal bits in all trials."""
    num_rows: int
    """The most that were tried."""
    refused: tuple[str, ...]
    """The candidates before it, each with the reason."""

    def __str__(self) -> str:
        """One line for the log."""
        promise = f"equal bits up to {self.num_rows} rows" if self.holds else "bits DEPEND on the number of rows"
        refused = f" (refused: {'; '.join(self.refused)})" if self.refused else ""
        return f"{self.kind}: {self.name}, {promise}{refused}"


@dataclass(frozen=True, slots=True)
class ProductReport:
    """What was decided for all matrices."""

    choices: tuple[Choice, ...]

    @property
    def holds(self) -> bool:
        """Whether no row's bits depend on the load, as far as was tried."""
        return all(choice.holds for choice in self.choices)

    def __str__(self) -> str:
        """A line for each kind."""
        return "\n".join(map(str, self.choices))


class PaddedProduct:
    """A product that is given rows up to a multiple only. Two more copies, where they are not one already."""

    def __init__(self, product: Product, multiple: int) -> None:
        self._product = product
        self._multiple = multiple

    def __call__(self, x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_MO: Tensor) -> None:
        """See Product."""
        num_rows = x_MI.shape[0]
        num_padded = -(-num_rows // self._multiple) * self._multiple
        if num_padded == num_rows:
            self._product(x_MI, weight_OI, bias_O, out_MO)
            return
        # Rows do not meet: what happens to be in the other ones is multiplied, and left.
        padded_x, padded_out = x_MI.new_empty(num_padded, x_MI.shape[1]), out_MO.new_empty(num_padded, out_MO.shape[1])
        padded_x[:num_rows].copy_(x_MI)
        self._product(padded_x, weight_OI, bias_O, padded_out)
        out_MO.copy_(padded_out[:num_rows])


class ChosenProduct:
    """The product that was chosen for each kind of matrix."""

    def __init__(self, products: dict[Kind, Product]) -> None:
        self._products = products

    def __call__(self, x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_MO: Tensor) -> None:
        """See Product. Raises KeyError for a kind that was not among the uses."""
        self._products[_kind_of(weight_OI, bias_O, out_MO.dtype)](x_MI, weight_OI, bias_O, out_MO)


def library_product(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_MO: Tensor) -> None:
    """See Product: torch's own."""
    if out_MO.dtype is x_MI.dtype:
        if bias_O is None:
            torch.mm(x_MI, weight_OI.t(), out=out_MO)
        else:
            torch.addmm(bias_O, x_MI, weight_OI.t(), out=out_MO)
        return
    if x_MI.is_cuda:
        torch.mm(x_MI, weight_OI.t(), out_dtype=out_MO.dtype, out=out_MO)
    else:  # which has no product of another dtype
        torch.mm(x_MI.to(out_MO.dtype), weight_OI.t().to(out_MO.dtype), out=out_MO)
    if bias_O is not None:
        out_MO.add_(bias_O)


def forbid_split_sums(device: torch.device) -> None:
    """Keeps the library, in all of this process, from splitting the inputs of a sum among programs.

    Only cuBLASLt can be told to: torch raises RuntimeError for products by cuBLAS once splits are forbidden.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    if device.type == "cuda":
        torch.backends.cuda.preferred_blas_library("cublaslt")


def candidates(shared_bytes: int) -> list[Candidate]:
    """All, the best first, with the tiles that have room in so much shared memory of a block."""
    return [
        Candidate("library", library_product),
        *(Candidate(f"library, rows in {many}s", PaddedProduct(library_product, many)) for many in MULTIPLES),
        Candidate("tiles", TiledProduct(tiles_within(ALL_TILES, shared_bytes))),
        Candidate("tiles of wgmma", TiledProduct(tiles_within(WGMMA_TILES, shared_bytes))),
        Candidate("one tile", TiledProduct(ONE_TILE)),
    ]


def choose_product(
    uses: Iterable[Use], max_rows: int, device: torch.device, among: Sequence[Candidate]
) -> tuple[ChosenProduct, ProductReport]:
    """The first candidate whose rows have equal bits whatever their number, for each kind of some matrices.

    The weights are on the device. Where none holds, the first one that computes at all is taken, and the report says
    so. Raises ValueError where none computes.
    """
    forbid_split_sums(device)
    products: dict[Kind, Product] = {}
    choices = []
    for use in uses:
        if use.kind not in products:
            products[use.kind], choice = _choose(use, min(max_rows, use.max_rows or max_rows), among)
            choices.append(choice)
    return ChosenProduct(products), ProductReport(tuple(choices))


def _choose(use: Use, max_rows: int, among: Sequence[Candidate]) -> tuple[Product, Choice]:
    kind = use.kind
    num_rows = max(1, min(max_rows, MAX_OUT_BYTES // (kind.num_outputs * kind.out_dtype.itemsize)))
    sample_SI = cancelling_rows(use.weight_OI, use.bias_O, min(TEST_ROWS, num_rows))
    refused: list[str] = []
    computing: list[Candidate] = []
    for candidate in among:
        try:
            is_equal = _holds(candidate.product, use, sample_SI, num_rows)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TritonError) as error:
            refused.append(f"{candidate.name}: {str(error).partition(chr(10))[0]}")
            continue
        if is_equal:
            return candidate.product, Choice(kind, candidate.name, True, num_rows, tuple(refused))
        refused.append(f"{candidate.name}: rows differ")
        computing.append(candidate)
    if not computing:
        raise ValueError(f"no product computes {list(use.weight_OI.shape)}: {'; '.join(refused)}")
    return computing[0].product, Choice(kind, computing[0].name, False, num_rows, tuple(refused))


def _holds(product: Product, use: Use, sample_SI: Tensor, num_rows: int) -> bool:
    """Whether rows have equal bits alone, among a few others, and among up to `num_rows`."""

    def multiply(x_MI: Tensor) -> Tensor:
        out_MO = x_MI.new_empty(x_MI.shape[0], use.kind.num_outputs, dtype=use.kind.out_dtype)
        product(x_MI, use.weight_OI, use.bias_O, out_MO)
        return out_MO

    if not holds(multiply, sample_SI):
        return False
    expected_SO = multiply(sample_SI)
    for count in sorted({count for count in (*TEST_COUNTS, num_rows) if count <= num_rows}):
        repeats = -(-count // len(sample_SI))
        out_MO = multiply(sample_SI.repeat(repeats, 1)[:count].contiguous())
        if not all(torch.equal(part, expected_SO[: len(part)]) for part in out_MO.split(len(sample_SI))):
            return False
    return True


def _kind_of(weight_OI: Tensor, bias_O: Tensor | None, out_dtype: torch.dtype) -> Kind:
    num_outputs, num_inputs = weight_OI.shape
    return Kind(num_outputs, num_inputs, bias_O is not None, weight_OI.dtype, out_dtype)
