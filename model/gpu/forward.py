"""The whole step of a decoder on a card: from token ids to logits, over buffers that never move.

It owns the parameters, the key/value cache, and the buffers between operators; model/transformer.py is the
specification. It allocates nothing and waits for nothing, and what it launches depends on the numbers of tokens and of
wanted rows only, so that a step can be captured. It does not know what is drawn from the logits.

Shape letters:

    T tokens of the step   W wanted tokens   E hidden size   F intermediate size   V vocabulary
    H query heads          K key/value heads D head size     N = H + 2 K           S slots
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.gpu.attention_base import Attention
from model.gpu.inputs import TokenInputs
from model.gpu.operators import add_rms_norm, embed, gated_mul, gather_rows, rotate_and_write
from model.gpu.products import Product, Use
from model.rotary import RotaryTables


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [O, I], with a bias [O] or without."""

    weight_OI: Tensor
    bias_O: Tensor | None


@dataclass(frozen=True, slots=True)
class Layer:
    """The parameters of one layer."""

    norm1_E: Tensor
    qkv: Matrix
    o: Matrix
    norm2_E: Tensor
    gate_up: Matrix
    down: Matrix


class Parameters:
    """All parameters by their use, on the device."""

    def __init__(self, config: ModelConfig, parameters: dict[str, Tensor]) -> None:
        """Takes the parameters out of the dict (model/families names them)."""
        self.embedding_VE = parameters.pop("embedding")
        self.layers = [_take_layer(parameters, f"layers.{index}.") for index in range(config.num_layers)]
        self.norm_E = parameters.pop("norm")
        self.unembedding_VE = parameters.pop("unembedding", self.embedding_VE)
        assert not parameters, f"parameters without a use: {sorted(parameters)}"

    def uses(self, max_wanted: int) -> Iterator[Use]:
        """All products, for the choice of how they are computed; logits are of at most so many rows."""
        for layer in self.layers:
            for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
                yield Use(matrix.weight_OI, matrix.bias_O)
        yield Use(self.unembedding_VE, out_dtype=torch.float32, max_rows=max_wanted)


def _take_layer(parameters: dict[str, Tensor], prefix: str) -> Layer:
    def matrix(name: str) -> Matrix:
        return Matrix(parameters.pop(prefix + name), parameters.pop(f"{prefix}{name}.bias", None))

    return Layer(
        norm1_E=parameters.pop(f"{prefix}norm1"),
        qkv=matrix("qkv"),
        o=matrix("o"),
        norm2_E=parameters.pop(f"{prefix}norm2"),
        gate_up=matrix("gate_up"),
        down=matrix("down"),
    )


