"""The scheduler under any mix of arrivals, cancels, deadlines and priorities; then each of these alone."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from model.interface import Sampling
from service.engine.engine import Engine, EngineOptions
from service.engine.messages import FinishCode, StepStats, Submit
from tests.engine.conftest import FakeClock
from tests.engine.fake_runner import SHAPE, FakeRunner, expected_tokens
from tests.engine.ledger import FAR, Ledger, make_submit, run_to_end, step

SMALL = replace(SHAPE, num_blocks=10, num_slots=4, context_length=40, max_batch_tokens=12)
NAN_TOKEN = 5


class SchedulerMachine(RuleBasedStateMachine):
    """Every sequence ends exactly once, with the tokens of an undisturbed run, whatever else goes on."""

    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.engine = Engine(FakeRunner(SMALL, nan_token=NAN_TOKEN), EngineOptions(depth=self.depth), self.clock)
        self.ledger = Ledger()
        self.submits: dict[int, Submit] = {}

    @rule(
        prompt=st.lists(st.sampled_from([1, 2, 3, NAN_TOKEN]), min_size=1, max_size=24),
        max_new=st.integers(1, 16),
        end=st.sampled_from([(), (0, 1, 2, 3, 4, 6, 7, 8, 9, 10), (*range(40, 60),)]),
        min_new=st.integers(0, 3),
        patience=st.sampled_from([FAR, FAR, 5.0, 0.0]),
        priority=st.integers(-1, 1),
        cache_root=st.sampled_from([None, b"a", b"b"]),
    )
    def submit(
        self,
        prompt: list[int],
        max_new: int,
        end: tuple[int, ...],
        min_new: int,
        patience: float,
        priority: int,
        cache_root: bytes | None,
    ) -> None:
        sequence_id = len(self.submits)
        self.submits[sequence_id] = make_submit(
            sequence_id,
            prompt,
            max_new,
            seed=sequence_id,
            min_new=min(min_new, max_new),
            end=end,
            deadline=self.clock.now + patience,
            arrival=self.clock.now,
            priority=priority,
            cache_root=cache_root,
        )
        self.engine.submit(self.submits[sequence_id])

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Before admission, while prefilling or decoding, in flight, after the end, or an id that never was."""
        self.engine.cancel([data.draw(st.integers(0, len(self.submits)))])

    @rule(num_steps=st.integers(1, 6))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.clock.now += 0.1
            step(self.engine, self.ledger)

    @rule()
    def wait(self) -> None:
        self.clock.now += 4.0

    @invariant()
    def is_sound(self) -> None:
        self.engine.scheduler.check()

    def teardown(self) -> None:
        run_to_end(self.engine, self.ledger, max_steps=3000)
        self.engine.scheduler.check_idle()
        assert self.ledger.finishes.keys() == self.submits.keys()
        for sequence_id, submit in self.submits.items():
            self.check_outcome(submit, self.ledger.tokens.get(sequence_id, []), self.ledger.finishes[sequence_id])
        sick = sum(code is FinishCode.NON_FINITE for code in self.ledger.finishes.values())
        lost = self.ledger.num_sampled - self.ledger.num_tokens - sick
        assert 0 <= lost <= self.ledger.num_dropped, "tokens out = tokens counted"
        assert self.depth or not self.ledger.num_dropped

    @staticmethod
    def check_outcome(submit: Submit, tokens: list[int], code: FinishCode) -> None:
        limits = submit.limits
        expected = expected_tokens(
            submit.token_ids,
            limits.max_new_tokens,
            submit.sampling,
            limits.end_token_ids,
            limits.min_new_tokens,
        )
        assert tokens == expected[: len(tokens)]
        if code is FinishCode.STOP_TOKEN:
            assert len(tokens) == len(expected)
            assert tokens[-1] in limits.end_token_ids
        elif code is FinishCode.LENGTH:
            assert len(tokens) == limits.max_new_tokens
        elif code is FinishCode.NON_FINITE:
            assert NAN_TOKEN in submit.token_ids + tokens
        else:
            assert code is FinishCode.CANCELLED or limits.deadline < FAR


class SchedulerMachineOneAhead(SchedulerMachine):
    depth = 1


