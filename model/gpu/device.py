"""The seam to a card: what a runner asks of one, and CUDA's answer.

Work is handed over in order and runs when the device comes to it; the host waits for events only. So everything that a
runner does to the device goes through here, and a device of the tests (tests/gpu/late_device.py) can put it off to the
last moment at which a card might do it. It knows neither steps nor models.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], None]
"""Launches kernels and copies on the device; it waits for none of them."""


class Event(Protocol):
    """A point in what was enqueued."""

    def wait(self) -> None:
        """The host waits until the device has come to it."""

    def hold(self) -> None:
        """What is enqueued from now on waits until the device has come to it; the host does not."""


class Device(Protocol):
    """A card, or what stands in for one."""

    torch_device: torch.device
    name: str
    capability: tuple[int, int]
    """Compute capability, before and after the point."""
    num_multiprocessors: int
    shared_bytes: int
    """Shared memory that a block of threads can have."""

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Host memory that the device can copy from and to by itself. Its content is undefined."""

    def enqueue(self, work: Work) -> None:
        """Has the device do this after what was enqueued before. The host memory that it reads must stay as it is."""

    def copy_back(self, copies: Sequence[tuple[Tensor, Tensor]]) -> Event:
        """Copies from the device (first of each pair) to pinned memory (second), beside what is enqueued later.

        They come after what was enqueued before. Whoever enqueues work that overwrites a source lets the event hold it.
        """

    def capture(self, work: Work) -> Work:
        """Runs the work once, records it, and returns what enqueues it again: the same launches on the same memory.

        Waits for everything enqueued so far. What is returned is for `enqueue`.
        """

    def free_bytes(self) -> int:
        """Memory that nothing holds, once everything enqueued so far is done."""


class CudaEvent:
    """See Event."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        """See Event."""
        self._event.synchronize()

    def hold(self) -> None:
        """See Event."""
        torch.cuda.current_stream().wait_event(self._event)


class CudaDevice:
    """One NVIDIA card. See Device.

    Work goes to the current stream, copies back to a stream of their own; graphs are captured on a third, and share one
    pool of memory: a graph's temporaries are dead when the next one runs.
    """

    def __init__(self) -> None:
        """The current one, which there must be (model.backend.find_card_fault)."""
        index = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        self.torch_device = torch.device("cuda", index)
        self.name: str = properties.name
        self.capability: tuple[int, int] = (properties.major, properties.minor)
        self.num_multiprocessors: int = properties.multi_processor_count
        self.shared_bytes: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # by torch's stubs
        self._copies = torch.cuda.Stream()
        self._captures = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """See Device. Memory of a tensor that is gone is used again when the copies from and to it are done."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def enqueue(self, work: Work) -> None:
        """See Device."""
        work()

    def copy_back(self, copies: Sequence[tuple[Tensor, Tensor]]) -> CudaEvent:
        """See Device."""
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            for source, target in copies:
                target.copy_(source, non_blocking=True)
                source.record_stream(self._copies)  # whoever lets go of it does not know when the copy is done
            event = torch.cuda.Event()
            event.record()
        return CudaEvent(event)

    def capture(self, work: Work) -> Work:
        """See Device."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # The first run compiles kernels and makes the library choose its own: nothing that can be captured. It is on
        # the stream of the capture, where a library then finds its workspace.
        with torch.cuda.stream(self._captures):
            work()
            torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._captures):
            work()
        return graph.replay

    def free_bytes(self) -> int:
        """See Device."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
