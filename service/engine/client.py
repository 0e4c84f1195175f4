"""The front end's side of the socket: sequences go out, their tokens come in, and an engine's death is survived.

Owns the connection and the open sequences. A restarted engine is given them again with what they had generated, so
their streams go on with the same tokens: draws depend on the seed and the position only. It knows neither gRPC nor
text, and runs on one asyncio loop: every callback comes from it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

import msgspec

from model.interface import TokenLogprobs
from service.engine.framing import FrameDecoder, FramingError, encode_frame
from service.engine.messages import (
    NO_TOKEN,
    Cancel,
    FinishCode,
    FromEngine,
    Hello,
    Report,
    Start,
    StepStats,
    Submit,
    ToEngine,
)

log = logging.getLogger("quire.engine_client")

RETRY_SECONDS = 0.05


class SequenceListener(Protocol):
    """Hears of one sequence: at most one on_start, tokens, then exactly one on_finish or on_lost."""

    def on_start(self, start: Start) -> None:
        """It was scheduled for the first time."""

    def on_token(self, token_id: int, logprobs: TokenLogprobs | None, preemptions: int, drawn_at: float) -> None:
        """A token was drawn; an end token too. The sequence had been preempted so many times by then."""

    def on_finish(self, code: FinishCode, preemptions: int) -> None:
        """It ended, after having been preempted so many times."""

    def on_lost(self) -> None:
        """Its engine is gone and it will not be resubmitted again."""


@dataclass(slots=True)
class OpenSequence:
    """What it takes to submit a sequence again."""

    submit: Submit
    listener: SequenceListener
    token_ids: list[int] = field(default_factory=list)
    """Generated so far."""
    has_started: bool = False
    is_cancelled: bool = False
    num_submissions: int = 0
    num_preemptions: int = 0
    """In the present engine."""
    num_preemptions_before: int = 0
    """In engines that were lost."""

    @property
    def all_preemptions(self) -> int:
        """How often the sequence was preempted, in whichever engine."""
        return self.num_preemptions_before + self.num_preemptions

    def resubmit(self) -> Submit:
        """The sequence as it stands, for an engine that does not know it."""
        self.num_submissions += 1
        return msgspec.structs.replace(self.submit, token_ids=self.submit.token_ids + self.token_ids)


class EngineClient:
    """One connection to the engine, kept up by `run`."""

    def __init__(
        self,
        socket_path: str,
        *,
        on_up: Callable[[Hello], None],
        on_down: Callable[[], None],
        on_stats: Callable[[StepStats], None],
        max_resubmissions: int = 2,
    ) -> None:
        self._socket_path = socket_path
        self._on_up = on_up
        self._on_down = on_down
        self._on_stats = on_stats
        self._max_submissions = 1 + max_resubmissions
        self._open: dict[int, OpenSequence] = {}
        self._transport: asyncio.Transport | None = None
        self.hello: Hello | None = None
        """What the engine last connected said of itself."""
        self.stats = StepStats()
        """The present engine's last."""

    @property
    def is_up(self) -> bool:
        """Whether an engine is connected and ready."""
        return self._transport is not None

    @property
    def num_open(self) -> int:
        """Sequences that have not ended."""
        return len(self._open)

    async def run(self) -> None:
        """Keeps the connection up until cancelled; what is open then is lost."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    _, connection = await loop.create_unix_connection(lambda: _Connection(self), self._socket_path)
                except OSError:
                    pass  # no engine yet, or none any more
                else:
                    await connection.wait_lost()
                await asyncio.sleep(RETRY_SECONDS)
        finally:
            self.on_connection_lost()
            for entry in list(self._open.values()):
                self._lose(entry)

    def submit(self, submit: Submit, listener: SequenceListener) -> None:
        """Starts a sequence now, or as soon as an engine is up. Its id must not be open."""
        assert submit.id not in self._open, "ids are unique among open sequences"
        entry = OpenSequence(submit, listener)
        self._open[submit.id] = entry
        if self.is_up:
            self._send(entry.resubmit())

    def cancel(self, sequence_id: int) -> None:
        """Ends a sequence; its listener hears CANCELLED, or whatever end came first. Silent if it has ended."""
        entry = self._open.get(sequence_id)
        if entry is None or entry.is_cancelled:
            return
        entry.is_cancelled = True
        if self.is_up:
            self._send(Cancel([sequence_id]))
        else:
            self._finish(entry, FinishCode.CANCELLED)

    def take(self, message: FromEngine, transport: asyncio.Transport) -> None:
        """A message arrived on the connection."""
        if isinstance(message, Hello):
            self._transport = transport
            self.hello = message
            for entry in list(self._open.values()):
                self._send(entry.resubmit())
            self._on_up(message)
        else:
            self._take_report(message)

    def on_connection_lost(self) -> None:
        """The connection ended: the engine is gone, or is being replaced."""
        if self._transport is None:
            return
        self._transport = None
        self.stats = StepStats()
        self._on_down()
        for entry in list(self._open.values()):
            entry.num_preemptions_before += entry.num_preemptions
            entry.num_preemptions = 0
            if entry.is_cancelled:
                self._finish(entry, FinishCode.CANCELLED)
            elif entry.num_submissions >= self._max_submissions:
                self._lose(entry)

    def _take_report(self, report: Report) -> None:
        self.stats = report.stats
        for start in report.starts:
            entry = self._open.get(start.id)
            if entry is not None and not entry.has_started:
                entry.has_started = True
                self._tell(entry, entry.listener.on_start, start)
        for index, sequence_id in enumerate(report.ids):
            entry = self._open.get(sequence_id)
            if entry is None:
                continue
            entry.num_preemptions = report.preemptions[index]
            if (token_id := report.token_ids[index]) != NO_TOKEN:
                entry.token_ids.append(token_id)
                logprobs = report.logprobs[index] if report.logprobs else None
                self._tell(entry, entry.listener.on_token, token_id, logprobs, entry.all_preemptions, report.ended_at)
            if report.finishes[index]:
                self._finish(entry, FinishCode(report.finishes[index]))
        self._on_stats(report.stats)

    def _finish(self, entry: OpenSequence, code: FinishCode) -> None:
        if self._open.pop(entry.submit.id, None) is not None:
            self._tell(entry, entry.listener.on_finish, code, entry.all_preemptions)

    def _lose(self, entry: OpenSequence) -> None:
        if self._open.pop(entry.submit.id, None) is not None:
            self._tell(entry, entry.listener.on_lost)

    def _tell(self, entry: OpenSequence, callback: Callable[..., None], *arguments: object) -> None:
        """Calls a listener. One that raises loses its own sequence, and nobody else's."""
        try:
            callback(*arguments)
        except Exception:
            log.exception("a listener failed; its sequence is cancelled")
            if self._open.pop(entry.submit.id, None) is not None and self.is_up:
                self._send(Cancel([entry.submit.id]))

    def _send(self, message: ToEngine) -> None:
        assert self._transport is not None
        self._transport.write(encode_frame(message))


class _Connection(asyncio.Protocol):
    """Bytes of one connection, as messages to the client."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._decoder: FrameDecoder[FromEngine] = FrameDecoder(FromEngine)
        self._lost = asyncio.Event()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            for message in self._decoder.feed(data):
                self._client.take(message, self._transport)
        except FramingError:
            log.error("the engine sent what is no message; disconnecting")
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._client.on_connection_lost()
        self._lost.set()

    async def wait_lost(self) -> None:
        """Returns when the connection has ended; cancelled, it ends the connection."""
        try:
            await self._lost.wait()
        finally:
            assert self._transport is not None
            self._transport.abort()
