"""Threads that others keep from running are left out for a while, and tried again."""

from __future__ import annotations

from itertools import count

import pytest

from model import contention
from model.contention import LONGEST_REST_SECONDS, LOOK_SECONDS, SHORTEST_REST_SECONDS, ThreadCount
from tests.model.levels import LEVELS, kernels_of, needs_kernels


def rest_after(threads: ThreadCount, now: float, waited: float) -> float:
    """Has a thread left out at `now`. Returns the seconds after which it is tried again, and tries it."""
    before = threads.value
    threads.judge(now, waited)
    assert threads.value == before - 1
    for look in count(1):
        threads.judge(now + look * LOOK_SECONDS, 0)
        if threads.value == before:
            return look * LOOK_SECONDS
    raise AssertionError


def test_all_compute_while_nobody_takes_a_core() -> None:
    threads = ThreadCount(2)
    for look in range(100):
        threads.judge(look * LOOK_SECONDS, 0.4 * (look % 2))
        assert threads.value == 2


def test_rests_grow_while_trials_fail_and_are_short_again_after_one_that_did_not() -> None:
    threads, now, rests = ThreadCount(2), 10.0, []
    for _ in range(6):
        rests.append(rest_after(threads, now, 0.6))
        now += rests[-1] + LOOK_SECONDS
    longer = [SHORTEST_REST_SECONDS * 2**i for i in range(6)]
    assert rests == pytest.approx([min(rest, LONGEST_REST_SECONDS) for rest in longer], abs=LOOK_SECONDS)
    threads.judge(now, 0)
    assert threads.value == 2
    assert rest_after(threads, now + LOOK_SECONDS, 0.6) == pytest.approx(SHORTEST_REST_SECONDS, abs=LOOK_SECONDS)


def test_the_more_threads_the_less_waiting_one_of_them_may_cause() -> None:
    for most, waited, expected in [(2, 0.49, 2), (2, 0.51, 1), (16, 0.06, 16), (16, 0.07, 15), (1, 1.0, 1)]:
        threads = ThreadCount(most)
        threads.judge(0, waited)
        assert threads.value == expected, (most, waited)


def test_threads_are_left_out_and_come_back_one_by_one() -> None:
    threads, values = ThreadCount(4), []
    for look in range(12):
        threads.judge(10 + look * SHORTEST_REST_SECONDS / 4, 1.0 if look < 3 else 0)
        values.append(threads.value)
    assert values == [3, 2, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4]


@needs_kernels
def test_where_the_system_does_not_tell_all_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(contention.os, "open", refuse)
    monkeypatch.setattr(contention, "LOOK_SECONDS", 0)
    watch = contention.Contention(kernels_of(LEVELS[0]), 3)
    assert [watch.num_threads() for _ in range(5)] == [3] * 5
