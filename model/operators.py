"""What a layer computes between its matrix products and its attention: norm, gated activation, rotary positions.

The functions here are the specification, in torch; model/operators_native.py has compiled twins (that of `silu_mul`
is part of the native gated product). Every one treats each
token by itself, so that a token's bits do not depend on the others in the step. Shape letters:

    T tokens of the step   E hidden size   F intermediate size
    H query heads          K key/value heads   N = H + 2 K   D head size
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.attention.base import AttentionPlan
from model.kv_cache import KVCache
from model.rotary import rotate


class Operators(NamedTuple):
    """One way to compute them; see the functions of the same names."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotate_and_write: Callable[[Tensor, tuple[Tensor, Tensor], KVCache, int, AttentionPlan], Tensor]


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


def rotate_and_write(
    qkv_TND: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache, layer: int, plan: AttentionPlan
) -> Tensor:
    """Turns queries and keys by their positions and puts keys and values into the cache: contiguous queries [T, H, D].

    `rotation` is what RotaryTables.at() gives for the step's positions.
    """
    num_kv_heads = cache.num_kv_heads
    qk_TND = rotate(qkv_TND[:, :-num_kv_heads], *rotation)
    cache.write(layer, qk_TND[:, -num_kv_heads:], qkv_TND[:, -num_kv_heads:], plan)
    return qk_TND[:, :-num_kv_heads].contiguous()


TORCH = Operators(rms_norm, rotate_and_write)
