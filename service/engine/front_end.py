"""The engine's end of one connection to a front end: bytes both ways, which sequences are whose, and what can wait.

A report wakes the front end, which costs the cores more than what is in it: so those that nobody waits for are held for
a moment and go out together.

Front ends choose their ids without knowing of each other, so inside the engine an id carries the number of its
connection:  | connection | id of the front end, 48 bits |
"""

from __future__ import annotations

import socket
from itertools import compress
from typing import TypeVar

import msgspec

from service.engine.framing import FrameDecoder, FramingError, encode_frame
from service.engine.messages import (
    MAX_FRAME_BYTES,
    Cancel,
    FromEngine,
    Report,
    Start,
    ToEngine,
)

ID_BITS = 48
ID_MASK = (1 << ID_BITS) - 1
READ_BYTES = 1 << 20
MAX_UNSENT_BYTES = 2 * MAX_FRAME_BYTES
"""A front end that leaves more than this unread is lost."""
HOLD_SECONDS = 0.02
"""Reports that can wait go out at such intervals: half of what a reader waits for its next delta anyway."""
MANY_SEQUENCES = 20
LONG_HOLD_SECONDS = 0.05
"""The same among more sequences than these, whose readers wait longer: each report wakes a front end for all."""

Entry = TypeVar("Entry")


class FrontEndLost(Exception):
    """The connection ended, or cannot be trusted or waited for any longer."""


class FrontEnd:
    """One connected front end. Owns its socket, which does not block."""

    def __init__(self, number: int, connection: socket.socket) -> None:
        self.number = number
        self.connection = connection
        self._open_ids: set[int] = set()
        """Its sequences that have not ended, by its own ids."""
        self._awaited_ids: set[int] = set()
        """Of these, those whose next token is not held: it is their first, or they want each."""
        self._eager_ids: set[int] = set()
        """Of these, those that want each token."""
        self._decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
        self._held: list[Report] = []
        self._unsent = bytearray()
        self._released_at = 0.0
        connection.setblocking(False)

    @property
    def open_ids(self) -> set[int]:
        """Engine ids of its sequences that have not ended."""
        return {self._key(sequence_id) for sequence_id in self._open_ids}

    @property
    def has_unsent(self) -> bool:
        """Whether the socket did not take all that was to be sent."""
        return bool(self._unsent)

    def read(self) -> list[ToEngine]:
        """What has arrived, with engine ids. Raises FrontEndLost."""
        try:
            data = self.connection.recv(READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise FrontEndLost(error.strerror) from None
        if not data:
            raise FrontEndLost("it disconnected")
        try:
            messages = self._decoder.feed(data)
        except FramingError as error:
            raise FrontEndLost(str(error)) from None
        return [self._with_engine_ids(message) for message in messages]

    def send(self, *messages: FromEngine) -> None:
        """Sends what the socket takes and keeps the rest. Raises FrontEndLost."""
        for message in messages:
            self._unsent += encode_frame(message)
        self.flush()
        if len(self._unsent) > MAX_UNSENT_BYTES:
            raise FrontEndLost("it does not read")

    def report(self, report: Report, now: float, *, can_hold: bool) -> None:
        """Sends its share of a step's report, or holds it if it can and nobody there waits for it.

        What is held goes out with the next report that has news, or the first that comes HOLD_SECONDS after the last
        that went out, LONG_HOLD_SECONDS among many. Raises FrontEndLost.
        """
        share = self._share_of(report)
        self._held.append(share)
        hold_seconds = HOLD_SECONDS if len(self._open_ids) <= MANY_SEQUENCES else LONG_HOLD_SECONDS
        if self._note_news(share) or not can_hold or now - self._released_at >= hold_seconds:
            self.release(now)

    def release(self, now: float) -> None:
        """Sends what was held. Raises FrontEndLost."""
        if self._held:
            self._released_at = now
            self.send(*self._held)
            self._held.clear()

    def flush(self) -> None:
        """Sends what was kept, as far as it goes. Raises FrontEndLost."""
        try:
            sent = self.connection.send(self._unsent)
        except BlockingIOError:
            return
        except OSError as error:
            raise FrontEndLost(error.strerror) from None
        del self._unsent[:sent]

    def _note_news(self, share: Report) -> bool:
        """Whether somebody waits for its share of a report; what ended is open no more."""
        has_ends = any(share.finishes)
        if not has_ends and self._awaited_ids.isdisjoint(share.ids):
            return False
        if has_ends:
            ended = {own_id for own_id, finish in zip(share.ids, share.finishes, strict=True) if finish}
            self._open_ids -= ended
            self._eager_ids -= ended
        self._awaited_ids.difference_update(share.ids)
        self._awaited_ids |= self._eager_ids
        return True

    def _share_of(self, report: Report) -> Report:
        """This front end's part of a step's report, with its own ids. Columns that are all its own are not copied."""
        first, end = self.number << ID_BITS, (self.number + 1) << ID_BITS
        ids = [key - first for key in report.ids if first <= key < end]
        is_mine = [first <= key < end for key in report.ids] if len(ids) < len(report.ids) else None

        def of_mine(column: list[Entry]) -> list[Entry]:
            return column if is_mine is None else list(compress(column, is_mine))

        return Report(
            ids=ids,
            token_ids=of_mine(report.token_ids),
            finishes=of_mine(report.finishes),
            preemptions=of_mine(report.preemptions),
            logprobs=of_mine(report.logprobs),
            starts=[
                Start(start.id - first, start.scheduled_at, start.num_cached)
                for start in report.starts
                if first <= start.id < end
            ],
            ended_at=report.ended_at,
            stats=report.stats,
        )

    def _with_engine_ids(self, message: ToEngine) -> ToEngine:
        if isinstance(message, Cancel):
            return Cancel([self._key(sequence_id) for sequence_id in message.ids])
        key = self._key(message.id)
        self._open_ids.add(message.id)
        self._awaited_ids.add(message.id)
        if message.wants_each_token:
            self._eager_ids.add(message.id)
        return msgspec.structs.replace(message, id=key)

    def _key(self, sequence_id: int) -> int:
        if not 0 <= sequence_id <= ID_MASK:
            raise FrontEndLost("it sent an id out of range")
        return self.number << ID_BITS | sequence_id
