"""Puts a model together: which backend computes it on this machine, and the one function that computes a step.

The native backend is the compiled kernels, with the whole step in one call where they take the model; the torch backend
is slow and everywhere. Either computes what model/transformer.py says. It does not know sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model import operators, operators_native
from model.attention.native import NativeAttention
from model.attention.reference import ReferenceAttention
from model.cards import find_triton_fault
from model.config import ModelConfig
from model.decoder_native import NativeDecoder
from model.inputs import SlotTables
from model.interface import Backend, Batch, Quantization, RunnerShape
from model.kv_cache import KVCache
from model.linear import LinearPacker
from model.native.library import Kernels, open_kernels_for
from model.transformer import Logits, Transformer

Forward = Callable[[SlotTables, Batch], Logits]
"""Computes a batch whose rows the tables have taken in: logits of the wanted tokens, which the next may overwrite."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Assembled:
    """A model that is ready to compute."""

    transformer: Transformer
    cache: KVCache
    packer: LinearPacker
    forward: Forward


MIN_CAPABILITY = (8, 0)
"""Of a card whose instructions the kernels in model/gpu are made of."""


def find_card_fault() -> str | None:
    """Why no card computes here, in a few words; None where one does."""
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA card"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"the card has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    return find_triton_fault()


def choose_kernels(
    backend: Backend,
    level: str | None,
    config: ModelConfig,
    dtype: torch.dtype,
    quantization: Quantization,
    block_size: int,
) -> Kernels | None:
    """The kernels of the native backend, or None for torch's.

    Raises ValueError when the native backend, or a level of it, was asked for and cannot compute this model here.
    """
    if backend is Backend.TORCH:
        if level is not None:
            raise ValueError("cpu_level: the torch backend has no levels")
        return None
    try:
        return open_kernels_for(config, str(dtype).removeprefix("torch."), quantization, block_size, level)
    except ValueError as reason:
        if backend is Backend.NATIVE or level is not None:
            raise
        # Slow, and torch's products do not keep a row's bits apart from the load's.
        _logger.warning("torch computes, slowly and without the promise of equal bits: %s", reason)
        return None


def assemble(
    config: ModelConfig,
    parameters: dict[str, Tensor],
    shape: RunnerShape,
    dtype: torch.dtype,
    quantization: Quantization,
    kernels: Kernels | None,
) -> Assembled:
    """Packs the parameters, which are taken out of the dict, and makes the cache.

    Raises ValueError where there is no memory for them.
    """
    packer = LinearPacker("torch" if kernels is None else "native", dtype, quantization, kernels)
    attention = ReferenceAttention() if kernels is None else NativeAttention(kernels, dtype, config.head_dim)
    between = operators.TORCH if kernels is None else operators_native.load(kernels, dtype)
    transformer = Transformer(config, parameters, packer, attention, between, shape.context_length)
    cache = KVCache(config, shape.num_blocks, shape.block_size, dtype, attention.layout)
    if kernels is not None and _fits_one_call(config, dtype, quantization):
        decoder = NativeDecoder(kernels, transformer, cache, shape.max_batch_tokens, shape.num_slots)
        return Assembled(transformer, cache, packer, decoder.forward)
    return Assembled(transformer, cache, packer, step_by_step(transformer, cache))


def step_by_step(transformer: Transformer, cache: KVCache) -> Forward:
    """The readable way: operator by operator."""

    @torch.inference_mode()
    def forward(tables: SlotTables, batch: Batch) -> Logits:
        inputs = tables.build(batch.rows)
        logits_WV = transformer.forward(inputs.ids_T, inputs.positions_T, cache, inputs.plan, inputs.wanted_W)
        return Logits.of(logits_WV)

    return forward


def _fits_one_call(config: ModelConfig, dtype: torch.dtype, quantization: Quantization) -> bool:
    """Inside the call, rows of bfloat16 are read as pairs, without room to fill up an odd one."""
    has_pairs = dtype is torch.bfloat16 and quantization is Quantization.NONE
    return not (has_pairs and (config.hidden_size % 2 or config.intermediate_size % 2))
