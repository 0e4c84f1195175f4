"""The load is what it says: lengths from the tables, prefixes that are shared, the same again for the same seed."""

from __future__ import annotations

import pytest

from loadtest.workloads import (
    CHAT,
    FIRST_PLAIN_TOKEN,
    PROBABILITIES,
    PROFILES,
    ProfileWorks,
    Quantiles,
    shared_prefix_works,
    uniform_works,
)

VOCAB_SIZE = 4096


def test_lengths_meet_the_table_and_are_linear_between() -> None:
    assert [CHAT.prompt.at(probability) for probability in PROBABILITIES] == list(CHAT.prompt.lengths)
    table = Quantiles((0.0, 0.5, 1.0), (10, 20, 60))
    assert table.at(0.25) == 15
    assert table.at(0.75) == 40


def test_lengths_beyond_the_table_are_its_ends() -> None:
    assert CHAT.prompt.at(0.0) == 207
    assert CHAT.prompt.at(1.0) == 4142


@pytest.mark.parametrize("name", sorted(PROFILES))
@pytest.mark.parametrize("context_length", [64, 1024, 100_000])
def test_every_request_of_a_profile_fits_the_context(name: str, context_length: int) -> None:
    works = ProfileWorks(PROFILES[name], 0, context_length, VOCAB_SIZE)
    drawn = [works.next() for _ in range(200)]
    assert max(len(work.prompt) + work.num_new for work in drawn) <= context_length
    assert min(min(len(work.prompt), work.num_new) for work in drawn) >= 1


def test_a_context_that_is_large_enough_leaves_the_lengths_as_measured() -> None:
    works = ProfileWorks(CHAT, 0, 100_000, VOCAB_SIZE)
    prompts = sorted(len(works.next().prompt) for _ in range(400))
    assert prompts[0] == 207
    assert prompts[-1] == 4142
    assert 900 < prompts[200] < 1150


def test_a_seed_names_the_works() -> None:
    first, again, other = (ProfileWorks(CHAT, seed, 512, VOCAB_SIZE) for seed in (1, 1, 2))
    drawn = [first.next() for _ in range(5)]
    assert drawn == [again.next() for _ in range(5)]
    assert drawn != [other.next() for _ in range(5)]


def test_uniform_works_have_one_size_and_differ() -> None:
    works = uniform_works(0, 8, 32, 5, VOCAB_SIZE)
    assert {(len(work.prompt), work.num_new) for work in works} == {(32, 5)}
    assert len({work.prompt for work in works}) == 8
    ids = [token_id for work in works for token_id in work.prompt]
    assert FIRST_PLAIN_TOKEN <= min(ids) <= max(ids) < VOCAB_SIZE


def test_shared_prefixes_are_shared_and_no_longer_than_said() -> None:
    works = shared_prefix_works(0, 4, 100, 10, VOCAB_SIZE)
    assert len({work.prompt[:100] for work in works}) == 1
    assert len({work.prompt[100:] for work in works}) == 4
    assert {len(work.prompt) for work in works} == {110}
