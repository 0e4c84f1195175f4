"""Matrix products: right, and with the same bits whatever the load."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.interface import Quantization
from model.linear import GatedLinear, LinearPacker, Product, RowRule, RuledLinear, cancelling_rows, find_rule, holds
from model.operators import silu_mul
from model.quantize import encode, multiply
from tests.model.levels import LEVELS, kernels_of

# (inputs, outputs): the built-in model's, odd vocabularies, head sizes 64, 80 and 128, long sums.
SHAPES = [
    (2048, 500),
    (192, 320),
    (256, 1001),
    (80, 333),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((192, 1024), (512, 192), (192, 4096))),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((640, 257), (1536, 576), (4096, 128))),
]
DTYPES = [torch.bfloat16, torch.float32]
BACKENDS = [(name, dtype) for name in ("native", "onednn", "plain") for dtype in DTYPES]


def packer(name: str, dtype: torch.dtype, quantization: Quantization = Quantization.NONE) -> LinearPacker:
    if name == "native" and not LEVELS:
        pytest.skip("native kernels are not built")
    try:
        return LinearPacker(name, dtype, quantization, kernels_of(LEVELS[0]) if name == "native" else None)
    except ValueError as error:
        pytest.skip(str(error))


def weights(num_inputs: int, num_outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_inputs * num_outputs)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
    return weight.to(dtype), torch.randn(num_outputs, generator=generator).to(dtype)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("name", "dtype"), BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_rows(
    name: str, dtype: torch.dtype, shape: tuple[int, int], num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    weight, bias = weights(*shape, dtype)
    linear = packer(name, dtype).pack(weight, bias)
    x = cancelling_rows(weight, bias, 300).flip(0)
    together = linear(x)
    for num_rows in (1, 2, 3, 5, 7, 11, 15, 18, 29, 61, 67, 129, 190, 257):  # Mostly others than the self-test's.
        for start in (0, 41, 300 - num_rows):
            if start + num_rows <= 300:
                alone = linear(x[start : start + num_rows].clone())
                assert torch.equal(alone, together[start : start + num_rows]), (num_rows, start)


@pytest.mark.parametrize(("name", "dtype"), BACKENDS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_the_plain_product(name: str, dtype: torch.dtype, has_bias: bool) -> None:
    weight, bias = weights(192, 333, dtype)
    x = torch.randn(37, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = functional.linear(x.double(), weight.double(), bias.double() if has_bias else None)
    linear = packer(name, dtype).pack(weight, bias if has_bias else None)
    actual = linear(x)
    assert actual.dtype is dtype
    assert actual.shape == (37, 333)
    torch.testing.assert_close(actual.double(), expected, atol=1e-2 if dtype is torch.bfloat16 else 1e-5, rtol=1e-2)
    residual = torch.randn(37, 333, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(linear(x, residual), residual + actual)


@pytest.mark.parametrize("has_bias", [False, True])
def test_cancelling_rows_show_what_rounding_hides(has_bias: bool) -> None:
    """The order of addition changes hardly any ordinary bfloat16 output, and most of those that cancel."""
    weight, bias = weights(2048, 512, torch.bfloat16)
    targets = torch.arange(64) * 512 // 64

    def changed(x: Tensor) -> int:
        """How many of the targeted outputs differ when the inputs are added from the other end."""
        products = (x.float() * weight[targets].float()).numpy()
        added = bias[targets].float() if has_bias else torch.zeros(64)
        # NumPy's running sums add one by one in float32; the last is the whole sum.
        there, back = (torch.from_numpy(p.cumsum(axis=1)[:, -1]) + added for p in (products, products[:, ::-1]))
        return int((there.bfloat16() != back.bfloat16()).sum())

    ordinary = torch.randn(64, 2048, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert changed(ordinary) <= 2
    assert changed(cancelling_rows(weight, bias if has_bias else None, 64)) > 32


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_cancelling_rows_of_a_flat_matrix_are_finite(value: float) -> None:
    weight = torch.full((3, 2), value).bfloat16()
    assert cancelling_rows(weight, None, 32).isfinite().all()


def row_by_row(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([weight @ row for row in x])


def unsteady_product(weight: Tensor, unsteady: range) -> Product:
    """A product that computes each row alone, off by a little in every row when the number of rows is in a set."""

    def product(x: Tensor) -> Tensor:
        return row_by_row(x, weight) + (1e-3 if x.shape[0] in unsteady else 0.0)

    return product


@pytest.mark.parametrize(
    ("unsteady", "rule"),
    [
        (range(0), RowRule(1)),
        (range(1, 2), RowRule(2)),
        (range(1, 4), RowRule(4)),
        (range(1, 16), RowRule(16)),
        (range(33, 1000), RowRule(32, tile=32)),
        (range(65, 1000), RowRule(32, tile=32)),
    ],
)
def test_the_cheapest_rule_that_holds_is_found(unsteady: range, rule: RowRule) -> None:
    weight, _ = weights(48, 20, torch.float32)
    product = unsteady_product(weight, unsteady)
    found = find_rule(product, weight)
    assert found == rule
    assert holds(RuledLinear(product, found), torch.randn(100, 48, generator=torch.Generator().manual_seed(3)))


def test_the_last_resort_is_one_row_at_a_time() -> None:
    weight, _ = weights(48, 20, torch.float32)

    def product(x: Tensor) -> Tensor:
        """Depends on the row's place in the call."""
        return row_by_row(x, weight) + torch.arange(x.shape[0])[:, None] * 1e-3

    rule = find_rule(product, weight)
    assert rule == RowRule(1, tile=1)
    assert holds(RuledLinear(product, rule), torch.randn(40, 48, generator=torch.Generator().manual_seed(4)))


