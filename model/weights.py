"""Streams a checkpoint's tensors into merged parameters, hashing every byte on the way.

It reads what model/checkpoint.py found sound, and does not know what the parameters do. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from model.checkpoint import Checkpoint, StoredTensor, check_against, open_checkpoint
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

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


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

    The digest is "sha256:" and the hash of the configuration and tokenizer files and of the weight files in order, each
    preceded by its name and length.
    """
    checkpoint = open_checkpoint(model_dir)
    check_against(checkpoint, tensor_map)
    parameters = {name: torch.empty(shape, dtype=dtype) for name, shape in tensor_map.parameter_shapes().items()}
    loading = _Loading(checkpoint, tensor_map, parameters, progress)
    try:
        for name in HASHED_FILES:
            loading.hash_file(model_dir / name)
        for file in checkpoint.files:
            loading.load_file(file)
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from None
    loading.check_duplicates()
    unused = tuple(sorted(tensor.name for tensor in checkpoint.tensors if tensor.name not in tensor_map.placements))
    return LoadedWeights(parameters, "sha256:" + loading.digest.hexdigest(), unused)


class _Loading:
    """One load under way: the parameters being filled, the running hash, the bytes done."""

    def __init__(
        self, checkpoint: Checkpoint, tensor_map: TensorMap, parameters: dict[str, Tensor], progress: Progress | None
    ) -> None:
        self.digest = hashlib.sha256()
        self._checkpoint = checkpoint
        self._tensor_map = tensor_map
        self._parameters = parameters
        self._progress = progress
        self._bytes_done = 0
        self._duplicates: list[tuple[StoredTensor, Tensor]] = []

    def hash_file(self, file: Path) -> None:
        """Adds a small file to the digest."""
        content = file.read_bytes() if file.exists() else b""
        self.digest.update(f"{file.name}\0{len(content) if file.exists() else -1}\0".encode())
        self.digest.update(content)

    def load_file(self, file: Path) -> None:
        """Reads one weight file from start to end, filling the parameters that it has parts of."""
        tensors = [tensor for tensor in self._checkpoint.tensors if tensor.file == file]
        with file.open("rb") as stream:
            self.digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            self.digest.update(stream.read(tensors[0].begin if tensors else -1))
            for tensor in tensors:
                self._place(tensor, self._read(stream, tensor))

    def check_duplicates(self) -> None:
        """Compares tensors that must equal others, once those are loaded. Raises ValueError where they do not."""
        for tensor, values in self._duplicates:
            source = self._tensor_map.duplicates[tensor.name]
            target = self._target(self._tensor_map.placements[source])
            if not torch.equal(values.view(tensor.shape).to(target.dtype), target):
                raise ValueError(
                    f"{tensor.file.name}: tensor {tensor.name!r} differs from {source!r}, to which config.json ties it"
                )

    def _read(self, stream: BinaryIO, tensor: StoredTensor) -> Tensor:
        """Reads one tensor's bytes, in pieces, so that hashing finds them in the processor's cache."""
        content = bytearray(tensor.end - tensor.begin)
        view = memoryview(content)
        for begin in range(0, len(content), READ_BYTES):
            piece = view[begin : begin + READ_BYTES]
            if stream.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise ValueError(f"{tensor.file.name}: cut off while it was read, in tensor {tensor.name!r}")
            self.digest.update(piece)
            self._bytes_done += len(piece)
            if self._progress is not None:
                self._progress(self._bytes_done, self._checkpoint.num_bytes)
        dtype = _DTYPES.get(tensor.dtype)
        return torch.frombuffer(content, dtype=dtype or torch.uint8) if content else torch.empty(0)

    def _place(self, tensor: StoredTensor, values: Tensor) -> None:
        """Copies a tensor's values to its place, converting to the parameter's dtype."""
        placement = self._tensor_map.placements.get(tensor.name)
        if placement is not None:
            self._target(placement).copy_(values.view(tensor.shape))
        elif tensor.name in self._tensor_map.duplicates:
            self._duplicates.append((tensor, values))

    def _target(self, placement: Placement) -> Tensor:
        first_row = placement.first_row
        return self._parameters[placement.parameter][first_row : first_row + placement.shape[0]]
