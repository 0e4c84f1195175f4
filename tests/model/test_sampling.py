"""The sampler against Hugging Face's processors, against the distributions it should draw from, and against itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.interface import Admission, Sampling
from model.sampling import Sampler, SlotState, change, count_kept, keep_first, most_likely, race, rank
from model.transformer import Logits

NAN, INF = float("nan"), float("inf")
CONTEXT_LENGTH = 64
PROMPT = (3, 1, 4, 1, 5)
OUTPUT = (9, 2, 6, 5, 9, 9)
NUM_PROMPT, NUM_KNOWN = len(PROMPT), len(PROMPT) + len(OUTPUT)


def make_sampler(samplings, vocab_size, known=(*PROMPT, *OUTPUT), num_prompt=NUM_PROMPT, **admission):
    """A sampler whose slots hold these tokens and parameters, in order."""
    tokens = torch.zeros(len(samplings), CONTEXT_LENGTH + 1, dtype=torch.int32)
    tokens[:, : len(known)] = torch.tensor(known, dtype=torch.int32)
    sampler = Sampler(len(samplings), vocab_size, tokens)
    for slot, sampling in enumerate(samplings):
        sampler.admit(slot, Admission(known, num_prompt, sampling, **admission))
    return sampler


def sample_one(logits, sampling, position=NUM_KNOWN, **admission):
    sampler = make_sampler([sampling], len(logits), **admission)
    return sampler.sample(Logits.of(logits[None]), [0], [position])


def draws(logits, sampling, num):
    """Tokens drawn at positions 0, 1, ... from the same logits, many rows at a time."""
    sampler = make_sampler([sampling], len(logits))
    return torch.tensor(sampler.sample(Logits.of(logits.expand(num, -1)), [0] * num, range(num)).token_ids)


def random_logits(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def kept_by(logits, sampling):
    """The tokens that our filters leave."""
    scaled = (logits - logits.max()) / sampling.temperature
    keep = most_likely(
        scaled[None],
        scaled.exp()[None],
        torch.tensor([sampling.top_k or len(logits)]),
        torch.tensor([sampling.top_p], dtype=torch.float64),
    )[0]
    return (keep & (scaled.exp() >= sampling.min_p)).nonzero().flatten().tolist()


def kept_by_hugging_face(logits, sampling):
    scores, ids = logits[None], torch.zeros(1, 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p > 0:
        scores = MinPLogitsWarper(sampling.min_p)(ids, scores)
    return scores[0].isfinite().nonzero().flatten().tolist()


def chi_square(drawn, probabilities):
    """Pearson's statistic in standard deviations from its mean; tokens expected fewer than 5 times are pooled."""
    observed = torch.bincount(drawn, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(drawn)
    rare = expected < 5
    if rare.any():
        observed = torch.cat((observed[~rare], observed[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    return (((observed - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees)


FILTERS = [
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=200, temperature=0.7),
    Sampling(top_p=0.5),
    Sampling(top_p=0.9, temperature=1.5),
    Sampling(top_p=0.999, temperature=3.0),
    Sampling(top_p=1e-9),
    Sampling(min_p=0.05),
    Sampling(min_p=1.0),
    Sampling(top_k=20, top_p=0.8),
    Sampling(top_k=300, top_p=0.95, min_p=0.02, temperature=2.0),
]


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
@pytest.mark.parametrize("vocab_size", [40, 301, 4096])
def test_filters_keep_what_hugging_face_keeps(sampling, vocab_size):
    for seed in range(4):
        logits = random_logits(vocab_size, seed=seed)
        assert kept_by(logits, sampling) == kept_by_hugging_face(logits, sampling)


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_only_kept_tokens_are_drawn_and_in_their_proportions(sampling):
    logits = random_logits(301, seed=1)
    kept = kept_by_hugging_face(logits, sampling)
    probabilities = torch.zeros(301)
    probabilities[kept] = (logits[kept] / sampling.temperature).softmax(dim=-1)
    drawn = draws(logits, sampling, 5000)
    assert set(drawn.tolist()) <= set(kept)
    if len(kept) > 1:
        assert chi_square(drawn, probabilities) < 4
    else:
        assert set(drawn.tolist()) == set(kept)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(seed, temperature):
    logits = random_logits(200, seed=3, scale=1.5)
    drawn = draws(logits, Sampling(temperature=temperature, seed=seed), 20_000)
    assert chi_square(drawn, (logits / temperature).softmax(dim=-1)) < 4


def test_draws_over_seeds_follow_the_softmax_too():
    """One position, many requests: seeds must be as good a source as positions."""
    logits = random_logits(100, seed=4, scale=1.5)
    sampler = make_sampler([Sampling(seed=seed) for seed in range(5000)], 100)
    drawn = torch.tensor(sampler.sample(Logits.of(logits.expand(5000, -1)), range(5000), [7] * 5000).token_ids)
    assert chi_square(drawn, logits.softmax(dim=-1)) < 4


def test_positions_next_to_each_other_are_independent():
    drawn = draws(torch.zeros(8), Sampling(seed=11), 20_001)
    assert chi_square(drawn[:-1] * 8 + drawn[1:], torch.full((64,), 1 / 64)) < 4


def test_seeds_and_positions_give_other_draws():
    logits = torch.zeros(4096)
    first, second = draws(logits, Sampling(seed=1), 200), draws(logits, Sampling(seed=2), 200)
    assert (first == second).sum() < 5
    assert len(first.unique()) > 180
    assert torch.equal(first, draws(logits, Sampling(seed=1), 200))


MANY = [
    Sampling(temperature=0.0),
    Sampling(seed=5),
    Sampling(seed=6, temperature=0.7, top_k=50, top_p=0.9),
    Sampling(seed=7, top_p=0.99, temperature=2.5),
    Sampling(seed=8, min_p=0.1),
    Sampling(seed=9, top_k=1000, repetition_penalty=1.3),
    Sampling(temperature=0.0, presence_penalty=1.5, num_logprobs=3),
    Sampling(seed=10, frequency_penalty=-1.0, logit_bias=((17, 4.0),), num_logprobs=0),
    Sampling(seed=2**63, top_p=0.3, num_logprobs=20),
]


@pytest.mark.parametrize("vocab_size", [97, 4096, 50257])
def test_a_row_gets_the_same_token_and_bits_alone_and_among_63_others(vocab_size):
    samplings = [MANY[i % len(MANY)] for i in range(64 if vocab_size < 50_000 else 18)]
    num = len(samplings)
    sampler, logits = make_sampler(samplings, vocab_size), random_logits(num, vocab_size, seed=2)
    positions = [11 + i % 5 for i in range(num)]
    together = sampler.sample(Logits.of(logits), range(num), positions)
    for i in range(num):
        alone = sampler.sample(Logits.of(logits[i : i + 1].clone()), [i], [positions[i]])
        assert alone.token_ids == together.token_ids[i : i + 1]
        assert (alone.logprobs or [None]) == together.logprobs[i : i + 1]
    turned = sampler.sample(Logits.of(logits.flip(0)), list(range(num))[::-1], positions[::-1])
    assert turned.token_ids == together.token_ids[::-1]
    assert turned.logprobs == together.logprobs[::-1]


def test_logits_are_left_alone():
    """They are the decoder's memory."""
    logits = Logits.of(random_logits(len(MANY), 300))
    before = logits.values_WV.clone(), list(logits.peaks), list(logits.peak_ids)
    make_sampler(MANY, 300).sample(logits, range(len(MANY)), [11] * len(MANY))
    assert torch.equal(logits.values_WV, before[0])
    assert (logits.peaks, logits.peak_ids) == before[1:]


def test_peaks_are_the_first_of_the_largest():
    logits = Logits.of(torch.tensor([[1.0, 3.0, 3.0], [-INF, -INF, -INF], [0.0, NAN, 9.0], [INF, 0.0, INF]]))
    assert logits.peaks[:2] == [3.0, -INF]
    assert math.isnan(logits.peaks[2]) and logits.peaks[3] == INF
    assert logits.peak_ids[:2] == [1, 0]
    assert logits.peak_ids[3] == 0


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([0.0, 3.0, 3.0, -1.0, 3.0])
    assert sample_one(logits, Sampling(temperature=0.0), known=(1,), num_prompt=1, position=1).token_ids == [1]


def test_greedy_is_the_end_of_cooling():
    logits = random_logits(500)
    for temperature in (1e-3, 1e-30, 1e-45, 1e-300):
        assert set(draws(logits, Sampling(temperature=temperature), 20).tolist()) == {int(logits.argmax())}


def test_a_huge_temperature_is_uniform():
    drawn = draws(random_logits(50), Sampling(temperature=1e30), 10_000)
    assert chi_square(drawn, torch.full((50,), 1 / 50)) < 4


def test_huge_logits_do_not_overflow():
    logits = torch.tensor([3e38, -3e38, 3e38, 0.0])
    assert set(draws(logits, Sampling(temperature=0.01), 200).tolist()) == {0, 2}


def test_top_k_breaks_ties_by_id_and_may_exceed_the_vocabulary():
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert set(draws(logits, Sampling(top_k=2), 300).tolist()) == {1, 2}
    assert set(draws(logits, Sampling(top_k=1), 50).tolist()) == {1}
    assert set(draws(logits, Sampling(top_k=10**6), 3000).tolist()) == {0, 1, 2, 3, 4}


def test_top_p_breaks_ties_by_id_far_beyond_the_first_ranking():
    """A flat distribution makes the nucleus thousands of tokens wide, all tied."""
    scaled = torch.zeros(1, 5000)
    kept = most_likely(scaled, scaled.exp(), torch.tensor([5000]), torch.tensor([0.5], dtype=torch.float64))
    assert kept[0].nonzero().flatten().tolist() == list(range(2500))


def test_a_wider_ranking_changes_no_count():
    scaled = random_logits(6, 2000).sort(descending=True).values
    scaled = scaled - scaled[:, :1]
    total = scaled.double().exp().sum(dim=-1)
    top_k, top_p = torch.tensor([2000, 30, 64, 2000, 1, 2000]), torch.tensor([0.1, 0.9, 1.0, 0.5, 0.3, 0.7]).double()
    narrow, wide = (count_kept(scaled[:, :n], top_k < 2000, total, top_k, top_p) for n in (64, 512))
    reached = narrow <= 64
    assert reached.sum() >= 4
    assert torch.equal(narrow[reached], wide[reached])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_keep_first_ranks_by_score_then_id(values, data):
    num_kept = data.draw(st.integers(1, len(values)))
    scores = torch.tensor([values], dtype=torch.float32)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:num_kept]
    top = scores.sort(descending=True).values[:, :num_kept]
    assert keep_first(scores, top, torch.tensor([num_kept]))[0].nonzero().flatten().tolist() == sorted(order)


def test_race_never_takes_a_weightless_index():
    weights = torch.zeros(500, 130)
    weights[:, 129] = 1e-30
    key = torch.arange(1000).view(500, 2)
    assert set(race(weights, key, torch.arange(500)).tolist()) == {129}


def scores_of(logits, sampling):
    """What the logits become before the draw, after PROMPT and OUTPUT."""
    scores = logits.clone()
    known = torch.tensor([*PROMPT, *OUTPUT])
    change(scores, SlotState.of(Admission(known.tolist(), NUM_PROMPT, sampling)), known)
    return scores.tolist()


@pytest.mark.parametrize("penalty", [0.5, 1.2, 10.0])
def test_repetition_penalty_is_hugging_faces_over_prompt_and_output(penalty):
    logits, known = random_logits(12), torch.tensor([[*PROMPT, *OUTPUT]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(known, logits[None].clone())[0]
    assert scores_of(logits, Sampling(repetition_penalty=penalty)) == pytest.approx(expected.tolist(), rel=1e-6)


def test_presence_and_frequency_count_the_output_only():
    logits = torch.zeros(12)
    presence = scores_of(logits, Sampling(presence_penalty=0.5))
    frequency = scores_of(logits, Sampling(frequency_penalty=0.25))
    counts = [OUTPUT.count(token) for token in range(12)]
    assert presence == [-0.5 if count else 0.0 for count in counts]
    assert frequency == [-0.25 * count for count in counts]


def test_bias_comes_before_the_repetition_penalty():
    logits = torch.tensor([0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    scores = scores_of(logits, Sampling(logit_bias=((1, 3.0), (7, 1.0)), repetition_penalty=2.0, presence_penalty=0.5))
    assert scores[1] == 1.0  # (-1 + 3) / 2, in the prompt only
    assert scores[7] == 1.0
    assert scores[9] == -0.5


def test_penalties_see_the_known_tokens_only():
    """The table may hold a former sequence's tokens beyond what is known."""
    sampling = Sampling(temperature=0.0, presence_penalty=2.0)
    logits = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.9])
    sampler = make_sampler([sampling], 10)
    assert [sampler.sample(Logits.of(logits[None]), [0], [p]).token_ids[0] for p in (5, 6, 7, 8)] == [2, 2, 6, 0]


def test_bias_of_100_forces_and_of_minus_100_bans():
    logits = random_logits(30)
    best = int(logits.argmax())
    for temperature in (0.0, 1.0):
        assert sample_one(logits, Sampling(temperature, logit_bias=((3, 100.0),))).token_ids == [3]
        assert sample_one(logits, Sampling(temperature, logit_bias=((best, -100.0),))).token_ids != [best]


def test_tiny_penalties_do_not_overflow():
    logits = torch.full((12,), -5.0)
    logits[9] = 30.0
    for temperature in (0.0, 1.0):
        drawn = sample_one(logits, Sampling(temperature, repetition_penalty=1e-45))
        assert drawn.token_ids[0] in {*PROMPT, *OUTPUT}
        assert drawn.is_finite == [True]


def test_end_tokens_are_banned_until_min_new_tokens():
    logits = torch.zeros(8)
    logits[5], logits[6], logits[2] = 3.0, 2.0, 1.0
    sampler = make_sampler(
        [Sampling(temperature=0.0, logit_bias=((5, 100.0),))], 8, known=(1, 1), num_prompt=2,
        min_new_tokens=3, end_token_ids=(5, 6),
    )  # fmt: skip
    assert [sampler.sample(Logits.of(logits[None]), [0], [position]).token_ids[0] for position in (2, 3, 4, 5)] == [
        2,
        2,
        2,
        5,
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_are_of_the_models_own_distribution(temperature):
    logits = random_logits(50)
    sampling = Sampling(temperature, top_k=5, repetition_penalty=1.5, logit_bias=((7, 50.0),), seed=1, num_logprobs=4)
    sampled = sample_one(logits, sampling)
    expected = logits.double().log_softmax(dim=-1)
    values, ids = expected.topk(4)
    (found,) = sampled.logprobs
    assert found.chosen == pytest.approx(expected[sampled.token_ids[0]].item(), abs=1e-5)
    assert found.top_ids == ids.tolist()
    assert found.top_logprobs == pytest.approx(values.tolist(), abs=1e-5)


def test_logprobs_are_columns_only_when_someone_asks():
    logits = random_logits(2, 20)
    plain = make_sampler([Sampling(), Sampling()], 20).sample(Logits.of(logits), [0, 1], [11, 11])
    assert plain.logprobs == []
    mixed = make_sampler([Sampling(), Sampling(num_logprobs=0)], 20).sample(Logits.of(logits), [0, 1], [11, 11])
    assert mixed.logprobs[0] is None
    assert mixed.logprobs[1].top_ids == mixed.logprobs[1].top_logprobs == []
    assert mixed.token_ids == plain.token_ids


def test_logprob_ties_are_ranked_by_id_and_capped_by_the_vocabulary():
    assert rank(torch.tensor([-2.0, -1.0, -2.0, -1.0, -2.0]), 3) == ([1, 3, 0], [-1.0, -1.0, -2.0])
    assert rank(torch.tensor([-2.0, -1.0]), 20)[0] == [1, 0]


@pytest.mark.parametrize("sampling", MANY, ids=str)
@pytest.mark.parametrize("broken", [[NAN, 1.0], [INF, 1.0], [-INF, -INF], [INF, -INF], [NAN, INF]])
def test_a_broken_row_is_told_and_touches_no_other(sampling, broken):
    logits = random_logits(3, 128)
    sampler = make_sampler([sampling] * 3, 128)
    healthy = sampler.sample(Logits.of(logits), [0, 1, 2], [11, 12, 13])
    logits[1] = torch.tensor(broken).repeat(64)
    sampled = sampler.sample(Logits.of(logits), [0, 1, 2], [11, 12, 13])
    assert sampled.is_finite == [True, False, True]
    assert sampled.token_ids[0::2] == healthy.token_ids[0::2]
    assert 0 <= sampled.token_ids[1] < 128
    assert sampled.logprobs[0::2] == healthy.logprobs[0::2]
    assert sampled.logprobs[1:2] in ([], [None])


def test_a_row_with_some_minus_infinities_is_fine():
    logits = torch.full((100,), -INF)
    logits[40], logits[41] = 1.0, 1.0
    for sampling in (Sampling(), Sampling(top_k=50), Sampling(top_p=0.999), Sampling(repetition_penalty=2.0)):
        sampler = make_sampler([sampling], 100)
        sampled = sampler.sample(Logits.of(logits.expand(50, -1)), [0] * 50, range(50))
        assert set(sampled.token_ids) == {40, 41}
        assert all(sampled.is_finite)


def test_a_slot_forgets_the_sequence_before():
    sampler = make_sampler([Sampling(temperature=0.0, logit_bias=((3, 100.0),))], 10)
    logits = torch.arange(10.0)[None]
    assert sampler.sample(Logits.of(logits), [0], [11]).token_ids == [3]
    sampler.admit(0, Admission(PROMPT, len(PROMPT), Sampling(temperature=0.0)))
    assert sampler.sample(Logits.of(logits), [0], [11]).token_ids == [9]


def test_an_empty_step_draws_nothing():
    sampled = make_sampler([Sampling()], 10).sample(Logits.of(torch.empty(0, 10)), [], [])
    assert (sampled.token_ids, sampled.is_finite, sampled.logprobs) == ([], [], [])


def test_a_slot_never_admitted_is_our_mistake():
    with pytest.raises(AssertionError, match="never admitted"):
        Sampler(2, 10, torch.zeros(2, 5, dtype=torch.int32)).sample(Logits.of(torch.zeros(1, 10)), [1], [1])
