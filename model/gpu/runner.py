"""Builds a runner on a card: loads, warms up, measures what memory is left for keys and values, captures steps.

It owns the order in which memory is given away: weights, buffers, whatever warming up makes the libraries take, then
everything that is left but for a reserve to the key/value pool. What computes is model/gpu/device_runner.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from model.backend import find_card_fault
from model.config import FAMILIES, ModelConfig, load_config
from model.facts import facts_of, plan_shape
from model.families.base import TensorMap
from model.gpu.attention import DECODE, Heads, PagedAttention
from model.gpu.attention_base import Attention
from model.gpu.device import CudaDevice, Device
from model.gpu.device_runner import DeviceRunner
from model.gpu.flash_attention import FlashAttention, find_fault
from model.gpu.forward import DeviceCache, Forward, Parameters
from model.gpu.graphs import Buckets
from model.gpu.inputs import InputBuffer
from model.gpu.loading import load_onto
from model.gpu.products import Candidate, candidates, choose_product
from model.gpu.slots import SlotMemory
from model.gpu.step import DeviceStep
from model.gpu.tiles import BLOCK_SIZE, PROGRAMS_PER_MULTIPROCESSOR, choose_tiles
from model.interface import (
    Admission,
    Backend,
    Batch,
    GpuAttention,
    ModelFacts,
    Quantization,
    Row,
    RunnerOptions,
    RunnerShape,
    Sampling,
)
from model.kv_cache import affordable_blocks
from model.malloc import large_pieces_given_back
from model.threads import plan_threads
from model.weights import Progress

RESERVE_BYTES = 2**30
"""Memory that stays free when the pool is made: for captured steps (what they take is logged) and for temporaries that
come and go (log-probabilities, prompts that penalties count, rows that a product is padded with, what FlashAttention-3
returns)."""
RECOMPUTED_BYTES = 2**28
"""For partial results of tokens that were generated before: what is computed again after a preemption or a restart goes
through decode's tiles, beside the rows that decode."""
MIB = 2**20
DEMANDING = Sampling(repetition_penalty=1.1, num_logprobs=20)

_logger = logging.getLogger(__name__)


def load_device_runner(
    options: RunnerOptions,
    progress: Progress | None = None,
    device: Device | None = None,
    buckets: Buckets | None = None,
    products: Sequence[Candidate] | None = None,
) -> tuple[DeviceRunner, ModelFacts]:
    """Loads, warms up, and captures steps; on the current card unless another device is given.

    `products` are those to choose among, the best first; by default all that there are.
    Raises ValueError, in one line, for a directory or options that cannot be used, or where memory does not suffice.
    """
    _check(options)
    if device is None:
        fault = find_card_fault()
        if fault is not None:
            raise ValueError(f"backend: {fault}")
        device = CudaDevice()
    torch.set_num_threads(plan_threads(options.num_threads, pins=False).num_threads)
    config = load_config(Path(options.model_dir))
    shape = plan_shape(config, options, num_blocks=0, block_size=options.block_size or BLOCK_SIZE)
    most = _max_generated_tokens(config, shape) if options.gpu_attention is GpuAttention.TRITON else None
    shape = replace(shape, runs_ahead=True, max_generated_tokens=most)
    tensor_map: TensorMap = import_module(FAMILIES[config.architecture]).tensor_map(config)
    dtype = getattr(torch, options.dtype.value)
    if options.gpu_attention is GpuAttention.FLASH_ATTENTION_3:
        fault = find_fault(config.head_dim, dtype, device.capability)
        if fault is not None:
            raise ValueError(f"gpu_attention: {fault}")
    with large_pieces_given_back():
        try:
            weights = load_onto(Path(options.model_dir), tensor_map, dtype, device.torch_device, progress)
            num_parameters = sum(parameter.numel() for parameter in weights.parameters.values())
            num_bytes = sum(parameter.nbytes for parameter in weights.parameters.values())
            parameters = Parameters(config, weights.parameters)
            runner = _build(config, options, shape, parameters, device, buckets or Buckets(), products)
        except torch.OutOfMemoryError:
            raise ValueError(f"no memory on {device.name} for this model, its buffers and its steps") from None
    if weights.unused:
        _logger.info("tensors not used: %s", ", ".join(weights.unused))
    return runner, facts_of(
        config,
        options,
        digest=weights.digest,
        num_parameters=num_parameters,
        weight_bytes=num_bytes,
        backend=Backend.GPU,
        num_threads=torch.get_num_threads(),
        card=device.name,
        attention="" if options.gpu_attention is GpuAttention.TRITON else options.gpu_attention.value,
    )


def warm_up(runner: DeviceRunner) -> None:
    """Computes the largest step of prompts and the largest one of generated tokens, in all slots, which are still free.

    All rows ask for whatever takes memory, and share the first blocks: nobody reads what is in them.
    """
    shape = runner.shape
    num_rows = min(shape.num_slots, shape.max_batch_tokens)
    num_left, rows = shape.max_batch_tokens, list[Row]()
    while num_left and len(rows) < num_rows:
        num_tokens = min(num_left, shape.context_length)
        rows.append(_first_row(len(rows), num_tokens, num_tokens, shape.block_size))
        num_left -= num_tokens
    singles = [_first_row(slot, 1, 0, shape.block_size) for slot in range(num_rows)]
    for step in (rows, singles):
        runner.launch(Batch(step, sum(row.num_tokens for row in step))).result()


