"""Streams a checkpoint's tensors into merged parameters, hashing every byte on the way.

It reads what model/checkpoint.py found sound, and does not know what the parameters do. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from model.checkpoint import Checkpoint, StoredTensor, check_against, open_checkpoint
from model.digest import FileDigest, PieceHasher, digest_of
from model.families.base import Placement, TensorMap

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total)."""

READ_BYTES = 16 * 2**20
HASHED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""Besides the weights, what decides a model's answers; absent ones count as absent."""

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """Parameters by name, and the digest of everything that they were made from."""

    parameters: dict[str, Tensor]
    digest: str
    unused: tuple[str, ...]
    """Tensors that were left out because they repeat others or hold what is computed anyway."""


def load_weights(
    model_dir: Path, tensor_map: TensorMap, dtype: torch.dtype, progress: Progress | None = None
) -> LoadedWeights:
    """Loads all parameters in `dtype`. Raises ValueError, in one line that names file or tensor, for what does not fit.

    The digest (model/digest.py) is of the configuration and tokenizer files and of the weight files in order.
    """
    checkpoint = open_checkpoint(model_dir)
    check_against(checkpoint, tensor_map)
    parameters = {name: torch.empty(shape, dtype=dtype) for name, shape in tensor_map.parameter_shapes().items()}
    loading = _Loading(checkpoint, tensor_map, parameters, progress)
    try:
        digest = digest_of([*hash_small_files(model_dir), *map(loading.load_file, checkpoint.files)])
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from None
    loading.check_duplicates()
    return LoadedWeights(parameters, digest, unused_tensors(checkpoint, tensor_map))


def hash_small_files(model_dir: Path) -> list[FileDigest]:
    """The digests of what decides answers besides the weights. Raises OSError."""
    digests = []
    for file in (model_dir / name for name in HASHED_FILES):
        hasher, content = PieceHasher(), file.read_bytes() if file.exists() else None
        hasher.update(content or b"")
        digests.append(FileDigest(file.name, None if content is None else len(content), hasher.pieces()))
    return digests


def target_of(parameters: dict[str, Tensor], placement: Placement) -> Tensor:
    """The rows of a parameter that one tensor of the checkpoint fills."""
    first_row = placement.first_row
    return parameters[placement.parameter][first_row : first_row + placement.shape[0]]


def unused_tensors(checkpoint: Checkpoint, tensor_map: TensorMap) -> tuple[str, ...]:
    """Names of tensors that fill no parameter, in order."""
    return tuple(sorted(tensor.name for tensor in checkpoint.tensors if tensor.name not in tensor_map.placements))


def cut_off(file: Path, tensor: StoredTensor | None) -> ValueError:
    """The error of a file that has become shorter since its header was read; without a tensor, in that header."""
    place = "its header" if tensor is None else f"tensor {tensor.name!r}"
    return ValueError(f"{file.name}: cut off while it was read, in {place}")


def differs(tensor: StoredTensor, source: str) -> ValueError:
    """The error of a tensor that should equal another one."""
    return ValueError(
        f"{tensor.file.name}: tensor {tensor.name!r} differs from {source!r}, to which config.json ties it"
    )


class _Loading:
    """One load under way: the parameters being filled, the bytes done."""

    def __init__(
        self, checkpoint: Checkpoint, tensor_map: TensorMap, parameters: dict[str, Tensor], progress: Progress | None
    ) -> None:
        self._checkpoint = checkpoint
        self._tensor_map = tensor_map
        self._parameters = parameters
        self._progress = progress
        self._bytes_done = 0
        self._duplicates: list[tuple[StoredTensor, Tensor]] = []

    def load_file(self, file: Path) -> FileDigest:
        """Reads one weight file from start to end, filling the parameters that it has parts of."""
        tensors = [tensor for tensor in self._checkpoint.tensors if tensor.file == file]
        hasher = PieceHasher()
        with file.open("rb") as stream:
            num_bytes = file.stat().st_size
            hasher.update(stream.read(tensors[0].begin if tensors else -1))
            for tensor in tensors:
                self._place(tensor, self._read(stream, tensor, hasher))
        return FileDigest(file.name, num_bytes, hasher.pieces())

    def check_duplicates(self) -> None:
        """Compares tensors that must equal others, once those are loaded. Raises ValueError where they do not."""
        for tensor, values in self._duplicates:
            source = self._tensor_map.duplicates[tensor.name]
            target = target_of(self._parameters, self._tensor_map.placements[source])
            if not torch.equal(values.view(tensor.shape).to(target.dtype), target):
                raise differs(tensor, source)

    def _read(self, stream: BinaryIO, tensor: StoredTensor, hasher: PieceHasher) -> Tensor:
        """Reads one tensor's bytes, in pieces, so that hashing finds them in the processor's cache."""
        content = bytearray(tensor.end - tensor.begin)
        view = memoryview(content)
        for begin in range(0, len(content), READ_BYTES):
            piece = view[begin : begin + READ_BYTES]
            if stream.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise cut_off(tensor.file, tensor)
            hasher.update(piece)
            self._bytes_done += len(piece)
            if self._progress is not None:
                self._progress(self._bytes_done, self._checkpoint.num_bytes)
        dtype = DTYPES.get(tensor.dtype)
        return torch.frombuffer(content, dtype=dtype or torch.uint8) if content else torch.empty(0)

    def _place(self, tensor: StoredTensor, values: Tensor) -> None:
        """Copies a tensor's values to its place, converting to the parameter's dtype."""
        placement = self._tensor_map.placements.get(tensor.name)
        if placement is not None:
            target_of(self._parameters, placement).copy_(values.view(tensor.shape))
        elif tensor.name in self._tensor_map.duplicates:
            self._duplicates.append((tensor, values))
