"""The compiled matrix products on every instruction set that runs here: right, and each row's bits its own."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from model.linear import cancelling_rows
from model.linear_native import NativeLinear, NativeLinears, Numbers
from model.native.limits import max_inputs
from model.operators import silu_mul
from model.quantize import encode, multiply
from tests.model.levels import LEVELS, kernels_of, needs_kernels

DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [(1, 1), (2, 3), (3, 31), (7, 32), (80, 33), (192, 320), (333, 1001), (577, 100), (64, 65), (1500, 257)]
"""(inputs, outputs): odd numbers of either, less than a tile, whole tiles, one output more."""

pytestmark = [
    needs_kernels,
    pytest.mark.parametrize("level", LEVELS),
    pytest.mark.parametrize("dtype", DTYPES),
]


def pack(
    level: str, dtype: torch.dtype, shape: tuple[int, int], has_bias: bool, **kinds: bool
) -> tuple[NativeLinear, Tensor, Tensor]:
    """A linear, and the weight and bias that it holds."""
    num_inputs, num_outputs = shape
    generator = torch.Generator().manual_seed(num_inputs * num_outputs)
    weight = (torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5).to(dtype)
    bias = torch.randn(num_outputs, generator=generator).to(dtype) if has_bias else torch.zeros(num_outputs).to(dtype)
    linears = NativeLinears(kernels_of(level), dtype, has_codes=kinds.pop("has_codes", False))
    return linears.pack(weight, bias if has_bias else None, **kinds), weight, bias


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


def check_bits(linear: NativeLinear, x: Tensor) -> None:
    """Each row has its bits on any number of threads, among any others; `x` has 300 rows."""
    torch.set_num_threads(1)
    together = linear(x)
    rng = random.Random(0)
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(linear(x), together)
        for num_rows in (*range(1, 14), 24, 25, rng.randint(26, 200)):
            start = rng.randint(0, 300 - num_rows)
            assert torch.equal(linear(x[start : start + num_rows]), together[start : start + num_rows]), num_rows


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("shape", [(2048, 500), (333, 1001), (80, 4096)], ids=str)
def test_bits_depend_neither_on_rows_nor_on_threads(level: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Counts that fill the registers or do not, and shapes of which some are worth a second thread and some are not."""
    linear, weight, bias = pack(level, dtype, shape, has_bias=True)
    check_bits(linear, cancelling_rows(weight, bias, 300))


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("has_codes", [False, True])
def test_gated_bits_depend_neither_on_rows_nor_on_threads(level: str, dtype: torch.dtype, has_codes: bool) -> None:
    linear, weight, bias = pack(level, dtype, (333, 2 * 501), has_bias=True, is_gated=True, has_codes=has_codes)
    check_bits(linear, cancelling_rows(weight, bias, 300))


@pytest.mark.parametrize("has_codes", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (31, 15), (64, 16), (80, 17), (192, 256), (100, 333)], ids=str)
def test_a_gated_product_is_silu_of_one_half_times_the_other(
    level: str, dtype: torch.dtype, shape: tuple[int, int], has_bias: bool, has_codes: bool
) -> None:
    """Equal to torch's silu_mul of both halves but for the rounding of its parts. Outputs fill a tile or do not."""
    num_inputs, num_outputs = shape
    whole = (num_inputs, 2 * num_outputs)
    linear, _, _ = pack(level, dtype, whole, has_bias, is_gated=True, has_codes=has_codes)
    halves, _, _ = pack(level, dtype, whole, has_bias, has_codes=has_codes)
    x = rows(dtype, 23, num_inputs) * 3
    found, expected = linear(x), silu_mul(halves(x))
    assert found.shape == (23, num_outputs) and found.dtype is dtype and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=2**-6 if dtype is torch.bfloat16 else 2e-6, atol=1e-30)
    if dtype is torch.bfloat16:
        assert (found != expected).sum() <= 1 + 0.01 * found.numel()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_have_the_bits_of_the_specification(
    level: str, dtype: torch.dtype, shape: tuple[int, int], has_bias: bool
) -> None:
    """Without a bias; with one, a fused multiply-add rounds once where torch rounds twice."""
    linear, weight, bias = pack(level, dtype, shape, has_bias, has_codes=True)
    for num_rows in (1, 2, 3, 4, 6, 7, 12, 13, 130):
        x = rows(dtype, num_rows, shape[0])
        expected = multiply(encode(x), encode(weight), bias if has_bias else None)
        if has_bias:
            rtol = 2**-7 if dtype is torch.bfloat16 else 1e-6
            torch.testing.assert_close(linear(x), expected.to(dtype), atol=1e-6, rtol=rtol)
        else:
            assert torch.equal(linear(x), expected.to(dtype)), num_rows


