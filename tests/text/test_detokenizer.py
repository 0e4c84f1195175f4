"""Streamed text equals the tokenizer's own decode of all ids, for every family and any ids; no character is split."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.config import BUILT_IN_MODEL
from service.text.detokenizer import Detokenizer
from service.text.tokenizer import Tokenizer
from tests.text.toy import FAMILIES, FIRST_WORD, WORDS

DEFAULT = Tokenizer.from_directory(BUILT_IN_MODEL)
TOYS = {name: Tokenizer(build()) for name, build in FAMILIES.items()}


def stream(tokenizer: Tokenizer, ids: list[int], keep_special_tokens: bool = False) -> list[str]:
    detokenizer = Detokenizer(tokenizer, keep_special_tokens)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 4100), max_size=40), keep=st.booleans())
def test_any_ids_of_the_default_model(ids: list[int], keep: bool) -> None:
    assert "".join(stream(DEFAULT, ids, keep)) == DEFAULT.decode(ids, keep)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_in_whole_characters(text: str) -> None:
    pieces = stream(DEFAULT, DEFAULT.encode(text))
    assert "".join(pieces) == DEFAULT.decode(DEFAULT.encode(text))
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("family", TOYS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), keep=st.booleans())
def test_any_ids_of_every_family(family: str, data: st.DataObject, keep: bool) -> None:
    tokenizer = TOYS[family]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=30))
    assert "".join(stream(tokenizer, ids, keep)) == tokenizer.decode(ids, keep)


@pytest.mark.parametrize("family", ["llama", "gemma"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_byte_fallback_with_valid_and_broken_runs(family: str, data: st.DataObject) -> None:
    """Runs of bytes that are mostly characters, broken off here and there, between words."""
    tokenizer = TOYS[family]
    character = st.sampled_from("é€😀の").map(lambda c: [byte + 1 for byte in c.encode()])
    word = st.sampled_from(range(FIRST_WORD, tokenizer.vocab_size)).map(lambda i: [i])
    broken = st.integers(1, 256).map(lambda i: [i])
    parts = data.draw(st.lists(st.one_of(character, character, word, broken), max_size=12))
    ids = [token_id for part in parts for token_id in part]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_an_emoji_appears_with_its_last_byte() -> None:
    ids = DEFAULT.encode("😀!")
    pieces = stream(DEFAULT, ids)
    assert [piece for piece in pieces if piece] == ["😀", "!"]


def test_incomplete_bytes_at_the_end_become_replacement_characters() -> None:
    ids = DEFAULT.encode("😀")[:-1]
    assert "".join(stream(DEFAULT, ids)) == DEFAULT.decode(ids) == "\ufffd"


def test_special_tokens_are_kept_only_when_asked_for() -> None:
    ids = DEFAULT.encode("a<|im_end|>b")
    assert "".join(stream(DEFAULT, ids)) == "ab"
    assert "".join(stream(DEFAULT, ids, keep_special_tokens=True)) == "a<|im_end|>b"


def test_blanks_are_stripped_from_the_front_only() -> None:
    tokenizer = TOYS["stripping"]
    blank, a = FIRST_WORD + WORDS.index("▁"), FIRST_WORD + WORDS.index("▁a")
    ids = [blank] * 5 + [a] + [blank] * 5 + [a]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == "   a      a"


def test_words_appear_at_once_and_not_at_the_end() -> None:
    tokenizer = TOYS["llama"]
    the, a = FIRST_WORD + WORDS.index("▁the"), FIRST_WORD + WORDS.index("▁a")
    assert stream(tokenizer, [the, a, the]) == ["the", " a", " the", ""]


@pytest.mark.parametrize("name", ["default", "llama"])
def test_cost_per_token_does_not_grow(name: str) -> None:
    """No re-decoding: the number of ids handed to the library shows it, not the clock."""
    tokenizer = DEFAULT if name == "default" else TOYS[name]
    counted = _Counted(tokenizer)
    detokenizer = Detokenizer(counted)  # type: ignore[arg-type]
    for _ in range(2_000):
        detokenizer.push(FIRST_WORD + 4)
    detokenizer.finish()
    assert counted.num_ids <= 2_000 * 6


class _Counted:
    """A tokenizer that counts the ids it is asked to decode."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner
        self.num_ids = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def token_bytes(self, token_id: int) -> bytes:
        self.num_ids += 1
        return self._inner.token_bytes(token_id)

    def decode(self, ids: list[int], keep_special_tokens: bool = False) -> str:
        self.num_ids += len(ids)
        return self._inner.decode(ids, keep_special_tokens)
