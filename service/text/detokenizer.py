"""Turns the token ids of one sequence into text as they come. Owns the bytes and tokens that are not text yet.

The texts it returns, joined, equal `Tokenizer.decode` of all ids: no character is ever split, and nothing already
returned would have read differently at the end. It does not know stop strings, nor when the sequence ends.
"""

from __future__ import annotations

import codecs
from typing import Protocol

from service.text.tokenizer import Tokenizer


class Detokenizer:
    """Streaming decode of one sequence, at constant cost per token."""

    def __init__(self, tokenizer: Tokenizer, keep_special_tokens: bool = False) -> None:
        self._skipped = frozenset() if keep_special_tokens else tokenizer.special_tokens.keys()
        self._stream: _Stream = _ByteStream(tokenizer) if tokenizer.is_byte_level else _PieceStream(tokenizer)

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; "" while a character is incomplete."""
        return "" if token_id in self._skipped else self._stream.push(token_id)

    def finish(self) -> str:
        """What is left at the end; incomplete bytes become U+FFFD. Nothing may be pushed afterwards."""
        return self._stream.finish()


class _Stream(Protocol):
    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _ByteStream:
    """Byte-level tokenizers: the text is the UTF-8 of all bytes, and an incremental decoder gives it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _PieceStream:
    """All other tokenizers: a token's text is what it adds to the text of its context.

    context           held               token_id
    [anchor, last]    <0xE2> <0x82> ...   ▁the        text = decode(all three)[len(decode(context)):]

    The context is one token that showed (`anchor`), so that what happens to a text's first token does not happen to
    `last`. A run of byte tokens is held until it ends, for only then is it certain: decoders turn a whole run into
    U+FFFD when any of it is no UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._num_context_chars = 0
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        if not self._tokenizer.is_known(token_id):
            return ""
        self._held.append(token_id)
        if self._tokenizer.is_byte_token(token_id):
            return ""
        text = self._text()
        if not self._context and not text:
            return ""  # at a text's start whitespace may vanish: hold it until something shows
        self._context = [*self._tokenizer.anchor, token_id]
        self._num_context_chars = len(self._decode(self._context))
        self._held.clear()
        return text

    def finish(self) -> str:
        text = self._text() if self._held else ""
        self._held.clear()
        return text

    def _text(self) -> str:
        return self._decode(self._context + self._held)[self._num_context_chars :]

    def _decode(self, ids: list[int]) -> str:
        # Special tokens that were to be skipped never came here.
        return self._tokenizer.decode(ids, keep_special_tokens=True)
