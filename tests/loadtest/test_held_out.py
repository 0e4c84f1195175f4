"""The held-out text: the same windows every time, each of another file, none that training could have read."""

from __future__ import annotations

from itertools import islice

import pytest
from tokenizers import Tokenizer

from loadtest import held_out
from loadtest.held_out import digest, second_half, texts, windows
from model.training.library import source_files
from service.config import BUILT_IN_MODEL


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUILT_IN_MODEL / "tokenizer.json"))


def test_windows_have_one_length_and_are_the_same_again(tokenizer: Tokenizer) -> None:
    found = windows(tokenizer, 6, 40)
    assert [len(window) for window in found] == [40] * 6
    assert len(set(found)) == 6
    assert windows(tokenizer, 6, 40) == found
    assert windows(tokenizer, 4, 40) == found[:4]


def test_the_digest_names_the_windows() -> None:
    assert digest([(1, 2), (3,)]) == digest([(1, 2), (3,)])
    assert digest([(1, 2), (3,)]) != digest([(1,), (2, 3)])


def test_no_text_is_of_the_standard_library() -> None:
    trained_on = "".join(file.text for file in source_files())
    for text in islice((text for text in texts() if len(text) > 2_000), 20):
        assert text[:1_000] not in trained_on


def test_the_second_half_begins_with_a_whole_line() -> None:
    assert second_half("one\ntwo\nthree\n") == "three\n"
    assert second_half("one line") == "one line"


def test_more_windows_than_there_are_files_is_an_error(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "texts", lambda: iter(["def f():\n    return 1\n" * 20, "x = 1\n"]))
    with pytest.raises(ValueError, match="only 1 files hold 16 tokens, 2 are wanted"):
        windows(tokenizer, 2, 16)


def test_a_package_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "PACKAGES", ("no_such_package",))
    with pytest.raises(ValueError, match="no_such_package is not installed"):
        next(texts())
