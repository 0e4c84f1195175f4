"""The digest of a model: one hash of all files that decide its answers, made of pieces that may be hashed in any order.

Standard library only. It does not know what is in the files, nor who reads them.

    digest = sha256( file, file, ... )      file = name \\0 length \\0 sha256(piece 0) sha256(piece 1) ...

A single running hash would keep a whole checkpoint waiting for one core, at one to two gigabytes a second; pieces are
hashed by whoever reads them (the two-level case of a hash tree: Merkle, 1987).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

PIECE_BYTES = 8 * 2**20 - 4096
"""Of each piece of a file but its last. Part of what the digest is: another size gives every model another one.

A page less than a power of two, so that a buffer for a piece and the end of an element that it cuts is not larger than
that: pinned memory is rounded up.
"""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file's share of the digest."""

    name: str
    num_bytes: int | None
    """None says that there is no such file."""
    pieces: tuple[bytes, ...]


def num_pieces(num_bytes: int) -> int:
    """How many pieces a file of some length has."""
    return -(-num_bytes // PIECE_BYTES)


def digest_of(files: Iterable[FileDigest]) -> str:
    """The digest of files in their order, as "sha256:" and 64 hexadecimal digits."""
    whole = hashlib.sha256()
    for file in files:
        num_bytes = -1 if file.num_bytes is None else file.num_bytes
        whole.update(f"{file.name}\0{num_bytes}\0".encode())
        whole.update(b"".join(file.pieces))
    return "sha256:" + whole.hexdigest()


class PieceHasher:
    """Cuts what comes in a file's order into pieces, and hashes them."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._hash = hashlib.sha256()
        self._num_bytes = 0

    def update(self, content: bytes | memoryview) -> None:
        """Adds the next bytes of the file."""
        view = memoryview(content)
        while len(view):
            taken = view[: PIECE_BYTES - self._num_bytes]
            self._hash.update(taken)
            self._num_bytes += len(taken)
            view = view[len(taken) :]
            if self._num_bytes == PIECE_BYTES:
                self._end_piece()

    def pieces(self) -> tuple[bytes, ...]:
        """The hashes of all pieces, once the file is through."""
        if self._num_bytes:
            self._end_piece()
        return tuple(self._pieces)

    def _end_piece(self) -> None:
        self._pieces.append(self._hash.digest())
        self._hash = hashlib.sha256()
        self._num_bytes = 0
