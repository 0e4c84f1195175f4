"""Owns the set of open generations: starts them, sees them out, and ends what is left at shutdown.

Everything a generation holds is given back in one place, `held`: whatever way its caller leaves, the sequence in the
engine is ended, the queue's place is freed, the outcome is counted once and logged on one line. It knows neither gRPC
nor text.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from service.admission import Admission, Ticket
from service.engine.messages import Submit
from service.errors import Code, QuireError, Reason
from service.generation import Generation, GenerationRequest
from service.logs import with_fields
from service.metrics import Outcome, RequestMetrics
from service.text.tokenizer import Tokenizer

log = logging.getLogger("quire.request")

DEADLINE_SLACK_SECONDS = 0.05
"""A caller's clock for its deadline started a network trip before ours: a leave this close to it is the deadline."""


class Engine(Protocol):
    """What generations need of an EngineClient."""

    def submit(self, submit: Submit, listener: Generation) -> None: ...

    def cancel(self, sequence_id: int) -> None: ...


class Generations:
    """All generations that callers hold."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, admission: Admission, metrics: RequestMetrics) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._admission = admission
        self._metrics = metrics
        self._sequence_ids = itertools.count(1)
        self._id_prefix = secrets.token_hex(4)
        self._open: set[Generation] = set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def num_open(self) -> int:
        return len(self._open)

    @contextmanager
    def held(self, request: GenerationRequest) -> Iterator[Generation]:
        """Starts a generation and keeps it until its caller leaves, whether it has ended by then or not.

        Raises the refusals of Admission.admit.
        """
        ticket = Ticket(len(request.token_ids))
        generation = self._make(request, ticket)
        with self._metrics.counting_rejections():
            self._admission.admit(ticket, request.deadline)
        self._open.add(generation)
        self._is_idle.clear()
        self._metrics.on_accepted()
        timer = asyncio.get_running_loop().call_later(request.deadline - time.monotonic(), generation.expire)
        error: BaseException | None = None
        try:
            self._engine.submit(request.to_submit(generation.sequence_id), generation)
            yield generation
        except BaseException as raised:
            error = raised
            raise
        finally:
            timer.cancel()
            self._end(generation, ticket, error)

    def end_all(self, error: QuireError) -> None:
        """Ends every generation with this error; their callers then leave by themselves."""
        for generation in list(self._open):
            generation.fail(error)

    async def wait_idle(self) -> None:
        """Returns when no caller holds a generation."""
        await self._is_idle.wait()

    def _make(self, request: GenerationRequest, ticket: Ticket) -> Generation:
        sequence_id = next(self._sequence_ids)
        return Generation(
            request,
            sequence_id,
            f"gen-{self._id_prefix}-{sequence_id}",
            tokenizer=self._tokenizer,
            metrics=self._metrics,
            num_open=lambda: self.num_open,
            on_scheduled=lambda: self._admission.start(ticket),
            cancel=self._engine.cancel,
        )

    def _end(self, generation: Generation, ticket: Ticket, error: BaseException | None) -> None:
        generation.leave()
        was_scheduled = not ticket.is_waiting
        self._admission.leave(ticket)
        self._open.discard(generation)
        if not self._open:
            self._is_idle.set()
        verdict = _judge(generation, error)
        self._metrics.on_ended(verdict.outcome, verdict.reason, was_scheduled)
        if verdict.outcome is Outcome.OK:
            self._count_good_end(generation)
        _log_end(generation, verdict)

    def _count_good_end(self, generation: Generation) -> None:
        assert generation.first_token_at is not None
        assert generation.last_token_at is not None
        decode_seconds = generation.last_token_at - generation.first_token_at
        self._metrics.on_good_end(generation.finish.total_seconds, decode_seconds, generation.num_tokens)


class Verdict(NamedTuple):
    """How a generation counts; `code` is the gRPC status code's name, `reason` that of an error."""

    outcome: Outcome
    code: str
    reason: Reason | None = None


def _judge(generation: Generation, error: BaseException | None) -> Verdict:
    """How a generation counts whose caller left with this error."""
    if error is None:
        return Verdict(Outcome.OK, "OK")
    if isinstance(error, QuireError):
        return Verdict(Outcome.FAILED, error.code, error.reason)
    if not isinstance(error, asyncio.CancelledError) and not generation.was_abandoned:
        return Verdict(Outcome.FAILED, Code.INTERNAL, Reason.INTERNAL)
    if time.monotonic() >= generation.request.deadline - DEADLINE_SLACK_SECONDS:
        return Verdict(Outcome.FAILED, Code.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED)
    return Verdict(Outcome.CANCELLED, Code.CANCELLED)


def _log_end(generation: Generation, verdict: Verdict) -> None:
    request, arrival = generation.request, generation.request.arrival
    first, scheduled = generation.first_token_at, generation.scheduled_at
    fields = with_fields(
        generation_id=generation.id,
        client_request_id=request.client_request_id or None,
        outcome=verdict.outcome,
        code=verdict.code,
        reason=generation.finish.reason if verdict.outcome is Outcome.OK else verdict.reason,
        prompt_tokens=len(request.token_ids),
        cached_tokens=generation.num_cached,
        completion_tokens=generation.num_tokens,
        queue_seconds=None if scheduled is None else round(max(scheduled - arrival, 0.0), 4),
        ttft_seconds=None if first is None else round(first - arrival, 4),
        total_seconds=round(time.monotonic() - arrival, 4),
    )
    log.info("request ended", extra=fields)
