"""The Llama network as it is trained: parameters under the names that Hugging Face gives them, dense attention.

It knows nothing of caches, sampling or files: serving has its own network, and the two meet only in the weights.
Letters of shapes: B rows, T positions, D width, H query heads, K key/value heads, E width of a head, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_THETA = 10_000.0
NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class Shape:
    """The sizes that define one network."""

    vocabulary: int = 4_096
    width: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    mlp_width: int = 704

    @property
    def head_width(self) -> int:
        """Width of one head; the heads share the width evenly."""
        return self.width // self.num_heads

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> Shape:
        """Read the sizes from the contents of a Hugging Face `config.json`."""
        return cls(
            vocabulary=config["vocab_size"],
            width=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            mlp_width=config["intermediate_size"],
        )


def rotary_tables(num_positions: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, E) of rotary position embeddings (RoFormer, section 3.4), in Hugging Face's half split."""
    inverse = ROPE_THETA ** -(torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) of a head by its position's angle."""
    left, right = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_TE + torch.cat((-right, left), dim=-1) * sin_TE


def document_mask(ids_BT: Tensor, end_id: int) -> Tensor:
    """Which positions see which, (B, 1, T, T): earlier ones of the same document; `end_id` closes a document."""
    is_end = ids_BT == end_id
    document_BT = is_end.cumsum(1) - is_end.long()
    same = document_BT[:, None, :, None] == document_BT[:, None, None, :]
    return same.tril()


class Norm(nn.Module):
    """Root-mean-square normalisation, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, NORM_EPSILON)


class Attention(nn.Module):
    """Grouped-query attention over the documents of a row."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_width = shape.head_width
        kv_width = shape.num_kv_heads * shape.head_width
        self.group = shape.num_heads // shape.num_kv_heads
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.width, kv_width, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor, mask: Tensor | None) -> Tensor:
        num_rows, num_positions, width = x_BTD.shape
        q, k, v = (
            proj(x_BTD).view(num_rows, num_positions, -1, self.head_width).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = rotate(q, cos_TE, sin_TE).to(v.dtype)
        k = rotate(k, cos_TE, sin_TE).to(v.dtype).repeat_interleave(self.group, dim=1)
        v = v.repeat_interleave(self.group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        mixed: Tensor = self.o_proj(y.transpose(1, 2).reshape(num_rows, num_positions, width))
        return mixed


class GatedMlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
        self.down_proj = nn.Linear(shape.mlp_width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.width)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.width)
        self.mlp = GatedMlp(shape)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor, mask: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TE, sin_TE, mask)
        y: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return y


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_width = shape.head_width
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = Norm(shape.width)

    def forward(self, ids_BT: Tensor, mask: Tensor | None) -> Tensor:
        cos_TE, sin_TE = rotary_tables(ids_BT.shape[1], self.head_width)
        x_BTD = self.embed_tokens(ids_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos_TE, sin_TE, mask)
        y: Tensor = self.norm(x_BTD)
        return y


class Network(nn.Module):
    """A decoder whose embedding is also its output head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Decoder(shape)
        residual_std = 0.02 / math.sqrt(2 * shape.num_layers)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=residual_std if into_residual else 0.02)

    def forward(self, ids_BT: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V). Without a mask, attention is plainly causal."""
        return F.linear(self.model(ids_BT, mask), self.model.embed_tokens.weight)

    def loss(self, ids_BT: Tensor, targets_BT: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean cross entropy in nats per token."""
        logits = self(ids_BT, mask).float()
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())
