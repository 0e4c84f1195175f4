"""The shapes that are measured on a card, and tiny ones in their place for a dry run."""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.models import CARD_SHAPES, ModelShape, config
from loadtest.roofline import ModelCost

DRY_SHAPES = {
    "1B": ModelShape(1200, 32, 48, 2, 2, 1, 10_000.0, 256, seed=4),
    "8B": ModelShape(1200, 64, 96, 2, 4, 2, 10_000.0, 256, seed=5, is_tied=False),
}
"""Vocabularies as small as loadtest.models has tokens for."""


def names_of(is_dry: bool) -> tuple[str, ...]:
    """The models whose kernels are measured, most important first; a dry run has enough of one."""
    return ("1B",) if is_dry else ("8B", "1B")


def shape_of(name: str, is_dry: bool) -> ModelShape:
    """By name. Raises ValueError for a name that there is none of."""
    shapes = DRY_SHAPES if is_dry else CARD_SHAPES
    if name not in shapes:
        raise ValueError(f"model {name!r} is none of {', '.join(shapes)}")
    return shapes[name]


def cost_of(shape: ModelShape) -> ModelCost:
    """What its arithmetic consists of."""
    return ModelCost.from_config(config(shape))


UNEMBEDDING = "unembedding"


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight as a step multiplies with it."""

    name: str
    num_outputs: int
    num_inputs: int
    count: int
    """How many of the kind a step multiplies with."""

    @property
    def is_last(self) -> bool:
        """Whether it gives the logits, of those tokens that are drawn from."""
        return self.name == UNEMBEDDING


def matrices_of(shape: ModelShape) -> list[Matrix]:
    """All of a model's, merged as Quire merges them."""
    hidden, layers = shape.hidden_size, shape.num_layers
    q_size, kv_size = (count * shape.head_dim for count in (shape.num_heads, shape.num_kv_heads))
    return [
        Matrix("qkv", q_size + 2 * kv_size, hidden, layers),
        Matrix("o", hidden, q_size, layers),
        Matrix("gate_up", 2 * shape.intermediate_size, hidden, layers),
        Matrix("down", hidden, shape.intermediate_size, layers),
        Matrix(UNEMBEDDING, shape.vocab_size, hidden, 1),
    ]
