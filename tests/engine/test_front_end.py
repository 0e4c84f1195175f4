"""What goes out to a front end at once, and what is held for a moment: over a real socket, with times given."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from service.engine.framing import FrameDecoder, encode_frame
from service.engine.front_end import HOLD_SECONDS, ID_BITS, FrontEnd
from service.engine.messages import NO_TOKEN, FinishCode, FromEngine, Report, StepStats, Submit
from tests.engine.ledger import make_submit

NUMBER = 3
SOON = HOLD_SECONDS / 4


class Peer:
    """The other end. Sequences 0 and 1 have been submitted; 1 has stop strings."""

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair(socket.AF_UNIX)
        self._theirs.setblocking(False)
        self._decoder: FrameDecoder[FromEngine] = FrameDecoder(FromEngine)
        self.front_end = FrontEnd(NUMBER, ours)
        for submit in (make_submit(0, [1]), make_submit(1, [1], has_stop_strings=True)):
            self.submit(submit)

    def submit(self, submit: Submit) -> None:
        self._theirs.sendall(encode_frame(submit))
        self.front_end.read()

    def tell(self, now: float, *ids: int, can_hold: bool = True, **columns: list[int]) -> None:
        """A report of a token for each sequence, or of what is given."""
        report = Report(
            ids=[NUMBER << ID_BITS | sequence_id for sequence_id in ids],
            token_ids=columns.get("token_ids", [7] * len(ids)),
            finishes=columns.get("finishes", [FinishCode.NONE] * len(ids)),
            preemptions=[0] * len(ids),
            logprobs=[],
            starts=[],
            ended_at=now,
            stats=StepStats(),
        )
        self.front_end.report(report, now, can_hold=can_hold)

    def heard(self) -> list[float]:
        """When the steps ended whose reports have arrived since the last call."""
        try:
            data = self._theirs.recv(1 << 20)
        except BlockingIOError:
            return []
        return [message.ended_at for message in self._decoder.feed(data) if isinstance(message, Report)]

    def close(self) -> None:
        self.front_end.connection.close()
        self._theirs.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    peer.tell(1.0, 0, 1)
    assert peer.heard() == [1.0]  # both first tokens
    yield peer
    peer.close()


def test_tokens_are_held_and_go_out_together(peer: Peer) -> None:
    for turn in range(1, 4):
        peer.tell(1.0 + turn * SOON, 0)
    assert peer.heard() == []
    assert not peer.front_end.has_unsent  # the socket is not to be watched for them
    peer.tell(1.0 + 4 * SOON, 0)
    assert peer.heard() == [1.0 + turn * SOON for turn in range(1, 5)]
    peer.tell(1.0 + 5 * SOON, 0)
    assert peer.heard() == []


def test_a_first_token_is_not_held(peer: Peer) -> None:
    peer.tell(1.0 + SOON, 0)
    peer.submit(make_submit(2, [1]))
    peer.tell(1.0 + 2 * SOON, 0, 2)
    assert peer.heard() == [1.0 + SOON, 1.0 + 2 * SOON]
    peer.tell(1.0 + 3 * SOON, 0, 2)
    assert peer.heard() == []


def test_no_token_is_held_that_may_complete_a_stop_string(peer: Peer) -> None:
    for turn in range(1, 4):
        peer.tell(1.0 + turn * SOON, 0, 1)
        assert peer.heard() == [1.0 + turn * SOON]
    peer.tell(2.0, 1, finishes=[FinishCode.LENGTH])
    assert peer.heard() == [2.0]
    peer.tell(2.0 + SOON, 0)
    assert peer.heard() == []


@pytest.mark.parametrize("token_id", [7, NO_TOKEN])
def test_an_end_is_not_held(peer: Peer, token_id: int) -> None:
    peer.tell(1.0 + SOON, 0)
    peer.tell(1.0 + 2 * SOON, 0, finishes=[FinishCode.LENGTH], token_ids=[token_id])
    assert peer.heard() == [1.0 + SOON, 1.0 + 2 * SOON]
    assert peer.front_end.open_ids == {NUMBER << ID_BITS | 1}


def test_nothing_is_held_behind_what_may_last(peer: Peer) -> None:
    peer.tell(1.0 + SOON, 0, can_hold=False)
    assert peer.heard() == [1.0 + SOON]
    peer.tell(1.0 + 2 * SOON, 0)
    assert peer.heard() == []
    peer.front_end.release()
    assert peer.heard() == [1.0 + 2 * SOON]


def test_a_sequence_given_again_is_awaited_again(peer: Peer) -> None:
    """As after an end: ids may come back."""
    peer.tell(1.0 + SOON, 0, finishes=[FinishCode.CANCELLED], token_ids=[NO_TOKEN])
    peer.submit(make_submit(0, [1]))
    peer.heard()
    peer.tell(1.0 + 2 * SOON, 0)
    assert peer.heard() == [1.0 + 2 * SOON]
