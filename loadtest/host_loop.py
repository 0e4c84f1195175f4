"""An engine loop over steps that only take their time, and a watch on each of its phases.

It reaches into the engine from outside: the functions of the phases are wrapped where they hang, so that the service
knows nothing of being measured. It does not know what the loads are, nor what is made of the times.
"""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from operator import methodcaller
from pathlib import Path
from typing import ParamSpec, TypeVar

from loadtest.targets import as_submit
from loadtest.workloads import Work
from model.interface import Batch, ModelFacts, Pending, Runner, RunnerShape, Sampled
from service.engine.engine import Engine, EngineOptions
from service.engine.framing import FrameDecoder, encode_frame
from service.engine.loop import EngineLoop
from service.engine.messages import NO_TOKEN, FromEngine, Hello, Report

PHASES = ("poll", "schedule", "launch", "result", "commit", "report", "deliver", "other")
"""`poll`: commands taken in. `launch`, `result`: the runner's own work, without the wait for a step. `report`: the
columns of the report. `deliver`: each front end's share of it, encoded and sent. `other`: what is between them."""
DEVICE = "device"
"""The time of steps: no phase of the host."""
TOKEN = 7
FACTS = ModelFacts("none", "", "none", 0, 0, (), 0, 0, 0, "none", "none", "", 0)
READ_BYTES = 1 << 20

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(slots=True)
class Turn:
    """One turn of the loop: seconds of the host by phase, and the size of its step."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    device_seconds: float = 0.0
    """The wait for a step."""
    num_rows: int = 0
    """Of the step launched last."""
    num_tokens: int = 0
    is_disturbed: bool = False
    """The kernel gave the core to others meanwhile."""

    @property
    def host_seconds(self) -> float:
        """All phases."""
        return sum(self.seconds.values())


class Watch:
    """Measures turns. Functions that it wrapped count for their phase, but for the wrapped ones inside them."""

    def __init__(self) -> None:
        self.turn = Turn()
        self._inner = 0.0
        """Seconds so far of what was wrapped in the function that runs."""
        self._began = 0.0
        self._num_switches = 0
        self.is_running = False
        """A turn has begun and not ended."""

    def wrap(self, phase: str, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """The function, measured."""

        def measured(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            outer, self._inner = self._inner, 0.0
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - began
                self._count(phase, seconds - self._inner)
                self._inner = outer + seconds

        return measured

    def begin(self) -> None:
        """A turn begins."""
        self.is_running = True
        self.turn, self._inner = Turn(), 0.0
        self._num_switches = _num_switches()
        self._began = time.perf_counter()

    def end(self) -> Turn:
        """It ends."""
        seconds = time.perf_counter() - self._began
        self._count("other", seconds - self._inner)
        self.is_running = False
        self.turn.is_disturbed = _num_switches() != self._num_switches
        return self.turn

    def _count(self, phase: str, seconds: float) -> None:
        if phase == DEVICE:
            self.turn.device_seconds += seconds
        else:
            self.turn.seconds[phase] += seconds


def _num_switches() -> int:
    """How often the kernel has taken the core from this thread, which had not finished."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


class StepClock:
    """Lets steps take a fixed time, one after the other."""

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._free_at = 0.0

    def begin_step(self) -> float:
        """A step begins, now or when the one before is done. Returns when it will be."""
        self._free_at = max(time.perf_counter(), self._free_at) + self._step_seconds
        return self._free_at

    def wait(self, until: float) -> None:
        """Sleeps, if it is not late."""
        seconds = until - time.perf_counter()
        if self._step_seconds and seconds > 0:
            time.sleep(seconds)


@dataclass(frozen=True, slots=True)
class NoRunner:
    """A runner without work of its own, which always draws the same token."""

    shape: RunnerShape
    clock: StepClock

    def launch(self, batch: Batch) -> NoStep:
        """See model.interface.Runner."""
        return NoStep(self.clock, batch, self.clock.begin_step())


@dataclass(frozen=True, slots=True)
class NoStep:
    """A step of no runner."""

    clock: StepClock
    batch: Batch
    ends_at: float

    def result(self) -> Sampled:
        """See model.interface.Pending."""
        self.clock.wait(self.ends_at)
        num_drawn = sum([row.wants_token for row in self.batch.rows])
        return Sampled([TOKEN] * num_drawn, [True] * num_drawn)


