"""The loop with the fake runner: equal outputs whatever disturbs them, at both depths."""

from dataclasses import replace

import msgspec
import pytest

from model.interface import MAX_END_TOKEN_IDS, MAX_LOGIT_BIAS, NO_LOGPROBS, Batch, RunnerShape, Sampling
from service.engine.engine import Engine, EngineOptions
from service.engine.messages import NO_TOKEN, FinishCode
from tests.engine.conftest import FakeClock
from tests.engine.fake_runner import SHAPE, FakeRunner, expected_tokens
from tests.engine.ledger import Ledger, make_submit, run_to_end, step

ROOT = b"tenant"
APART = replace(SHAPE, max_generated_tokens=SHAPE.num_slots)
"""Of a runner that computes generated tokens in another way than prompts."""


@pytest.fixture(params=[0, 1], ids=["depth0", "depth1"])
def depth(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def options(depth: int) -> EngineOptions:
    return EngineOptions(depth=depth)


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def engine(runner: FakeRunner, options: EngineOptions, clock: FakeClock) -> Engine:
    return Engine(runner, options, clock)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(7 * position + salt) % 50 for position in range(length)]


def test_a_lone_sequence_draws_what_it_should(engine: Engine, ledger: Ledger) -> None:
    engine.submit(make_submit(1, prompt_of(9), 12, seed=3))
    run_to_end(engine, ledger)
    assert ledger.tokens[1] == expected_tokens(prompt_of(9), 12, Sampling(seed=3))
    assert ledger.finishes == {1: FinishCode.LENGTH}
    assert ledger.starts[1].num_cached == 0


def test_a_long_prompt_comes_in_chunks(depth: int, clock: FakeClock, ledger: Ledger) -> None:
    engine = Engine(FakeRunner(), EngineOptions(depth=depth, max_prefill_chunk=5), clock)
    engine.submit(make_submit(1, prompt_of(33), 2))
    num_steps = run_to_end(engine, ledger)
    assert ledger.tokens[1] == expected_tokens(prompt_of(33), 2, Sampling())
    assert num_steps == 7 + 1 + depth


def test_many_sequences_do_not_change_each_other(engine: Engine, ledger: Ledger) -> None:
    lengths = {sequence_id: 1 + 5 * sequence_id % 23 for sequence_id in range(20)}
    for sequence_id, length in lengths.items():
        engine.submit(make_submit(sequence_id, prompt_of(length, sequence_id), 10, seed=sequence_id))
        step(engine, ledger)
    run_to_end(engine, ledger)
    for sequence_id, length in lengths.items():
        expected = expected_tokens(prompt_of(length, sequence_id), 10, Sampling(seed=sequence_id))
        assert ledger.tokens[sequence_id] == expected


def test_depth_one_keeps_two_steps_in_flight(runner: FakeRunner, engine: Engine, ledger: Ledger, depth: int) -> None:
    engine.submit(make_submit(1, prompt_of(4), 10))
    run_to_end(engine, ledger)
    assert runner.max_in_flight == depth + 1


def test_an_end_token_ends(engine: Engine, ledger: Ledger, depth: int) -> None:
    free = expected_tokens(prompt_of(5), 10, Sampling())
    end = free[4]
    engine.submit(make_submit(1, prompt_of(5), 10, end=(end,)))
    run_to_end(engine, ledger)
    assert ledger.tokens[1] == free[: free.index(end) + 1]
    assert ledger.finishes[1] is FinishCode.STOP_TOKEN
    assert ledger.num_dropped == depth, "one step ahead, the row after the end token is computed and dropped"


def test_an_end_token_on_the_last_place_is_a_stop(engine: Engine, ledger: Ledger) -> None:
    free = expected_tokens(prompt_of(5), 3, Sampling())
    engine.submit(make_submit(1, prompt_of(5), 3, end=(free[-1],), min_new=2))
    run_to_end(engine, ledger)
    assert ledger.finishes[1] is FinishCode.STOP_TOKEN


def test_no_end_before_the_minimum(engine: Engine, ledger: Ledger) -> None:
    end = tuple(expected_tokens(prompt_of(5), 10, Sampling())[:3])
    engine.submit(make_submit(1, prompt_of(5), 30, end=end, min_new=6))
    run_to_end(engine, ledger)
    assert not set(ledger.tokens[1][:6]) & set(end)
    assert ledger.tokens[1] == expected_tokens(prompt_of(5), 30, Sampling(), end, min_new=6)