def test_codes_added_up_are_exact_for_the_largest_codes(level: str, dtype: torch.dtype) -> None:
    """All codes at 127: 8192 products whose sum, with what is added to the codes, fits 32 bits."""
    linears = NativeLinears(kernels_of(level), dtype, has_codes=True)
    signs = torch.ones(2, 8192)
    signs[1] = -1
    weight = torch.cat((signs, torch.ones(1, 8192).where(torch.arange(8192) % 2 == 0, -1))).to(dtype)
    found = linears.pack(weight, keeps_float32=True)(signs.to(dtype))
    expected = multiply(encode(signs.to(dtype)), encode(weight), None)
    assert torch.equal(found, expected)
    torch.testing.assert_close(found, torch.tensor([[8192.0, -8192.0, 0.0], [-8192.0, 8192.0, 0.0]]))


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("shape", [(2048, 500), (333, 1001)], ids=str)
def test_bits_of_codes_depend_neither_on_rows_nor_on_threads(
    level: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    linear, weight, bias = pack(level, dtype, shape, has_bias=True, has_codes=True)
    check_bits(linear, cancelling_rows(weight, bias, 300))


def test_rows_of_codes_that_are_zero_broken_or_huge(level: str, dtype: torch.dtype) -> None:
    """Each gives what the specification gives, and touches no other row."""
    linear, weight, _ = pack(level, dtype, (70, 50), has_bias=False, has_codes=True)
    x = rows(dtype, 12, 70)
    x[1] = 0
    x[2, 69] = float("nan")
    x[3, 0] = float("inf")
    x[4, 5] = -float("inf")
    x[5, 3] = 3e38
    x[6, 69] = -1e30
    x[7] = 0
    x[7, 20] = 1e-30
    x[8] *= 1e30
    x[9] *= 1e-30
    found, expected = linear(x), multiply(encode(x), encode(weight), None).to(dtype)
    broken = [2, 3, 4]
    whole = [row for row in range(12) if row not in broken]
    assert torch.equal(found[whole], expected[whole])
    assert not found[broken].isfinite().any() and not expected[broken].isfinite().any()
    assert found[1].count_nonzero() == 0


def test_an_output_of_zero_weights_is_its_bias(level: str, dtype: torch.dtype) -> None:
    linears = NativeLinears(kernels_of(level), dtype, has_codes=True)
    weight, bias = torch.zeros(40, 33, dtype=dtype), torch.arange(40).to(dtype)
    weight[1::2] = rows(dtype, 20, 33)
    assert torch.equal(linears.pack(weight, bias)(rows(dtype, 4, 33))[:, ::2], bias[None, ::2].expand(4, -1))


@pytest.mark.parametrize("has_codes", [False, True])
def test_results_that_are_not_rounded(level: str, dtype: torch.dtype, has_codes: bool) -> None:
    shape = (192, 333)
    linear, weight, _ = pack(level, dtype, shape, has_bias=False, keeps_float32=True, has_codes=has_codes)
    rounded, _, _ = pack(level, dtype, shape, has_bias=False, has_codes=has_codes)
    x = rows(dtype, 17, 192)
    assert linear(x).dtype is torch.float32
    assert torch.equal(linear(x).to(dtype), rounded(x))
    expected = multiply(encode(x), encode(weight), None).double() if has_codes else x.double() @ weight.double().T
    torch.testing.assert_close(linear(x).double(), expected, atol=4e-6, rtol=1e-5)


def test_packed_memory_is_counted(level: str, dtype: torch.dtype) -> None:
    """Weights, and a bias of float32; codes have a scale and an offset for each output as well."""
    plain, weight, _ = pack(level, dtype, (64, 128), has_bias=False)
    coded, _, _ = pack(level, dtype, (64, 128), has_bias=False, has_codes=True)
    packed_bytes = weight.nbytes
    if plain.struct.numbers == Numbers.SHORT_BF16S:
        linears = NativeLinears(kernels_of(level), dtype)
        num_tiles, num_groups = 128 // linears.tile, 64 // 2 // linears.group_words
        of_a_list = 4 + 4  # where it starts, and its end
        packed_bytes = num_tiles * (num_groups * linears.group_bytes + linears.short_palette + of_a_list)
        packed_bytes += linears.group_words * linears.tile * 4  # no group escapes, but there is room for one
    assert plain.num_bytes == packed_bytes + 4 * 128
    assert coded.num_bytes == weight.numel() + 3 * 4 * 128


@pytest.mark.parametrize("kinds", [{}, {"has_codes": True}, {"is_gated": True}], ids=str)
def test_a_row_of_inputs_that_are_not_finite_stays_alone(
    level: str, dtype: torch.dtype, kinds: dict[str, bool]
) -> None:
    linear, _, _ = pack(level, dtype, (33, 70), has_bias=False, **kinds)
    x = rows(dtype, 5, 33)
    expected = linear(x)
    x[2] = float("nan")
    found = linear(x)
    assert not found[2].isfinite().any()
    assert torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_long_inputs_go_through_in_panels(level: str, dtype: torch.dtype) -> None:
    """So many rows of so many inputs that they do not stay in a cache together."""
    linear, weight, _ = pack(level, dtype, (9001, 40), has_bias=False)
    x = rows(dtype, 230, 9001)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(linear(x).double(), expected, atol=2e-5, rtol=2**-8)
    assert torch.equal(linear(x[200:207]), linear(x)[200:207])


@pytest.mark.usefixtures("restored_threads")
def test_the_widest_inputs_fit_a_helpers_stack(level: str, dtype: torch.dtype) -> None:
    """Where blocks of rows are widened there; wider ones are refused before any is computed."""
    is_limited = dtype is torch.bfloat16 and level not in ("v4_amx", "v4_bf16")
    linears = NativeLinears(kernels_of(level), dtype)
    most = max_inputs(str(dtype).removeprefix("torch."), has_codes=False, level_name=level)
    assert most == ((57344 if linears.tile == 32 else 76458) if is_limited else None)
    num_inputs = most or 80000
    weight, x = rows(dtype, 200, num_inputs), rows(dtype, 17, num_inputs)
    torch.set_num_threads(3)
    found, expected = linears.pack(weight)(x).double(), x.double() @ weight.double().T
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=2**-8)
    if is_limited:
        told = f"take bfloat16 matrices of {num_inputs} inputs at most, not {num_inputs + 1}"
        with pytest.raises(ValueError, match=f"^kernels of level {level} {told}$"):
            linears.pack(torch.zeros(1, num_inputs + 1, dtype=dtype))
