"""An engine loop with the fake runner in a thread, and a listener that remembers what it was told."""

import asyncio
import os
import threading
import time
from collections.abc import Callable

from model.interface import Batch, TokenLogprobs
from service.engine.engine import Engine, EngineOptions
from service.engine.heartbeat import Heartbeat
from service.engine.loop import EngineLoop
from service.engine.messages import FinishCode, Hello, Start
from tests.engine.fake_process import FACTS, STEP_SECONDS
from tests.engine.fake_runner import SHAPE, FakeRunner

PATIENCE_SECONDS = 10.0


class ServedEngine:
    """Runs until `end`, which closes its sockets as a dying process would.

    While cleared, `gate` holds every step up but for `num_free_steps` more, and `prompt_gate` those with a prompt.
    """

    def __init__(self, socket_path: str, depth: int = 0) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.num_free_steps = 0
        self.prompt_gate = threading.Event()
        self.prompt_gate.set()
        self.engine = Engine(FakeRunner(SHAPE, on_step=self._wait_for_gate), EngineOptions(depth=depth))
        self._reading, writing = os.pipe()
        self._writing = writing
        self._loop = EngineLoop(self.engine, Hello(FACTS, SHAPE), socket_path, Heartbeat(writing))
        self._thread = threading.Thread(target=self._loop.run, daemon=True)
        self._thread.start()

    def _wait_for_gate(self, batch: Batch) -> None:
        time.sleep(STEP_SECONDS)
        if self.num_free_steps:
            self.num_free_steps -= 1
        else:
            assert self.gate.wait(PATIENCE_SECONDS)
        if batch.num_tokens > len(batch.rows):
            assert self.prompt_gate.wait(PATIENCE_SECONDS)

    def end(self) -> None:
        if not self._thread.is_alive():
            return
        os.close(self._reading)
        self.gate.set()
        self.prompt_gate.set()
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()
        self._loop.close()
        os.close(self._writing)


class Recorder:
    """A listener; `ended` resolves with how it ended, None for lost."""

    def __init__(self, on_token: Callable[[int], None] = lambda token_id: None) -> None:
        self.starts: list[Start] = []
        self.token_ids: list[int] = []
        self.drawn_at: list[float] = []
        self.logprobs: list[TokenLogprobs | None] = []
        self.preemptions = 0
        self.ended: asyncio.Future[FinishCode | None] = asyncio.get_running_loop().create_future()
        self._on_token = on_token

    def on_start(self, start: Start) -> None:
        assert not self.ended.done()
        self.starts.append(start)

    def on_token(self, token_id: int, logprobs: TokenLogprobs | None, preemptions: int, drawn_at: float) -> None:
        assert not self.ended.done(), "a token after the end"
        self.token_ids.append(token_id)
        self.drawn_at.append(drawn_at)
        self.logprobs.append(logprobs)
        self._on_token(token_id)

    def on_finish(self, code: FinishCode, preemptions: int) -> None:
        self.preemptions = preemptions
        self.ended.set_result(code)  # raises when it ends twice

    def on_lost(self) -> None:
        self.ended.set_result(None)

    async def end(self) -> FinishCode | None:
        return await asyncio.wait_for(self.ended, PATIENCE_SECONDS)


async def until(holds: Callable[[], bool]) -> None:
    """Waits for a condition that only other threads or processes can bring about."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not holds():  # noqa: ASYNC110 - nothing in this process could set an event
            await asyncio.sleep(0.005)
