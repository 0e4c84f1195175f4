"""A runner as on a card, over a device that does nothing: what is left is the host's part of `launch` and `result`.

Its tables lie on torch's "meta" device, which has shapes and no memory. It does not know what is measured, nor models:
of one it has the heads of Llama 3.1 8B, whose splits and tiles a step's plan is made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from loadtest.host_loop import TOKEN, StepClock
from model.gpu.attention import Heads, PagedAttention
from model.gpu.device import Work
from model.gpu.device_runner import DeviceRunner
from model.gpu.forward import Forward
from model.gpu.graphs import Buckets
from model.gpu.inputs import InputBuffer
from model.gpu.slots import SlotMemory
from model.gpu.step import DeviceStep, Results
from model.gpu.tiles import PROGRAMS_PER_MULTIPROCESSOR
from model.interface import RunnerShape

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128


class IdleDevice:
    """See model.gpu.device.Device. A step is done when a clock says so, and always has drawn the same token."""

    torch_device = torch.device("meta")
    name = "idle device"
    capability = (9, 0)
    num_multiprocessors = 132
    shared_bytes = 227 * 2**10

    def __init__(self, clock: StepClock, max_wanted: int) -> None:
        self._clock, self._max_wanted = clock, max_wanted

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """See Device. Plain memory, which holds results as they will always be."""
        words = torch.zeros(shape, dtype=dtype)
        if len(words) == Results.words_of(self._max_wanted):
            results = Results(words, self._max_wanted)
            results.token_ids_W.fill_(TOKEN)
            results.is_finite_W.fill_(True)
        return words

    def enqueue(self, work: Work) -> None:
        """See Device. Nothing is done."""

    def copy_back(self, copies: Sequence[tuple[Tensor, Tensor]]) -> IdleEvent:
        """See Device. Nothing is copied; the step takes its time from now on."""
        return IdleEvent(self._clock, self._clock.begin_step())

    def capture(self, work: Work) -> Work:
        """See Device."""
        return work

    def free_bytes(self) -> int:
        """See Device."""
        return 0


@dataclass(frozen=True, slots=True)
class IdleEvent:
    """The end of a step. See model.gpu.device.Event."""

    clock: StepClock
    ends_at: float

    def wait(self) -> None:
        """See Event."""
        self.clock.wait(self.ends_at)

    def hold(self) -> None:
        """See Event."""


def idle_runner(shape: RunnerShape, clock: StepClock) -> DeviceRunner:
    """Builds a runner as model/gpu/runner.py does, but for the weights, the cache and whatever computes."""
    buckets = Buckets().up_to(shape.num_slots, shape.max_batch_tokens)
    max_tokens, max_wanted = buckets.room_for(shape.num_slots, shape.max_batch_tokens)
    device = IdleDevice(clock, max_wanted)
    heads = Heads(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, shape.block_size, scale=HEAD_DIM**-0.5)
    attention = PagedAttention(
        heads,
        max_rows=shape.max_generated_tokens or shape.num_slots,
        max_tokens=shape.max_batch_tokens,
        max_context=shape.context_length,
        num_programs=PROGRAMS_PER_MULTIPROCESSOR * device.num_multiprocessors,
        device=device.torch_device,
    )
    max_blocks = -(-shape.context_length // shape.block_size)
    slots = SlotMemory(shape.num_slots, max_blocks, shape.vocab_size, device.torch_device)
    inputs = InputBuffer(max_tokens, max_wanted, attention.num_plan_words, slots.max_patch_words, device.torch_device)
    # Of the forward pass, a step that computes nothing has the logits only.
    logits = SimpleNamespace(logits_WV=torch.zeros(max_wanted, shape.vocab_size, device=device.torch_device))
    step = DeviceStep(cast(Forward, logits), slots, inputs)
    return DeviceRunner(device, step, attention, shape, buckets)
