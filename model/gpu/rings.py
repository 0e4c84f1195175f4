"""The two buffers of a reader on the host, out of which copies to a device go on while the next one is filled.

A ring has one user, a thread. It does not know what is in the buffers or where that goes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model import digest
from model.checkpoint import ELEMENT_BYTES

NUM_BUFFERS = 2
"""One that is filled, and hashed, at about 1 GB/s, and one that is copied, by what a bus promises, at tens of them."""


class Ring:
    """Buffers in plain memory, whose copies are done when they are asked for: those of a load onto a CPU."""

    def __init__(self, device: torch.device, *, has_scratch: bool) -> None:
        num_bytes = digest.PIECE_BYTES + max(ELEMENT_BYTES.values())
        self._buffers = [self._allocate(num_bytes) for _ in range(NUM_BUFFERS)]
        self._turn = 0
        self.scratch = torch.empty(num_bytes if has_scratch else 0, dtype=torch.uint8, device=device)
        """Bytes on the device, for what `enqueue` does."""

    def take(self) -> Tensor:
        """The next buffer, uint8 [bytes of a piece and an element], once nothing is copied out of it any more."""
        self._turn = (self._turn + 1) % NUM_BUFFERS
        self._wait(self._turn)
        return self._buffers[self._turn]

    def enqueue(self, work: Callable[[], None]) -> None:
        """Does something with the buffer that was taken last, after all that was enqueued before."""
        self._do(self._turn, work)

    def finish(self) -> None:
        """Waits until all is done."""
        for turn in range(NUM_BUFFERS):
            self._wait(turn)

    def _allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def _do(self, turn: int, work: Callable[[], None]) -> None:
        work()

    def _wait(self, turn: int) -> None:
        pass


class CardRing(Ring):
    """Buffers in pinned memory, whose copies a stream of its own does."""

    def __init__(self, device: torch.device, *, has_scratch: bool) -> None:
        super().__init__(device, has_scratch=has_scratch)
        self._stream = torch.cuda.Stream(device)
        self._events = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]
        # What was computed in memory that the parameters have now comes before them.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def _allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def _do(self, turn: int, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()
        self._events[turn].record(self._stream)

    def _wait(self, turn: int) -> None:
        self._events[turn].synchronize()


def ring_for(device: torch.device, *, has_scratch: bool) -> Ring:
    """A ring for loads onto a device; call it in the thread whose stream the parameters were made in."""
    return (CardRing if device.type == "cuda" else Ring)(device, has_scratch=has_scratch)
