"""Admission by itself, with a clock that the test turns."""

import pytest

from service.admission import Admission, Ticket, TokenRate
from service.engine.messages import StepStats
from service.errors import DeadlineUnreachable, QueueFull, ServerDraining, ServerStarting


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    made = Admission(num_slots=2, max_requests=4, max_tokens=100, clock=clock)
    made.open()
    return made


def admit(admission: Admission, count: int = 1, num_tokens: int = 10, deadline: float = 1e9) -> list[Ticket]:
    tickets = [Ticket(num_tokens) for _ in range(count)]
    for ticket in tickets:
        admission.admit(ticket, deadline)
    return tickets


def test_refuses_before_the_start_and_while_draining(clock):
    admission = Admission(num_slots=2, max_requests=4, max_tokens=100, clock=clock)
    with pytest.raises(ServerStarting):
        admit(admission)
    admission.open()
    assert admission.is_accepting
    admission.drain()
    assert not admission.is_accepting
    with pytest.raises(ServerDraining):
        admit(admission)


def test_counts_places_until_they_are_left(admission):
    first, second = admit(admission, 2)
    assert (admission.num_waiting, admission.num_waiting_tokens, admission.num_running) == (2, 20, 0)
    admission.start(first)
    assert (admission.num_waiting, admission.num_waiting_tokens, admission.num_running) == (1, 10, 1)
    admission.leave(second)
    admission.leave(first)
    assert (admission.num_waiting, admission.num_waiting_tokens, admission.num_running) == (0, 0, 0)


def test_bounds_requests_beyond_the_slots(admission):
    admit(admission, 6)
    with pytest.raises(QueueFull) as refusal:
        admit(admission)
    assert refusal.value.metadata == {"queueDepth": "6"}


def test_without_a_queue_as_many_as_there_are_slots_get_in(clock):
    admission = Admission(num_slots=2, max_requests=0, max_tokens=100, clock=clock)
    admission.open()
    admit(admission, 2)
    with pytest.raises(QueueFull):
        admit(admission)


def test_bounds_tokens_but_lets_a_large_prompt_wait_alone(admission):
    admit(admission, num_tokens=1000)
    with pytest.raises(QueueFull):
        admit(admission, num_tokens=1)


def saturate(admission: Admission, clock: Clock, gap: float) -> list[Ticket]:
    """Two run and three wait; the queue was seen to move once in `gap`. The tickets that wait."""
    tickets = admit(admission, 6)
    for ticket in tickets[:2]:
        clock.now += gap
        admission.start(ticket)
    clock.now += gap
    admission.leave(tickets[0])
    admission.start(tickets[2])
    return tickets[3:]


def test_estimates_from_the_measured_drain_rate(admission, clock):
    assert admission.estimated_wait_seconds == 0
    saturate(admission, clock, gap=3.0)
    assert (admission.num_running, admission.num_waiting) == (2, 3)
    assert admission.estimated_wait_seconds == pytest.approx(9.0)
    assert admission.retry_after_seconds == pytest.approx(4.5)


def test_refuses_what_cannot_meet_its_deadline(admission, clock):
    saturate(admission, clock, gap=3.0)
    with pytest.raises(DeadlineUnreachable) as refusal:
        admit(admission, deadline=clock.now + 8.0)
    assert refusal.value.metadata == {"estimatedWaitMs": "9000"}
    assert refusal.value.retry_after_seconds == pytest.approx(4.5)
    admit(admission, deadline=clock.now + 10.0)


def test_a_free_slot_means_no_wait_unless_the_engine_has_a_queue(admission, clock):
    waiting = saturate(admission, clock, gap=3.0)
    for ticket in waiting[:2]:
        admission.start(ticket)
        admission.leave(ticket)
    running = [admission.num_running, admission.num_waiting]
    admission.num_running -= 1  # one slot is free, one request is on its way to it
    assert running == [2, 1]
    assert admission.estimated_wait_seconds == 0
    admission.on_stats(StepStats(num_waiting=1))
    assert admission.estimated_wait_seconds > 0


def test_an_idle_time_is_no_slow_drain(admission, clock):
    for _ in range(3):
        (ticket,) = admit(admission)
        admission.start(ticket)
        clock.now += 1000.0
        admission.leave(ticket)
    admit(admission, 5)
    assert admission.estimated_wait_seconds == 0


def test_retry_hints_are_bounded(admission, clock):
    assert admission.retry_after_seconds == 1.0
    saturate(admission, clock, gap=1000.0)
    assert admission.retry_after_seconds == 30.0


def test_token_rate_forgets(clock):
    rate = TokenRate(clock)
    rate.add(10)
    clock.now += 4.0
    rate.add(20)
    assert rate.per_second == pytest.approx(6.0)
    clock.now += 2.0
    assert rate.per_second == pytest.approx(4.0)
    clock.now += 100.0
    assert rate.per_second == 0.0
