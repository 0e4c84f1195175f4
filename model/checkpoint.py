"""The safetensors files of a checkpoint: which tensors they hold, where, and whether they are those a model needs.

Standard library only: headers are read by hand (the "Format" page of the safetensors documentation), nothing is mapped
or executed, and every size is checked against the file before anything of that size is allocated.

    file    | length N: u64 | JSON header, N bytes | tensors, without holes ............|
                                                   ^ offset 0 of data_offsets           ^ end of file
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from model.families.base import TensorMap
from model.families.fields import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 2**20
"""The limit of the safetensors library itself."""
ELEMENT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
"""The element types that a model's weights may have."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file: the bytes [begin, end) counted from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All weight files of a model, and their tensors in file order."""

    files: tuple[Path, ...]
    tensors: tuple[StoredTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.end - tensor.begin for tensor in self.tensors)


def open_checkpoint(model_dir: Path) -> Checkpoint:
    """Reads all headers. Raises ValueError, in one line that names file or tensor, for files that are not sound."""
    files = _weight_files(model_dir)
    tensors = tuple(tensor for file in files for tensor in _read_header(file))
    seen: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"{tensor.file.name}: tensor {tensor.name!r} is also in {seen[tensor.name].file.name}")
        seen[tensor.name] = tensor
    return Checkpoint(files, tensors)


def check_against(checkpoint: Checkpoint, tensor_map: TensorMap) -> None:
    """Checks that every tensor has a use, every parameter a source, and shapes and types fit. Raises ValueError."""
    for tensor in checkpoint.tensors:
        if tensor.name.endswith(tensor_map.ignored_suffixes):
            continue
        source = tensor_map.duplicates.get(tensor.name, tensor.name)
        placement = tensor_map.placements.get(source)
        if placement is None:
            raise ValueError(f"{tensor.file.name}: tensor {tensor.name!r} has no place in this architecture")
        if tensor.shape != placement.shape:
            raise ValueError(
                f"{tensor.file.name}: tensor {tensor.name!r} has shape {list(tensor.shape)}, "
                f"config.json implies {list(placement.shape)}"
            )
        if tensor.dtype not in ELEMENT_BYTES:
            raise ValueError(
                f"{tensor.file.name}: tensor {tensor.name!r} has type {tensor.dtype}, expected a float type"
            )
    missing = tensor_map.placements.keys() - {tensor.name for tensor in checkpoint.tensors}
    if missing:
        raise ValueError(f"weights are incomplete: no tensor {min(missing)!r}" + _and_more(len(missing) - 1))


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count else ""


def _weight_files(model_dir: Path) -> tuple[Path, ...]:
    """The single file, or those that the index names."""
    if (model_dir / SINGLE_FILE).exists():
        return (model_dir / SINGLE_FILE,)
    if not (model_dir / INDEX_FILE).exists():
        raise ValueError(f"{model_dir}: no {SINGLE_FILE} and no {INDEX_FILE}")
    index = read_json(model_dir / INDEX_FILE)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise index.fail("weight_map", "an object of file names by tensor name")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX_FILE}: weight_map: {name!r} is not the name of a safetensors file beside it")
    return tuple(model_dir / name for name in names)


def _read_header(file: Path) -> list[StoredTensor]:
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise ValueError(f"{file.name}: not a safetensors file, or cut off in its header")
            header = json.loads(stream.read(header_bytes))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{file.name}: not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file.name}: not a safetensors file: its header is not an object")
    tensors = [
        _read_entry(file, 8 + header_bytes, name, entry) for name, entry in header.items() if name != "__metadata__"
    ]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_layout(file, tensors, 8 + header_bytes, file_bytes)
    return tensors


def _read_entry(file: Path, data_start: int, name: str, entry: Any) -> StoredTensor:
    """One entry of a header: {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{file.name}: tensor {name!r} has a malformed header entry")
    num_bytes = offsets[1] - offsets[0]
    if dtype in ELEMENT_BYTES and num_bytes != math.prod(shape) * ELEMENT_BYTES[dtype]:
        raise ValueError(f"{file.name}: tensor {name!r}: {num_bytes} bytes do not hold {dtype} {shape}")
    return StoredTensor(name, file, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(file: Path, tensors: Iterable[StoredTensor], data_start: int, file_bytes: int) -> None:
    """Tensors must follow one another without holes or overlaps, and end where the file ends."""
    position = data_start
    for tensor in tensors:
        if tensor.begin != position or tensor.end < position:
            raise ValueError(f"{file.name}: tensor {tensor.name!r} overlaps another one or leaves a hole")
        position = tensor.end
        if position > file_bytes:
            raise ValueError(f"{file.name}: cut off: tensor {tensor.name!r} ends at {position} of {file_bytes} bytes")
    if position != file_bytes:
        raise ValueError(f"{file.name}: {file_bytes - position} bytes behind the last tensor")