def _first_row(slot: int, num_tokens: int, num_prompt: int, block_size: int) -> Row:
    admission = Admission([0] * num_tokens, num_prompt, DEMANDING)
    return Row(slot, 0, num_tokens, range(-(-num_tokens // block_size)), wants_token=True, admission=admission)


def _check(options: RunnerOptions) -> None:
    """Refuses what is for CPUs only."""
    if options.quantization is not Quantization.NONE:
        raise ValueError(f"quantize: the gpu backend does not compute {options.quantization}, the native one does")
    if options.cpu_level is not None:
        raise ValueError("cpu_level: the gpu backend has no levels")
    if options.pins_threads:
        raise ValueError("pin_threads: only the native backend's threads can be tied to CPUs")


def _max_generated_tokens(config: ModelConfig, shape: RunnerShape) -> int:
    """For our own attention, which has tiles for them: all slots' rows, and what memory is set aside for."""
    num_splits = -(-shape.context_length // DECODE.split)
    token_bytes = num_splits * config.num_heads * (config.head_dim + 2) * torch.float32.itemsize
    return shape.num_slots + min(shape.max_batch_tokens, max(1, RECOMPUTED_BYTES // token_bytes))


def _build(
    config: ModelConfig,
    options: RunnerOptions,
    shape: RunnerShape,
    parameters: Parameters,
    device: Device,
    buckets: Buckets,
    products: Sequence[Candidate] | None,
) -> DeviceRunner:
    """Gives memory away, in its order, and makes the runner."""
    begun_at = time.monotonic()
    dtype = getattr(torch, options.dtype.value)
    cache = DeviceCache(config, shape.block_size, dtype, device.torch_device)
    buckets = buckets.up_to(shape.num_slots, shape.max_batch_tokens)
    max_tokens, max_wanted = buckets.room_for(shape.num_slots, shape.max_batch_tokens)
    attention = _make_attention(config, options, shape, device)
    among = candidates(device.shared_bytes) if products is None else products
    product, report = choose_product(parameters.uses(max_wanted), max_tokens, device.torch_device, among)
    _logger.log(logging.INFO if report.holds else logging.WARNING, "matrix products: %s", report)
    forward = Forward(config, parameters, cache, attention, product, shape.context_length, max_tokens, max_wanted)
    max_blocks = -(-shape.context_length // shape.block_size)
    slots = SlotMemory(shape.num_slots, max_blocks, shape.vocab_size, device.torch_device)
    inputs = InputBuffer(max_tokens, max_wanted, attention.num_plan_words, slots.max_patch_words, device.torch_device)
    step = DeviceStep(forward, slots, inputs)

    trial = replace(shape, num_blocks=-(-min(shape.max_batch_tokens, shape.context_length) // shape.block_size))
    cache.allocate(trial.num_blocks)
    warm_up(DeviceRunner(device, step, attention, trial, buckets))
    cache.allocate(0)
    shape = replace(shape, num_blocks=_count_blocks(config, options, shape.block_size, device))
    cache.allocate(shape.num_blocks)
    runner = DeviceRunner(device, step, attention, shape, buckets)
    _logger.info("buffers, kernels and the key/value pool took %.1f s", time.monotonic() - begun_at)
    if options.captures_graphs:
        _capture(runner, device)
    return runner


def _make_attention(config: ModelConfig, options: RunnerOptions, shape: RunnerShape, device: Device) -> Attention:
    heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim, shape.block_size, scale=config.head_dim**-0.5)
    if options.gpu_attention is GpuAttention.FLASH_ATTENTION_3:
        try:
            attention = FlashAttention(heads, shape.num_slots, device.torch_device)
        except ValueError as reason:
            raise ValueError(f"gpu_attention: {reason}") from None
        _logger.warning("FlashAttention-3 computes attention: the last bits of answers may depend on the load")
        return attention
    try:
        group = config.num_heads // config.num_kv_heads
        decode, prefill = choose_tiles(config.head_dim, group, getattr(torch, options.dtype.value), device.shared_bytes)
        return PagedAttention(
            heads,
            max_rows=shape.max_generated_tokens or shape.num_slots,
            max_tokens=shape.max_batch_tokens,
            max_context=shape.context_length,
            num_programs=PROGRAMS_PER_MULTIPROCESSOR * device.num_multiprocessors,
            device=device.torch_device,
            decode=decode,
            prefill=prefill,
        )
    except ValueError as reason:
        raise ValueError(f"the gpu backend does not take this model or block_size: {reason}") from None


def _count_blocks(config: ModelConfig, options: RunnerOptions, block_size: int, device: Device) -> int:
    """How many blocks the pool gets. Raises ValueError where there is no memory for what was asked for."""
    free_bytes = max(device.free_bytes() - RESERVE_BYTES, 0)
    if options.num_blocks is not None:
        if options.num_blocks * block_size * config.kv_bytes_per_token(options.dtype) > free_bytes:
            raise ValueError(f"no memory for a key/value cache of {options.num_blocks} blocks")
        return options.num_blocks
    budget = free_bytes if options.kv_cache_bytes is None else options.kv_cache_bytes
    if budget > free_bytes:
        raise ValueError(f"kv_cache_mib: {device.name} has {free_bytes // MIB} MiB left, not {budget // MIB}")
    return affordable_blocks(config, budget, block_size, options.dtype)


def _capture(runner: DeviceRunner, device: Device) -> None:
    begun_at, free_bytes = time.monotonic(), device.free_bytes()
    num_captured = runner.capture()
    taken, seconds = free_bytes - device.free_bytes(), time.monotonic() - begun_at
    _logger.info("%d graphs captured in %.1f s; they take %d MiB", num_captured, seconds, round(taken / MIB))
