"""Loads a checkpoint straight into merged parameters on a card, by several readers; on a CPU by the same code.

It owns the readers and their buffers, for as long as a load takes. What a checkpoint is, what belongs where, the digest
and the errors are those of model/checkpoint.py, model/digest.py and model/weights.py; load_weights is the
specification, with equal parameters, digest and refusals.

Files are read in the digest's pieces, each by the reader that is free next: read, hashed, and copied to where its
elements belong, on the reader's own stream, while the next piece is read into its other buffer.

    file       | header | tensor A       | tensor B     | tensor C  ...
    piece      0            1            2            3
                            |<--- B's first elements, and A's last ones
    An element that a piece cuts belongs to the piece in which it begins; its other bytes are read as well.

No more memory is taken, whatever the checkpoint, than two buffers a reader on the host, pinned for a card, and one on
the device where types are converted: 16 readers have 256 MiB.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event

import torch
from torch import Tensor

from model import digest
from model.checkpoint import ELEMENT_BYTES, Checkpoint, StoredTensor, check_against, open_checkpoint
from model.digest import FileDigest, digest_of, num_pieces
from model.families.base import TensorMap
from model.gpu.rings import Ring, ring_for
from model.weights import DTYPES, LoadedWeights, Progress, cut_off, differs, hash_small_files, target_of, unused_tensors

MAX_READERS = 16
"""A reader does about 1 GB/s on one core, nearly all of it hashing, and two do twice that; beyond it is reckoned."""


@dataclass(frozen=True, slots=True)
class Part:
    """The elements [first, last) of a tensor, which begin in some piece."""

    tensor: StoredTensor
    first: int
    last: int

    @property
    def begin(self) -> int:
        """Of its bytes in the file."""
        return self.tensor.begin + self.first * ELEMENT_BYTES[self.tensor.dtype]

    @property
    def end(self) -> int:
        """Of its bytes in the file; it may be behind the piece's."""
        return self.tensor.begin + self.last * ELEMENT_BYTES[self.tensor.dtype]


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes [begin, end) of a file, which are hashed together, and the elements that begin there."""

    file: Path
    number: int
    begin: int
    end: int
    parts: tuple[Part, ...]

    @property
    def num_read(self) -> int:
        """Bytes to read: the piece and the rest of its last element."""
        return max([self.end, *(part.end for part in self.parts)]) - self.begin


def load_onto(
    model_dir: Path,
    tensor_map: TensorMap,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    num_readers: int | None = None,
) -> LoadedWeights:
    """Loads all parameters in `dtype` onto a device; they are there when it returns. As load_weights else.

    By default there is a reader for each core, up to MAX_READERS. `progress` is called in the caller's thread. Raises
    ValueError, in one line that names file or tensor, for what does not fit; no reader is left then.
    """
    checkpoint = open_checkpoint(model_dir)
    check_against(checkpoint, tensor_map)
    num_readers = num_readers or min(MAX_READERS, len(os.sched_getaffinity(0)))
    shapes = tensor_map.parameter_shapes()
    parameters = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    converts = bool(tensor_map.duplicates) or any(
        DTYPES.get(tensor.dtype, dtype) is not dtype for tensor in checkpoint.tensors
    )
    try:
        with ExitStack() as opened:
            loading = _Loading(checkpoint, tensor_map, parameters, opened)
            rings = [ring_for(device, has_scratch=converts) for _ in range(num_readers)]
            _read_all(loading.pieces, loading.take_in, rings, partial(_tell, progress, checkpoint.num_bytes))
            _read_all(loading.duplicates(), loading.compare, rings, lambda _: None)
            files = [*hash_small_files(model_dir), *loading.digests()]
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from None
    return LoadedWeights(parameters, digest_of(files), unused_tensors(checkpoint, tensor_map))


def _tell(progress: Progress | None, num_bytes: int, num_done: int) -> None:
    if progress is not None:
        progress(num_done, num_bytes)


def _read_all(
    pieces: Iterable[Piece], take: Callable[[Piece, Ring], int], rings: Sequence[Ring], tell: Callable[[int], None]
) -> None:
    """Lets a reader for each ring take pieces until there are none, and tells of the bytes done.

    Raises what a reader raised, once all have ended.
    """
    waiting: SimpleQueue[Piece] = SimpleQueue()
    for piece in pieces:
        waiting.put(piece)
    done: SimpleQueue[int | None] = SimpleQueue()
    stopping = Event()

    def read(ring: Ring) -> None:
        try:
            # Parameters that were made in inference mode may be changed in it only, and the mode is a thread's own.
            with torch.inference_mode():
                while not stopping.is_set():
                    done.put(take(waiting.get_nowait(), ring))
        except Empty:
            pass
        except BaseException:
            stopping.set()
            raise
        finally:
            try:
                ring.finish()
            finally:
                done.put(None)

    with ThreadPoolExecutor(len(rings), thread_name_prefix="reader") as pool:
        readers = [pool.submit(read, ring) for ring in rings]
        try:
            num_done, num_reading = 0, len(rings)
            while num_reading:
                num_bytes = done.get()
                if num_bytes is None:
                    num_reading -= 1
                elif num_bytes:
                    num_done += num_bytes
                    tell(num_done)
        finally:
            stopping.set()
    for reader in readers:
        reader.result()


class _Loading:
    """One load under way: the open files, their pieces, and the hashes so far."""

    def __init__(
        self, checkpoint: Checkpoint, tensor_map: TensorMap, parameters: dict[str, Tensor], opened: ExitStack
    ) -> None:
        """Opens the files; `opened` closes them. Raises OSError."""
        self._tensor_map = tensor_map
        self._parameters = parameters
        self._tensors: dict[Path, list[StoredTensor]] = {file: [] for file in checkpoint.files}
        for tensor in checkpoint.tensors:
            self._tensors[tensor.file].append(tensor)
        self._files = {file: opened.enter_context(file.open("rb", buffering=0)) for file in checkpoint.files}
        self._num_bytes = {file: os.fstat(stream.fileno()).st_size for file, stream in self._files.items()}
        self._hashes = {file: [b""] * num_pieces(num_bytes) for file, num_bytes in self._num_bytes.items()}
        self.pieces = [piece for file in checkpoint.files for piece in self._cut(file)]

    def take_in(self, piece: Piece, ring: Ring) -> int:
        """Reads and hashes a piece, and brings its elements to their places. Returns its number of tensors' bytes."""
        buffer = self._read(piece, ring)
        content = buffer.numpy().data[: piece.end - piece.begin]
        self._hashes[piece.file][piece.number] = hashlib.sha256(content).digest()
        placements = self._tensor_map.placements
        for part in piece.parts:
            if part.tensor.name in placements:
                target = target_of(self._parameters, placements[part.tensor.name]).view(-1)[part.first : part.last]
                values = buffer[part.begin - piece.begin : part.end - piece.begin]
                ring.enqueue(partial(_copy, values, DTYPES[part.tensor.dtype], target, ring.scratch))
        tensors = self._tensors[piece.file]
        return max(piece.end - max(piece.begin, tensors[0].begin), 0) if tensors else 0

    def duplicates(self) -> Iterator[Piece]:
        """What is left to read again, once all parameters are there: tensors that must equal others."""
        for piece in self.pieces:
            parts = tuple(part for part in piece.parts if part.tensor.name in self._tensor_map.duplicates)
            if parts:
                yield replace(piece, parts=parts)

    def compare(self, piece: Piece, ring: Ring) -> int:
        """Reads a piece of duplicates again. Raises ValueError where they differ from what they repeat; returns 0."""
        buffer = self._read(piece, ring)
        for part in piece.parts:
            source = self._tensor_map.duplicates[part.tensor.name]
            target = target_of(self._parameters, self._tensor_map.placements[source]).view(-1)[part.first : part.last]
            values = buffer[part.begin - piece.begin : part.end - piece.begin]
            ring.enqueue(partial(_check_equal, part.tensor, source, values, target, ring.scratch))
        return 0

    def digests(self) -> list[FileDigest]:
        """Of the files in order, once all pieces are read."""
        return [
            FileDigest(file.name, num_bytes, tuple(self._hashes[file])) for file, num_bytes in self._num_bytes.items()
        ]

    def _cut(self, file: Path) -> Iterator[Piece]:
        """The pieces of one file."""
        names = self._tensor_map.placements.keys() | self._tensor_map.duplicates.keys()
        known = [tensor for tensor in self._tensors[file] if tensor.name in names]
        next_tensor = 0
        for number in range(num_pieces(self._num_bytes[file])):
            begin = number * digest.PIECE_BYTES
            end = min(begin + digest.PIECE_BYTES, self._num_bytes[file])
            while next_tensor < len(known) and known[next_tensor].end <= begin:
                next_tensor += 1
            parts = []
            for tensor in known[next_tensor:]:
                if tensor.begin >= end:
                    break
                parts.append(_part_of(tensor, begin, end))
            yield Piece(file, number, begin, end, tuple(part for part in parts if part.first < part.last))

    def _read(self, piece: Piece, ring: Ring) -> Tensor:
        """Fills the ring's next buffer. Raises OSError that names the file, ValueError where the file has an end."""
        buffer = ring.take()
        view = buffer.numpy().data[: piece.num_read]
        num_read = 0
        while num_read < len(view):
            try:
                count = os.preadv(self._files[piece.file].fileno(), [view[num_read:]], piece.begin + num_read)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(piece.file)) from None
            if count == 0:
                raise cut_off(piece.file, self._tensor_at(piece.file, piece.begin + num_read))
            num_read += count
        return buffer

    def _tensor_at(self, file: Path, position: int) -> StoredTensor | None:
        """The tensor that has a byte; None in the header."""
        return next((tensor for tensor in self._tensors[file] if tensor.begin <= position < tensor.end), None)


