"""The compiled operators against torch's, on every instruction set that runs here, and their equal bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model.attention.base import AttentionPlan, Layout
from model.config import Rope
from model.kv_cache import KVCache
from model.linear_native import NativeLinears
from model.operators import TORCH, Operators, silu_mul
from model.operators_native import load
from model.rotary import RotaryTables
from tests.model.layouts import keys_as_dots, keys_as_plain, values_as_dots, values_as_plain
from tests.model.levels import LEVELS, kernels_of, needs_kernels

DTYPES = [torch.bfloat16, torch.float32]
NUM_BLOCKS, BLOCK_SIZE = 14, 32


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
    operators = load(kernels_of(level), dtype)
    found = operators.rms_norm(x, weight, 1e-5)
    assert_rounds_alike(found, TORCH.rms_norm(x, weight, 1e-5))
    assert torch.equal(operators.rms_norm(x[7:19], weight, 1e-5), found[7:19])
    assert operators.rms_norm(torch.zeros_like(x), weight, 1e-5).abs().max() == 0


@needs_kernels
def test_silu_of_every_bfloat16(level: str) -> None:
    """Inside a gated product that lets one input through to the gate, and has ones on the other side."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()][:, None]
    weight, bias = torch.tensor([[1.0], [0.0]]).bfloat16(), torch.tensor([0.0, 1.0]).bfloat16()
    gated = NativeLinears(kernels_of(level), torch.bfloat16).pack(weight, bias, is_gated=True)
    # A dot product of bfloat16 may take what is below the normal numbers for zero.
    is_normal = every.abs() >= torch.finfo(torch.bfloat16).tiny
    found, expected = gated(every), silu_mul(torch.cat((every, torch.ones_like(every)), dim=1))
    assert_rounds_alike(found[is_normal], expected[is_normal])
    assert found[~is_normal].abs().max() <= torch.finfo(torch.bfloat16).tiny
    edges = torch.tensor([[float("inf")], [float("nan")]]).bfloat16()
    assert gated(edges).isfinite().sum() == 0


