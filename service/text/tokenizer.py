"""Owns the served tokenizer: text to token ids and back, over Hugging Face `tokenizers` and a model's tokenizer.json.

It knows neither streams (detokenizer.py), nor conversations (chat.py), nor which model the ids are for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from service.errors import StartupError

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f+][0-9A-Fa-f]>")
"""What the ByteFallback decoder reads as one byte; to Rust, which parses the digits, "+F" is a number, too."""

LOCAL_DECODERS = frozenset({"BPEDecoder", "ByteFallback", "Metaspace", "Replace", "Strip", "WordPiece"})
"""Decoder steps in which a token's text depends on no other token than the one before it, runs of byte tokens aside."""


class Tokenizer:
    """Text to token ids and back. Immutable and free of I/O once made; may be shared by everything in a process."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        # tokenizer.json may carry truncation and padding from training; a server must never cut a prompt silently.
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        added = inner.get_added_tokens_decoder()
        self.special_tokens: Mapping[int, str] = {id_: token.content for id_, token in added.items() if token.special}
        """Special tokens by id: <|im_end|> and its kind."""
        steps = _decoder_steps(inner)
        self.is_byte_level = [step["type"] for step in steps] == ["ByteLevel"]
        """Whether every token is a string of bytes and text is their concatenation (GPT-2, Llama 3, Qwen)."""
        self.has_byte_fallback = any(step["type"] == "ByteFallback" for step in steps)
        """Whether tokens such as <0xE2> stand for single bytes (Llama 2, Gemma)."""
        if not self.is_byte_level and not _is_streamable(steps):
            raise StartupError("tokenizer.json: its decoder cannot be streamed: " + "+".join(s["type"] for s in steps))

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Loads tokenizer.json of a Hugging Face directory. Raises StartupError when it is missing or broken."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise StartupError(f"{file}: no such file; a model directory needs a tokenizer.json")
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise StartupError(f"{file}: not a tokenizer: {' '.join(str(error).split())}") from None
        return cls(inner)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._inner.get_vocab().values(), default=-1) + 1

    @cached_property
    def max_token_bytes(self) -> int:
        """Most bytes of UTF-8 that one token adds to a text."""
        tokens = self._inner.get_vocab()
        return max((len(_bytes_of(t)) if self.is_byte_level else len(t.encode()) for t in tokens), default=0)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens in it are recognised.

        `add_special_tokens` adds what the tokenizer's own post-processor adds, such as a <s> in front. A rendered chat
        carries its special tokens already: pass False.
        """
        # The library's `encode` holds the interpreter's lock for as long as it takes; a batch of one does not.
        (encoding,) = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, ids: Sequence[int], keep_special_tokens: bool = False) -> str:
        """Text of token ids; bytes that form no character become U+FFFD, ids of no token nothing."""
        return self._inner.decode(ids, skip_special_tokens=not keep_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, of a byte-level tokenizer; b"" for an id of no token."""
        token = self._inner.id_to_token(token_id)
        return b"" if token is None else _bytes_of(token)

    def is_known(self, token_id: int) -> bool:
        """Whether the id names a token. Models may have rows beyond their tokenizer's last id."""
        return self._inner.id_to_token(token_id) is not None

    def is_byte_token(self, token_id: int) -> bool:
        """Whether the token stands for one byte of a byte-fallback tokenizer."""
        token = self._inner.id_to_token(token_id) if self.has_byte_fallback else None
        return token is not None and BYTE_TOKEN.fullmatch(token) is not None

    @cached_property
    def anchor(self) -> tuple[int, ...]:
        """One token that shows as text by itself: in front of others, it takes what happens to a text's first token.

        Empty where there is none.
        """
        for token_id in sorted(self._inner.get_vocab().values()):
            plain = token_id not in self.special_tokens and not self.is_byte_token(token_id)
            if plain and self.decode([token_id]).strip():
                return (token_id,)
        return ()


def _decoder_steps(inner: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder of tokenizer.json, sequences flattened."""
    if inner.decoder is None:
        return []
    pending = [json.loads(inner.decoder.__getstate__())]
    steps = []
    while pending:
        step = pending.pop(0)
        if step["type"] == "Sequence":
            pending = step["decoders"] + pending
        else:
            steps.append(step)
    return steps


def _is_streamable(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the text of a longer sequence always begins with the text of a shorter one.

    Before Fuse, steps see single tokens; after it they see the whole text, and may only strip it on the left.
    """
    names = [step["type"] for step in steps]
    fuse = names.index("Fuse") if "Fuse" in names else len(names)
    after = steps[fuse + 1 :]
    return LOCAL_DECODERS.issuperset(names[:fuse]) and all(s["type"] == "Strip" and s["stop"] == 0 for s in after)


def _byte_of_character() -> dict[str, int]:
    """The printable stand-in of each byte in a byte-level vocabulary (GPT-2, bytes_to_unicode), reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def _bytes_of(token: str) -> bytes:
    """Bytes of a byte-level token; a token with any other character (an added one) stands for itself."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()
