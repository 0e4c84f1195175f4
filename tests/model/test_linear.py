"""Matrix products: right, and with the same bits whatever the load."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.linear import LinearPacker, Product, RowRule, RuledLinear, cancelling_rows, find_rule, holds

# (inputs, outputs): the built-in model's, odd vocabularies, head sizes 64, 80 and 128, long sums.
SHAPES = [
    (2048, 500),
    (192, 320),
    (192, 1024),
    (512, 192),
    (192, 4096),
    (256, 1001),
    (80, 333),
    (640, 257),
    (1536, 576),
    (4096, 128),
]
DTYPES = [torch.bfloat16, torch.float32]
BACKENDS = [(name, dtype) for name in ("native", "onednn", "plain") for dtype in DTYPES]


def packer(name: str, dtype: torch.dtype) -> LinearPacker:
    try:
        return LinearPacker(name, dtype)
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


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were no compiled kernel."""

    def refuse(dtype: torch.dtype) -> None:
        raise ValueError("not built")

    monkeypatch.setattr("model.linear.NativeLinears", refuse)


def test_auto_is_the_compiled_one() -> None:
    packer("native", torch.float32)
    assert LinearPacker("auto", torch.float32).name == "native"
    assert LinearPacker("auto", torch.bfloat16).name == "native"


@pytest.mark.usefixtures("unbuilt")
def test_names() -> None:
    assert LinearPacker("auto", torch.float32).name == "plain"
    with pytest.raises(ValueError, match="not built"):
        LinearPacker("native", torch.float32)
    with pytest.raises(ValueError, match="unknown linear backend 'mkl'"):
        LinearPacker("mkl", torch.float32)


@pytest.mark.usefixtures("unbuilt")
def test_onednn_is_refused_where_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.linear._has_onednn", lambda dtype: False)
    assert LinearPacker("auto", torch.bfloat16).name == "plain"
    with pytest.raises(ValueError, match="does not compute"):
        LinearPacker("onednn", torch.bfloat16)
