"""The reference against torch's attention, the native kernel against the reference, and the kernel's equal bits."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from model.attention.base import AttentionPlan, Layout
from model.attention.native import NativeAttention
from model.attention.reference import ReferenceAttention
from tests.model.layouts import keys_as_dots, values_as_dots
from tests.model.levels import LEVELS, kernels_of, needs_kernels

DTYPES = [torch.bfloat16, torch.float32]
DECODE, PREFILL = [(1, 1), (17, 1), (64, 1), (65, 1), (200, 1)], [(1, 1), (33, 33), (150, 86), (70, 7)]
MIXED = [*DECODE, *PREFILL]

pytestmark = needs_kernels


def native(level, dtype, head_dim=64):
    return NativeAttention(kernels_of(level), dtype, head_dim)


@dataclasses.dataclass
class Case:
    """One layer's cache, in the plain layout, and one step over it. `spans` are (context length, new tokens) by row."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    plan: AttentionPlan
    scale: float

    def run(self, backend):
        caches = self.k_cache, self.v_cache
        if backend.layout is Layout.DOTS:
            caches = keys_as_dots(self.k_cache), values_as_dots(self.v_cache)
        return backend.attend(self.q, *caches, self.plan, self.scale)

    def tokens_of(self, row):
        return slice(int(self.plan.query_starts[row]), int(self.plan.query_starts[row + 1]))


def make_plan(spans, tables):
    """A plan for these (context length, new tokens) and these lists of block ids; nothing is written by attention."""
    width = max(map(len, tables))
    num_tokens = sum(tokens for _, tokens in spans)
    return AttentionPlan(
        query_starts=torch.tensor([0, *itertools.accumulate(tokens for _, tokens in spans)], dtype=torch.int32),
        context_lens=torch.tensor([context for context, _ in spans], dtype=torch.int32),
        block_tables=torch.tensor([[*table, *[0] * (width - len(table))] for table in tables], dtype=torch.int32),
        write_blocks_T=torch.zeros(num_tokens, dtype=torch.int64),
        write_offsets_T=torch.zeros(num_tokens, dtype=torch.int64),
    )


