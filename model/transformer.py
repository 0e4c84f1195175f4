"""The decoder: embed, then layers of attention and MLP around a residual stream, then norm and unembed.

It does not know requests, slots or sampling; what a step looks like stands in its arguments alone. Shape letters:

    T tokens of the step   W wanted tokens   E hidden size   F intermediate size   V vocabulary
    H query heads          K key/value heads D head size
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention.base import AttentionBackend, AttentionPlan
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.linear import Linear, LinearPacker
from model.operators import Operators
from model.rotary import RotaryTables


class Logits(NamedTuple):
    """What a step gives for the wanted tokens: float32 scores of all tokens, and the largest of each row.

    A peak is NaN where any of the row's logits is; `peak_ids` are the first tokens that have the peaks. They are
    lists: between two steps the caches are cold, and whatever asks a tensor for a number or its length is slow.
    """

    values_WV: Tensor
    peaks: list[float]
    peak_ids: list[int]

    @classmethod
    def of(cls, values_WV: Tensor) -> Logits:
        """Finds the peaks."""
        peaks_W, peak_ids_W = values_WV.max(dim=-1)
        return cls(values_WV, peaks_W.tolist(), peak_ids_W.tolist())


@dataclass(frozen=True, slots=True)
class Layer:
    """The parameters of one layer."""

    norm1_E: Tensor
    qkv: Linear
    o: Linear
    norm2_E: Tensor
    gate_up: Linear
    """silu(gate) * up: [T, F]."""
    down: Linear

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        linears = sum(linear.num_bytes for linear in (self.qkv, self.o, self.gate_up, self.down))
        return linears + self.norm1_E.nbytes + self.norm2_E.nbytes


class Transformer:
    """A pre-norm decoder with grouped-query attention (Ainslie et al., 2023), RMS norm, rotary positions and SwiGLU."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: dict[str, Tensor],
        packer: LinearPacker,
        attention: AttentionBackend,
        operators: Operators,
        num_positions: int,
    ) -> None:
        """Takes the parameters out of the dict one by one, so that each raw matrix is released when it is packed."""
        self.config = config
        self._attention = attention
        self._operators = operators
        self.rotary = RotaryTables(config.rope, config.head_dim, num_positions)
        self.embedding_VE = parameters.pop("embedding")
        self.layers = [_build_layer(parameters, f"layers.{index}.", packer) for index in range(config.num_layers)]
        self.norm_E = parameters.pop("norm")
        self.unembedding = packer.pack_unembedding(parameters.pop("unembedding", self.embedding_VE))
        assert not parameters, f"parameters without a use: {sorted(parameters)}"

    @property
    def num_bytes(self) -> int:
        """Memory that the parameters take as they were packed; a tied embedding lies there twice."""
        layers = sum(layer.num_bytes for layer in self.layers)
        return layers + self.unembedding.num_bytes + self.embedding_VE.nbytes + self.norm_E.nbytes

    def forward(
        self, ids_T: Tensor, positions_T: Tensor, cache: KVCache, plan: AttentionPlan, wanted_W: Tensor
    ) -> Tensor:
        """Computes one step: writes the tokens' keys and values to the cache, returns float32 logits [W, V].

        `ids_T`, `positions_T` and `wanted_W` (places among the T tokens) are int64.
        """
        rotation = self.rotary.at(positions_T)
        x_TE = self.embedding_VE[ids_T]
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x_TE = self._attend(index, layer, x_TE, rotation, cache, plan)
            if index < last:
                x_TE = self._mlp(layer, x_TE)
        if wanted_W.shape[0] == 0:
            return torch.empty(0, self.config.vocab_size)
        # Behind the last keys and values nothing reads the tokens that are not wanted.
        x_WE = self._mlp(self.layers[last], x_TE[wanted_W])
        return self.unembedding(self._norm(x_WE, self.norm_E)).float()

    def _attend(
        self,
        index: int,
        layer: Layer,
        x_TE: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: KVCache,
        plan: AttentionPlan,
    ) -> Tensor:
        """Adds what the tokens see to the residual stream."""
        qkv_TND = layer.qkv(self._norm(x_TE, layer.norm1_E)).view(x_TE.shape[0], -1, self.config.head_dim)
        q_THD = self._operators.rotate_and_write(qkv_TND, rotation, cache, index, plan)
        scale = self.config.head_dim**-0.5
        mixed_THD = self._attention.attend(q_THD, cache.k[index], cache.v[index], plan, scale)
        return layer.o(mixed_THD.flatten(1), residual_MO=x_TE)

    def _mlp(self, layer: Layer, x_TE: Tensor) -> Tensor:
        """Adds the gated MLP to the residual stream."""
        activated_TF = layer.gate_up(self._norm(x_TE, layer.norm2_E))
        return layer.down(activated_TF, residual_MO=x_TE)

    def _norm(self, x_TE: Tensor, weight_E: Tensor) -> Tensor:
        return self._operators.rms_norm(x_TE, weight_E, self.config.norm_epsilon)


def _build_layer(parameters: dict[str, Tensor], prefix: str, packer: LinearPacker) -> Layer:
    def taken(name: str) -> tuple[Tensor, Tensor | None]:
        return parameters.pop(prefix + name), parameters.pop(f"{prefix}{name}.bias", None)

    return Layer(
        norm1_E=parameters.pop(f"{prefix}norm1"),
        qkv=packer.pack(*taken("qkv")),
        o=packer.pack(*taken("o")),
        norm2_E=parameters.pop(f"{prefix}norm2"),
        gate_up=packer.pack_gated(*taken("gate_up")),
        down=packer.pack(*taken("down")),
    )
