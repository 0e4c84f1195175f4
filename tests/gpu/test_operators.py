"""The fused kernels, run by the interpreter, against the torch functions; a row's bits, alone and with others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.attention.base import AttentionPlan
from model.config import Rope
from model.gpu import operators
from model.kv_cache import KVCache
from model.operators import rms_norm, silu_mul
from model.rotary import RotaryTables, rotate

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.bfloat16, torch.float32]
EPSILON = 1e-5
ROWS = 7
PARTS = (slice(0, 1), slice(4, 5), slice(2, 6))
POISON = float("nan")


def random_rows(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1])) * 3).to(dtype)


def every_bfloat16() -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal bits, but for those that say which NaN it is."""
    assert found.dtype is expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    integers = torch.int16 if found.dtype is torch.bfloat16 else torch.int32
    is_number = ~found.isnan()
    assert torch.equal(found[is_number].view(integers), expected[is_number].view(integers))


def assert_rounds_alike(found: Tensor, expected: Tensor, atol: float = 1e-30, most_tipped: float = 0.01) -> None:
    """Equal but for float32 rounding, which now and then tips a rounding to bfloat16 the other way, twice at most."""
    rtol = 2**-7 if found.dtype is torch.bfloat16 else 2e-6
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)
    if found.dtype is torch.bfloat16:
        num_tipped = int(((found != expected) & ~found.isnan()).sum())
        assert num_tipped <= most_tipped * found.numel()


def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel's (residual_out, out)."""
    stream, out = torch.full_like(x, POISON), torch.full_like(x, POISON)
    operators.add_rms_norm(x, residual, weight, EPSILON, out, stream)
    return stream, out


def norm(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.full_like(x, POISON)
    operators.add_rms_norm(x, None, weight, EPSILON, out, None)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 192, 1001])