def test_a_prefix_is_computed_once(runner: FakeRunner, engine: Engine, ledger: Ledger) -> None:
    prompt = prompt_of(17)
    engine.submit(make_submit(1, prompt, 4, cache_root=ROOT))
    run_to_end(engine, ledger)
    engine.submit(make_submit(2, prompt, 4, cache_root=ROOT))
    run_to_end(engine, ledger)
    assert ledger.starts[2].num_cached == 16
    assert runner.num_prefilled[tuple(prompt)] == 17 + 1
    assert ledger.tokens[1] == ledger.tokens[2]


def test_a_hit_leaves_one_token_to_compute(engine: Engine, ledger: Ledger) -> None:
    for sequence_id in (1, 2):
        engine.submit(make_submit(sequence_id, prompt_of(16), 4, cache_root=ROOT))
        run_to_end(engine, ledger)
    assert ledger.starts[2].num_cached == 12
    assert ledger.tokens[1] == ledger.tokens[2]


def test_generated_tokens_are_cached_too(engine: Engine, ledger: Ledger) -> None:
    engine.submit(make_submit(1, prompt_of(6), 11, cache_root=ROOT))
    run_to_end(engine, ledger)
    engine.submit(make_submit(2, prompt_of(6) + ledger.tokens[1], 3, cache_root=ROOT))
    run_to_end(engine, ledger)
    assert ledger.starts[2].num_cached == 16


def test_generated_tokens_are_no_prompts_where_their_bits_may_differ(ledger: Ledger, clock: FakeClock) -> None:
    engine = Engine(FakeRunner(APART), EngineOptions(depth=1), clock)
    engine.submit(make_submit(1, prompt_of(6), 11, cache_root=ROOT))
    run_to_end(engine, ledger)
    for sequence_id, prompt in ((2, prompt_of(6) + ledger.tokens[1]), (3, prompt_of(17)), (4, prompt_of(20))):
        engine.submit(make_submit(sequence_id, prompt, 3, cache_root=ROOT))
        run_to_end(engine, ledger)
    assert [ledger.starts[sequence_id].num_cached for sequence_id in (2, 3, 4)] == [4, 4, 16]


@pytest.mark.parametrize(("first", "second"), [(ROOT, b"other"), (None, ROOT), (ROOT, None), (None, None)])
def test_prefixes_stay_within_their_root(
    engine: Engine, ledger: Ledger, first: bytes | None, second: bytes | None
) -> None:
    for sequence_id, root in ((1, first), (2, second)):
        engine.submit(make_submit(sequence_id, prompt_of(16), 4, cache_root=root))
        run_to_end(engine, ledger)
    assert ledger.starts[2].num_cached == 0
    assert ledger.tokens[1] == ledger.tokens[2]


def test_the_prefix_cache_can_be_turned_off(runner: FakeRunner, ledger: Ledger, clock: FakeClock) -> None:
    engine = Engine(runner, EngineOptions(prefix_cache=False), clock)
    for sequence_id in (1, 2):
        engine.submit(make_submit(sequence_id, prompt_of(16), 4, cache_root=ROOT))
        run_to_end(engine, ledger)
    assert ledger.starts[2].num_cached == 0


def test_a_pool_of_twice_one_request_serves_thirty_two(
    ledger: Ledger, options: EngineOptions, clock: FakeClock
) -> None:
    """RELIABILITY: preempted output equals the undisturbed one."""
    prompts = {sequence_id: prompt_of(10, sequence_id) for sequence_id in range(32)}
    engine = Engine(FakeRunner(replace(SHAPE, num_blocks=2 * 8)), options, clock)
    for sequence_id, prompt in prompts.items():
        engine.submit(make_submit(sequence_id, prompt, 22, seed=sequence_id, cache_root=ROOT))
    run_to_end(engine, ledger)
    assert ledger.num_preempted > 0
    for sequence_id, prompt in prompts.items():
        assert ledger.tokens[sequence_id] == expected_tokens(prompt, 22, Sampling(seed=sequence_id))
    assert set(ledger.finishes.values()) == {FinishCode.LENGTH}
    assert sum(ledger.preemptions.values()) == ledger.num_preempted
    assert ledger.num_recomputed > 0


def test_what_was_generated_is_computed_again_in_few_steps_beside_a_full_house(
    ledger: Ledger, clock: FakeClock
) -> None:
    """As after a restart: seven sequences decode, the eighth comes back with 40 generated tokens."""
    shape = replace(SHAPE, num_blocks=200, max_generated_tokens=SHAPE.num_slots + 8)
    engine = Engine(FakeRunner(shape), EngineOptions(depth=1), clock)
    for sequence_id in range(7):
        engine.submit(make_submit(sequence_id, prompt_of(2, sequence_id), 100))
    for _ in range(5):
        step(engine, ledger)
    given = make_submit(7, prompt_of(4), 60, seed=3)
    drawn = expected_tokens(prompt_of(4), 60, given.sampling)
    engine.submit(msgspec.structs.replace(given, token_ids=[*prompt_of(4), *drawn[:40]]))
    for _ in range(14):  # four tokens a step, which is the budget's least share
        step(engine, ledger)
    assert ledger.tokens[7] == drawn[40 : 40 + len(ledger.tokens[7])] != []


