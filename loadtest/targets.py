"""The two ways to the same model: the engine in this process, and a server through the asyncio client.

Both take requests that begin at the same moment and give times and tokens of each; greedy, end-of-sequence ignored.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from loadtest.timing import StreamTimes
from loadtest.workloads import Work
from model.interface import Sampling
from service.client.aio import Client
from service.client.types import Delta
from service.config import Settings
from service.engine.engine import Engine
from service.engine.messages import NO_TOKEN, Limits, Submit
from service.engine.process import engine_options, load_model

LONG_SECONDS = 3_600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One stream: when its tokens came, and which."""

    times: StreamTimes
    token_ids: list[int]


class Target(Protocol):
    """Something that answers requests."""

    name: str

    async def run(self, works: Sequence[Work], *, use_cache: bool) -> list[Answer]:
        """Answers all requests at once."""


class EngineTarget:
    """The engine, called directly, built as the engine process builds it; over the built-in model by default."""

    name = "engine"

    def __init__(self, settings: Settings | None = None) -> None:
        settings = settings or Settings()
        runner, self.facts = load_model(settings)
        self._engine = Engine(runner, engine_options(settings, runner.shape))
        self._num_submitted = 0

    async def run(self, works: Sequence[Work], *, use_cache: bool, temperature: float = 0.0) -> list[Answer]:
        """See Target."""
        answers = dict(self.submit(work, use_cache=use_cache, temperature=temperature) for work in works)
        while self._engine.has_work:
            self.step(answers)
        return list(answers.values())

    def submit(self, work: Work, *, use_cache: bool, temperature: float = 0.0) -> tuple[int, Answer]:
        """Hands one request to the engine. Returns its sequence's id, and the answer that `step` is to fill."""
        self._num_submitted += 1
        sent_at = time.monotonic()
        self._engine.submit(as_submit(self._num_submitted, work, sent_at, use_cache, temperature))
        return self._num_submitted, Answer(StreamTimes(sent_at, len(work.prompt)), [])

    def step(self, answers: Mapping[int, Answer]) -> None:
        """One step; its tokens go to the answers of their sequences. There must be work."""
        report = self._engine.step()
        now = time.monotonic()
        assert report is not None, "an engine that has work reports"
        for sequence_id, token_id in zip(report.ids, report.token_ids, strict=True):
            if token_id != NO_TOKEN:
                answers[sequence_id].token_ids.append(token_id)
                answers[sequence_id].times.arrived(now, 1)
                answers[sequence_id].times.ended_at = now

    def cancel(self, answers: Mapping[int, Answer]) -> None:
        """Ends the sequences of these answers, and runs until nothing is left."""
        self._engine.cancel(answers)
        while self._engine.has_work:
            self.step(answers)


def as_submit(sequence_id: int, work: Work, now: float, use_cache: bool, temperature: float = 0.0) -> Submit:
    """A request that only its length ends; each has a seed of its own."""
    return Submit(
        id=sequence_id,
        token_ids=list(work.prompt),
        num_prompt=len(work.prompt),
        sampling=Sampling(temperature=temperature, seed=sequence_id),
        limits=Limits(
            max_new_tokens=work.num_new,
            min_new_tokens=0,
            end_token_ids=(),
            deadline=now + LONG_SECONDS,
            arrival=now,
        ),
        cache_root=b"" if use_cache else None,
    )


class GrpcTarget:
    """A server, through one channel."""

    name = "grpc"

    def __init__(self, address: str) -> None:
        self._client = Client(address)

    async def run(self, works: Sequence[Work], *, use_cache: bool) -> list[Answer]:
        """See Target."""
        return await asyncio.gather(*(self.answer(work, use_cache=use_cache) for work in works))

    async def answer(self, work: Work, *, use_cache: bool, sent_at: float | None = None) -> Answer:
        """One answer; its times count from now, or from when it was to be sent. Raises QuireClientError."""
        answer = Answer(StreamTimes(sent_at or time.monotonic(), len(work.prompt)), [])
        await self.read(answer, work, use_cache=use_cache)
        return answer

    async def read(self, answer: Answer, work: Work, *, use_cache: bool) -> None:
        """Fills an answer as its tokens come. Raises QuireClientError."""
        stream = self._client.stream(
            work.prompt,
            temperature=0.0,
            max_tokens=work.num_new,
            ignore_eos=True,
            return_token_ids=True,
            bypass_cache=not use_cache,
        )
        async with stream as events:
            async for event in events:
                if isinstance(event, Delta):
                    answer.times.arrived(time.monotonic(), event.num_tokens)
                    answer.token_ids.extend(event.token_ids)
        answer.times.ended_at = time.monotonic()

    async def close(self) -> None:
        """Closes the channel."""
        await self._client.close()