class DeviceCache:
    """Keys and values of all layers on a device: one piece of memory [layers, 2, num_blocks, K, block_size, D]."""

    def __init__(self, config: ModelConfig, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """A cache without blocks."""
        self._shape = config.num_kv_heads, block_size, config.head_dim
        self._num_layers = config.num_layers
        self._memory = torch.empty(self._num_layers, 2, 0, *self._shape, dtype=dtype, device=device)

    def allocate(self, num_blocks: int) -> None:
        """Has so many blocks, zero at first, instead of those that there were.

        A captured step goes on using those. Raises ValueError where there is no memory for them.
        """
        dtype, device = self._memory.dtype, self._memory.device
        del self._memory
        try:
            self._memory = torch.zeros(self._num_layers, 2, num_blocks, *self._shape, dtype=dtype, device=device)
        except RuntimeError:  # torch's own, or what it says of a size beyond all memory
            raise ValueError(f"no memory for a key/value cache of {num_blocks} blocks") from None

    def of_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, contiguous [num_blocks, K, block_size, D] each."""
        return self._memory[index, 0], self._memory[index, 1]


class Forward:
    """Computes steps of at most `max_tokens` tokens, of which at most `max_wanted` are wanted."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        cache: DeviceCache,
        attention: Attention,
        product: Product,
        num_positions: int,
        max_tokens: int,
        max_wanted: int,
    ) -> None:
        self._config, self._parameters, self._cache = config, parameters, cache
        self._attention, self._product = attention, product
        embedding_VE = parameters.embedding_VE
        rotary = RotaryTables(config.rope, config.head_dim, num_positions)
        self._cos_PD, self._signed_sin_PD = (
            table_PD.to(embedding_VE.device) for table_PD in (rotary.cos_PD, rotary.signed_sin_PD)
        )
        num_heads, num_kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim

        def buffer(num_rows: int, *shape: int, dtype: torch.dtype = embedding_VE.dtype) -> Tensor:
            return torch.zeros(num_rows, *shape, dtype=dtype, device=embedding_VE.device)

        self._stream_TE, self._normed_TE, self._change_TE = (buffer(max_tokens, config.hidden_size) for _ in range(3))
        self._qkv_TND = buffer(max_tokens, num_heads + 2 * num_kv_heads, head_dim)
        self._q_THD, self._mixed_THD = (buffer(max_tokens, num_heads, head_dim) for _ in range(2))
        self._gate_up_T2F = buffer(max_tokens, 2 * config.intermediate_size)
        self._activated_TF = buffer(max_tokens, config.intermediate_size)
        self._wanted_stream_WE = buffer(max_wanted, config.hidden_size)
        self._wanted_mixed_WM = buffer(max_wanted, num_heads * head_dim)
        self.logits_WV = buffer(max_wanted, config.vocab_size, dtype=torch.float32)
        """Of the wanted tokens of the step computed last."""

    def compute(
        self,
        tokens: TokenInputs,
        places_W: Tensor,
        last_tokens_S: Tensor,
        block_tables: Tensor,
        *,
        is_decode_only: bool,
    ) -> None:
        """Computes one step: keys and values go to the cache, logits of the wanted places to `logits_WV`.

        The plan calls its sequences by their rows in `block_tables`. With `is_decode_only`, none brings a part of its
        prompt.
        """
        parameters, epsilon = self._parameters, self._config.norm_epsilon
        num_tokens, num_wanted = len(tokens.ids_T), len(places_W)
        stream, normed = self._stream_TE[:num_tokens], self._normed_TE[:num_tokens]
        mixed = self._mixed_THD[:num_tokens].flatten(1)
        embed(tokens.ids_T, tokens.slots_T, last_tokens_S, parameters.embedding_VE, stream)
        add_rms_norm(stream, None, parameters.layers[0].norm1_E, epsilon, normed, None)
        following_norms = [*(layer.norm1_E for layer in parameters.layers[1:]), parameters.norm_E]
        for index, (layer, next_norm_E) in enumerate(zip(parameters.layers, following_norms, strict=True)):
            self._write_keys(index, layer, normed, tokens)
            is_last = index == len(parameters.layers) - 1
            if is_last and not num_wanted:
                return
            self._attend(index, tokens, block_tables, is_decode_only)
            if is_last:
                mixed, stream = self._gather(places_W, mixed, stream)
            normed = self._finish_layer(layer, mixed, stream, next_norm_E)
        self._product(normed, parameters.unembedding_VE, None, self.logits_WV[:num_wanted])

    def _write_keys(self, index: int, layer: Layer, normed_TE: Tensor, tokens: TokenInputs) -> None:
        """Queries, keys and values of a layer; keys and values into the cache."""
        num_tokens = len(normed_TE)
        qkv_TND = self._qkv_TND[:num_tokens]
        self._multiply(normed_TE, layer.qkv, qkv_TND.flatten(1))
        rotate_and_write(
            qkv_TND,
            tokens.positions_T,
            self._cos_PD,
            self._signed_sin_PD,
            *self._cache.of_layer(index),
            tokens.write_blocks_T,
            tokens.write_offsets_T,
            self._q_THD[:num_tokens],
        )

    def _attend(self, index: int, tokens: TokenInputs, block_tables: Tensor, is_decode_only: bool) -> None:
        """What the tokens see."""
        num_tokens = len(tokens.ids_T)
        self._attention.attend(
            self._q_THD[:num_tokens],
            *self._cache.of_layer(index),
            block_tables,
            self._mixed_THD[:num_tokens],
            is_decode_only=is_decode_only,
            plan=tokens.plan,
        )

    def _gather(self, places_W: Tensor, mixed_TM: Tensor, stream_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The wanted tokens' rows: behind the last keys and values nothing reads the others."""
        mixed_WM, stream_WE = self._wanted_mixed_WM[: len(places_W)], self._wanted_stream_WE[: len(places_W)]
        gather_rows(mixed_TM, places_W, mixed_WM)
        gather_rows(stream_TE, places_W, stream_WE)
        return mixed_WM, stream_WE

    def _finish_layer(self, layer: Layer, mixed: Tensor, stream: Tensor, next_norm_E: Tensor) -> Tensor:
        """Adds attention and MLP to the residual stream; returns it as the next layer's norm makes it."""
        num_rows, epsilon = len(stream), self._config.norm_epsilon
        change, normed = self._change_TE[:num_rows], self._normed_TE[:num_rows]
        gate_up, activated = self._gate_up_T2F[:num_rows], self._activated_TF[:num_rows]
        self._multiply(mixed, layer.o, change)
        add_rms_norm(change, stream, layer.norm2_E, epsilon, normed, stream)
        self._multiply(normed, layer.gate_up, gate_up)
        gated_mul(gate_up, activated, "silu")
        self._multiply(activated, layer.down, change)
        add_rms_norm(change, stream, next_norm_E, epsilon, normed, stream)
        return normed

    def _multiply(self, x_MI: Tensor, matrix: Matrix, out_MO: Tensor) -> None:
        self._product(x_MI, matrix.weight_OI, matrix.bias_O, out_MO)