@pytest.mark.parametrize("shape", [SHAPE, APART], ids=["", "apart"])
@pytest.mark.parametrize("root", [None, ROOT], ids=["", "cache"])
def test_hundreds_of_preemptions_change_nothing(
    ledger: Ledger, options: EngineOptions, clock: FakeClock, shape: RunnerShape, root: bytes | None
) -> None:
    engine = Engine(FakeRunner(replace(shape, num_blocks=24)), options, clock)
    for sequence_id in range(160):
        engine.submit(make_submit(sequence_id, prompt_of(3, sequence_id), 50, seed=sequence_id, cache_root=root))
    run_to_end(engine, ledger, max_steps=20_000)
    assert ledger.num_preempted > 200
    for sequence_id in range(160):
        expected = expected_tokens(prompt_of(3, sequence_id), 50, Sampling(seed=sequence_id))
        assert ledger.tokens[sequence_id] == expected


def test_a_sequence_as_large_as_the_pool_runs(ledger: Ledger, options: EngineOptions, clock: FakeClock) -> None:
    engine = Engine(FakeRunner(replace(SHAPE, num_blocks=8)), options, clock)
    for sequence_id in range(3):
        engine.submit(make_submit(sequence_id, prompt_of(20, sequence_id), 12))
    run_to_end(engine, ledger)
    assert set(ledger.finishes.values()) == {FinishCode.LENGTH}


def test_a_non_finite_row_ends_alone_and_leaves_no_prefix(
    ledger: Ledger, options: EngineOptions, clock: FakeClock
) -> None:
    engine = Engine(FakeRunner(nan_token=99 % SHAPE.vocab_size), options, clock)
    sick = [*prompt_of(40), 99 % SHAPE.vocab_size]
    engine.submit(make_submit(1, prompt_of(11, salt=5), 12))
    engine.submit(make_submit(2, sick, 12, cache_root=ROOT))
    run_to_end(engine, ledger)
    assert ledger.finishes == {1: FinishCode.LENGTH, 2: FinishCode.NON_FINITE}
    assert ledger.tokens == {1: expected_tokens(prompt_of(11, salt=5), 12, Sampling())}
    engine.submit(make_submit(3, prompt_of(40), 2, cache_root=ROOT))
    run_to_end(engine, ledger)
    assert ledger.starts[3].num_cached == 0


def test_logprobs_stand_beside_their_tokens(engine: Engine, ledger: Ledger) -> None:
    engine.submit(make_submit(1, prompt_of(5), 3, num_logprobs=2))
    engine.submit(make_submit(2, prompt_of(6), 3, num_logprobs=NO_LOGPROBS))
    run_to_end(engine, ledger)
    assert [len(logprobs.top_ids) for logprobs in ledger.logprobs[1] if logprobs] == [2, 2, 2]
    assert ledger.logprobs[2] == [None, None, None]


def test_a_resubmitted_sequence_goes_on_where_it_was(engine: Engine, ledger: Ledger) -> None:
    prompt = prompt_of(9)
    whole = expected_tokens(prompt, 12, Sampling(seed=3))
    submit = make_submit(1, prompt + whole[:5], 12, seed=3)
    engine.submit(
        type(submit)(submit.id, submit.token_ids, len(prompt), submit.sampling, submit.limits, submit.cache_root)
    )
    run_to_end(engine, ledger)
    assert ledger.tokens[1] == whole[5:]


def bad_submits() -> dict[str, dict[str, object]]:
    return {
        "empty": {"prompt": []},
        "negative id": {"prompt": [-1, 2]},
        "id beyond the vocabulary": {"prompt": [1, SHAPE.vocab_size]},
        "beyond the context": {"prompt": [1] * 100, "max_new": 157},
        "nothing to generate": {"prompt": [1], "max_new": 0},
        "end token beyond the vocabulary": {"prompt": [1], "end": (SHAPE.vocab_size,)},
        "more end tokens than a runner keeps": {"prompt": [1], "end": (2,) * (MAX_END_TOKEN_IDS + 1)},
        "minimum above maximum": {"prompt": [1], "max_new": 3, "min_new": 4},
        "seed": {"prompt": [1], "seed": -1},
        "logprobs": {"prompt": [1], "num_logprobs": SHAPE.vocab_size + 1},
        "deadline": {"prompt": [1], "deadline": float("nan")},
    }


