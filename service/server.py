"""Composition root and life cycle of the front-end process: start, serve, drain, stop.

    python -m service.server --socket PATH --heartbeat-fd N        settings as JSON on standard input

It knows what there is and in which order it begins and ends; what anything does is its own module's.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any, Protocol

import uvloop

from service import banner, logs
from service.admission import Admission
from service.config import Settings
from service.engine.client import EngineClient
from service.engine.messages import Hello, StepStats
from service.errors import UNMEASURED_RETRY_SECONDS, ServerDraining, StartupError
from service.generations import Engine, Generations
from service.heartbeat import Heartbeat
from service.metrics import Metrics
from service.rpc import listener
from service.rpc.convert import Converter
from service.rpc.health import LIVENESS, PROCESS, READINESS, Health
from service.rpc.inference import EngineLoad, InferenceServicer
from service.rpc.model import ServedModel
from service.text.chat import ChatTemplate
from service.text.tokenizer import Tokenizer

log = logging.getLogger("quire.server")

LEAVE_SECONDS = 1.0
"""Time for callers to hear how their calls ended, once the drain budget is spent."""


class RunningEngine(Engine, Protocol):
    """An EngineClient, or what stands in for one in a test."""

    async def run(self) -> None: ...


class ConnectEngine(Protocol):
    """Makes the engine client; it calls back on the event loop."""

    def __call__(
        self,
        *,
        on_up: Callable[[Hello], None],
        on_down: Callable[[], None],
        on_stats: Callable[[StepStats], None],
    ) -> RunningEngine: ...


class FrontEnd:
    """One front end. `on_ready` is called once, when it can answer generations for the first time."""

    def __init__(
        self, settings: Settings, connect: ConnectEngine, on_ready: Callable[[FrontEnd, Hello], None] = lambda *_: None
    ) -> None:
        """Raises StartupError when the model's text side cannot be loaded."""
        self.settings = settings
        self._on_ready = on_ready
        self._stopping = asyncio.Event()
        self._skipping = asyncio.Event()
        self._closing = AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        tokenizer = Tokenizer.from_directory(settings.model)
        self.model = ServedModel(settings.served_name, tokenizer, ChatTemplate.from_directory(settings.model))
        self.metrics = Metrics()
        self._health = Health()
        self._load = EngineLoad()
        self._admission = Admission(
            num_slots=settings.max_num_seqs,
            max_requests=settings.max_waiting_requests,
            max_tokens=settings.max_waiting_tokens,
        )
        self._engine = connect(on_up=self._on_up, on_down=self._on_down, on_stats=self._on_stats)
        self.generations = Generations(self._engine, tokenizer, self._admission, self.metrics.requests)
        self.port = 0
        self.metrics_port = 0

    async def run(self, companion: Coroutine[Any, Any, None]) -> None:
        """A whole life, with a task that begins before and ends after everything else.

        Raises StartupError when it cannot begin, or whatever ended one of its tasks.
        """
        self._start_task(companion)
        try:
            await self.start()
            await self.serve()
            await self.drain()
        finally:
            await self.stop()

    async def start(self) -> None:
        """Opens both ports and looks for the engine; generations are refused until it is up."""
        settings = self.settings
        server = listener.build(
            self._servicer(),
            self._health,
            reflection=settings.reflection,
            connection_grace_seconds=settings.max_deadline_seconds,
            on_handled=self.metrics.requests.on_handled,
        )
        # Before the metrics' port: a second server on one machine should hear of the port that matters.
        self.port = listener.bind(server, settings.host, settings.port)
        endpoint = self.metrics.serve(settings.metrics_host, settings.metrics_port)
        self._closing.push_async_callback(endpoint.close)
        self.metrics_port = endpoint.port
        self._start_task(self._engine.run())
        self._closing.push_async_callback(server.stop, LEAVE_SECONDS)
        await server.start()
        self._health.set(PROCESS, True)
        self._health.set(LIVENESS, True)

    async def serve(self) -> None:
        """Returns when it is asked to stop."""
        stopping = asyncio.create_task(self._stopping.wait())
        done, _ = await asyncio.wait({stopping, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        for task in done - {stopping}:
            task.result()
        if not self._stopping.is_set():
            raise RuntimeError("a task of the front end returned")

    async def drain(self) -> None:
        """Tells balancers, refuses what is new, lets what runs finish, ends the rest. A second signal skips ahead."""
        self._health.set(PROCESS, False)
        self._health.set(READINESS, False)
        self.metrics.engine.on_draining()
        if self.model.is_known:  # a server that never served has one thing to say: why
            log.info(
                "draining; another signal ends what is open at once",
                extra=logs.with_fields(
                    open_requests=self.generations.num_open, drain_seconds=self.settings.drain_seconds
                ),
            )
        await self._wait(self._skipping.wait(), self.settings.lame_duck_seconds)
        self._admission.drain()
        await self._wait(self.generations.wait_idle(), self.settings.drain_seconds)
        self.generations.end_all(ServerDraining(retry_after_seconds=UNMEASURED_RETRY_SECONDS))
        with suppress(TimeoutError):  # a caller that reads nothing keeps its place until the server stops
            await asyncio.wait_for(self.generations.wait_idle(), LEAVE_SECONDS)

    async def stop(self) -> None:
        """Closes what was opened, last first."""
        self._health.close()
        await self._closing.aclose()
        if self.model.is_known:
            log.info("stopped")

    def request_stop(self) -> None:
        """Asks for the drain; asked twice, for its end."""
        if self._stopping.is_set():
            self._skipping.set()
        self._stopping.set()

    def _servicer(self) -> InferenceServicer:
        settings = self.settings
        converter = Converter(
            self.model,
            default_deadline_seconds=settings.default_deadline_seconds,
            max_deadline_seconds=settings.max_deadline_seconds,
        )
        return InferenceServicer(
            settings=settings,
            model=self.model,
            converter=converter,
            admission=self._admission,
            generations=self.generations,
            load=self._load,
            metrics=self.metrics.requests,
        )

    def _on_up(self, hello: Hello) -> None:
        is_first = not self.model.is_known
        self.model.learn(hello)
        self.metrics.engine.on_up(self.model.name, hello)
        self._admission.open()
        if self._stopping.is_set():
            return
        self._health.set(READINESS, True)
        log.info("the engine is up", extra=logs.with_fields(model=self.model.name, digest=hello.facts.digest))
        if is_first:
            self._on_ready(self, hello)

    def _on_down(self) -> None:
        if not self._stopping.is_set():
            log.warning("the engine is lost; open requests wait for the next one")
        self.metrics.engine.on_down()
        self._health.set(READINESS, False)

    def _on_stats(self, stats: StepStats) -> None:
        self._load.on_stats(stats)
        self._admission.on_stats(stats)
        self.metrics.engine.on_step(stats)

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        """A task that ends with this front end, and that ends it when it fails."""
        task = asyncio.create_task(work)
        self._tasks.add(task)

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._closing.push_async_callback(end)

    async def _wait(self, condition: Awaitable[object], seconds: float) -> None:
        """Waits for a condition, this long at most, and not at all once a second signal came."""
        tasks = [asyncio.ensure_future(condition), asyncio.ensure_future(self._skipping.wait())]
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()


async def serve(settings: Settings, socket_path: str, heartbeat_fd: int) -> None:
    """Runs a front end under a supervisor: signals, heartbeat, banner."""

    def on_ready(ready: FrontEnd, hello: Hello) -> None:
        heartbeat.ready()
        made = banner.make(
            settings,
            hello,
            address=listener.address_of(settings.host.strip("[]"), ready.port),
            metrics_address=listener.address_of(settings.metrics_host.strip("[]"), ready.metrics_port),
            has_chat=ready.model.chat is not None,
        )
        with suppress(OSError):  # a server whose output nobody reads serves all the same
            made.show(sys.stdout)

    front_end = FrontEnd(settings, partial(EngineClient, socket_path), on_ready)
    # What was loaded stays: collections that walk it would only hold up streams.
    gc.collect()
    gc.freeze()

    def on_orphaned() -> None:
        """Without a supervisor there is no engine either: nothing can finish."""
        front_end.request_stop()
        front_end.request_stop()

    heartbeat = Heartbeat(heartbeat_fd, on_lag=front_end.metrics.engine.on_loop_lag, on_orphaned=on_orphaned)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, front_end.request_stop)
    await front_end.run(heartbeat.run())


def take_turns() -> None:
    """Keeps this process from taking a core at the moment it wakes: kernels' threads wait for the one that loses it."""
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def main() -> int:
    """Returns the exit code: 0 after a drain, 2 for a user's mistake, 1 for a failure."""
    parser = argparse.ArgumentParser(prog="service.server", description="The front-end process of `quire serve`.")
    parser.add_argument("--socket", required=True, help="path of the engine's socket")
    parser.add_argument("--heartbeat-fd", required=True, type=int, help="writing end of the supervisor's pipe")
    arguments = parser.parse_args()
    settings = Settings.model_validate_json(sys.stdin.buffer.read())
    logs.configure(settings.log_level, settings.log_format)
    take_turns()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's to pass on
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings, arguments.socket, arguments.heartbeat_fd))
    except StartupError as error:
        print(f"quire: error: {error}", file=sys.stderr)
        return 2
    except Exception:
        log.exception("the front end failed")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
