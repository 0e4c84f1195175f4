"""The tokenizer against transformers' own, and the mistakes a model directory can hold."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, processors

from service.config import BUILT_IN_MODEL
from service.errors import StartupError
from service.text.tokenizer import Tokenizer
from tests.text.toy import FAMILIES, byte_level, llama

transformers = pytest.importorskip("transformers")
DEFAULT = Tokenizer.from_directory(BUILT_IN_MODEL)
REFERENCE = transformers.AutoTokenizer.from_pretrained(BUILT_IN_MODEL, local_files_only=True)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.one_of(st.text(max_size=20), st.sampled_from([*SPECIAL, "\n", "def f(x):", "2024"]))))
def test_encodes_as_transformers_does(parts: list[str]) -> None:
    text = "".join(parts)
    assert DEFAULT.encode(text) == REFERENCE.encode(text)
    assert DEFAULT.encode(text, add_special_tokens=False) == REFERENCE.encode(text, add_special_tokens=False)


def test_encoding_a_long_text_lets_other_threads_run() -> None:
    """The front end tokenises long prompts in a thread so that its event loop turns meanwhile."""
    begin = threading.Event()

    def encode() -> None:
        begin.wait()
        DEFAULT.encode("hello world " * 50_000)

    thread = threading.Thread(target=encode)
    thread.start()
    begin.set()
    num_turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        num_turns += 1
    assert num_turns > 10, "the interpreter's lock was held"


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 4095), max_size=30), keep=st.booleans())
def test_decodes_as_transformers_does(ids: list[int], keep: bool) -> None:
    assert DEFAULT.decode(ids, keep) == REFERENCE.decode(ids, skip_special_tokens=not keep)


def test_facts_of_the_default_model() -> None:
    config = json.loads((BUILT_IN_MODEL / "config.json").read_text())
    assert DEFAULT.vocab_size == config["vocab_size"]
    assert dict(DEFAULT.special_tokens) == dict(enumerate(SPECIAL))
    assert DEFAULT.is_byte_level
    assert DEFAULT.max_token_bytes == max(len(DEFAULT.token_bytes(i)) for i in range(DEFAULT.vocab_size))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_adds_more_than_max_token_bytes(family: str) -> None:
    tokenizer = Tokenizer(FAMILIES[family]())
    texts = (tokenizer.decode([i], keep_special_tokens=True) for i in range(tokenizer.vocab_size))
    assert max(len(text.replace("\ufffd", "").encode()) for text in texts) <= tokenizer.max_token_bytes


def test_the_post_processor_acts_on_plain_text_only() -> None:
    inner = llama()
    bos = inner.token_to_id("<s>")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = Tokenizer(inner)
    plain = tokenizer.encode("the a", add_special_tokens=False)
    assert tokenizer.encode("the a") == [bos, *plain]
    assert bos not in plain


def test_no_prompt_is_cut_or_padded() -> None:
    inner = byte_level()
    inner.enable_truncation(4)
    inner.enable_padding(length=9)
    assert len(Tokenizer(inner).encode("a" * 100)) == 100
    assert len(Tokenizer(inner).encode("a")) == 1


def test_every_token_of_a_large_text_returns() -> None:
    text = Path(__file__).read_text() + "héllo wörld の 😀\x00\x7f"
    assert DEFAULT.decode(DEFAULT.encode(text), keep_special_tokens=True) == text


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version": "1.0"}', b"\xff\xfe", b'{"model": {"type": "None"}}']
)
def test_a_broken_file_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(StartupError, match=r"tokenizer\.json") as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(StartupError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")]),
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_refused(decoder: object) -> None:
    inner: Inner = llama()
    inner.decoder = decoder
    with pytest.raises(StartupError, match="cannot be streamed"):
        Tokenizer(inner)


def test_only_tokenizer_json_is_needed(tmp_path: Path) -> None:
    shutil.copy(BUILT_IN_MODEL / "tokenizer.json", tmp_path)
    assert Tokenizer.from_directory(tmp_path).encode("a b") == DEFAULT.encode("a b")
