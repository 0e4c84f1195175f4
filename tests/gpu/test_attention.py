"""The kernels of paged attention against the reference, and their equal bits, in Triton's interpreter.

Tiles, blocks and splits are small, so that short contexts have several of each.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from model.attention.base import AttentionPlan
from model.attention.reference import ReferenceAttention
from model.gpu.attention import Heads, PagedAttention, Tile, variants

DTYPES = [torch.float32, torch.bfloat16]
DECODE = Tile(num_lanes=16, num_keys=16, split=32, num_warps=4, num_stages=3)
PREFILL = Tile(num_lanes=32, num_keys=16, split=64, num_warps=4, num_stages=3)
HEADS = Heads(num_heads=2, num_kv_heads=1, head_dim=32, block_size=16, scale=0.2)
MIXED = [(1, 1), (70, 1), (37, 37), (0, 1), (90, 21), (100, 1), (16, 2)]
BORDERS = [(1, 1), (15, 1), (16, 1), (17, 1), (32, 1), (33, 1), (64, 1), (65, 1), (64, 16), (65, 17), (16, 16), (33, 2)]
UNTOUCHED = 7.0
"""What results are filled with before anything is computed."""


@dataclasses.dataclass
class Case:
    """One layer's cache and a step over it. `spans` are (context length, new tokens) by row.

    Unless `given_prompts` says otherwise, rows of one token decode and others bring a part of their prompt.
    """

    heads: Heads
    spans: list[tuple[int, int]]
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    tables: torch.Tensor
    sinks: torch.Tensor | None = None
    given_prompts: list[int] | None = None

    @property
    def prompts(self):
        return self.given_prompts or [0 if tokens == 1 else context for context, tokens in self.spans]

    @property
    def lengths(self):
        return self.starts.numpy(), self.contexts.numpy(), np.array(self.prompts)

    @property
    def starts(self):
        return torch.tensor([0, *itertools.accumulate(tokens for _, tokens in self.spans)], dtype=torch.int32)

    @property
    def contexts(self):
        return torch.tensor([context for context, _ in self.spans], dtype=torch.int32)

    def run(self, decode=DECODE, prefill=PREFILL, num_programs=3, is_decode_only=False):
        attention = PagedAttention(
            self.heads,
            max_rows=max(len(self.spans), len(self.q)),
            max_tokens=len(self.q),
            max_context=max(int(self.contexts.max()), 1),
            num_programs=num_programs,
            device=torch.device("cpu"),
            decode=decode,
            prefill=prefill,
        )
        plan = torch.from_numpy(attention.plan(*self.lengths))
        out = torch.full_like(self.q, UNTOUCHED, memory_format=torch.contiguous_format)
        tensors = self.q, self.k_cache, self.v_cache, self.tables, out, self.sinks
        attention.attend(*tensors, plan=plan, is_decode_only=is_decode_only)
        return out

    def reference(self):
        """In float32 arithmetic, whatever the dtype."""
        nothing = torch.empty(0, dtype=torch.int64)
        plan = AttentionPlan(self.starts, self.contexts, self.tables, nothing, nothing)
        return ReferenceAttention().attend(
            self.q.float(),
            self.k_cache.float(),
            self.v_cache.float(),
            plan,
            self.heads.scale,
            window=self.heads.window,
            soft_cap=self.heads.soft_cap,
            sinks_H=self.sinks,
        )

    def tokens_of(self, row):
        starts = self.starts.tolist()
        return slice(starts[row], starts[row + 1])

    def part(self, row, first, last):
        """The step that brings only the new tokens [first, last) of one row; later ones are not in its context yet."""
        context, tokens = self.spans[row]
        q = self.q[self.tokens_of(row)][first:last].contiguous()
        return dataclasses.replace(
            self,
            spans=[(context - tokens + last, last - first)],
            q=q,
            tables=self.tables[row : row + 1],
            given_prompts=[self.prompts[row]],
        )


def make_case(spans, heads=HEADS, dtype=torch.float32, has_sinks=False, seed=0):
    """Random queries, and keys and values in blocks in random places. Whatever no row may read is not a number."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [-(-context // heads.block_size) for context, _ in spans]
    order = torch.randperm(sum(sizes) + 2, generator=generator).tolist()
    tables = torch.full((len(spans), max(sizes)), 2**30, dtype=torch.int32)  # an entry that is read in vain would show
    shape = len(order), heads.num_kv_heads, heads.block_size, heads.head_dim
    caches = torch.full((2, *shape), float("nan"), dtype=dtype)
    for row, (size, (context, tokens)) in enumerate(zip(sizes, spans, strict=True)):
        first_seen = max(0, context - tokens - heads.window + 1) if heads.window else 0
        for i in range(size):
            block = tables[row, i] = order.pop()
            first, end = (max(0, min(heads.block_size, p - i * heads.block_size)) for p in (first_seen, context))
            numbers = torch.randn(2, heads.num_kv_heads, end - first, heads.head_dim, generator=generator)
            caches[:, block, :, first:end] = numbers.to(dtype)
    q = torch.randn(sum(tokens for _, tokens in spans), heads.num_heads, heads.head_dim, generator=generator).to(dtype)
    sinks = torch.randn(heads.num_heads, generator=generator) * 3 if has_sinks else None
    return Case(heads, spans, q, *caches, tables, sinks)


