"""What a model on disk costs, and what would compute it here: parameters, bytes, sequences in a budget, the backend.

Standard library only: it reads configuration and safetensors headers, never a weight. It does not know how to print.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from model.cards import cards, find_install_fault
from model.checkpoint import check_against, open_checkpoint
from model.config import FAMILIES, ModelConfig, dtype_bytes, load_config
from model.families.base import MatrixKind, TensorMap
from model.interface import Dtype, Quantization
from model.native.levels import usable_levels
from model.native.library import open_kernels_for

_NOT_PRODUCTS = (MatrixKind.EMBEDDING, MatrixKind.NORM)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Counts and sizes of one checkpoint. Parameters are counted once where matrices are tied."""

    config: ModelConfig
    parameters: dict[MatrixKind, int]
    file_bytes: int
    """Bytes of the weight files on disk."""

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    def weight_bytes(self, dtype: Dtype, quantization: Quantization = Quantization.NONE) -> dict[MatrixKind, int]:
        """Bytes by kind when loaded, but for what fills up tiles, and for the scales of 8-bit codes.

        Of bfloat16 at most: some levels of the native backend keep about three quarters for products (native/shorts.h).
        Only products are quantized. A tied unembedding is packed for its product and so takes memory of its own.
        """
        whole, coded = dtype_bytes(dtype), 1 if quantization is Quantization.INT8 else dtype_bytes(dtype)
        unembedding = self.config.vocab_size * self.config.hidden_size
        counts = {**self.parameters, MatrixKind.UNEMBEDDING: unembedding}
        return {kind: count * (whole if kind in _NOT_PRODUCTS else coded) for kind, count in counts.items()}

    def sequences_that_fit(self, budget_bytes: int, num_tokens: int, block_size: int, dtype: Dtype) -> int:
        """How many sequences of `num_tokens` tokens a key/value budget holds, in whole blocks, sharing nothing."""
        num_blocks = budget_bytes // (block_size * self.config.kv_bytes_per_token(dtype))
        return num_blocks // -(-num_tokens // block_size)


def cpu_levels() -> list[str]:
    """The kernels that were built here for instruction sets that this CPU has, fastest first; they may be refused."""
    return [level.name for level in usable_levels()]


def backend_here(config: ModelConfig, dtype: Dtype, quantization: Quantization, block_size: int) -> str:
    """What a server here would compute with if left to itself, as far as can be told without torch, and why.

    An old card, or one that the driver shows and torch does not find, is told as if it computed.
    """
    names = cards()
    fault = find_install_fault() if names else None
    if names and fault is None:
        refused = "" if quantization is Quantization.NONE else f", which refuses {quantization}"
        return f"gpu, {names[0]}{refused}"
    instead = "" if fault is None else f" (not {names[0]}: {fault})"
    try:
        return f"native {open_kernels_for(config, dtype.value, quantization, block_size).level}{instead}"
    except ValueError as reason:
        return f"torch, slowly: {reason}{instead}"


def load_info(model_dir: Path) -> ModelInfo:
    """Reads and checks a Hugging Face directory. Raises ValueError, in one line, where it could not be loaded."""
    config = load_config(model_dir)
    tensor_map: TensorMap = import_module(FAMILIES[config.architecture]).tensor_map(config)
    checkpoint = open_checkpoint(model_dir)
    check_against(checkpoint, tensor_map)
    parameters = dict.fromkeys(MatrixKind, 0)
    for placement in tensor_map.placements.values():
        parameters[placement.kind] += math.prod(placement.shape)
    return ModelInfo(config, parameters, sum(file.stat().st_size for file in checkpoint.files))
