"""The compiled operators against torch's, on every instruction set that runs here, and their equal bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.attention.base import AttentionPlan
from model.config import Rope
from model.kv_cache import KVCache
from model.native.levels import library_path, runnable_levels
from model.operators import TORCH, Operators, load_operators
from model.operators_native import load
from model.rotary import RotaryTables

LEVELS = [level.name for level in runnable_levels() if library_path("rowwise", level).exists()]
DTYPES = [torch.bfloat16, torch.float32]

needs_kernels = pytest.mark.skipif(not LEVELS, reason="native kernels are not built: python -m model.native.build")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return request.param


def random_rows(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1])) * 3).to(dtype)


def assert_rounds_alike(found: Tensor, expected: Tensor) -> None:
    """Equal but for float32 rounding, which now and then tips a rounding to bfloat16 the other way, twice at most."""
    assert found.dtype is expected.dtype and found.is_contiguous()
    rtol = 2**-7 if found.dtype is torch.bfloat16 else 2e-6
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-30)
    if found.dtype is torch.bfloat16:
        assert (found != expected).float().mean() < 0.01


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 33, 192, 1001])
def test_norm(level: str, dtype: torch.dtype, width: int) -> None:
    x, weight = random_rows(dtype, 70, width), random_rows(dtype, width)
    operators = load(dtype, level)
    found = operators.rms_norm(x, weight, 1e-5)
    assert_rounds_alike(found, TORCH.rms_norm(x, weight, 1e-5))
    assert torch.equal(operators.rms_norm(x[7:19], weight, 1e-5), found[7:19])
    assert operators.rms_norm(torch.zeros_like(x), weight, 1e-5).abs().max() == 0


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 33, 512, 1999])
def test_silu_mul(level: str, dtype: torch.dtype, width: int) -> None:
    x = random_rows(dtype, 70, 2 * width) * 4
    operators = load(dtype, level)
    found = operators.silu_mul(x)
    assert_rounds_alike(found, TORCH.silu_mul(x))
    assert torch.equal(operators.silu_mul(x[7:19]), found[7:19])


@needs_kernels
def test_silu_of_every_bfloat16(level: str) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    gate_up = torch.stack((every, torch.ones_like(every)), dim=1)
    assert_rounds_alike(load(torch.bfloat16, level).silu_mul(gate_up), TORCH.silu_mul(gate_up))
    edges = torch.tensor([[float("inf"), 1.0], [float("nan"), 1.0]]).bfloat16()
    assert load(torch.bfloat16, level).silu_mul(edges).isfinite().sum() == 0


class Step:
    """Tokens of one layer at scattered places of a cache."""

    def __init__(self, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, num_tokens: int) -> None:
        num_heads, self.num_kv_heads = heads
        self.qkv = random_rows(dtype, num_tokens, num_heads + 2 * self.num_kv_heads, head_dim)
        self.rotation = RotaryTables(Rope(1e4), head_dim, 300).at(torch.arange(num_tokens) * 3)
        places = torch.randperm(20 * 8, generator=torch.Generator().manual_seed(0))[:num_tokens]
        self.places = (places // 8, places % 8)

    def run(self, operators: Operators, tokens: slice) -> tuple[Tensor, KVCache]:
        """Queries, and a cache that holds these tokens only."""
        cache = object.__new__(KVCache)
        shape = (20, self.num_kv_heads, 8, self.qkv.shape[2])
        cache.k, cache.v = ([torch.zeros(shape, dtype=self.qkv.dtype) for _ in range(2)] for _ in range(2))
        nothing = torch.empty(0, dtype=torch.int32)
        plan = AttentionPlan(nothing, nothing, nothing, *(place[tokens].clone() for place in self.places))
        rotation = (self.rotation[0][tokens].clone(), self.rotation[1][tokens].clone())
        return operators.rotate_and_write(self.qkv[tokens].clone(), rotation, cache, 1, plan), cache


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 1), (4, 4), (6, 2)])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128])
def test_rotation_and_cache_have_torchs_bits(
    level: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int
) -> None:
    step, operators = Step(dtype, heads, head_dim, 90), load(dtype, level)
    for tokens in (slice(0, 90), slice(11, 12), slice(5, 38)):
        q, cache = step.run(operators, tokens)
        expected_q, expected_cache = step.run(TORCH, tokens)
        assert torch.equal(q, expected_q) and q.is_contiguous()
        for found, expected in ((cache.k, expected_cache.k), (cache.v, expected_cache.v)):
            assert all(map(torch.equal, found, expected))


@needs_kernels
@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_bits(level: str, dtype: torch.dtype) -> None:
    operators = load(dtype, level)
    x, weight, step = random_rows(dtype, 400, 512), random_rows(dtype, 512), Step(dtype, (12, 4), 64, 100)
    found = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        q, cache = step.run(operators, slice(0, 100))
        found.append((operators.rms_norm(x, weight, 1e-5), operators.silu_mul(x), q, cache.k[1], cache.v[1]))
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


def test_other_linears_keep_torchs_operators() -> None:
    assert load_operators("plain", torch.float32) is TORCH
    with pytest.raises(ValueError, match="take bfloat16 and float32"):
        load(torch.float16)
