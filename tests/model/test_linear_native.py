"""The compiled matrix products on every instruction set that runs here: right, and each row's bits its own."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from model.linear import cancelling_rows
from model.linear_native import NativeLinear, NativeLinears
from model.native.levels import library_path, runnable_levels

LEVELS = [level.name for level in runnable_levels() if library_path("linear", level).exists()]
DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [(1, 1), (2, 3), (3, 31), (7, 32), (80, 33), (192, 320), (333, 1001), (577, 100), (64, 65), (1500, 257)]
"""(inputs, outputs): odd numbers of either, less than a tile, whole tiles, one output more."""

pytestmark = [
    pytest.mark.skipif(not LEVELS, reason="native kernels are not built: python -m model.native.build"),
    pytest.mark.parametrize("level", LEVELS),
    pytest.mark.parametrize("dtype", DTYPES),
]


def pack(level: str, dtype: torch.dtype, shape: tuple[int, int], has_bias: bool) -> tuple[NativeLinear, Tensor, Tensor]:
    """A linear, and the weight and bias that it holds."""
    num_inputs, num_outputs = shape
    generator = torch.Generator().manual_seed(num_inputs * num_outputs)
    weight = (torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5).to(dtype)
    bias = torch.randn(num_outputs, generator=generator).to(dtype) if has_bias else torch.zeros(num_outputs).to(dtype)
    return NativeLinears(dtype, level).pack(weight, bias if has_bias else None), weight, bias


def rows(dtype: torch.dtype, num_rows: int, num_inputs: int) -> Tensor:
    return torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(num_rows)).to(dtype)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_product_in_float64(level: str, dtype: torch.dtype, shape: tuple[int, int], has_bias: bool) -> None:
    linear, weight, bias = pack(level, dtype, shape, has_bias)
    rounding = {"atol": 1e-5, "rtol": 2**-8} if dtype is torch.bfloat16 else {"atol": 4e-6, "rtol": 1e-5}
    for num_rows in (*range(1, 14), random.Random(shape[1]).randint(14, 130), 130):
        x = rows(dtype, num_rows, shape[0])
        expected = x.double() @ weight.double().T + bias.double()
        assert linear(x).dtype is dtype
        torch.testing.assert_close(linear(x).double(), expected, **rounding)


@pytest.mark.parametrize("shape", [(7, 33), (192, 320), (333, 1001)], ids=str)
def test_the_residual_is_added_to_the_rounded_product(level: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    linear, _, _ = pack(level, dtype, shape, has_bias=True)
    x, residual = rows(dtype, 17, shape[0]), rows(dtype, 17, shape[1])
    before = residual.clone()
    assert torch.equal(linear(x, residual), residual + linear(x))
    assert torch.equal(residual, before)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("shape", [(2048, 500), (333, 1001), (80, 4096)], ids=str)
def test_bits_depend_neither_on_rows_nor_on_threads(level: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Counts that fill the registers or do not, and shapes of which some are worth a second thread and some are not."""
    linear, weight, bias = pack(level, dtype, shape, has_bias=True)
    x = cancelling_rows(weight, bias, 300)
    torch.set_num_threads(1)
    together = linear(x)
    rng = random.Random(0)
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(linear(x), together)
        for num_rows in (*range(1, 14), 24, 25, rng.randint(26, 200)):
            start = rng.randint(0, 300 - num_rows)
            assert torch.equal(linear(x[start : start + num_rows]), together[start : start + num_rows]), num_rows


def test_a_row_of_inputs_that_are_not_finite_stays_alone(level: str, dtype: torch.dtype) -> None:
    linear, _, _ = pack(level, dtype, (33, 70), has_bias=False)
    x = rows(dtype, 5, 33)
    expected = linear(x)
    x[2] = float("nan")
    found = linear(x)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_long_inputs_go_through_in_panels(level: str, dtype: torch.dtype) -> None:
    """So many rows of so many inputs that they do not stay in a cache together."""
    linear, weight, _ = pack(level, dtype, (9001, 40), has_bias=False)
    x = rows(dtype, 230, 9001)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(linear(x).double(), expected, atol=2e-5, rtol=2**-8)
    assert torch.equal(linear(x[200:207]), linear(x)[200:207])