@pytest.mark.parametrize("fields", bad_submits().values(), ids=bad_submits().keys())
def test_what_cannot_be_indexed_is_refused(engine: Engine, ledger: Ledger, fields: dict[str, object]) -> None:
    engine.submit(make_submit(1, prompt_of(5), 3))
    engine.submit(make_submit(2, **fields))  # type: ignore[arg-type]
    run_to_end(engine, ledger)
    assert ledger.finishes == {1: FinishCode.LENGTH, 2: FinishCode.REFUSED}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=float("inf")),
        Sampling(temperature=-1.0),
        Sampling(top_p=float("nan")),
        Sampling(repetition_penalty=0.0),
        Sampling(top_k=-1),
        Sampling(logit_bias=((SHAPE.vocab_size, 1.0),)),
        Sampling(logit_bias=((1, float("nan")),)),
        Sampling(logit_bias=((1, 0.5),) * (MAX_LOGIT_BIAS + 1)),
    ],
)
def test_unsound_sampling_is_refused(engine: Engine, ledger: Ledger, sampling: Sampling) -> None:
    submit = make_submit(1, [1, 2], 3)
    engine.submit(type(submit)(1, submit.token_ids, 2, sampling, submit.limits, None))
    run_to_end(engine, ledger)
    assert ledger.finishes == {1: FinishCode.REFUSED}


def test_what_can_never_fit_the_pool_is_refused(ledger: Ledger, options: EngineOptions, clock: FakeClock) -> None:
    engine = Engine(FakeRunner(replace(SHAPE, num_blocks=4)), options, clock)
    engine.submit(make_submit(1, prompt_of(10), 7))
    engine.submit(make_submit(2, prompt_of(10), 6))
    run_to_end(engine, ledger)
    assert ledger.finishes == {1: FinishCode.REFUSED, 2: FinishCode.LENGTH}


def test_an_id_used_twice_ends_once(engine: Engine, ledger: Ledger) -> None:
    engine.submit(make_submit(1, prompt_of(5), 30))
    step(engine, ledger)
    engine.submit(make_submit(1, prompt_of(5), 30))
    run_to_end(engine, ledger)
    assert ledger.finishes == {1: FinishCode.REFUSED}


def test_an_idle_engine_has_nothing_to_say(engine: Engine, ledger: Ledger) -> None:
    assert not engine.has_work
    assert engine.step() is None
    engine.submit(make_submit(1, prompt_of(5), 3))
    run_to_end(engine, ledger)
    assert engine.step() is None


def test_the_last_report_says_that_nothing_is_left(engine: Engine, ledger: Ledger) -> None:
    engine.submit(make_submit(1, prompt_of(5), 9, end=(expected_tokens(prompt_of(5), 9, Sampling())[3],)))
    reports = []
    while engine.has_work:
        reports.append(step(engine, ledger))
    stats = reports[-1].stats
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (0, 0, 0)
    assert stats.free_blocks + stats.cached_blocks == SHAPE.num_blocks


def test_a_refusal_alone_is_reported_at_once(engine: Engine) -> None:
    engine.submit(make_submit(1, [], 3))
    report = engine.step()
    assert report is not None
    assert (report.ids, report.token_ids, report.finishes) == ([1], [NO_TOKEN], [FinishCode.REFUSED])


def test_statistics_count_prefixes(engine: Engine) -> None:
    def totals(sequence_id: int) -> tuple[int, int]:
        engine.submit(make_submit(sequence_id, prompt_of(16), 1, cache_root=ROOT))
        reports = []
        while engine.has_work:
            reports.append(engine.step())
        return (
            sum(report.stats.prefix_query_tokens for report in reports),
            sum(report.stats.prefix_hit_tokens for report in reports),
        )

    assert totals(1) == (16, 0)
    assert totals(2) == (16, 12)


def test_step_seconds_are_a_steps_own(clock: FakeClock, depth: int) -> None:
    def take_two_seconds(batch: Batch) -> None:
        clock.now += 2.0

    engine = Engine(FakeRunner(on_step=take_two_seconds), EngineOptions(depth=depth), clock)
    engine.submit(make_submit(1, prompt_of(5), 6))
    seconds = []
    while engine.has_work:
        report = engine.step()
        assert report is not None
        if report.stats.num_rows:
            seconds.append(report.stats.step_seconds)
    assert seconds == [2.0] * 6


def test_only_depths_zero_and_one_exist() -> None:
    with pytest.raises(ValueError, match="one step ahead"):
        Engine(FakeRunner(), EngineOptions(depth=2))
