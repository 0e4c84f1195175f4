"""How many of the kernels' threads compute while other processes take cores.

Threads meet after each operator, so that one which loses its core for some milliseconds holds up all others: two of
them beside a busy process do less than one that has a core to itself. Linux tells how long each was ready to run and
had no core (/proc/self/task/*/schedstat); where it does not, all threads compute always. Who computes what shows in no
result, so this may look at clocks. It does not know what is computed.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import chain

from model.native.library import Kernels

LOOK_SECONDS, TRIAL_SECONDS = 0.2, 0.03
"""Long enough for a front end's bursts not to look like a process that stays; a trial costs while it lasts."""
SHORTEST_REST_SECONDS, LONGEST_REST_SECONDS = 0.4, 3.2


class ThreadCount:
    """A number of threads: one less while that promises more, and raised now and then to see whether it still does."""

    def __init__(self, most: int) -> None:
        self.value = self._most = most
        self.is_trial = False
        self._rest_seconds, self._rests_until = SHORTEST_REST_SECONDS, 0.0

    def judge(self, now: float, waited: float) -> None:
        """Decides after some time, for this share of which threads have waited for a core (all their shares added up).

        While one waits so do the others: what is lost is `waited` times all threads, and to be less than one of them.
        """
        if self.value > 1 and waited * self.value > 1:
            longer = min(2 * self._rest_seconds, LONGEST_REST_SECONDS)
            self._rest_seconds = longer if self.is_trial else SHORTEST_REST_SECONDS
            self.value, self._rests_until, self.is_trial = self.value - 1, now + self._rest_seconds, False
        else:
            self.is_trial = self.value < self._most and now >= self._rests_until
            self.value += self.is_trial


class Contention:
    """Watches the threads of the kernels, the caller's included."""

    def __init__(self, kernels: Kernels, most_threads: int) -> None:
        self._count, self._most_threads = ThreadCount(most_threads), most_threads
        self._id_of = kernels.library.quire_thread_id
        self._id_of.argtypes, self._id_of.restype = (ctypes.c_int,), ctypes.c_int
        self._ties: dict[int, set[int]] = {}
        self._looked_at, self._waited = time.monotonic(), waited_seconds(self._threads())

    def num_threads(self) -> int:
        """How many are to compute the step that comes: asked before each, by the thread that calls the kernels."""
        now = time.monotonic()
        elapsed = now - self._looked_at
        if elapsed >= (TRIAL_SECONDS if self._count.is_trial else LOOK_SECONDS):
            waited, before = waited_seconds(self._threads()), self._count.value
            self._count.judge(now, (waited - self._waited) / elapsed)
            self._looked_at, self._waited = now, waited
            if before == self._most_threads > self._count.value:
                self._untie()
            elif before < self._most_threads == self._count.value:
                self._tie()
        return self._count.value

    def _threads(self) -> Iterator[int]:
        """By their names in the system."""
        return chain([threading.get_native_id()], self._helpers())

    def _helpers(self) -> Iterator[int]:
        """The threads beside the caller's, of those that have started."""
        return filter(None, map(self._id_of, range(1, self._most_threads)))

    def _untie(self) -> None:
        """Lets those that are tied to a CPU move: the one that is left out may not be the one whose CPU is taken."""
        anywhere = os.sched_getaffinity(0)
        cpus = {helper: os.sched_getaffinity(helper) for helper in self._helpers()}
        self._ties = {helper: its for helper, its in cpus.items() if its != anywhere}
        for helper in self._ties:
            os.sched_setaffinity(helper, anywhere)

    def _tie(self) -> None:
        for helper, cpus in self._ties.items():
            os.sched_setaffinity(helper, cpus)


def waited_seconds(threads: Iterable[int]) -> float:
    """For how long threads of this process have been ready to run and had no core; 0 where the system does not tell."""
    total = 0
    for thread in threads:
        try:
            file = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY)
            try:
                total += int(os.read(file, 100).split()[1])
            finally:
                os.close(file)
        except (OSError, IndexError, ValueError):
            return 0
    return total / 1e9