def _part_of(tensor: StoredTensor, begin: int, end: int) -> Part:
    """The elements of a tensor that begin in [begin, end) of its file."""
    size = ELEMENT_BYTES[tensor.dtype]
    first, last = (-(-(position - tensor.begin) // size) for position in (begin, min(end, tensor.end)))
    return Part(tensor, max(first, 0), last)


def _copy(values: Tensor, stored: torch.dtype, target: Tensor, scratch: Tensor) -> None:
    """Brings bytes of a buffer, elements of a stored type, to their place [elements] on the device."""
    if stored is target.dtype:
        target.view(torch.uint8).copy_(values, non_blocking=True)
    else:
        target.copy_(_moved(values, stored, scratch))


def _check_equal(tensor: StoredTensor, source: str, values: Tensor, target: Tensor, scratch: Tensor) -> None:
    """Raises ValueError where the elements, rounded as they would have been, are others than those on the device."""
    if not torch.equal(_moved(values, DTYPES[tensor.dtype], scratch).to(target.dtype), target):
        raise differs(tensor, source)


def _moved(values: Tensor, stored: torch.dtype, scratch: Tensor) -> Tensor:
    """Elements as they are stored, on the device, at the start of `scratch`: in a buffer they may begin anywhere."""
    raw = scratch[: len(values)]
    raw.copy_(values, non_blocking=True)
    return raw.view(stored)
