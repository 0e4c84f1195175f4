"""What a family says about a checkpoint's tensors: where each belongs, its shape, and its kind.

Standard library only. It does not read files and does not know tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class MatrixKind(StrEnum):
    """What a parameter is for; `quire model info` adds up by it."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"
    NORM = "norm"
    UNEMBEDDING = "unembedding"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one checkpoint tensor goes: the rows [first_row, first_row + shape[0]) of one parameter."""

    parameter: str
    shape: tuple[int, ...]
    kind: MatrixKind
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class TensorMap:
    """All tensors of a checkpoint, by their names in its files."""

    placements: Mapping[str, Placement]
    duplicates: Mapping[str, str]
    """Tensors that may be present but must equal another one (a tied unembedding that was saved as well)."""
    ignored_suffixes: tuple[str, ...]
    """Endings of names of tensors that hold nothing a model needs (frequencies that are computed anyway)."""

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter: its parts stacked by rows."""
        shapes: dict[str, tuple[int, ...]] = {}
        for placement in self.placements.values():
            num_rows = placement.first_row + placement.shape[0]
            known = shapes.get(placement.parameter, (0,))
            shapes[placement.parameter] = (max(num_rows, known[0]), *placement.shape[1:])
        return shapes