TestScheduler = SchedulerMachine.TestCase
TestSchedulerOneAhead = SchedulerMachineOneAhead.TestCase
TestScheduler.settings = TestSchedulerOneAhead.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)


@pytest.fixture(params=[0, 1], ids=["depth0", "depth1"])
def options(request: pytest.FixtureRequest) -> EngineOptions:
    return EngineOptions(depth=request.param, max_prefill_chunk=8)


@pytest.fixture
def engine(options: EngineOptions, clock: FakeClock) -> Engine:
    return Engine(FakeRunner(), options, clock)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def stats_after(engine: Engine, ledger: Ledger) -> StepStats:
    report = step(engine, ledger)
    assert report is not None
    return report.stats


@pytest.mark.parametrize("num_steps", range(7), ids=lambda num: f"after {num} steps")
def test_a_cancel_frees_everything_within_one_step(engine: Engine, ledger: Ledger, num_steps: int) -> None:
    """Three steps of prefill, then decoding; at depth 1 with a step in flight."""
    engine.submit(make_submit(1, list(range(20)), 30))
    for _ in range(num_steps):
        step(engine, ledger)
    engine.cancel([1])
    engine.cancel([1])
    stats = stats_after(engine, ledger)
    assert ledger.finishes == {1: FinishCode.CANCELLED}
    assert stats.free_blocks == SHAPE.num_blocks
    assert not engine.has_work


def test_a_cancel_in_the_queue_computes_nothing(clock: FakeClock, ledger: Ledger) -> None:
    engine = Engine(FakeRunner(replace(SHAPE, num_slots=1)), EngineOptions(), clock)
    engine.submit(make_submit(1, [1, 2], 5))
    engine.submit(make_submit(2, [3, 4], 5))
    step(engine, ledger)
    engine.cancel([2])
    run_to_end(engine, ledger)
    assert ledger.finishes == {1: FinishCode.LENGTH, 2: FinishCode.CANCELLED}
    assert 2 not in ledger.starts
    assert ledger.num_computed == 2 + 4


def test_a_cancel_after_the_end_is_silent(engine: Engine, ledger: Ledger) -> None:
    engine.submit(make_submit(1, [1, 2], 3))
    run_to_end(engine, ledger)
    engine.cancel([1, 77])
    assert engine.step() is None


def test_a_cancel_between_preemption_and_release(ledger: Ledger, clock: FakeClock) -> None:
    """One step ahead, a preempted sequence still holds its blocks until the step in flight has ended."""
    engine = Engine(FakeRunner(replace(SHAPE, num_blocks=6)), EngineOptions(depth=1), clock)
    for sequence_id in (1, 2):
        engine.submit(make_submit(sequence_id, [sequence_id] * 6, 16))
    preempted = False
    while not preempted:
        preempted = stats_after(engine, ledger).num_preemptions > 0
    engine.cancel([2])
    run_to_end(engine, ledger)
    assert ledger.finishes == {1: FinishCode.LENGTH, 2: FinishCode.CANCELLED}
    assert ledger.tokens[1] == expected_tokens([1] * 6, 16, Sampling())


def test_a_deadline_in_the_queue_costs_no_prefill(clock: FakeClock, ledger: Ledger) -> None:
    runner = FakeRunner(replace(SHAPE, num_slots=1))
    engine = Engine(runner, EngineOptions(), clock)
    engine.submit(make_submit(1, [1, 2], 5))
    step(engine, ledger)
    engine.submit(make_submit(2, [3, 4], 5, deadline=clock.now + 1))
    step(engine, ledger)
    clock.now += 1
    run_to_end(engine, ledger)
    assert ledger.finishes == {1: FinishCode.LENGTH, 2: FinishCode.DEADLINE}
    assert (3, 4) not in runner.num_prefilled


def test_a_deadline_ends_a_running_sequence(
    engine: Engine, ledger: Ledger, clock: FakeClock, options: EngineOptions
) -> None:
    engine.submit(make_submit(1, [1, 2], 50, deadline=clock.now + 1))
    for _ in range(5):
        step(engine, ledger)
    num_tokens = len(ledger.tokens[1])
    clock.now += 1
    stats = stats_after(engine, ledger)
    assert ledger.finishes == {1: FinishCode.DEADLINE}
    assert len(ledger.tokens[1]) == num_tokens, "nothing after the deadline"
    assert stats.dropped_tokens == options.depth
    assert not engine.has_work


