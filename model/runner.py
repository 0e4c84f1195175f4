"""TorchRunner: builds a model from a directory, proves it ready, and computes steps on the CPU.

It owns the parameters, the cache and the tables by slot. It does not know why rows were chosen or who asked. On a card
it is model/gpu/runner.py that builds a runner; `load_runner` leads there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch

from model.backend import Forward, assemble, choose_kernels, find_card_fault
from model.config import FAMILIES, ModelConfig, load_config
from model.facts import facts_of, plan_shape
from model.families.base import TensorMap
from model.inputs import SlotTables
from model.interface import (
    CPU_BLOCK_SIZE,
    CPU_KV_CACHE_BYTES,
    Admission,
    Backend,
    Batch,
    GpuAttention,
    ModelFacts,
    Pending,
    Row,
    Runner,
    RunnerOptions,
    RunnerShape,
    Sampled,
    Sampling,
)
from model.kv_cache import affordable_blocks
from model.malloc import large_pieces_given_back
from model.sampling import Sampler
from model.threads import plan_threads
from model.weights import Progress, load_weights

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Done:
    """A step that ended before `launch` returned, as every step on a CPU does."""

    sampled: Sampled

    def result(self) -> Sampled:
        """See Pending."""
        return self.sampled


class TorchRunner:
    """Computes steps of one model with one set of slots. See model.interface.Runner."""

    def __init__(self, forward: Forward, shape: RunnerShape) -> None:
        self._forward = forward
        self._shape = shape
        self._tables = SlotTables(shape.num_slots, shape.context_length, shape.num_blocks, shape.block_size)
        self._sampler = Sampler(shape.num_slots, shape.vocab_size, torch.from_numpy(self._tables.tokens))

    @property
    def shape(self) -> RunnerShape:
        """The sizes an engine plans with."""
        return self._shape

    def launch(self, batch: Batch) -> Pending:
        """Computes a step. Tokens that it draws are known to their slots at once; rows need not bring them back."""
        self._tables.take_in(batch)
        for row in batch.rows:
            if row.admission is not None:
                self._sampler.admit(row.slot, row.admission)
        logits = self._forward(self._tables, batch)
        wanting = [row for row in batch.rows if row.wants_token]
        if not wanting:
            return Done(Sampled())
        slots, positions = [row.slot for row in wanting], [row.start + row.num_tokens for row in wanting]
        sampled = self._sampler.sample(logits, slots, positions)
        self._tables.append(slots, positions, sampled.token_ids)
        return Done(sampled)


def load_runner(options: RunnerOptions, progress: Progress | None = None) -> tuple[Runner, ModelFacts]:
    """Loads, tests and warms up. Raises ValueError, in one line, for a directory or options that cannot be used."""
    fault = find_card_fault() if options.backend is Backend.AUTO else None
    if fault is not None and torch.cuda.is_available():
        _logger.warning("the CPU computes, though there is a card: %s", fault)
    if options.backend is Backend.GPU or (options.backend is Backend.AUTO and fault is None):
        # By name: the kernels' compiler is imported where they are used.
        runner, facts = import_module("model.gpu.runner").load_device_runner(options, progress)
        return runner, facts
    return load_torch_runner(options, progress)


def load_torch_runner(options: RunnerOptions, progress: Progress | None = None) -> tuple[TorchRunner, ModelFacts]:
    """As `load_runner`, on the CPU."""
    threads = plan_threads(options.num_threads, options.pins_threads)
    torch.set_num_threads(threads.num_threads)
    config = load_config(Path(options.model_dir))
    shape = _plan_shape(config, options)
    tensor_map: TensorMap = import_module(FAMILIES[config.architecture]).tensor_map(config)
    dtype = getattr(torch, options.dtype.value)
    if options.gpu_attention is not GpuAttention.TRITON:
        raise ValueError(f"gpu_attention: {options.gpu_attention} is for the gpu backend")
    kernels = choose_kernels(options.backend, options.cpu_level, config, dtype, options.quantization, shape.block_size)
    if kernels is None and options.pins_threads:
        raise ValueError("pin_threads: only the native backend's threads can be tied to CPUs")
    # The first is the engine's own, which moves.
    tied_to = threads.cpus[1:] if kernels is not None else ()
    if kernels is not None and tied_to:
        kernels.keep_to_cpus(threads.cpus)
        _logger.info("threads beside the engine's own are tied to the CPUs %s", ", ".join(map(str, tied_to)))
    with large_pieces_given_back(), torch.inference_mode():
        weights = load_weights(Path(options.model_dir), tensor_map, dtype, progress)
        num_parameters = sum(parameter.numel() for parameter in weights.parameters.values())
        model = assemble(config, weights.parameters, shape, dtype, options.quantization, kernels)
    if model.packer.num_tiled:
        _logger.warning("%s linears: %d shapes run in fixed tiles, slower", model.packer.name, model.packer.num_tiled)
    if weights.unused:
        _logger.info("tensors not used: %s", ", ".join(weights.unused))
    runner = TorchRunner(model.forward, shape)
    warm_up(runner)
    return runner, facts_of(
        config,
        options,
        digest=weights.digest,
        num_parameters=num_parameters,
        weight_bytes=model.transformer.num_bytes,
        backend=Backend.TORCH if kernels is None else Backend.NATIVE,
        num_threads=torch.get_num_threads(),
        has_tied_threads=bool(tied_to),
        cpu_level="" if kernels is None else kernels.level,
    )


def warm_up(runner: TorchRunner) -> None:
    """Computes the largest prompt step that the pool allows and one decode step, in slot 0, which is still free."""
    shape = runner.shape
    room = min(shape.num_blocks * shape.block_size, shape.context_length)
    num_tokens = max(1, min(shape.max_batch_tokens, room - 1))
    admission = Admission([0] * num_tokens, num_tokens, Sampling())
    blocks = range(-(-min(num_tokens + 1, room) // shape.block_size))
    steps = [
        Row(0, 0, num_tokens, blocks, wants_token=True, admission=admission),
        Row(0, num_tokens, 1, wants_token=True),
    ]
    for row in steps:
        if row.start + row.num_tokens <= room:
            runner.launch(Batch([row], row.num_tokens)).result()


def _plan_shape(config: ModelConfig, options: RunnerOptions) -> RunnerShape:
    block_size = options.block_size or CPU_BLOCK_SIZE
    # The context is checked before the pool is made for it.
    shape = plan_shape(config, options, num_blocks=options.num_blocks or 0, block_size=block_size)
    if options.num_blocks is not None:
        return shape
    budget = CPU_KV_CACHE_BYTES if options.kv_cache_bytes is None else options.kv_cache_bytes
    return replace(shape, num_blocks=affordable_blocks(config, budget, block_size, options.dtype))
