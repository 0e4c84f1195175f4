"""Frames: whole messages whatever way the bytes are cut, and nothing else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.interface import RunnerShape, Sampling, TokenLogprobs
from service.engine.framing import HEADER_BYTES, FrameDecoder, FramingError, encode_frame
from service.engine.messages import (
    MAX_FRAME_BYTES,
    Cancel,
    FromEngine,
    Hello,
    Limits,
    Report,
    Start,
    StepStats,
    Submit,
    ToEngine,
)
from tests.engine.fake_process import FACTS
from tests.engine.ledger import make_submit

FULL_SUBMIT = Submit(
    id=2**47,
    token_ids=[0, 1, 2**31],
    num_prompt=2,
    sampling=Sampling(0.5, 3, 0.9, 0.1, 1.1, -0.5, 0.5, ((7, -1.5), (8, 100.0)), 2**64 - 1, 20),
    limits=Limits(5, 1, (1, 2), 1e9, 12.5, -100),
    cache_root=b"\x00\xff",
    wants_each_token=True,
)
FULL_REPORT = Report(
    ids=[1, 2],
    token_ids=[5, -1],
    finishes=[0, 3],
    preemptions=[0, 2],
    logprobs=[TokenLogprobs(-0.25, [5, 6], [-0.25, -2.0]), None],
    starts=[Start(1, 3.5, 16)],
    ended_at=3.75,
    stats=StepStats(num_running=1, step_seconds=0.5, prefix_hit_tokens=16),
)
HELLO = Hello(FACTS, RunnerShape(1, 2, 3, 4, 5, 6))


@pytest.mark.parametrize("message", [FULL_SUBMIT, Cancel([1, 2]), make_submit(0, [])], ids=["full", "cancel", "small"])
def test_commands_arrive_as_they_were_sent(message: ToEngine) -> None:
    assert FrameDecoder(ToEngine).feed(encode_frame(message)) == [message]


@pytest.mark.parametrize("message", [FULL_REPORT, HELLO], ids=["report", "hello"])
def test_answers_arrive_as_they_were_sent(message: FromEngine) -> None:
    assert FrameDecoder(FromEngine).feed(encode_frame(message)) == [message]


@given(
    messages=st.lists(st.builds(Cancel, st.lists(st.integers(0, 2**48), max_size=40)), max_size=8),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=20),
)
def test_bytes_may_be_cut_anywhere(messages: list[Cancel], cuts: list[int]) -> None:
    data = b"".join(map(encode_frame, messages))
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
    received: list[ToEngine] = []
    position = turn = 0
    while position < len(data):
        size = cuts[turn % len(cuts)]
        received += decoder.feed(data[position : position + size])
        position, turn = position + size, turn + 1
    assert received == messages


@settings(max_examples=300)
@given(data=st.binary(max_size=200))
def test_garbage_is_refused_or_awaited(data: bytes) -> None:
    """Any bytes: messages of the right type, a FramingError, or nothing yet; never another exception."""
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
    try:
        messages = decoder.feed(data)
    except FramingError:
        return
    assert all(isinstance(message, (Submit, Cancel)) for message in messages)


@settings(max_examples=300)
@given(position=st.integers(0, len(encode_frame(FULL_SUBMIT)) - 1), value=st.integers(0, 255))
def test_a_changed_byte_never_escapes(position: int, value: int) -> None:
    frame = bytearray(encode_frame(FULL_SUBMIT))
    frame[position] = value
    try:
        messages = FrameDecoder(ToEngine).feed(bytes(frame))
    except FramingError:
        return
    assert all(isinstance(message, (Submit, Cancel)) for message in messages)


def test_a_frame_beyond_the_bound_is_refused_by_its_header() -> None:
    with pytest.raises(FramingError, match="larger"):
        FrameDecoder(ToEngine).feed((MAX_FRAME_BYTES + 1).to_bytes(HEADER_BYTES, "little"))


def test_a_message_beyond_the_bound_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.framing.MAX_FRAME_BYTES", 10)
    with pytest.raises(ValueError, match="larger than a frame"):
        encode_frame(FULL_SUBMIT)


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(FramingError, match="decode"):
        FrameDecoder(ToEngine).feed(encode_frame(FULL_REPORT))


def test_an_empty_frame_is_refused() -> None:
    with pytest.raises(FramingError, match="decode"):
        FrameDecoder(ToEngine).feed(bytes(HEADER_BYTES))