def caches(config: SimpleNamespace, dtype: torch.dtype, layout: Layout) -> KVCache:
    """Whatever was there before is poison."""
    cache = KVCache(config, NUM_BLOCKS, BLOCK_SIZE, dtype, layout)  # type: ignore[arg-type]
    for tensor in (*cache.k, *cache.v):
        tensor.fill_(float("nan"))
    return cache


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """NaNs included."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class Step:
    """Tokens of one layer: runs of neighbours as sequences have them, in blocks in random places."""

    RUNS = ((0, 1), (3, 1), (5, 30), (40, 17), (96, 31), (128, 2), (163, 8))
    """(first position, tokens): each run's positions lie behind one another, but for where a block ends."""

    def __init__(self, dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
        num_heads, self.num_kv_heads = heads
        order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0))
        positions = torch.cat([torch.arange(first, first + count) for first, count in self.RUNS])
        self.places = (order[positions // BLOCK_SIZE], positions % BLOCK_SIZE)
        self.num_tokens = len(positions)
        self.qkv = random_rows(dtype, self.num_tokens, num_heads + 2 * self.num_kv_heads, head_dim)
        self.rotation = RotaryTables(Rope(1e4), head_dim, 300).at(torch.arange(self.num_tokens) * 3)
        self.config = SimpleNamespace(num_layers=2, num_kv_heads=self.num_kv_heads, head_dim=head_dim)

    def run(self, operators: Operators, tokens: slice, layout: Layout = Layout.DOTS) -> tuple[Tensor, KVCache]:
        """Queries, and a cache that holds these tokens only."""
        cache = caches(self.config, self.qkv.dtype, layout)
        nothing = torch.empty(0, dtype=torch.int32)
        plan = AttentionPlan(nothing, nothing, nothing, *(place[tokens].clone() for place in self.places))
        rotation = (self.rotation[0][tokens].clone(), self.rotation[1][tokens].clone())
        return operators.rotate_and_write(self.qkv[tokens].clone(), rotation, cache, 1, plan), cache

    def read(self, cache: KVCache, tokens: slice) -> tuple[Tensor, Tensor]:
        """What the cache holds at the places of these tokens: [T, K, D]."""
        blocks, offsets = (place[tokens] for place in self.places)
        plain = cache.k[1], cache.v[1]
        if cache.layout is Layout.DOTS:
            plain = keys_as_plain(cache.k[1]), values_as_plain(cache.v[1])
        return plain[0][blocks, :, offsets], plain[1][blocks, :, offsets]


PARTS = (slice(0, 90), slice(11, 12), slice(1, 2), slice(2, 39))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 1), (4, 4), (6, 2)])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128])
def test_rotation_and_cache_have_torchs_bits(
    level: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int
) -> None:
    """All of the cache: what is written, what is zeroed beside it, and the poison that is left alone."""
    step, operators = Step(dtype, heads, head_dim), load(kernels_of(level), dtype)
    for tokens in PARTS:
        q, cache = step.run(operators, tokens)
        expected_q, expected_cache = step.run(TORCH, tokens)
        assert torch.equal(q, expected_q) and q.is_contiguous()
        for found, expected in ((cache.k, expected_cache.k), (cache.v, expected_cache.v)):
            assert all(map(same_bytes, found, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_either_layout_holds_what_was_written(dtype: torch.dtype, head_dim: int) -> None:
    step = Step(dtype, (4, 2), head_dim)
    for tokens in PARTS:
        _, plain = step.run(TORCH, tokens, Layout.PLAIN)
        _, dots = step.run(TORCH, tokens, Layout.DOTS)
        assert all(map(torch.equal, step.read(plain, tokens), step.read(dots, tokens)))
        assert torch.equal(step.read(dots, tokens)[1], step.qkv[tokens, -2:])
        assert same_bytes(dots.k[1], keys_as_dots(plain.k[1]))
        assert dots.k[0].isnan().all() and dots.v[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operators", ["torch", *LEVELS])
def test_the_second_of_a_pair_is_zero_until_it_is_written(operators: str, dtype: torch.dtype) -> None:
    """And the first of a pair is left alone when only the second is written."""
    way = TORCH if operators == "torch" else load(kernels_of(operators), dtype)
    step = Step(dtype, (4, 2), 24)
    for tokens in (slice(index, index + 1) for index in range(step.num_tokens)):
        _, cache = step.run(way, tokens)
        block, offset = (int(place[tokens]) for place in step.places)
        values = values_as_plain(cache.v[1])
        assert torch.equal(values[block, :, offset], step.qkv[tokens, -2:][0])
        values[block, :, offset] = float("nan")
        if dtype is torch.bfloat16 and offset % 2 == 0:
            assert values[block, :, offset + 1].count_nonzero() == 0
            values[block, :, offset + 1] = float("nan")
        assert values.isnan().all()


def test_layouts_turn_back() -> None:
    for dtype in DTYPES:
        plain = random_rows(dtype, 3, 2, 32, 24)
        assert torch.equal(keys_as_plain(keys_as_dots(plain)), plain)
        assert torch.equal(values_as_plain(values_as_dots(plain)), plain)


def test_blocks_of_another_size_are_refused_by_the_native_layout() -> None:
    config = SimpleNamespace(num_layers=1, num_kv_heads=1, head_dim=8)
    for block_size in (1, 8, 24):
        KVCache(config, 2, block_size, torch.float32, Layout.PLAIN)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"takes multiples of 16, not {block_size}"):
            KVCache(config, 2, block_size, torch.float32, Layout.DOTS)  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_bits(level: str, dtype: torch.dtype) -> None:
    operators = load(kernels_of(level), dtype)
    # Enough of either to be worth a second thread.
    x, weight = random_rows(dtype, 4500, 512), random_rows(dtype, 512)
    step = Step(dtype, (200, 2), 256)
    found = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        q, cache = step.run(operators, slice(0, 90))
        found.append((operators.rms_norm(x, weight, 1e-5), q, cache.k[1], cache.v[1]))
    assert all(same_bytes(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@needs_kernels
def test_other_dtypes_are_refused() -> None:
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match="take bfloat16 and float32"):
            load(kernels_of(LEVELS[0]), dtype)
        with pytest.raises(ValueError, match="take bfloat16 and float32"):
            NativeLinears(kernels_of(LEVELS[0]), dtype)
