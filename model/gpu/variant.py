"""One way in which a kernel is compiled: what `make kernels-check` compiles for a card that this machine has not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with everything that its code depends on. Each module of kernels lists its own in `variants()`."""

    name: str
    kernel: Any
    """The function under triton.jit."""
    signature: Mapping[str, str]
    """Triton's type of each argument that is no constant, as "*bf16" or "i32"."""
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    uses_wgmma: bool = False
    """Whether its products must be those of whole warp groups."""
    has_fp_fusion: bool = True
    """Whether a product and a sum may become one operation, of one rounding."""
    aligned: tuple[str, ...] = field(default=())
    """Arguments that are multiples of 16, pointers in bytes."""