def test_rows_are_padded_to_the_rule() -> None:
    assert [RowRule(4).padded(rows) for rows in (1, 4, 5, 63, 64, 65, 100)] == [4, 4, 8, 64, 64, 72, 104]
    assert [RowRule(1).padded(rows) for rows in (1, 7, 64, 65)] == [1, 7, 64, 72]
    assert [RowRule(12).padded(rows) for rows in (1, 13, 65)] == [12, 24, 72]


def test_a_shape_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("model.linear.find_rule", lambda *args: calls.append(args) or RowRule(1))
    packer = LinearPacker("plain", torch.float32)
    for _ in range(3):
        packer.pack(torch.ones(8, 4))
    packer.pack(torch.ones(4, 8))
    assert len(calls) == 2
    assert packer.num_tiled == 0


@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize(("name", "dtype"), BACKENDS)
def test_a_gated_matrix_gives_the_gated_product(name: str, dtype: torch.dtype, quantization: Quantization) -> None:
    weight, bias = weights(192, 2 * 99, dtype)
    made = packer(name, dtype, quantization)
    x = torch.randn(37, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    found, expected = made.pack_gated(weight, bias)(x), silu_mul(made.pack(weight, bias)(x))
    assert found.dtype is dtype and found.shape == (37, 99)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=2**-6 if dtype is torch.bfloat16 else 2e-6)


def test_nothing_is_added_to_a_gated_product() -> None:
    weight, _ = weights(8, 6, torch.float32)
    linear = GatedLinear(LinearPacker("plain", torch.float32).pack(weight))
    with pytest.raises(AssertionError, match="nothing is added"):
        linear(torch.ones(2, 8), torch.ones(2, 3))


@pytest.mark.parametrize("name", ["onednn", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_codes_by_torch_are_the_specification(name: str, dtype: torch.dtype, has_bias: bool) -> None:
    """And they need no rule: every row goes the same way."""
    weight, bias = weights(192, 333, dtype)
    made = packer(name, dtype, Quantization.INT8)
    linear = made.pack(weight, bias if has_bias else None)
    x = torch.randn(90, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = multiply(encode(x), encode(weight), bias if has_bias else None).to(dtype)
    assert torch.equal(linear(x), expected)
    residual = torch.randn(90, 333, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(linear(x, residual), residual + expected)
    assert holds(linear, x)
    assert linear.num_bytes == 333 * 192 + 333 * 4
    assert made.num_tiled == 0


@pytest.mark.parametrize("name", ["native", "torch"])
def test_logits_are_float32_where_the_backend_can(name: str) -> None:
    weight, _ = weights(192, 333, torch.bfloat16)
    linear = packer(name, torch.bfloat16).pack_unembedding(weight)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert linear(x).dtype is (torch.float32 if name == "native" else torch.bfloat16)
    expected = x.double() @ weight.double().T
    rtol = 1e-5 if name == "native" else 2**-8
    torch.testing.assert_close(linear(x).double(), expected, atol=1e-4, rtol=rtol)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LinearPacker("torch", torch.float32).name == "plain"
    with pytest.raises(ValueError, match="unknown linear backend 'mkl'"):
        LinearPacker("mkl", torch.float32)
    monkeypatch.setattr("model.linear._has_onednn", lambda dtype: True)
    assert LinearPacker("torch", torch.float32).name == "plain"
    assert LinearPacker("torch", torch.bfloat16).name == "onednn"


def test_native_products_need_the_kernels() -> None:
    with pytest.raises(AssertionError, match="need the kernels"):
        LinearPacker("native", torch.float32)


def test_onednn_is_refused_where_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.linear._has_onednn", lambda dtype: False)
    assert LinearPacker("torch", torch.bfloat16).name == "plain"
    with pytest.raises(ValueError, match="does not compute"):
        LinearPacker("onednn", torch.bfloat16)