def assert_close(case, **options):
    """Equal to the reference but for rounding: of float32 sums, and where bfloat16 is rounded to.

    That is each weight, which moves a result by a part of the weighed magnitudes of the values, and the result. The
    interpreter cuts bits off where a card rounds to the nearest: that part is 2^-7, twice a card's.
    """
    found = case.run(**options)
    # The reference multiplies what a window hides by zero.
    seen = dataclasses.replace(case, k_cache=case.k_cache.nan_to_num(), v_cache=case.v_cache.nan_to_num())
    expected = seen.reference()
    bound = 4e-6 + 1e-5 * expected.abs()
    if case.q.dtype is torch.bfloat16:
        magnitudes = dataclasses.replace(seen, v_cache=seen.v_cache.abs()).reference()
        bound = 2**-7 * (magnitudes + expected.abs()) + 1e-5
    for row, (context, _) in enumerate(case.spans):
        tokens = case.tokens_of(row)
        if context:
            assert ((found[tokens].float() - expected[tokens]).abs() <= bound[tokens]).all(), f"row {row}"
        else:
            assert (found[tokens] == UNTOUCHED).all(), f"padding, row {row}"


def variant_of(**changes):
    return dataclasses.replace(HEADS, **changes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads",
    [
        variant_of(num_kv_heads=2),
        variant_of(num_heads=6, num_kv_heads=2),
        variant_of(num_heads=16, head_dim=24),
        variant_of(head_dim=64),
    ],
    ids=["each its own", "groups of three", "one for all, 24 wide", "64 wide"],
)
def test_heads(heads, dtype):
    assert_close(make_case(MIXED, heads, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("soft_cap", "has_sinks"), [(2.0, False), (0.0, True), (5.0, True)])
@pytest.mark.parametrize("window", [None, 20])
def test_soft_cap_and_sinks(window, soft_cap, has_sinks, dtype):
    assert_close(make_case(MIXED, variant_of(window=window, soft_cap=soft_cap), dtype, has_sinks))


@pytest.mark.parametrize("window", [1, 5, 16, 40, 1000])
def test_windows(window):
    """Shorter than a tile, of its size, across splits, and longer than any context. What lies before is never read."""
    assert_close(make_case(MIXED, variant_of(window=window)))


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_blocks_and_tiles_of_keys(block_size):
    """A tile of two blocks, of one, and of half of one."""
    decode, prefill = (dataclasses.replace(tile, num_keys=32) for tile in (DECODE, PREFILL))
    assert_close(make_case(MIXED, variant_of(block_size=block_size, window=35)), decode=decode, prefill=prefill)


@pytest.mark.parametrize("window", [None, 16])
def test_borders_of_tiles_and_splits(window):
    assert_close(make_case(BORDERS, variant_of(window=window)))


def test_more_splits_than_peaks_are_read_at_a_time():
    assert_close(make_case([(560, 1), (530, 3)], variant_of(block_size=64)), prefill=DECODE)


def test_large_scores():
    """Peaks far from zero on either side, where a weight that is not taken from its peak overflows or vanishes."""
    case = make_case([(70, 1), (40, 10)])
    for sign in (1, -1):
        case.k_cache, case.q = case.k_cache.abs() * sign * 30, case.q.abs() * 30
        seen = dataclasses.replace(case, k_cache=case.k_cache.nan_to_num(), v_cache=case.v_cache.nan_to_num())
        torch.testing.assert_close(case.run(), seen.reference(), atol=2e-3, rtol=2e-3)


def test_queries_within_wider_rows():
    case = make_case(MIXED)
    wide = torch.cat([case.q, torch.full_like(case.q, float("nan"))], dim=1)
    expected, case.q = case.run(), wide[:, : HEADS.num_heads]
    assert torch.equal(case.run(), expected)


def test_decode_alone():
    case = make_case([(70, 1), (0, 1), (3, 1)])
    assert torch.equal(case.run(is_decode_only=True), case.run())


def test_mere_padding():
    assert (make_case([(0, 1), (0, 1), (0, 0)]).run() == UNTOUCHED).all()


def test_a_plan_replaces_the_last_one():
    """One object serves step after step; of a longer plan nothing is left."""
    case = make_case([(70, 1), (37, 37), (90, 30)])
    limits = {"max_rows": 3, "max_tokens": 68, "max_context": 90, "num_programs": 2, "device": torch.device("cpu")}
    attention = PagedAttention(HEADS, **limits, decode=DECODE, prefill=PREFILL)
    words = torch.zeros(attention.num_plan_words, dtype=torch.int32)
    plan = torch.from_numpy(attention.plan(*case.lengths))
    words[: len(plan)] = plan
    out = torch.empty_like(case.q)
    attention.attend(case.q, case.k_cache, case.v_cache, case.tables, out, plan=words)
    assert torch.equal(out, case.run())
    part = case.part(1, 0, 37)
    plan = torch.from_numpy(attention.plan(*part.lengths))
    words[: len(plan)] = plan
    out = torch.full_like(case.q, UNTOUCHED)
    attention.attend(part.q, part.k_cache, part.v_cache, part.tables, out, plan=words)
    assert torch.equal(out[:37], part.run()) and (out[37:] == UNTOUCHED).all()


# Equal bits. Where there is a soft cap, there are sinks too.

OPTIONS = [HEADS, variant_of(window=23), variant_of(window=40, soft_cap=3.0)]
BITS = [(HEADS, torch.float32), (HEADS, torch.bfloat16), (OPTIONS[1], torch.float32), (OPTIONS[2], torch.bfloat16)]


@pytest.mark.parametrize(("heads", "dtype"), BITS, ids=["plain", "plain bfloat16", "window", "everything"])
@pytest.mark.usefixtures("_one_by_one")
def test_a_row_alone_has_the_same_bits(heads, dtype):
    case = make_case(MIXED, heads, dtype, has_sinks=heads.soft_cap > 0)
    together = case.run()
    for row, (context, tokens) in enumerate(case.spans):
        if context:
            assert torch.equal(case.part(row, 0, tokens).run(num_programs=1), together[case.tokens_of(row)])


@pytest.mark.parametrize(("heads", "dtype"), BITS, ids=["plain", "plain bfloat16", "window", "everything"])
@pytest.mark.usefixtures("_one_by_one")
@pytest.mark.parametrize(("num_prompt", "cuts"), [(70, ([64, 6], [7, 2, 27, 34], [69, 1])), (41, ([40, 1, 1, 28],))])
def test_a_sequence_in_chunks_has_the_same_bits(heads, dtype, num_prompt, cuts):
    """Also in chunks of one token; and what lies behind the prompt, as decoding it does one by one."""
    case = make_case([(70, 70)], heads, dtype, has_sinks=heads.soft_cap > 0)
    case.given_prompts = [num_prompt]
    whole = case.run()
    for chunks in cuts:
        ends = list(itertools.accumulate(chunks))
        parts = [case.part(0, end - size, end).run() for size, end in zip(chunks, ends, strict=True)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("num_programs", [1, 7, 50])
@pytest.mark.usefixtures("_one_by_one")
def test_any_grid_has_the_same_bits(num_programs):
    case = make_case(MIXED)
    assert torch.equal(case.run(num_programs=num_programs), case.run())


@pytest.mark.parametrize("heads", OPTIONS, ids=["plain", "window", "everything"])
@pytest.mark.usefixtures("_one_by_one")
def test_with_one_tile_for_all_decode_and_prefill_have_the_same_bits(heads):
    case = make_case([(70, 70)], heads, torch.bfloat16, has_sinks=heads.soft_cap > 0)
    prompt = case.run(prefill=DECODE)
    for i in range(0, 70, 9):
        assert torch.equal(case.part(0, i, i + 1).run(prefill=DECODE), prompt[i : i + 1])


@pytest.mark.usefixtures("_one_by_one")
def test_blocks_in_other_places_have_the_same_bits():
    case = make_case(MIXED)
    order = torch.randperm(len(case.k_cache), generator=torch.Generator().manual_seed(1))
    known = case.tables < len(order)
    tables = torch.where(known, order.argsort()[torch.where(known, case.tables, 0).long()].int(), case.tables)
    moved = dataclasses.replace(case, k_cache=case.k_cache[order], v_cache=case.v_cache[order], tables=tables)
    assert torch.equal(moved.run(), case.run())


def test_limits_and_sizes_are_checked():
    limits = {"max_rows": 2, "max_tokens": 4, "max_context": 32, "num_programs": 1, "device": torch.device("cpu")}
    attention = PagedAttention(HEADS, **limits)
    for spans in ([(1, 1)] * 3, [(9, 5)], [(33, 1)]):
        case = make_case(spans)
        with pytest.raises(ValueError, match="are planned for"):
            attention.plan(*case.lengths)
    with pytest.raises(ValueError, match="3 tokens lie behind their prompts, of 2 at most"):
        attention.plan(np.array([0, 4], np.int32), np.array([4], np.int32), np.array([1]))
    for heads, tile, said in [
        (variant_of(num_kv_heads=3), DECODE, "no multiple of 3"),
        (variant_of(num_heads=40), DECODE, "no place"),
        (variant_of(block_size=48), DECODE, "power of two"),
        (HEADS, dataclasses.replace(DECODE, num_lanes=8), "power of two"),
        (HEADS, dataclasses.replace(DECODE, split=40), "no multiple of 16"),
    ]:
        with pytest.raises(ValueError, match=said):
            PagedAttention(heads, **limits, decode=tile)


def test_variants_are_all_there_is():
    listed = variants()
    assert len({variant.name for variant in listed}) == len(listed) == 10
    for variant in listed:
        assert {*variant.signature, *variant.constants} == set(variant.kernel.arg_names)
        assert set(variant.aligned) <= set(variant.signature)