def test_add_and_norm(dtype: torch.dtype, width: int) -> None:
    x, residual = random_rows(dtype, 2 * ROWS, width).chunk(2)
    x, residual, weight = x.clone(), residual.clone(), random_rows(dtype, width)
    stream, out = add_and_norm(x, residual, weight)
    assert_same(stream, residual + x)
    assert_rounds_alike(out, rms_norm(residual + x, weight, EPSILON))
    assert_same(norm(stream, weight), out)
    for rows in PARTS:
        part = add_and_norm(x[rows].clone(), residual[rows].clone(), weight)
        assert_same(part[0], stream[rows])
        assert_same(part[1], out[rows])
    operators.add_rms_norm(x, residual, weight, EPSILON, x, residual)
    assert_same(residual, stream)
    assert_same(x, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_stream_of_every_bfloat16(dtype: torch.dtype) -> None:
    """Sums of numbers that are about as large, so that roundings, ties and numbers below the normal ones are met."""
    x = every_bfloat16().view(16, 4096)
    residual = (x.view(torch.int16) + 101).view(torch.bfloat16)
    x, residual = x.to(dtype), residual.to(dtype)
    stream, _ = add_and_norm(x, residual, torch.ones(4096, dtype=dtype))
    assert_same(stream, residual + x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_large_and_tiny_rows(dtype: torch.dtype) -> None:
    """Squares that overflow or vanish; and what is no number stays in its row."""
    x, weight = random_rows(dtype, 8, 40), random_rows(dtype, 40)
    for row, scale in enumerate((1e30, 1e17, 1e-12, 1e-30, 1e-39, 0.0)):
        x[row] = (x[row].double() * scale).to(dtype)
    x[6, 3], x[7, 39] = float("nan"), float("inf")
    found = norm(x, weight)
    assert_rounds_alike(found, rms_norm(x, weight, EPSILON), atol=1e-37)
    assert found.isfinite().all(dim=1).tolist() == [True] * 6 + [False] * 2
    assert found.isnan().sum(dim=1).tolist() == [0] * 6 + [40, 1]


def test_the_widest_row_and_a_wider_one() -> None:
    x, weight = random_rows(torch.float32, 1, operators.MAX_WIDTH), torch.ones(operators.MAX_WIDTH)
    assert_rounds_alike(norm(x, weight), rms_norm(x, weight, EPSILON))
    with pytest.raises(ValueError, match="take at most 16384, not 16385"):
        norm(torch.ones(1, operators.MAX_WIDTH + 1), torch.ones(operators.MAX_WIDTH + 1))


def test_buffers_that_would_change_the_code_are_refused() -> None:
    rows, weight = torch.ones(3, 5), torch.ones(5)
    with pytest.raises(AssertionError, match="aligned"):
        norm(rows[1:], weight)
    with pytest.raises(AssertionError, match="contiguous"):
        norm(torch.ones(5, 3).T, weight)


class Heads(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_norms: bool
    integers: torch.dtype


HEADS = [
    Heads(4, 2, 8, False, torch.int32),
    Heads(3, 1, 80, False, torch.int64),
    Heads(2, 2, 64, True, torch.int32),
    Heads(6, 2, 24, True, torch.int64),
]
NUM_BLOCKS, BLOCK_SIZE, NUM_POSITIONS = 5, 4, 300


class Step:
    """Tokens of one layer in random places of the cache; the second and the last are padding, full of poison."""

    PADDING = torch.tensor([False, True, False, False, False, False, True])

    def __init__(self, dtype: torch.dtype, heads: Heads) -> None:
        self.heads = heads
        num_rows = heads.num_heads + 2 * heads.num_kv_heads
        self.qkv = random_rows(dtype, ROWS, num_rows, heads.head_dim)
        self.qkv[self.PADDING] = POISON
        places = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=torch.Generator().manual_seed(0))[:ROWS]
        self.blocks = (places // BLOCK_SIZE).masked_fill(self.PADDING, -1)
        self.offsets = (places % BLOCK_SIZE).masked_fill(self.PADDING, 2**20)
        self.positions = torch.tensor([0, -(2**30), 1, 17, NUM_POSITIONS - 1, 64, 2**30])
        self.tables = RotaryTables(Rope(1e4), heads.head_dim, NUM_POSITIONS)
        self.norms: tuple[Tensor, Tensor] | None = None
        if heads.has_norms:
            self.norms = random_rows(dtype, heads.head_dim), random_rows(dtype, 1, heads.head_dim)[0] + 1

    def empty_cache(self) -> KVCache:
        config = SimpleNamespace(num_layers=1, num_kv_heads=self.heads.num_kv_heads, head_dim=self.heads.head_dim)
        cache = KVCache(config, NUM_BLOCKS, BLOCK_SIZE, self.qkv.dtype)  # type: ignore[arg-type]
        for tensor in (cache.k[0], cache.v[0]):
            tensor.fill_(POISON)
        return cache

    def run(self, tokens: slice) -> tuple[Tensor, KVCache]:
        """The kernel's queries, and a cache that holds these tokens only."""
        cache, heads = self.empty_cache(), self.heads
        qkv = self.qkv[tokens].clone()
        q_out = qkv.new_full((qkv.shape[0], heads.num_heads, heads.head_dim), POISON)
        positions, blocks, offsets = (
            whole[tokens].to(heads.integers) for whole in (self.positions, self.blocks, self.offsets)
        )
        q_norm, k_norm = self.norms or (None, None)
        operators.rotate_and_write(
            qkv,
            positions,
            self.tables.cos_PD,
            self.tables.signed_sin_PD,
            cache.k[0],
            cache.v[0],
            blocks,
            offsets,
            q_out,
            q_norm_D=q_norm,
            k_norm_D=k_norm,
            epsilon=EPSILON,
        )
        return q_out, cache

    def run_torch(self) -> tuple[Tensor, KVCache]:
        """The same of all tokens by the torch functions, which know no padding."""
        is_real, num_heads = ~self.PADDING, self.heads.num_heads
        q, k, v = self.qkv[is_real].split((num_heads, self.heads.num_kv_heads, self.heads.num_kv_heads), dim=1)
        if self.norms is not None:
            q, k = rms_norm(q, self.norms[0], EPSILON), rms_norm(k, self.norms[1], EPSILON)
        rotation = self.tables.at(self.positions[is_real])
        q_out = self.qkv.new_zeros(ROWS, num_heads, self.heads.head_dim)
        q_out[is_real] = rotate(q, *rotation)
        cache, nothing = self.empty_cache(), torch.empty(0, dtype=torch.int32)
        plan = AttentionPlan(nothing, nothing, nothing, self.blocks[is_real], self.offsets[is_real])
        cache.write(0, rotate(k, *rotation), v, plan)
        return q_out, cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rotate_and_write(dtype: torch.dtype, heads: Heads) -> None:
    """All of the cache: what is written, and the poison that is left alone."""
    step = Step(dtype, heads)
    (q, cache), (expected_q, expected_cache) = step.run(slice(None)), step.run_torch()
    assert_alike = assert_rounds_alike if heads.has_norms else assert_same
    # After a norm, the two products of a rotation may all but cancel.
    options = {"atol": 4e-2 if dtype is torch.bfloat16 else 4e-6} if heads.has_norms else {}
    assert_alike(q, expected_q, **options)
    assert_alike(cache.k[0], expected_cache.k[0], **options)
    assert_same(cache.v[0], expected_cache.v[0])
    assert q[step.PADDING].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone_is_rotated_and_written_as_among_others(dtype: torch.dtype) -> None:
    step = Step(dtype, HEADS[-1])
    q, cache = step.run(slice(None))
    for index in range(ROWS):
        q_alone, cache_alone = step.run(slice(index, index + 1))
        assert_same(q_alone[0], q[index])
        place = int(step.blocks[index]), slice(None), int(step.offsets[index])
        for found, expected in ((cache_alone.k[0], cache.k[0]), (cache_alone.v[0], cache.v[0])):
            if not step.PADDING[index]:
                assert_same(found[place], expected[place])
                found[place] = POISON
            assert found.isnan().all()


def test_large_numbers_and_no_numbers_stay_in_their_head() -> None:
    step = Step(torch.bfloat16, HEADS[0])
    step.qkv[2, 1, 3], step.qkv[3, 2], step.qkv[4, 4, 0] = float("inf"), 3e38, POISON
    (q, cache), (expected_q, expected_cache) = step.run(slice(None)), step.run_torch()
    assert_same(q, expected_q)
    assert_same(cache.k[0], expected_cache.k[0])
    assert q.isfinite().all(dim=-1).logical_not().nonzero().tolist() == [[2, 1], [3, 2]]


GATES = {
    "silu": silu_mul,
    "gelu_tanh": lambda gate_up: (
        functional.gelu(gate_up.chunk(2, dim=-1)[0], approximate="tanh") * gate_up.chunk(2, dim=-1)[1]
    ),
}
GATE_TOLERANCE = {"silu": (1e-30, 0.01), "gelu_tanh": (2e-5, 0.1)}
"""torch's GELU loses what is far below zero in 1 + tanh(): an error of float32's precision at 1, times gate and up."""


def gated(gate_up: Tensor, kind: operators.Activation) -> Tensor:
    out = gate_up.new_full((gate_up.shape[0], gate_up.shape[1] // 2), POISON)
    operators.gated_mul(gate_up, out, kind)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("width", [1, 77, 1025])
def test_gates(dtype: torch.dtype, kind: operators.Activation, width: int) -> None:
    gate_up = random_rows(dtype, ROWS, 2 * width)
    gate_up[3, -1] = POISON
    found = gated(gate_up, kind)
    assert_rounds_alike(found, GATES[kind](gate_up), *GATE_TOLERANCE[kind])
    assert found.isnan().nonzero().tolist() == [[3, width - 1]]
    for rows in PARTS:
        assert_same(gated(gate_up[rows].clone(), kind), found[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATES)
def test_gates_of_every_bfloat16(dtype: torch.dtype, kind: operators.Activation) -> None:
    gates = every_bfloat16().to(dtype).view(16, 4096)
    gate_up = torch.cat((gates, torch.full_like(gates, 0.5)), dim=1)
    assert_rounds_alike(gated(gate_up, kind), GATES[kind](gate_up), *GATE_TOLERANCE[kind])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 1001])
def test_rows_are_gathered_and_padding_is_zero(dtype: torch.dtype, width: int) -> None:
    x, rows = random_rows(dtype, ROWS, width), torch.tensor([6, 0, -1, 3, 6])
    x[3] = POISON
    expected = x[rows].masked_fill(rows[:, None] < 0, 0.0)
    for wanted in (slice(0, 5), slice(1, 2), slice(2, 3), slice(0, 0)):
        for integers in (torch.int32, torch.int64):
            out = x.new_full((wanted.stop - wanted.start, width), POISON)
            operators.gather_rows(x, rows[wanted].to(integers), out)
            assert_same(out, expected[wanted])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 1001])
def test_tokens_are_embedded_by_id_or_by_slot(dtype: torch.dtype, width: int) -> None:
    """Slots of tokens whose id is known are not read."""
    embedding = random_rows(dtype, 11, width)
    last_tokens = torch.tensor([5, 10, 2], dtype=torch.int32)
    ids = torch.tensor([3, -1, 0, -1, 10], dtype=torch.int32)
    slots = torch.tensor([2**30, 1, -(2**30), 0, 2**30], dtype=torch.int32)
    expected = embedding[[3, 10, 0, 5, 10]]
    for tokens in (slice(0, 5), slice(1, 2), slice(2, 3)):
        out = embedding.new_full((tokens.stop - tokens.start, width), POISON)
        operators.embed(ids[tokens], slots[tokens], last_tokens, embedding, out)
        assert_same(out, expected[tokens])


def test_variants_fit_their_kernels() -> None:
    variants = operators.variants()
    assert len({variant.name for variant in variants}) == len(variants) == 16
    for variant in variants:
        assert sorted([*variant.signature, *variant.constants]) == sorted(variant.kernel.arg_names)
