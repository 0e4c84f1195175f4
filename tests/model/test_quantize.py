"""8-bit codes: what they are, for ordinary rows and for odd ones, and their products against an integer's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.quantize import LARGEST_CODE, Coded, encode, multiply

DTYPES = [torch.bfloat16, torch.float32]
NAN, INF = float("nan"), float("inf")


def random_rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_stand_for_the_numbers_to_half_a_step(dtype: torch.dtype) -> None:
    rows = random_rows(50, 333).to(dtype)
    coded = encode(rows)
    assert coded.codes.dtype is torch.int8 and coded.scales.dtype is torch.float32
    assert (coded.codes.abs().amax(-1) == LARGEST_CODE).all()
    error = (coded.values() - rows.float()).abs()
    assert (error <= coded.scales[:, None] * 0.5001).all()
    torch.testing.assert_close(coded.scales * LARGEST_CODE, rows.float().abs().amax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_do_not_depend_on_other_rows(dtype: torch.dtype) -> None:
    rows = random_rows(50, 333).to(dtype)
    together, alone = encode(rows), [encode(row[None]) for row in rows]
    assert torch.equal(together.codes, torch.cat([one.codes for one in alone]))
    assert torch.equal(together.scales, torch.cat([one.scales for one in alone]))


def test_codes_are_symmetric_and_round_to_even() -> None:
    rows = torch.tensor([[127.0, 0.5, 1.5, -0.5, -1.5, 2.49, -126.6]])
    assert encode(rows).codes.tolist() == [[127, 0, 2, 0, -2, 2, -127]]
    assert torch.equal(encode(-rows).codes, -encode(rows).codes)


def test_rows_of_zeros_stay_zeros() -> None:
    coded = encode(torch.zeros(2, 5))
    assert coded.codes.count_nonzero() == 0 and coded.scales.count_nonzero() == 0
    assert multiply(coded, encode(random_rows(3, 5)), None).count_nonzero() == 0


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_a_row_that_is_not_finite_gives_nothing_finite(broken: float) -> None:
    rows = random_rows(3, 40)
    rows[1, 7] = broken
    coded = encode(rows)
    assert coded.scales.isfinite().tolist() == [True, False, True]
    products = multiply(coded, encode(random_rows(30, 40)), None)
    assert products.isfinite().all(-1).tolist() == [True, False, True]
    assert not products[1].isfinite().any()
    assert torch.equal(coded.codes[::2], encode(rows[::2]).codes)


@pytest.mark.parametrize("huge", [3e38, -1e20, 1e-30])
def test_one_huge_number_hides_the_others(huge: float) -> None:
    rows = random_rows(1, 40) * 1e-36
    rows[0, 7] = huge
    coded = encode(rows)
    assert coded.codes[0, 7] == (127 if huge > 0 else -127)
    assert coded.codes[0].count_nonzero() == 1
    assert coded.values()[0, 7] == pytest.approx(huge, rel=1e-6)


def test_a_row_too_small_for_a_scale_is_zero() -> None:
    coded = encode(torch.full((1, 5), 1e-45))
    assert coded.codes.count_nonzero() == 0 and coded.scales.count_nonzero() == 0


@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_integers(has_bias: bool) -> None:
    """Also with more inputs than float32 could add up exactly."""
    x, weight, bias = encode(random_rows(4, 30_000)), encode(random_rows(6, 30_000) + 1), random_rows(6)
    sums = (x.codes.int()[:, None] * weight.codes.int()).sum(-1)
    scales = x.scales[:, None] * weight.scales
    expected = sums.float() * scales + (bias if has_bias else 0)
    assert torch.equal(multiply(x, weight, bias if has_bias else None), expected)


def test_products_are_near_those_of_the_numbers() -> None:
    x, weight = random_rows(20, 512), random_rows(30, 512)
    expected = x @ weight.T
    error = multiply(encode(x), encode(weight), None) - expected
    assert error.norm() / expected.norm() < 0.02
    assert isinstance(encode(x), Coded)
