"""The decoder: embed, then layers of attention and MLP around a residual stream, then norm and unembed.

It does not know requests, slots or sampling; what a step looks like stands in its arguments alone. Shape letters:

    T tokens of the step   W wanted tokens   E hidden size   F intermediate size   V vocabulary
    H query heads          K key/value heads D head size
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from model.attention.base import AttentionBackend, AttentionPlan
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.linear import Linear, LinearPacker
from model.rotary import RotaryTables, rotate


@dataclass(frozen=True, slots=True)
class Layer:
    """The parameters of one layer."""

    norm1_E: Tensor
    qkv: Linear
    o: Linear
    norm2_E: Tensor
    gate_up: Linear
    down: Linear


class Transformer:
    """A pre-norm decoder with grouped-query attention (Ainslie et al., 2023), RMS norm, rotary positions and SwiGLU."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: dict[str, Tensor],
        packer: LinearPacker,
        attention: AttentionBackend,
        num_positions: int,
    ) -> None:
        """Takes the parameters out of the dict one by one, so that each raw matrix is released when it is packed."""
        self._config = config
        self._attention = attention
        self._rotary = RotaryTables(config.rope, config.head_dim, num_positions)
        self._embedding_VE = parameters.pop("embedding")
        self._layers = [_build_layer(parameters, f"layers.{index}.", packer) for index in range(config.num_layers)]
        self._norm_E = parameters.pop("norm")
        self._unembedding = packer.pack(parameters.pop("unembedding", self._embedding_VE))
        assert not parameters, f"parameters without a use: {sorted(parameters)}"

    def forward(
        self, ids_T: Tensor, positions_T: Tensor, cache: KVCache, plan: AttentionPlan, wanted_W: Tensor
    ) -> Tensor:
        """Computes one step: writes the tokens' keys and values to the cache, returns float32 logits [W, V].

        `ids_T`, `positions_T` and `wanted_W` (places among the T tokens) are int64.
        """
        rotation = self._rotary.at(positions_T)
        x_TE = self._embedding_VE[ids_T]
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            x_TE = x_TE + self._attend(index, layer, x_TE, rotation, cache, plan)
            if index < last:
                x_TE = x_TE + self._mlp(layer, x_TE)
        if wanted_W.shape[0] == 0:
            return torch.empty(0, self._config.vocab_size)
        # Behind the last keys and values nothing reads the tokens that are not wanted.
        x_WE = x_TE[wanted_W]
        x_WE = x_WE + self._mlp(self._layers[last], x_WE)
        return self._unembedding(rms_norm(x_WE, self._norm_E, self._config.norm_epsilon)).float()

    def _attend(
        self,
        index: int,
        layer: Layer,
        x_TE: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: KVCache,
        plan: AttentionPlan,
    ) -> Tensor:
        num_heads, num_kv_heads = self._config.num_heads, self._config.num_kv_heads
        normed_TE = rms_norm(x_TE, layer.norm1_E, self._config.norm_epsilon)
        qkv_TND = layer.qkv(normed_TE).view(-1, num_heads + 2 * num_kv_heads, self._config.head_dim)
        qk_TND = rotate(qkv_TND[:, : num_heads + num_kv_heads], *rotation)
        cache.write(index, qk_TND[:, num_heads:], qkv_TND[:, num_heads + num_kv_heads :], plan)
        q_THD = qk_TND[:, :num_heads].contiguous()
        scale = self._config.head_dim**-0.5
        mixed_THD = self._attention.attend(q_THD, cache.k[index], cache.v[index], plan, scale)
        return layer.o(mixed_THD.flatten(1))

    def _mlp(self, layer: Layer, x_TE: Tensor) -> Tensor:
        normed_TE = rms_norm(x_TE, layer.norm2_E, self._config.norm_epsilon)
        return layer.down(silu_mul(layer.gate_up(normed_TE)))


def rms_norm(x_TE: Tensor, weight_E: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm (Zhang and Sennrich, 2019) in float32, rounded before the weight as Hugging Face does."""
    x = x_TE.float()
    scale_T1 = torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon)
    return weight_E * (x * scale_T1).to(x_TE.dtype)


def silu_mul(gate_up_TF2: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020) of the two halves [T, 2 F], contiguous [T, F].

    In float32 the library's silu rounds differently where a thread's share ends inside a row, so it is written out in
    operators that round each element alike. In bfloat16 its results agree for every one of the 65,536 values.
    """
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    if gate_TF.dtype is torch.bfloat16:
        return functional.silu(gate_TF) * up_TF
    return (gate_TF / torch.exp(-gate_TF).add_(1.0)).mul_(up_TF)


def _build_layer(parameters: dict[str, Tensor], prefix: str, packer: LinearPacker) -> Layer:
    def pack(name: str) -> Linear:
        return packer.pack(parameters.pop(prefix + name), parameters.pop(f"{prefix}{name}.bias", None))

    norm1_E, norm2_E = parameters.pop(f"{prefix}norm1"), parameters.pop(f"{prefix}norm2")
    return Layer(norm1_E, pack("qkv"), pack("o"), norm2_E, pack("gate_up"), pack("down"))
