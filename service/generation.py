"""Owns one request in the front end, from acceptance to its one terminal event: its text, its mailbox, its times.

Text is made and stop strings are matched when tokens arrive, not when the caller reads: a stop string ends the sequence
in the engine at once, whoever reads. It knows neither gRPC nor protobuf, nor how the engine schedules.

    engine ──on_token──► detokeniser ──► stop matcher ──► mailbox ──next_delta──► the caller's writer
                                                          (one place; new output joins what was not taken yet,
                                                          and is announced after delta_seconds at the earliest)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from model.interface import Sampling, TokenLogprobs
from service.engine.messages import NO_TOKEN, FinishCode, Limits, Start, Submit
from service.errors import UNMEASURED_RETRY_SECONDS, DeadlineExceeded, EngineLost, NonFiniteLogits
from service.metrics import RequestMetrics
from service.output import Delta, Mailbox, TextStream
from service.text.tokenizer import Tokenizer

DELTA_SECONDS = 0.04
DELTA_SECONDS_PER_REQUEST = 0.01
LONG_DELTA_SECONDS = 0.1
LONG_DELTA_SECONDS_PER_REQUEST = 0.005
LONGEST_DELTA_SECONDS = 0.15
DELTA_GRACE_SECONDS = 0.02
"""How much later a delta may be for the sake of going out with the tokens that wake this process anyway."""


def delta_seconds(num_open: int) -> float:
    """How long after a delta a reader is given the next one, with what was drawn meanwhile; of so many open requests.

    A message costs ten times the work of a token: between its two ends 0.1 to 0.5 ms of a core, which the requests have
    to leave to computing. So there are about a hundred a second of few requests, two hundred of more than twenty, up to
    the longest interval. The first token and the end do not wait.
    """
    long = min(num_open * DELTA_SECONDS_PER_REQUEST, LONG_DELTA_SECONDS)
    longest = min(num_open * LONG_DELTA_SECONDS_PER_REQUEST, LONGEST_DELTA_SECONDS)
    return max(DELTA_SECONDS, long, longest)


class EndReason(StrEnum):
    """Why a generation ended well."""

    STOP = "stop"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LENGTH = "context_length"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated request; defaults are filled in. Times are seconds on the machine's monotonic clock.

    `length_reason` tells what running into `max_new_tokens` means: the caller's own limit, or the end of the context.
    `cache_root` None bypasses the prefix cache.
    """

    model: str
    token_ids: list[int]
    sampling: Sampling
    max_new_tokens: int
    min_new_tokens: int
    length_reason: EndReason
    end_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    include_stop_string: bool
    wants_text: bool
    keep_special_tokens: bool
    wants_token_ids: bool
    cache_root: bytes | None
    priority: int
    client_request_id: str
    arrival: float
    deadline: float

    def to_submit(self, sequence_id: int) -> Submit:
        """What the engine is told."""
        limits = Limits(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            end_token_ids=self.end_token_ids,
            deadline=self.deadline,
            arrival=self.arrival,
            priority=self.priority,
        )
        return Submit(
            id=sequence_id,
            token_ids=self.token_ids,
            num_prompt=len(self.token_ids),
            sampling=self.sampling,
            limits=limits,
            cache_root=self.cache_root,
            wants_each_token=bool(self.stop_strings),
        )


@dataclass(frozen=True, slots=True)
class Finish:
    """A good end. `stop` is the token id or the stop string that matched, None for the other reasons."""

    reason: EndReason
    stop: int | str | None
    num_tokens: int
    preemptions: int
    queue_seconds: float
    first_token_seconds: float
    total_seconds: float