class MeasuredRunner:
    """A runner whose own work counts for its phases."""

    def __init__(self, runner: Runner, watch: Watch) -> None:
        self.shape = runner.shape
        self.batch = Batch([], 0)
        """The last one launched."""
        self._launch = watch.wrap("launch", runner.launch)
        self._take = watch.wrap("result", methodcaller("result"))

    def launch(self, batch: Batch) -> MeasuredStep:
        """See model.interface.Runner."""
        self.batch = batch
        return MeasuredStep(self._launch(batch), self._take)


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step of a measured runner."""

    pending: Pending
    take: Callable[[Pending], Sampled]

    def result(self) -> Sampled:
        """See model.interface.Pending."""
        return self.take(self.pending)


class Caller:
    """The far end of the socket: sends works, reads reports, and follows each end by the next work."""

    def __init__(self, path: Path, later: Iterator[Work]) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(str(path))
        self._connection.setblocking(False)
        self._decoder: FrameDecoder[FromEngine] = FrameDecoder(FromEngine)
        self._later = later
        self._unsent = bytearray()
        self._num_sent = 0
        self.begun_ids: set[int] = set()
        """Sequences that have a token, or had."""

    def send(self, works: Sequence[Work]) -> None:
        """Queues requests for the next exchange."""
        for work in works:
            self._num_sent += 1
            self._unsent += encode_frame(as_submit(self._num_sent, work, time.monotonic(), use_cache=True))

    def exchange(self) -> None:
        """Reads what is there, answers it, and writes what the socket takes."""
        try:
            data = self._connection.recv(READ_BYTES)
        except BlockingIOError:
            data = b""
        for message in self._decoder.feed(data):
            if isinstance(message, Report):
                self._take(message)
        if self._unsent:
            with suppress(BlockingIOError):
                del self._unsent[: self._connection.send(self._unsent)]

    def _take(self, report: Report) -> None:
        self.begun_ids.update(
            key for key, token_id in zip(report.ids, report.token_ids, strict=True) if token_id != NO_TOKEN
        )
        num_ended = sum(map(bool, report.finishes))
        self.send(list(islice(self._later, num_ended)))

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()


class MeasuredLoop:
    """An EngineLoop over a runner and its steps' clock, turned as often as is asked.

    It is its own heartbeat, which parts the turns.
    """

    def __init__(
        self, runner: Runner, clock: StepClock, options: EngineOptions, path: Path, later: Iterator[Work]
    ) -> None:
        self._watch = Watch()
        self._runner = MeasuredRunner(runner, self._watch)
        self._turns: list[Turn] = []
        self._num_left = 0
        engine = Engine(self._runner, options)
        self._loop = EngineLoop(engine, Hello(FACTS, runner.shape), str(path), self)
        self._caller = Caller(path, later)
        self._wrap("poll", self._loop, "_poll")
        self._wrap("deliver", self._loop, "_deliver", "_release")
        self._wrap("schedule", engine.scheduler, "schedule")
        self._wrap("commit", engine, "_commit")
        self._wrap("report", engine, "_report")
        self._wrap(DEVICE, clock, "wait")

    def _wrap(self, phase: str, owner: object, *names: str) -> None:
        for name in names:
            setattr(owner, name, self._watch.wrap(phase, getattr(owner, name)))

    def start(self, works: Sequence[Work], num_settling: int) -> None:
        """Turns until each of these has a token, and so often again."""
        self._caller.send(works)
        while len(self._caller.begun_ids) < len(works):
            self.run(1)
        self.run(num_settling)

    def run(self, num_turns: int) -> list[Turn]:
        """So many turns of the loop, measured."""
        self._turns, self._num_left = [], num_turns
        self._loop.run()
        return self._turns

    def beat(self, now: float) -> bool:
        """See service.engine.heartbeat: whether the loop shall turn on. Here the caller has its time."""
        if self._watch.is_running:
            turn = self._watch.end()
            turn.num_rows, turn.num_tokens = len(self._runner.batch.rows), self._runner.batch.num_tokens
            self._turns.append(turn)
        self._caller.exchange()
        self._num_left -= 1
        if self._num_left < 0:
            return False
        self._watch.begin()
        return True

    def close(self) -> None:
        """Closes both ends."""
        self._caller.close()
        self._loop.close()
