"""8-bit weights and activations: what the codes are. The specification, in torch; the kernels have it in C.

A weight has one scale for each output, an activation one for each row, found anew at every call; both are symmetric, so
that zero stays zero. The products of codes are added up as integers, exactly (Dettmers et al., LLM.int8(), 2022,
section 2; Xiao et al., SmoothQuant, 2023, section 2). Shape letters: M rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_CODE = 127


class Coded(NamedTuple):
    """Rows of codes: row = scale * codes."""

    codes: Tensor
    """int8, -127 to 127."""
    scales: Tensor
    """float32, one for each row."""

    def values(self) -> Tensor:
        """What the codes stand for, in float32."""
        return self.codes.float() * self.scales[:, None]


def encode(rows_MI: Tensor) -> Coded:
    """Codes of each row, the largest magnitude at 127.

    A row with a NaN or an infinity gets an infinite scale; one whose scale has no finite reciprocal, codes of zero.
    """
    rows = rows_MI.float()
    magnitudes = rows.abs()
    largest_M = torch.where(rows.isnan(), torch.inf, magnitudes).amax(-1)
    scales_M = largest_M / LARGEST_CODE
    inverses_M = (1 / scales_M).nan_to_num(0.0, posinf=0.0)
    codes = (rows * inverses_M[:, None]).clamp(-LARGEST_CODE, LARGEST_CODE).nan_to_num(0.0).round()
    return Coded(codes.to(torch.int8), scales_M)


def multiply(x: Coded, weight: Coded, bias_O: Tensor | None) -> Tensor:
    """x W^T + b in float32 [M, O], the integers exactly."""
    # float64 holds every integer up to 2^53, and its products are quick everywhere.
    sums_MO = (x.codes.double() @ weight.codes.double().T).float()
    y_MO = sums_MO * (x.scales[:, None] * weight.scales)
    return y_MO if bias_O is None else y_MO + bias_O.float()
