"""The kernels' own threads: they come and go, queue, survive a fork and an end, and stay where they are told."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from model.native import build
from model.native.levels import SOURCE_DIR
from tests.model.levels import LEVELS, kernels_of, needs_kernels
from tests.model.team_work import Norms

ROOT = Path(__file__).resolve().parents[2]

pytestmark = needs_kernels
on_linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")

PRELUDE = """
import os, sys, threading
from model.native.library import open_kernels
from tests.model.team_work import Norms
kernels = open_kernels(sys.argv[1])
"""


def run_alone(code: str) -> subprocess.CompletedProcess[str]:
    """In a process whose threads are its own; what it says on standard output is for the caller."""
    command = [sys.executable, "-W", "error", "-c", PRELUDE + code, LEVELS[0]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("level", LEVELS)
def test_the_number_of_threads_grows_and_shrinks(level: str) -> None:
    norms = Norms(kernels_of(level))
    norms.check(1, 3, 2, 4, 1, 2, 4, 3)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_many_calls_one_after_the_other(num_threads: int) -> None:
    """Each wakes the others and meets them; more threads than CPUs must only be slower."""
    norms = Norms(kernels_of(LEVELS[0]), num_rows=4100)
    norms.check(*[num_threads] * 300)


def test_more_threads_than_there_is_work_or_room_for() -> None:
    Norms(kernels_of(LEVELS[0])).check(16, 2)
    run_alone("Norms(kernels).check(300, 2, 255)")


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_calls_from_several_threads_queue(num_threads: int) -> None:
    kernels, wrong = kernels_of(LEVELS[0]), []
    works = [Norms(kernels, seed) for seed in range(4)]

    def call(norms: Norms, count: int) -> None:
        wrong.extend(1 for _ in range(40) if norms.run(count) != norms.expected)

    # Some of them with another number of threads than the others.
    callers = [threading.Thread(target=call, args=(work, num_threads + i % 2)) for i, work in enumerate(works)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not any(caller.is_alive() for caller in callers)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    """And its own child, too, and the parent goes on."""
    code = """
norms = Norms(kernels)
norms.check(3)
def generation(depth):
    child = os.fork()
    if child == 0:
        norms.check(1, 3, 2, 4)
        if depth:
            generation(depth - 1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    norms.check(3, 2)
generation(2)
"""
    run_alone(code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_in_the_middle_of_a_call() -> None:
    code = """
import warnings
warnings.simplefilter("ignore")
norms, goes_on = Norms(kernels), [True]
def call():
    while goes_on[0]:
        norms.check(3)
caller = threading.Thread(target=call)
caller.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        norms.check(3, 2)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
goes_on[0] = False
caller.join()
norms.check(3)
"""
    run_alone(code)


def test_a_process_ends_at_once_while_threads_sleep() -> None:
    code = "Norms(kernels).check(3)\nimport time; time.sleep(0.05); print(flush=True)"
    command = [sys.executable, "-c", PRELUDE + code, LEVELS[0]]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        start = time.monotonic()
        assert process.wait(timeout=30) == 0
        assert time.monotonic() - start < 5


@on_linux
def test_threads_stay_on_their_cpus_but_for_the_callers() -> None:
    """What the caller starts for others later would inherit its place."""
    code = """
cpus = sorted(os.sched_getaffinity(0))
kernels.keep_to_cpus([cpus[0], cpus[-1], cpus[0]])
before = set(os.listdir("/proc/self/task"))
norms = Norms(kernels)
norms.check(3)
helpers = set(os.listdir("/proc/self/task")) - before
# They are not waited for: they may only be about to go there.
while sorted(sorted(os.sched_getaffinity(int(task))) for task in helpers) != sorted([[cpus[0]], [cpus[-1]]]):
    norms.check(3)
assert os.sched_getaffinity(0) == set(cpus)
norms.check(1, 3)
"""
    run_alone(code)


@on_linux
def test_threads_that_nobody_placed_may_run_anywhere() -> None:
    code = """
before = set(os.listdir("/proc/self/task"))
Norms(kernels).check(3)
places = [os.sched_getaffinity(int(task)) for task in set(os.listdir("/proc/self/task")) - before]
assert len(places) == 2 and all(place == os.sched_getaffinity(0) for place in places), places
"""
    run_alone(code)


@on_linux
def test_threads_that_wait_cost_nothing() -> None:
    """They spin for microseconds and then sleep."""
    code = """
import time
norms = Norms(kernels)
norms.check(4)
time.sleep(0.05)
start = time.process_time()
time.sleep(0.5)
print(time.process_time() - start)
"""
    assert float(run_alone(code).stdout) < 0.05


def test_phases_end_when_their_parts_are_done_whoever_is_late(tmp_path: Path) -> None:
    program = tmp_path / "team_phases"
    source = Path(__file__).with_name("team_phases.c")
    flags = ("-std=c11", "-O2", "-pthread", f"-I{SOURCE_DIR}")
    subprocess.run([build.find_compiler(), *flags, source, "-o", program], check=True)
    subprocess.run([program], check=True, timeout=60)
