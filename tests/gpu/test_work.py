"""The plan of a step's attention: every token meets every position that it sees, once, and its parts come together."""

import itertools

import numpy as np
import pytest

from model.gpu.work import HEADER_SIZE, ITEM_SIZE, MERGE_SIZE, Cut, capacity_of, plan_work


def lists_of(plan):
    """Items of decode, items of prefill, merges."""
    num_decode, num_prefill, num_merges = plan[:3].tolist()
    assert not plan[3:HEADER_SIZE].any()
    ends = np.cumsum([HEADER_SIZE, num_decode * ITEM_SIZE, num_prefill * ITEM_SIZE, num_merges * MERGE_SIZE])
    assert ends[-1] == len(plan)
    decode, prefill, merges = (plan[first:end] for first, end in itertools.pairwise(ends))
    return decode.reshape(-1, ITEM_SIZE), prefill.reshape(-1, ITEM_SIZE), merges.reshape(-1, MERGE_SIZE)


def batch_of(spans):
    """query_starts, context_lens and prompt_lens of rows of these (context length, new tokens, prompt)."""
    starts = np.cumsum([0, *(tokens for _, tokens, _ in spans)], dtype=np.int32)
    return starts, *(np.array([span[place] for span in spans], np.int32) for place in (0, 2))


def random_spans(rng, num_rows):
    """Decoding rows, prompts, later chunks, of prompts, of what follows or of both; padding with and without tokens."""
    spans = []
    for _ in range(num_rows):
        context = int(rng.integers(1, 200))
        tokens = int(rng.choice([1, context, rng.integers(1, context + 1)]))
        prompt = int(rng.choice([1, context, context - tokens, rng.integers(1, context + 9)]))
        context, tokens = [(context, tokens), (context, tokens), (0, 1), (0, 0), (context, 0)][rng.integers(5)]
        spans.append((context, tokens, prompt))
    return spans


def check(spans, decode, prefill):
    starts, contexts, prompts = batch_of(spans)
    plan = plan_work(starts, contexts, prompts, decode, prefill)
    *kinds, merges = lists_of(plan)
    meetings = np.zeros((starts[-1], max([*contexts, 1])), np.int32)  # of each token with each position
    places = {}  # of each token's partial results, split after split
    for items, cut in zip(kinds, (decode, prefill), strict=True):
        assert (np.diff(items[:, 5] - items[:, 4]) <= 0).all(), "the longest come first"
        for row, first_query, num_queries, first_position, lo, hi, place, num_splits in items.tolist():
            assert (first_position >= spans[row][2]) == (cut is decode)
            assert cut is decode or first_position + num_queries <= spans[row][2]
            assert 0 < num_queries <= cut.num_queries
            assert lo < hi and lo // cut.split == (hi - 1) // cut.split
            for i in range(num_queries):
                position = first_position + i
                assert position - (spans[row][0] - spans[row][1]) == first_query + i - starts[row]
                first_seen = 0 if cut.window is None else max(0, position - cut.window + 1)
                meetings[first_query + i, max(lo, first_seen) : min(hi, position + 1)] += 1
                if num_splits > 1:
                    places.setdefault(first_query + i, {})[lo] = place + i * num_splits
    num_behind = 0
    for row, (context, tokens, prompt) in enumerate(spans):
        for i in range(tokens):
            expected = np.zeros(meetings.shape[1], np.int32)
            position = context - tokens + i
            window = decode.window or context
            num_behind += context > 0 and position >= prompt
            if context:
                expected[max(0, position - window + 1) : position + 1] = 1
            np.testing.assert_array_equal(meetings[starts[row] + i], expected)
    found = {token: list(range(first, first + count)) for token, first, count, _ in merges.tolist()}
    assert len(found) == len(merges)
    assert found == {token: [place for _, place in sorted(of_token.items())] for token, of_token in places.items()}
    everything = sorted(place for of_token in found.values() for place in of_token)
    assert everything == list(range(len(everything))), "no place twice, none unused"
    capacity = capacity_of(decode, prefill, max(len(spans), num_behind), int(starts[-1]), int(max(contexts)))
    assert len(plan) <= capacity.num_words and len(everything) <= capacity.num_partials


@pytest.mark.parametrize("window", [None, 1, 7, 16, 40, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_every_token_meets_what_it_sees_once(seed, window):
    rng = np.random.default_rng(seed)
    for num_rows in (1, 2, 9):
        num_queries, split = int(rng.integers(1, 20)), int(rng.choice([16, 32, 64, 512]))
        check(random_spans(rng, num_rows), Cut(4, 16, window), Cut(num_queries, split, window))


@pytest.mark.parametrize("context", [1, 15, 16, 17, 31, 32, 33, 48])
@pytest.mark.parametrize("window", [None, 16])
def test_borders(context, window):
    half = (context + 1) // 2
    spans = [(context, 1, 0), (context, context, context), (context, half, context), (context, context, half)]
    check(spans, Cut(4, 16, window), Cut(8, 32, window))


def test_no_rows_and_mere_padding():
    for spans in ([], [(0, 0, 0)], [(0, 1, 0), (0, 1, 1)], [(5, 0, 2)]):
        plan = plan_work(*batch_of(spans), Cut(4, 16), Cut(8, 32))
        assert plan.dtype == np.int32 and plan.tolist() == [0] * HEADER_SIZE


def test_a_full_house_fits_exactly():
    """Without a window, as many decoding rows of the longest context as there may be need all that is kept for them."""
    decode, prefill = Cut(4, 16), Cut(8, 1024)
    capacity = capacity_of(decode, prefill, max_rows=3, max_tokens=8, max_context=50)
    plan = plan_work(*batch_of([(50, 1, 9)] * 3), decode, prefill)
    assert plan[:3].tolist() == [12, 0, 3]
    assert capacity.num_partials == 12


def test_a_plan_of_many_rows_is_one_of_its_rows():
    """A row's items are the same in any batch, but for where its tokens and its partial results lie."""
    rng = np.random.default_rng(0)
    spans = random_spans(rng, 12)
    cuts = Cut(4, 16), Cut(8, 32)
    starts, *_ = batch_of(spans)
    decode, prefill, _ = lists_of(plan_work(*batch_of(spans), *cuts))
    together = np.concatenate([decode, prefill])
    for row, span in enumerate(spans):
        alone = np.concatenate(lists_of(plan_work(*batch_of([span]), *cuts))[:2])
        within = together[together[:, 0] == row]
        within[:, 1] -= starts[row]
        np.testing.assert_array_equal(within[:, [1, 2, 3, 4, 5, 7]], alone[:, [1, 2, 3, 4, 5, 7]])