class Generation:
    """One accepted request: hears the engine (as its SequenceListener), is read by its caller.

    Ends exactly once for the caller: with a Finish, or with the exception that `next_delta` raises.
    """

    def __init__(
        self,
        request: GenerationRequest,
        sequence_id: int,
        generation_id: str,
        *,
        tokenizer: Tokenizer,
        metrics: RequestMetrics,
        num_open: Callable[[], int],
        on_scheduled: Callable[[], None],
        cancel: Callable[[int], None],
    ) -> None:
        """`on_scheduled` is called when the sequence leaves the queue, `cancel` to end it in the engine."""
        self.request = request
        self.id = generation_id
        self.sequence_id = sequence_id
        self.num_cached = 0
        self.num_tokens = 0
        self.was_abandoned = False
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self._metrics = metrics
        self._num_open = num_open
        self._on_scheduled = on_scheduled
        self._cancel = cancel
        self._cancelled_at: float | None = None
        self._is_in_engine = True
        self._has_left = False
        self._text = _text_stream(request, tokenizer) if request.wants_text else None
        self._mailbox = Mailbox()
        self._has_news = asyncio.Event()
        self._has_ended = asyncio.Event()
        self._next_delta_at = 0.0
        self._announcement: asyncio.TimerHandle | None = None
        self._end: Finish | Exception | None = None
        self._last_token_id = NO_TOKEN

    # What the engine tells.

    def on_start(self, start: Start) -> None:
        """The sequence was scheduled for the first time."""
        if self._has_left:
            return
        self.scheduled_at = start.scheduled_at
        self.num_cached = start.num_cached
        self._on_scheduled()
        queue_seconds = max(start.scheduled_at - self.request.arrival, 0.0)
        self._metrics.on_scheduled(queue_seconds, len(self.request.token_ids), start.num_cached)

    def on_token(self, token_id: int, logprobs: TokenLogprobs | None, preemptions: int, drawn_at: float) -> None:
        """A token was drawn. A failure in handling it is this generation's alone."""
        if self._has_left or self._end is not None:
            return
        try:
            self._note_time(drawn_at)
            self._take(token_id, logprobs, preemptions)
        except Exception as error:
            self.fail(error)

    def on_finish(self, code: FinishCode, preemptions: int) -> None:
        """The sequence has left the engine; its blocks are free."""
        self._is_in_engine = False
        if self._cancelled_at is not None:
            self._metrics.on_freed(time.monotonic() - self._cancelled_at)
        if self._has_left or self._end is not None:
            return
        try:
            self._end_with(self._judge(code, preemptions))
        except Exception as error:
            self._end_with(error)

    def on_lost(self) -> None:
        """The engine is gone and the sequence with it."""
        self._is_in_engine = False
        if not self._has_left and self._end is None:
            metadata = {"generatedTokens": self.num_tokens}
            self._end_with(EngineLost(metadata=metadata, retry_after_seconds=UNMEASURED_RETRY_SECONDS))

    # What the caller's side does.

    async def next_delta(self) -> Delta | None:
        """Everything new since the last call; waits until it is announced. None after a good end.

        Raises what ended the generation otherwise: a QuireError, or whatever a bug raised.
        """
        while True:
            await self._has_news.wait()
            if self._end is None:
                self._has_news.clear()
            if (delta := self._mailbox.take()) is not None:
                return delta
            if isinstance(self._end, Exception):
                raise self._end
            if self._end is not None:
                return None

    async def whole(self) -> Delta:
        """All the output, once it is complete. Raises as `next_delta`."""
        await self._has_ended.wait()
        if isinstance(self._end, Exception):
            raise self._end
        return self._mailbox.take() or Delta()

    @property
    def finish(self) -> Finish:
        """How it ended; to be asked for after a good end only."""
        assert isinstance(self._end, Finish), "asked for the end before it"
        return self._end

    def fail(self, error: Exception) -> None:
        """Ends it with an error, here and in the engine, unless it has ended."""
        if self._end is None:
            self._end_with(error)
            self._cancel_in_engine()

    def expire(self) -> None:
        """Its deadline has passed."""
        self.fail(self._deadline_exceeded())

    def abandon(self) -> None:
        """Its caller's connection broke: whatever exception that gives, it is a cancel."""
        self.was_abandoned = True

    def leave(self) -> None:
        """Its caller is gone: nothing counts any more, and the engine is not left with the sequence."""
        self._has_left = True
        self._forget_announcement()
        self._cancel_in_engine()

    # How it is done.

    def _cancel_in_engine(self) -> None:
        """Ends the sequence in the engine unless it has left it or was told already.

        The engine's answer, on_finish, may come from within: whoever calls this has noted the end before.
        """
        if self._is_in_engine and self._cancelled_at is None:
            self._cancelled_at = time.monotonic()
            self._cancel(self.sequence_id)

    def _take(self, token_id: int, logprobs: TokenLogprobs | None, preemptions: int) -> None:
        """Puts a token into the mailbox, and ends everything when it completes a stop string."""
        self.num_tokens += 1
        self._mailbox.put_token(token_id, logprobs, keep_id=self.request.wants_token_ids)
        self._last_token_id = token_id
        if self._text is not None:
            text, matched = self._text.push(token_id)
            self._mailbox.put_text(text)
            if matched is not None:
                self._end_with(self._finish(EndReason.STOP, matched, preemptions))
                self._cancel_in_engine()
                return
        self._announce(time.monotonic())

    def _announce(self, now: float) -> None:
        """Wakes the reader: at once, or where its last delta is too recent, with the first tokens for which it is not.

        A timer sees to it if none come: waking up for it beside them would cost the cores more than the message.
        """
        if now >= self._next_delta_at:
            self._next_delta_at = now + delta_seconds(self._num_open())
            self._has_news.set()
            self._forget_announcement()
        elif self._announcement is None:
            seconds = self._next_delta_at - now + DELTA_GRACE_SECONDS
            self._announcement = asyncio.get_running_loop().call_later(seconds, self._announce_late)

    def _forget_announcement(self) -> None:
        if self._announcement is not None:
            self._announcement.cancel()
            self._announcement = None

    def _announce_late(self) -> None:
        self._announcement = None
        self._announce(time.monotonic())

    def _note_time(self, drawn_at: float) -> None:
        if self.last_token_at is None:
            assert self.scheduled_at is not None, "a token before the start"
            self.first_token_at = drawn_at
            self._metrics.on_first_token(drawn_at - self.request.arrival, max(drawn_at - self.scheduled_at, 0.0))
        else:
            self._metrics.on_next_token(drawn_at - self.last_token_at)
        self.last_token_at = drawn_at

    def _judge(self, code: FinishCode, preemptions: int) -> Finish | Exception:
        """What the engine's code means to the caller. The last text is let go, and may complete a stop string."""
        if code is FinishCode.DEADLINE:
            return self._deadline_exceeded()
        if code is FinishCode.NON_FINITE:
            return NonFiniteLogits()
        if code not in (FinishCode.STOP_TOKEN, FinishCode.LENGTH):
            return RuntimeError(f"the engine ended a sequence with {code.name}, unasked")
        if self._text is not None:
            text, matched = self._text.finish()
            self._mailbox.put_text(text)
            if matched is not None:
                return self._finish(EndReason.STOP, matched, preemptions)
        if code is FinishCode.STOP_TOKEN:
            return self._finish(EndReason.STOP, self._last_token_id, preemptions)
        return self._finish(self.request.length_reason, None, preemptions)

    def _finish(self, reason: EndReason, stop: int | str | None, preemptions: int) -> Finish:
        arrival = self.request.arrival
        assert self.scheduled_at is not None, "a good end before the start"
        assert self.first_token_at is not None, "a good end without a token"
        return Finish(
            reason=reason,
            stop=stop,
            num_tokens=self.num_tokens,
            preemptions=preemptions,
            queue_seconds=max(self.scheduled_at - arrival, 0.0),
            first_token_seconds=self.first_token_at - arrival,
            total_seconds=time.monotonic() - arrival,
        )

    def _end_with(self, end: Finish | Exception) -> None:
        assert self._end is None, "a generation ends once"
        self._end = end
        self._forget_announcement()
        self._has_ended.set()
        self._has_news.set()

    def _deadline_exceeded(self) -> DeadlineExceeded:
        return DeadlineExceeded(metadata={"generatedTokens": self.num_tokens})


def _text_stream(request: GenerationRequest, tokenizer: Tokenizer) -> TextStream:
    return TextStream(
        tokenizer,
        stop_strings=request.stop_strings,
        include_stop_string=request.include_stop_string,
        min_tokens=request.min_new_tokens,
        end_token_ids=request.end_token_ids,
        keep_special_tokens=request.keep_special_tokens,
    )
