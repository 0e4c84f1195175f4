"""The trial of products at the start: what is chosen of what depends on the number of rows, and what is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.gpu import products
from model.gpu.device import CudaDevice
from model.gpu.matmul import ONE_TILE, TiledProduct
from model.gpu.products import Candidate, PaddedProduct, Use, choose_product, forbid_split_sums, library_product

CPU = torch.device("cpu")


def matrix(num_outputs: int, num_inputs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_outputs)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
    return weight.to(dtype), torch.randn(num_outputs, generator=generator).to(dtype)


class RowByRow:
    """A product that computes each row alone, but is off by a little for some numbers of rows."""

    def __init__(self, *unsteady: int | range) -> None:
        self._unsteady = unsteady
        self.counts: list[int] = []

    def __call__(self, x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_MO: Tensor) -> None:
        num_rows = x_MI.shape[0]
        self.counts.append(num_rows)
        for row, out in zip(x_MI, out_MO, strict=True):
            sums = weight_OI @ row
            out.copy_(sums if bias_O is None else sums + bias_O)
        if any(num_rows == some if isinstance(some, int) else num_rows in some for some in self._unsteady):
            out_MO[0] += 1e-3


class Refusing:
    """A product that a library has not."""

    def __call__(self, x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_MO: Tensor) -> None:
        raise RuntimeError("requires another library\nand more")


def choose(
    *among: products.Product, max_rows: int = 300, use: Use | None = None
) -> tuple[products.ChosenProduct, products.ProductReport]:
    named = [Candidate(f"candidate {number}", product) for number, product in enumerate(among)]
    return choose_product([use or Use(matrix(20, 48)[0])], max_rows, CPU, named)


@pytest.mark.parametrize("unsteady", [1, 2, 3, 8, 16, 17, 64, 256, 300])
def test_each_number_of_rows_is_tried(unsteady: int) -> None:
    _, report = choose(RowByRow(unsteady), RowByRow())
    (choice,) = report.choices
    assert (choice.name, choice.holds, choice.refused) == ("candidate 1", True, ("candidate 0: rows differ",))
    assert report.holds


def test_the_first_that_holds_is_taken_and_used() -> None:
    first, second = RowByRow(), RowByRow()
    chosen, report = choose(first, second)
    assert report.choices[0].name == "candidate 0" and report.choices[0].refused == ()
    assert not second.counts
    weight, _ = matrix(20, 48)
    before, out = len(first.counts), torch.empty(2, 20)
    chosen(torch.ones(2, 48), weight, None, out)
    assert first.counts[before:] == [2]
    assert torch.equal(out[0], weight @ torch.ones(48))


def test_no_more_rows_are_tried_than_there_will_be() -> None:
    product = RowByRow()
    choose(product, max_rows=70)
    assert max(product.counts) == 70
    logits = RowByRow()
    choose(logits, use=Use(matrix(20, 48)[0], max_rows=5))
    assert max(logits.counts) == 5
    alone = RowByRow()
    _, report = choose(alone, max_rows=1)
    assert set(alone.counts) == {1} and report.choices[0].num_rows == 1


def test_results_of_a_trial_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "MAX_OUT_BYTES", 40 * 20 * 4)
    product = RowByRow()
    _, report = choose(product)
    assert max(product.counts) == report.choices[0].num_rows == 40


@pytest.mark.parametrize("below", [64, 128])
def test_padding_helps_where_few_rows_go_another_way(below: int) -> None:
    plain = RowByRow(range(below))
    padded = [PaddedProduct(plain, many) for many in products.MULTIPLES]
    _, report = choose(plain, *padded, RowByRow())
    assert report.choices[0].name == f"candidate {1 + products.MULTIPLES.index(below)}"


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 128])
@pytest.mark.parametrize("has_bias", [False, True])
def test_padded_rows_are_those_of_the_product(num_rows: int, has_bias: bool) -> None:
    weight, bias = matrix(20, 48)
    x = torch.randn(num_rows, 48, generator=torch.Generator().manual_seed(3))
    found, expected = torch.empty(num_rows, 20), torch.empty(num_rows, 20)
    inner = RowByRow()
    PaddedProduct(inner, 64)(x, weight, bias if has_bias else None, found)
    assert inner.counts == [-(-num_rows // 64) * 64]
    RowByRow()(x, weight, bias if has_bias else None, expected)
    assert torch.equal(found, expected)


def test_what_cannot_compute_is_passed_over_with_its_reason() -> None:
    _, report = choose(Refusing(), RowByRow(1), RowByRow())
    (choice,) = report.choices
    assert choice.name == "candidate 2"
    assert choice.refused == ("candidate 0: requires another library", "candidate 1: rows differ")


def test_where_none_holds_the_report_says_so() -> None:
    chosen, report = choose(Refusing(), RowByRow(1), RowByRow(2))
    assert not report.holds
    assert report.choices[0].name == "candidate 1"
    assert "DEPEND" in str(report) and "candidate 2: rows differ" in str(report)
    out = torch.empty(3, 20)
    chosen(torch.ones(3, 48), matrix(20, 48)[0], None, out)
    assert out.isfinite().all()


def test_where_none_computes_nothing_is_chosen() -> None:
    with pytest.raises(ValueError, match=r"^no product computes \[20, 48\]: candidate 0: requires another library$"):
        choose(Refusing())


def test_too_little_memory_is_no_reason_for_another_product() -> None:
    def exhausted(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_MO: Tensor) -> None:
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError):
        choose(exhausted, RowByRow())


def test_each_shape_is_tried_once_and_told_in_a_line() -> None:
    weight, bias = matrix(20, 48)
    other, _ = matrix(24, 48)
    uses = [
        Use(weight),
        Use(weight.clone()),
        Use(weight, bias),
        Use(other),
        Use(other.bfloat16(), out_dtype=torch.float32),
    ]
    # One that is unsteady for the second matrix only.
    steady, unsteady = RowByRow(), RowByRow(2)

    def mixed(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_MO: Tensor) -> None:
        (unsteady if weight_OI.shape[0] == 24 and x_MI.dtype is torch.float32 else steady)(
            x_MI, weight_OI, bias_O, out_MO
        )

    tried = RowByRow()
    chosen, report = choose_product(uses, 40, CPU, [Candidate("mixed", mixed), Candidate("steady", tried)])
    assert str(report).splitlines() == [
        "[20, 48] float32 to float32: mixed, equal bits up to 40 rows",
        "[20, 48] + bias float32 to float32: mixed, equal bits up to 40 rows",
        "[24, 48] float32 to float32: steady, equal bits up to 40 rows (refused: mixed: rows differ)",
        "[24, 48] bfloat16 to float32: mixed, equal bits up to 40 rows",
    ]
    before = len(tried.counts)
    chosen(torch.ones(2, 48), other, None, torch.empty(2, 24))
    chosen(torch.ones(2, 48), weight, None, torch.empty(2, 20))
    assert len(tried.counts) == before + 1
    with pytest.raises(KeyError):
        chosen(torch.ones(2, 48), torch.ones(20, 48), bias, torch.empty(2, 20, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32,) * 2]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_librarys_product(dtype: torch.dtype, out_dtype: torch.dtype, has_bias: bool) -> None:
    weight, bias = matrix(33, 192, dtype)
    x = torch.randn(7, 192, generator=torch.Generator().manual_seed(4)).to(dtype)
    out = torch.empty(7, 33, dtype=out_dtype)
    library_product(x, weight, bias if has_bias else None, out)
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0.0)
    rtol = 2**-7 if out_dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, atol=rtol / 4, rtol=rtol)


def test_splits_of_sums_are_forbidden() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k
    try:
        forbid_split_sums(CPU)
        assert matmul.allow_bf16_reduced_precision_reduction is False
        assert matmul.allow_bf16_reduced_precision_reduction_split_k is False
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@pytest.mark.usefixtures("_one_by_one")
def test_our_own_product_holds_where_the_library_does_not() -> None:
    """With a library whose single rows come out otherwise."""

    def library(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_MO: Tensor) -> None:
        library_product(x_MI, weight_OI, bias_O, out_MO)
        if x_MI.shape[0] < 3:
            out_MO[:, 0] += 1.0

    weight, bias = matrix(40, 129, torch.bfloat16)
    chosen, report = choose_product(
        [Use(weight, bias)], 20, CPU, [Candidate("library", library), Candidate("one tile", TiledProduct(ONE_TILE))]
    )
    assert report.choices[0].name == "one tile" and report.holds
    out = torch.empty(2, 40, dtype=torch.bfloat16)
    chosen(torch.ones(2, 129).bfloat16(), weight, bias, out)
    expected = weight.double().sum(1) + bias.double()
    torch.testing.assert_close(out[1].double(), expected, atol=1e-2, rtol=2**-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")
@pytest.mark.parametrize("shape", [(6144, 4096), (1000, 1000)])
def test_a_product_holds_on_a_card(shape: tuple[int, int]) -> None:
    weight, bias = (tensor.cuda() for tensor in matrix(*shape, torch.bfloat16))
    uses = [Use(weight), Use(weight, bias), Use(weight, out_dtype=torch.float32, max_rows=256)]
    among = products.candidates(CudaDevice().shared_bytes)
    for first in range(len(among)):
        _, report = choose_product(uses, 2048, weight.device, among[first:])
        print(report)
        assert report.holds
