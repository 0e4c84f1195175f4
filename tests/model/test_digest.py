"""The digest of files: what it depends on, and that pieces may be hashed by anyone."""

from __future__ import annotations

import hashlib

import pytest

from model import digest
from model.digest import FileDigest, PieceHasher, digest_of, num_pieces

CONTENT = bytes(range(256))


def pieces_of(content: bytes, cuts: list[int]) -> tuple[bytes, ...]:
    """What a hasher makes of a content that comes in parts of these lengths, and the rest."""
    hasher = PieceHasher()
    for length in cuts:
        hasher.update(memoryview(content)[:length])
        content = content[length:]
    hasher.update(content)
    return hasher.pieces()


@pytest.mark.parametrize("cuts", [[], [1], [10, 90, 10], [99, 1, 1], [100, 100], [0, 256], [3] * 85])
def test_pieces_do_not_depend_on_how_the_file_was_read(cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PIECE_BYTES", 100)
    expected = [hashlib.sha256(CONTENT[begin : begin + 100]).digest() for begin in (0, 100, 200)]
    assert list(pieces_of(CONTENT, cuts)) == expected


@pytest.mark.parametrize("num_bytes", [0, 1, 99, 100, 101, 200])
def test_a_file_has_as_many_pieces_as_it_takes(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PIECE_BYTES", 100)
    assert len(pieces_of(CONTENT[:num_bytes], [])) == num_pieces(num_bytes)


def test_names_lengths_pieces_and_their_order_count() -> None:
    a, b = hashlib.sha256(b"a").digest(), hashlib.sha256(b"b").digest()
    first, second = FileDigest("one", 1, (a,)), FileDigest("two", 1, (b,))
    others = [
        [second, first],
        [first],
        [FileDigest("uno", 1, (a,)), second],
        [FileDigest("one", 2, (a,)), second],
        [FileDigest("one", 1, (b,)), second],
        [FileDigest("one", 1, (a, b)), second],
        [FileDigest("one", 0, ()), second],
        [FileDigest("one", None, ()), second],
    ]
    assert len({digest_of(files) for files in [[first, second], *others]}) == 1 + len(others)
    assert digest_of([first]) == "sha256:" + hashlib.sha256(b"one\0001\0" + a).hexdigest()