def make_case(spans, dtype=torch.bfloat16, heads=(6, 2), head_dim=64, block_size=16, seed=0, poison=float("nan")):
    """Random queries, keys and values in blocks in random places. Whatever no row may read is poisoned.

    A pair of bfloat16 values is read as one, so that the second of a pair that is not written yet is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    sizes = [-(-context // block_size) for context, _ in spans]
    order = torch.randperm(sum(sizes) + 3, generator=generator).tolist()
    tables = [[order.pop() for _ in range(size)] for size in sizes]
    shape = (sum(sizes) + 3, num_kv_heads, block_size, head_dim)
    caches = [torch.full(shape, poison, dtype=dtype) for _ in range(2)]
    for cache in caches:
        for table, (context, _) in zip(tables, spans, strict=True):
            for i, block in enumerate(table):
                used = min(block_size, context - i * block_size)
                cache[block, :, :used] = torch.randn(num_kv_heads, used, head_dim, generator=generator).to(dtype)
                if used % 2 and dtype is torch.bfloat16 and cache is caches[1]:
                    cache[block, :, used] = 0
    q = torch.randn(sum(tokens for _, tokens in spans), num_heads, head_dim, generator=generator).to(dtype)
    return Case(q, *caches, make_plan(spans, tables), head_dim**-0.5)


def row_alone(case, row, first=0, last=None):
    """The step that holds only the tokens [first, last) of one row; the later ones are not in its context yet."""
    tokens = case.tokens_of(row)
    num_tokens = tokens.stop - tokens.start
    last = num_tokens if last is None else last
    context = int(case.plan.context_lens[row]) - (num_tokens - last)
    plan = make_plan([(context, last - first)], [case.plan.block_tables[row].tolist()])
    return dataclasses.replace(case, q=case.q[tokens][first:last].contiguous(), plan=plan)


def assert_close(case, backend):
    """Equal to the reference in float32 arithmetic but for rounding: of float32 sums, and where bfloat16 is rounded to.

    That is each weight, which moves a result by 2^-8 at most of the weighed magnitudes of the values, and the result.
    """
    found = case.run(backend)
    as_float = dataclasses.replace(case, q=case.q.float(), k_cache=case.k_cache.float(), v_cache=case.v_cache.float())
    expected = as_float.run(ReferenceAttention())
    assert found.dtype is case.q.dtype
    if case.q.dtype is torch.float32:
        torch.testing.assert_close(found, expected, atol=4e-6, rtol=1e-5)
        return
    magnitudes = dataclasses.replace(as_float, v_cache=as_float.v_cache.abs()).run(ReferenceAttention())
    bound = 2**-8 * (magnitudes + expected.abs()) + 1e-5
    assert ((found.float() - expected).abs() <= bound).all()


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
def test_reference_equals_torch(heads):
    case = make_case(MIXED, torch.float32, heads)
    found = case.run(ReferenceAttention())
    for row, (context, tokens) in enumerate(MIXED):
        table = case.plan.block_tables[row][: -(-context // 16)].long()
        k, v = (cache[table].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (case.k_cache, case.v_cache))
        mask = torch.ones(tokens, context, dtype=torch.bool).tril(context - tokens)
        q = case.q[case.tokens_of(row)].transpose(0, 1)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(found[case.tokens_of(row)], expected.transpose(0, 1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 80, 128, 256])
def test_head_sizes(level, dtype, head_dim):
    assert_close(make_case(MIXED, dtype, head_dim=head_dim), native(level, dtype, head_dim))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (9, 3), (8, 1), (40, 1), (71, 1)])
@pytest.mark.parametrize("head_dim", [16, 32])
def test_grouped_heads(level, dtype, heads, head_dim):
    assert_close(make_case(MIXED, dtype, heads, head_dim=head_dim), native(level, dtype, head_dim))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 48, 256])
def test_block_sizes(level, dtype, block_size):
    assert_close(make_case(MIXED, dtype, head_dim=32, block_size=block_size), native(level, dtype, 32))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_context(level, dtype):
    assert_close(make_case([(3000, 1), (2500, 40)], dtype), native(level, dtype))


@pytest.mark.parametrize("level", LEVELS)
def test_random_steps(level):
    generator = torch.Generator().manual_seed(5)
    for seed in range(12):
        contexts = torch.randint(1, 160, (5,), generator=generator).tolist()
        spans = [(c, int(torch.randint(1, c + 1, (1,), generator=generator))) for c in contexts]
        assert_close(make_case(spans, head_dim=32, block_size=16, seed=seed), native(level, torch.bfloat16, 32))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scale", [3, 300])
def test_large_scores_do_not_overflow(level, scale):
    """Nor do those that grow from tile to tile, in small steps or in large ones."""
    case = make_case(MIXED, torch.float32)
    case.q.mul_(scale)
    found = case.run(native(level, torch.float32))
    torch.testing.assert_close(found, case.run(ReferenceAttention()), atol=2e-4, rtol=2e-4)
    case = make_case([(3000, 2)], torch.bfloat16)
    case.q.mul_(scale)
    assert_close(case, native(level, torch.bfloat16))


@pytest.mark.parametrize("level", LEVELS)
def test_rows_without_tokens_and_empty_steps(level):
    backend = native(level, torch.bfloat16)
    case = make_case([(9, 0), (30, 2), (5, 0)])
    assert_close(case, backend)
    assert torch.equal(case.run(backend), row_alone(case, 1).run(backend))
    assert make_case([(9, 0)]).run(backend).shape == (0, 6, 64)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (8, 1), (40, 1)])
@pytest.mark.parametrize("head_dim", [24, 32])
def test_a_row_has_the_same_bits_alone_and_in_company(level, dtype, heads, head_dim):
    backend = native(level, dtype, head_dim)
    case = make_case(MIXED, dtype, heads, head_dim=head_dim)
    together = case.run(backend)
    for row in range(len(MIXED)):
        assert torch.equal(together[case.tokens_of(row)], row_alone(case, row).run(backend))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_a_prompt_has_the_same_bits_however_it_is_chunked(level, dtype, chunk):
    backend = native(level, dtype)
    case = make_case([(150, 150)], dtype, (6, 2))
    chunks = [row_alone(case, 0, first, min(150, first + chunk)).run(backend) for first in range(0, 150, chunk)]
    assert torch.equal(torch.cat(chunks), case.run(backend))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 80])
def test_block_ids_and_block_size_change_no_bit(level, dtype, block_size):
    """The same keys and values, laid out in other blocks of another size."""
    backend = native(level, dtype)
    case = make_case([(150, 86)], dtype, block_size=16)
    positions = torch.arange(150)
    blocks = torch.randperm(-(-150 // block_size), generator=torch.Generator().manual_seed(1))
    caches = []
    for cache in (case.k_cache, case.v_cache):
        moved = torch.full((len(blocks), 2, block_size, 64), float("nan"), dtype=cache.dtype)
        old = cache[case.plan.block_tables[0][positions // 16].long(), :, positions % 16]
        moved[blocks[positions // block_size], :, positions % block_size] = old
        caches.append(moved)
    plan = make_plan([(150, 86)], [blocks.tolist()])
    assert torch.equal(Case(case.q, *caches, plan, case.scale).run(backend), case.run(backend))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(level, dtype):
    backend, case, num_threads = native(level, dtype), make_case(MIXED, dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run(backend))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_a_row_may_not_see_does_not_leak(level, dtype, poison):
    """Free blocks, the unused tail of the last block, and what other sequences hold."""
    backend = native(level, dtype)
    clean, poisoned = make_case(MIXED, dtype, poison=0.0), make_case(MIXED, dtype, poison=poison)
    expected = clean.run(backend)
    assert torch.equal(expected, poisoned.run(backend))
    row = MIXED.index((150, 86))
    for block in clean.plan.block_tables[row, : -(-150 // 16)].tolist():
        poisoned.k_cache[block] = poisoned.v_cache[block] = poison
    found = poisoned.run(backend)
    for other in set(range(len(MIXED))) - {row}:
        assert torch.equal(found[clean.tokens_of(other)], expected[clean.tokens_of(other)])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_later_keys_of_the_row_itself_do_not_leak(level, dtype, poison):
    """Its later values may: they are read with weight zero, and a sequence that has a NaN is lost as a whole."""
    backend, case = native(level, dtype), make_case([(150, 86)], dtype, poison=0.0)
    expected = case.run(backend)
    for position in (149, 140, 128):
        case.k_cache[case.plan.block_tables[0, position // 16], :, position % 16] = poison
        num_before = position - (150 - 86)
        assert torch.equal(case.run(backend)[:num_before], expected[:num_before])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_later_values_of_the_row_itself_change_no_bit(level, dtype):
    """Whatever finite numbers are there, as when a prompt is computed in chunks or all at once."""
    backend, case = native(level, dtype), make_case([(150, 86)], dtype, poison=0.0)
    expected = case.run(backend)
    for position in (149, 140, 128):
        block = case.plan.block_tables[0, position // 16]
        case.k_cache[block, :, position % 16] = 3e4
        case.v_cache[block, :, position % 16] = -3e4
        num_before = position - (150 - 86)
        assert torch.equal(case.run(backend)[:num_before], expected[:num_before])


@pytest.mark.parametrize("level", LEVELS)
def test_a_broken_key_breaks_only_those_who_see_it(level):
    backend = native(level, torch.float32)
    case = make_case([(40, 40), (20, 1)], torch.float32, poison=0.0)
    case.k_cache[case.plan.block_tables[0, 0], 0, 3] = float("nan")
    found = case.run(backend)
    assert found[3:40, :3].isnan().all()
    assert found[:3].isfinite().all()
    assert found[:, 3:].isfinite().all()
    assert found[40].isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
def test_the_caches_are_left_alone(level):
    case = make_case(MIXED, poison=0.0)
    tensors = case.q, keys_as_dots(case.k_cache), values_as_dots(case.v_cache)
    before = [tensor.clone() for tensor in tensors]
    native(level, torch.bfloat16).attend(*tensors, case.plan, case.scale)
    assert all(map(torch.equal, before, tensors))


def test_what_the_kernel_does_not_take_is_refused():
    kernels = kernels_of(LEVELS[0])
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match="takes bfloat16 and float32"):
            NativeAttention(kernels, dtype, 64)
    for head_dim in (0, 36, 264):
        with pytest.raises(ValueError, match="head sizes"):
            NativeAttention(kernels, torch.float32, head_dim)


def test_a_cache_of_another_type_or_layout_is_our_mistake():
    case = make_case(DECODE)
    with pytest.raises(AssertionError):
        case.run(native(LEVELS[0], torch.float32))
    with pytest.raises((AssertionError, ValueError)):
        native(LEVELS[0], torch.bfloat16).attend(case.q, case.k_cache, case.v_cache, case.plan, case.scale)
