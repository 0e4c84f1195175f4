"""Frames on a stream socket: a 4-byte little-endian length, then one MessagePack message of a fixed type.

Both directions are bounded, so a broken peer can neither make us allocate nor wait for what will never come. It does
not know sockets: bytes in, messages out.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from service.engine.messages import MAX_FRAME_BYTES

HEADER_BYTES = 4
Message = TypeVar("Message")

_encoder = msgspec.msgpack.Encoder()


class FramingError(Exception):
    """The peer sent what is no frame of ours. Nothing after it can be trusted."""


def encode_frame(message: msgspec.Struct) -> bytes:
    """One frame. Raises ValueError for a message beyond the bound."""
    frame = bytearray(HEADER_BYTES)
    _encoder.encode_into(message, frame, HEADER_BYTES)
    length = len(frame) - HEADER_BYTES
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {length} bytes is larger than a frame")
    frame[:HEADER_BYTES] = length.to_bytes(HEADER_BYTES, "little")
    return bytes(frame)


class FrameDecoder(Generic[Message]):
    """Turns bytes, cut anywhere, into messages. Keeps what is incomplete."""

    def __init__(self, message_type: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that these bytes complete. Raises FramingError."""
        self._buffer += data
        messages = []
        start = 0
        while (end := self._frame_end(start)) <= len(self._buffer):
            try:
                messages.append(self._decoder.decode(memoryview(self._buffer)[start + HEADER_BYTES : end]))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                raise FramingError("a frame does not decode") from None
            start = end
        del self._buffer[:start]
        return messages

    def _frame_end(self, start: int) -> int:
        """Where the frame at `start` ends; without a whole header, beyond what the buffer holds."""
        header = self._buffer[start : start + HEADER_BYTES]
        if len(header) < HEADER_BYTES:
            return len(self._buffer) + 1
        length = int.from_bytes(header, "little")
        if length > MAX_FRAME_BYTES:
            raise FramingError("a frame is larger than allowed")
        return start + HEADER_BYTES + length