def test_each_deadline_has_its_own_time(engine: Engine, ledger: Ledger, clock: FakeClock) -> None:
    """Whatever came and went with earlier ones, and in whatever order they arrived."""
    begun = clock.now
    for sequence_id, patience in ((1, 3.0), (2, 1.0), (3, 2.0), (4, FAR)):
        engine.submit(make_submit(sequence_id, [sequence_id], 50, deadline=begun + patience))
    step(engine, ledger)
    engine.cancel([2])
    step(engine, ledger)
    for now, ended in ((1.5, {2}), (2.0, {2, 3}), (2.9, {2, 3}), (3.0, {1, 2, 3})):
        clock.now = begun + now
        step(engine, ledger)
        assert ledger.finishes.keys() == ended
    engine.submit(make_submit(5, [5], 50, deadline=clock.now + 1))
    step(engine, ledger)
    clock.now += 1
    step(engine, ledger)
    assert ledger.finishes == {
        2: FinishCode.CANCELLED,
        3: FinishCode.DEADLINE,
        1: FinishCode.DEADLINE,
        5: FinishCode.DEADLINE,
    }
    engine.cancel([4])
    run_to_end(engine, ledger)


def finish_order(engine: Engine, ledger: Ledger) -> list[int]:
    run_to_end(engine, ledger)
    return ledger.order


def test_order_is_priority_then_deadline_then_arrival(ledger: Ledger, options: EngineOptions, clock: FakeClock) -> None:
    engine = Engine(FakeRunner(replace(SHAPE, num_slots=1)), options, clock)
    engine.submit(make_submit(1, [1], 2, arrival=1.0, deadline=FAR + 9))
    engine.submit(make_submit(2, [1], 2, arrival=4.0))
    engine.submit(make_submit(3, [1], 2, arrival=3.0))
    engine.submit(make_submit(4, [1], 2, arrival=5.0, priority=1))
    engine.submit(make_submit(5, [1], 2, arrival=0.0, priority=-1))
    assert finish_order(engine, ledger) == [4, 3, 2, 1, 5]


def test_equal_sequences_go_first_come_first_served(ledger: Ledger, options: EngineOptions, clock: FakeClock) -> None:
    engine = Engine(FakeRunner(replace(SHAPE, num_slots=1)), options, clock)
    for sequence_id in (5, 3, 4):
        engine.submit(make_submit(sequence_id, [1], 2))
    assert finish_order(engine, ledger) == [5, 3, 4]


def test_the_last_in_order_is_preempted(ledger: Ledger, options: EngineOptions, clock: FakeClock) -> None:
    engine = Engine(FakeRunner(replace(SHAPE, num_blocks=8)), options, clock)
    engine.submit(make_submit(1, [1] * 5, 25, arrival=1.0))
    engine.submit(make_submit(2, [2] * 5, 25, arrival=2.0, priority=7))
    run_to_end(engine, ledger)
    assert ledger.preemptions[1] > 0
    assert ledger.preemptions[2] == 0


def test_the_first_in_order_progresses_in_every_step(ledger: Ledger, clock: FakeClock) -> None:
    engine = Engine(FakeRunner(replace(SHAPE, num_blocks=8)), EngineOptions(), clock)
    engine.submit(make_submit(0, [1] * 5, 27, arrival=0.0))
    for sequence_id in range(1, 30):
        engine.submit(make_submit(sequence_id, [sequence_id] * 5, 20, arrival=float(sequence_id)))
    for num_steps in range(1, 28):
        step(engine, ledger)
        assert len(ledger.tokens[0]) == num_steps
    run_to_end(engine, ledger)


