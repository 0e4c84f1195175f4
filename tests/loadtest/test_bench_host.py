"""The bench of the host's share turns the real loop, keeps the rows it was asked for, and blames the right phase."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from loadtest.bench_host import LOADS, Case, Plan, card, figures, measure, parse
from loadtest.host_loop import PHASES, TOKEN, MeasuredLoop, NoRunner, StepClock, Turn, Watch
from model.interface import Admission, Batch, Row, RunnerShape, Sampling
from service.engine.engine import EngineOptions

NO_TIME = 0.0
SHAPE = RunnerShape(
    num_blocks=4_000, block_size=16, num_slots=4, context_length=8_192, vocab_size=128_256, max_batch_tokens=2_048
)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("runner", ["card", "none"])
@pytest.mark.parametrize(("load", "least_tokens", "most_tokens"), [("decode", 3, 3), ("prompts", 3, 520)])
def test_every_step_has_the_rows_asked_for(
    runner: str, load: str, depth: int, least_tokens: int, most_tokens: int
) -> None:
    if runner == "card":
        pytest.importorskip("triton")
    found = measure(Case(runner, load, 3, depth, 64), Plan((), NO_TIME, steps=8, rounds=2))
    assert found.keys() == {*PHASES, "all", "all_p50", "all_p99", "rows", "tokens", "disturbed"}
    assert found["rows"]["median"] == pytest.approx(3, abs=1)
    assert least_tokens <= found["tokens"]["min"] and found["tokens"]["max"] <= most_tokens
    assert all(found[phase]["min"] > 0 for phase in PHASES)
    parts = sum(found[phase]["median"] for phase in PHASES)
    assert parts == pytest.approx(found["all"]["median"], rel=0.5)


def test_whoever_ends_is_followed_by_another(tmp_path: Path) -> None:
    first, later = LOADS["churn"](3)
    clock = StepClock(NO_TIME)
    loop = MeasuredLoop(NoRunner(SHAPE, clock), clock, EngineOptions(), tmp_path / "socket", later)
    try:
        loop.start(first, 0)
        turns = loop.run(300)  # more than the longest answer
    finally:
        loop.close()
    assert len(turns) == 300
    assert sum(turn.num_rows for turn in turns) > 0.9 * 3 * 300
    assert sum(turn.num_tokens > turn.num_rows for turn in turns) >= 3


def test_a_step_takes_its_time_and_none_of_it_is_the_hosts(tmp_path: Path) -> None:
    first, later = LOADS["decode"](2)
    clock = StepClock(0.05)
    loop = MeasuredLoop(NoRunner(SHAPE, clock), clock, EngineOptions(), tmp_path / "socket", later)
    try:
        loop.start(first, 0)
        began = time.perf_counter()
        turns = loop.run(4)
        seconds = time.perf_counter() - began
    finally:
        loop.close()
    assert seconds >= 4 * 0.05 * 0.9
    assert sum(turn.device_seconds for turn in turns) >= 4 * 0.05 * 0.9
    assert sum(turn.host_seconds for turn in turns) <= seconds - sum(turn.device_seconds for turn in turns)


def test_the_runner_for_a_card_waits_for_results_only() -> None:
    pytest.importorskip("triton")
    runner = card(SHAPE, StepClock(0.05))
    began = time.perf_counter()
    row = Row(0, 0, 2, (4,), wants_token=True, admission=Admission((5, 6), 2, Sampling()))
    pendings = [runner.launch(Batch([row], 2)), runner.launch(Batch([Row(0, 2, 1, wants_token=True)], 1))]
    launched = time.perf_counter()
    assert launched - began < 0.05
    for pending in pendings:
        sampled = pending.result()
        assert (sampled.token_ids, sampled.is_finite, sampled.logprobs) == ([TOKEN], [True], [])
    assert time.perf_counter() - began >= 2 * 0.05


def test_a_wrapped_function_counts_without_those_inside_it() -> None:
    watch = Watch()
    inner = watch.wrap("commit", lambda: time.sleep(0.02))
    outer = watch.wrap("report", inner)
    watch.begin()
    outer()
    turn = watch.end()
    assert turn.seconds["commit"] >= 0.02
    assert turn.seconds["report"] < turn.seconds["commit"]
    assert turn.seconds["schedule"] == 0


def test_disturbed_turns_are_counted_and_left_out() -> None:
    turns = [Turn(num_rows=1), Turn(num_rows=3), Turn(num_rows=99, is_disturbed=True)]
    for microseconds, turn in zip((10, 20, 4_000), turns, strict=True):
        turn.seconds["commit"] = microseconds / 1e6
    found = figures(turns)
    assert found["commit"] == found["all"] == found["all_p50"] == pytest.approx(15)
    assert (found["rows"], found["disturbed"]) == (2, 1)


@pytest.mark.parametrize(
    "arguments", [["--rows", "0"], ["--steps", "0"], ["--rounds", "0"], ["--step-ms", "-1"], ["--steps", "3000"]]
)
def test_what_cannot_be_measured_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    assert end.value.code == 2
