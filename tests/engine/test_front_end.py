"""What goes out to a front end at once, and what is held for a moment: over a real socket, with times given."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from model.interface import TokenLogprobs
from service.engine.framing import FrameDecoder, encode_frame
from service.engine.front_end import HOLD_SECONDS, ID_BITS, LONG_HOLD_SECONDS, MANY_SEQUENCES, FrontEnd
from service.engine.messages import NO_TOKEN, FinishCode, FromEngine, Report, Start, StepStats, Submit
from tests.engine.ledger import make_submit

NUMBER = 3
SOON = HOLD_SECONDS / 4


def report_of(ended_at: float, keys: list[int], **columns: list[int]) -> Report:
    """A token for each sequence, or what is given."""
    return Report(
        ids=keys,
        token_ids=columns.get("token_ids", [7] * len(keys)),
        finishes=columns.get("finishes", [FinishCode.NONE] * len(keys)),
        preemptions=[0] * len(keys),
        logprobs=[],
        starts=[],
        ended_at=ended_at,
        stats=StepStats(),
    )


class Peer:
    """The other end. Sequences 0 and 1 have been submitted; 1 wants each token."""

    def __init__(self, number: int = NUMBER) -> None:
        ours, self._theirs = socket.socketpair(socket.AF_UNIX)
        self._theirs.setblocking(False)
        self._decoder: FrameDecoder[FromEngine] = FrameDecoder(FromEngine)
        self.front_end = FrontEnd(number, ours)
        for submit in (make_submit(0, [1]), make_submit(1, [1], wants_each_token=True)):
            self.submit(submit)

    def submit(self, submit: Submit) -> None:
        self._theirs.sendall(encode_frame(submit))
        self.front_end.read()

    def tell(self, now: float, *ids: int, can_hold: bool = True, **columns: list[int]) -> None:
        """A report of these of its sequences."""
        report = report_of(now, [self.key(sequence_id) for sequence_id in ids], **columns)
        self.front_end.report(report, now, can_hold=can_hold)

    def key(self, sequence_id: int) -> int:
        return self.front_end.number << ID_BITS | sequence_id

    def reports(self) -> list[Report]:
        """What has arrived since the last call."""
        try:
            data = self._theirs.recv(1 << 20)
        except BlockingIOError:
            return []
        return [message for message in self._decoder.feed(data) if isinstance(message, Report)]

    def heard(self) -> list[float]:
        """When the steps ended whose reports have arrived since the last call."""
        return [report.ended_at for report in self.reports()]

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


def test_among_many_sequences_tokens_are_held_longer(peer: Peer) -> None:
    for sequence_id in range(2, MANY_SEQUENCES):
        peer.submit(make_submit(sequence_id, [1]))
    peer.tell(2.0, *range(2, MANY_SEQUENCES))
    peer.tell(2.0 + HOLD_SECONDS + 0.001, 0, 2)
    assert peer.heard() == [2.0, 2.0 + HOLD_SECONDS + 0.001]
    peer.submit(make_submit(MANY_SEQUENCES, [1]))
    peer.tell(3.0, MANY_SEQUENCES)
    peer.tell(3.0 + HOLD_SECONDS + 0.001, 0, 2)
    assert peer.heard() == [3.0]
    peer.tell(3.0 + LONG_HOLD_SECONDS + 0.001, 0, 2)
    assert peer.heard() == [3.0 + HOLD_SECONDS + 0.001, 3.0 + LONG_HOLD_SECONDS + 0.001]


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
    peer.tell(1.0 + 4 * SOON, 1, finishes=[FinishCode.LENGTH])
    assert peer.heard() == [1.0 + 4 * SOON]
    peer.tell(1.0 + 5 * SOON, 0)
    assert peer.heard() == []


@pytest.mark.parametrize("token_id", [7, NO_TOKEN])
def test_an_end_is_not_held(peer: Peer, token_id: int) -> None:
    peer.tell(1.0 + SOON, 0)
    peer.tell(1.0 + 2 * SOON, 0, finishes=[FinishCode.LENGTH], token_ids=[token_id])
    assert peer.heard() == [1.0 + SOON, 1.0 + 2 * SOON]
    assert peer.front_end.open_ids == {peer.key(1)}


def test_nothing_is_held_behind_what_may_last(peer: Peer) -> None:
    peer.tell(1.0 + SOON, 0, can_hold=False)
    assert peer.heard() == [1.0 + SOON]
    peer.tell(1.0 + 2 * SOON, 0)
    assert peer.heard() == []
    peer.front_end.release(1.0 + 2 * SOON)
    assert peer.heard() == [1.0 + 2 * SOON]


def test_a_sequence_given_again_is_awaited_again(peer: Peer) -> None:
    """Ids may come back once their end was reported."""
    peer.tell(1.0 + SOON, 0, finishes=[FinishCode.CANCELLED], token_ids=[NO_TOKEN])
    peer.submit(make_submit(0, [1]))
    peer.heard()
    peer.tell(1.0 + 2 * SOON, 0)
    assert peer.heard() == [1.0 + 2 * SOON]


def test_another_front_ends_news_is_none_here(peer: Peer) -> None:
    other = Peer(NUMBER + 1)
    other.tell(1.0, 0, 1)
    assert other.heard() == [1.0]
    other.submit(make_submit(2, [1]))
    report = report_of(1.0 + SOON, [peer.key(0), other.key(2)])
    for front_end in (peer.front_end, other.front_end):
        front_end.report(report, 1.0 + SOON, can_hold=True)
    assert peer.heard() == []
    assert other.heard() == [1.0 + SOON]
    other.close()


@pytest.mark.parametrize("num_others", [0, 1])
def test_a_share_has_its_own_entries_and_starts_under_its_own_ids(peer: Peer, num_others: int) -> None:
    """Whether it is all of the report, or another front end has an entry in it; that one's start is in it anyway."""
    other_key = (NUMBER + 1) << ID_BITS | 9
    report = Report(
        ids=[peer.key(0), *[other_key] * num_others, peer.key(1)],
        token_ids=[11, *[12] * num_others, 13],
        finishes=[FinishCode.NONE, *[FinishCode.LENGTH] * num_others, FinishCode.STOP_TOKEN],
        preemptions=[1, *[2] * num_others, 3],
        logprobs=[None, *[TokenLogprobs(-2.0, [], [])] * num_others, TokenLogprobs(-3.0, [], [])],
        starts=[Start(other_key, 0.5, 16), Start(peer.key(1), 0.75, 32)],
        ended_at=1.0 + SOON,
        stats=StepStats(),
    )
    peer.front_end.report(report, 1.0 + SOON, can_hold=True)
    (share,) = peer.reports()
    assert (share.ids, share.token_ids, share.finishes, share.preemptions) == ([0, 1], [11, 13], [0, 1], [1, 3])
    assert share.logprobs == [None, TokenLogprobs(-3.0, [], [])]
    assert share.starts == [Start(1, 0.75, 32)]
    assert peer.front_end.open_ids == {peer.key(0)}


def test_nothing_is_remembered_of_what_ended(peer: Peer) -> None:
    peer.submit(make_submit(2, [1]))
    peer.tell(1.0 + SOON, 0, 1, 2, finishes=[FinishCode.LENGTH, FinishCode.CANCELLED, FinishCode.DEADLINE])
    front_end = peer.front_end
    assert not (front_end.open_ids or front_end._awaited_ids or front_end._eager_ids or front_end._held)