def test_decoding_goes_on_beside_a_long_prompt(engine: Engine, ledger: Ledger, options: EngineOptions) -> None:
    engine.submit(make_submit(1, [1, 2], 40))
    for _ in range(3):
        step(engine, ledger)
    engine.submit(make_submit(2, [3] * 64, 4))
    num_tokens = len(ledger.tokens[1])
    for num_steps in range(1, 9):
        stats = stats_after(engine, ledger)
        assert len(ledger.tokens[1]) == num_tokens + num_steps
        assert stats.num_tokens <= 8 + 1
    run_to_end(engine, ledger)
    assert ledger.tokens[2] == expected_tokens([3] * 64, 4, Sampling())


def test_prompts_are_expected_while_there_are_any(engine: Engine, ledger: Ledger) -> None:
    """In the step launched last, or in the next one; behind these nothing should wait."""
    assert not engine.expects_prompts
    engine.submit(make_submit(1, [3] * 40, 9))
    seen = [engine.expects_prompts]
    while 1 not in ledger.tokens:
        step(engine, ledger)
        seen.append(engine.expects_prompts)
    assert all(seen[:-1])
    step(engine, ledger)
    assert not engine.expects_prompts
    engine.submit(make_submit(2, [4, 5], 3))
    assert engine.expects_prompts
    run_to_end(engine, ledger)
    assert not engine.expects_prompts


def test_what_cannot_start_is_not_expected(clock: FakeClock, ledger: Ledger) -> None:
    engine = Engine(FakeRunner(replace(SHAPE, num_slots=1)), EngineOptions(), clock)
    engine.submit(make_submit(1, [1, 2], 9))
    engine.submit(make_submit(2, [3, 4], 3))
    for _ in range(2):
        step(engine, ledger)
    assert not engine.expects_prompts
    run_to_end(engine, ledger)
    assert len(ledger.tokens[2]) == 3


def test_more_slots_than_batch_tokens_starve_nobody(ledger: Ledger, options: EngineOptions, clock: FakeClock) -> None:
    engine = Engine(FakeRunner(replace(SHAPE, max_batch_tokens=3)), options, clock)
    for sequence_id in range(9):
        engine.submit(make_submit(sequence_id, [sequence_id] * 4, 6))
    run_to_end(engine, ledger)
    assert set(ledger.finishes.values()) == {FinishCode.LENGTH}


def test_a_large_one_at_the_head_is_not_overtaken(ledger: Ledger, options: EngineOptions, clock: FakeClock) -> None:
    engine = Engine(FakeRunner(replace(SHAPE, num_blocks=16)), options, clock)
    engine.submit(make_submit(1, [1] * 30, 10, arrival=1.0))
    engine.submit(make_submit(2, [2] * 50, 10, arrival=2.0))
    engine.submit(make_submit(3, [3] * 2, 10, arrival=3.0))
    assert finish_order(engine, ledger) == [1, 2, 3]


def test_a_cached_prefix_is_not_counted_as_room_for_itself(
    ledger: Ledger, options: EngineOptions, clock: FakeClock
) -> None:
    """The pool's last free blocks are the prefix itself: taking it leaves none for the rest of the prompt."""
    engine = Engine(FakeRunner(replace(SHAPE, num_blocks=8)), options, clock)
    prompt = [9] * 17
    engine.submit(make_submit(1, prompt, 1, cache_root=b"a"))
    run_to_end(engine, ledger)
    engine.submit(make_submit(2, [1] * 13, 3))
    for _ in range(2):
        step(engine, ledger)
    engine.submit(make_submit(3, prompt, 3, cache_root=b"a"))
    run_to_end(engine, ledger)
    assert ledger.tokens[3] == expected_tokens(prompt, 3, Sampling())
    assert ledger.num_preempted == 0


def test_newcomers_leave_running_sequences_room_to_grow(
    ledger: Ledger, options: EngineOptions, clock: FakeClock
) -> None:
    """One free block is what the running sequence needs next: a newcomer that took it would be preempted at once."""
    engine = Engine(FakeRunner(replace(SHAPE, num_blocks=3)), options, clock)
    engine.submit(make_submit(1, [1] * 7, 5, arrival=1.0))
    engine.submit(make_submit(2, [2] * 3, 2, arrival=2.0))
    run_to_end(engine, ledger)
    assert ledger.num_preempted == 0
    assert set(ledger.finishes.values()) == {FinishCode.LENGTH}
