"""A device on the CPU that does nothing before it must: at the latest moment, or the most awkward one, a card may take.

What is enqueued waits until an event is waited for. Then it runs in order: as far as that event at least, and with
`runs_ahead` all of it, before the copies back, which have a stream of their own and are done when they are asked for.
So host memory that is written too early, a result that is read too early and one that is overwritten before it was
copied all give wrong numbers. A captured piece of work is a record of kernel launches and torch's operators with their
arguments: no line of Python runs when it is replayed, as with a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from model.gpu.device import Work
from model.gpu.products import Candidate, library_product

FREE_BYTES = 2**31
LIBRARY = (Candidate("library", library_product),)
"""For runners whose products are not what is tested: a choice takes its time."""
POISON = 0x5A
"""What fresh pinned memory holds, byte by byte."""


class LateDevice:
    """See model.gpu.device.Device."""

    name = "late device"
    capability = (9, 0)
    num_multiprocessors = 1
    shared_bytes = 227 * 2**10
    torch_device = torch.device("cpu")

    def __init__(self, runs_ahead: bool = False, free_bytes: int = FREE_BYTES) -> None:
        self._runs_ahead = runs_ahead
        self._free_bytes = free_bytes
        self._queue: list[Work] = []
        self.num_done = 0
        self.num_captured = 0
        self.num_replayed = 0

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        words = torch.empty(shape, dtype=dtype)
        words.view(torch.uint8).fill_(POISON)
        return words

    def enqueue(self, work: Work) -> None:
        self._queue.append(work)

    def copy_back(self, copies: Sequence[tuple[Tensor, Tensor]]) -> LateEvent:
        return LateEvent(self, len(self._queue), copies)

    def capture(self, work: Work) -> Work:
        self.run_to(len(self._queue))
        record = Record()
        with record, patch.object(InterpretedFunction, "run", record.launch):
            work()
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed += 1
            record.replay()

        return replay

    def free_bytes(self) -> int:
        self.run_to(len(self._queue))
        return self._free_bytes

    @property
    def num_enqueued(self) -> int:
        return len(self._queue)

    def run_to(self, place: int) -> None:
        """Runs what was enqueued before a place in the queue; `runs_ahead` all that is there."""
        while self.num_done < (len(self._queue) if self._runs_ahead else place):
            self.num_done += 1
            self._queue[self.num_done - 1]()


@dataclass
class LateEvent:
    """Copies back that come after a place in the queue."""

    device: LateDevice
    place: int
    copies: Sequence[tuple[Tensor, Tensor]]
    is_done: bool = False

    def wait(self) -> None:
        self.device.run_to(self.place)
        self._copy()

    def hold(self) -> None:
        self.device.enqueue(self._copy)

    def _copy(self) -> None:
        if not self.is_done:
            self.is_done = True
            for source, target in self.copies:
                target.copy_(source)


@dataclass
class Record(TorchDispatchMode):
    """Launches and operators in their order, as closures over their arguments."""

    calls: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._run = InterpretedFunction.run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        found = func(*args, **given)

        def again() -> None:
            outputs = func(*args, **given)
            if isinstance(found, Tensor) and outputs.data_ptr() != found.data_ptr():
                found.copy_(outputs)

        self.calls.append(again)
        return found

    @property
    def launch(self) -> Callable[..., None]:
        """Stands in for a kernel's `run`."""

        def run(kernel: InterpretedFunction[Any], *args: Any, **kwargs: Any) -> None:
            self.calls.append(lambda: self._run(kernel, *args, **kwargs))
            with _disable_current_modes():
                self._run(kernel, *args, **kwargs)

        return run

    def replay(self) -> None:
        for call in self.calls:
            call()
