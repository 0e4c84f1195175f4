"""Rotary position embedding (Su et al., 2021, section 3.4) in Hugging Face's half-split layout, with float32 tables.

It does not know layers or caches. Shape letters: T tokens, N heads, D head size, P positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import Rope


class RotaryTables:
    """Cosines and sines of every position up to a limit."""

    def __init__(self, rope: Rope, head_dim: int, num_positions: int) -> None:
        angles_PD = torch.outer(torch.arange(num_positions).float(), inverse_frequencies(rope, head_dim)).repeat(1, 2)
        sign_D = torch.ones(head_dim)
        sign_D[: head_dim // 2] = -1
        self.cos_PD = angles_PD.cos()
        # The minus of rotate_half(x) = (-right, left) is kept in the table: exact, and one operator less for each call.
        self.signed_sin_PD = angles_PD.sin() * sign_D

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [T, 1, D] for `rotate`."""
        return self.cos_PD[positions_T].unsqueeze(1), self.signed_sin_PD[positions_T].unsqueeze(1)


def rotate(x_TND: Tensor, cos_T1D: Tensor, signed_sin_T1D: Tensor) -> Tensor:
    """Turns each pair (i, i + D/2) of every head by its token's angle, in float32: [T, N, D] like the input."""
    x = x_TND.float()
    left, right = x.chunk(2, dim=-1)
    return (x * cos_T1D).add_(torch.cat((right, left), dim=-1).mul_(signed_sin_T1D)).to(x_TND.dtype)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of each pair, float32 [D / 2], scaled as the checkpoint says."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _scale_llama3(frequencies, rope)
    return frequencies


def _scale_llama3(frequencies: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    is_long = wavelengths > rope.original_context_length / rope.low_freq_factor
    is_short = wavelengths < rope.original_context_length / rope.high_freq_factor
    stretched = frequencies / rope.factor
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = (rope.original_context_length / wavelengths - rope.low_freq_factor) / span
    between = (1 - keep) * stretched + keep * frequencies
    return torch.where(is_long, stretched, torch.where(is_short, frequencies, between))
