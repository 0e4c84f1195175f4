"""Work for the kernels' threads that needs no torch, so that a process for it starts at once, and may fork."""

from __future__ import annotations

import ctypes
from array import array

from model.native.library import Kernels

NUM_ROWS, WIDTH = 5000, 512
"""Enough for the kernels to wake threads."""


class Norms:
    """A norm of many rows, and what one thread makes of it."""

    def __init__(self, kernels: Kernels, seed: int = 0, num_rows: int = NUM_ROWS) -> None:
        self._norm = kernels.library.quire_rms_norm
        self._norm.argtypes = (*(ctypes.c_void_p,) * 3, *(ctypes.c_int,) * 2, ctypes.c_float, *(ctypes.c_int,) * 2)
        self._norm.restype = None
        self._num_rows = num_rows
        row = array("f", [((17 * i + seed) % 101) / 50 - 1 for i in range(WIDTH + 7)])
        self._x = b"".join(row[i % 7 : i % 7 + WIDTH].tobytes() for i in range(num_rows))
        self._weight = array("f", [1.0] * WIDTH).tobytes()
        self.expected = self.run(1)

    def run(self, num_threads: int) -> bytes:
        """The bytes of the result."""
        y = ctypes.create_string_buffer(len(self._x))
        self._norm(self._x, self._weight, y, self._num_rows, WIDTH, 1e-5, 0, num_threads)
        return y.raw

    def check(self, *thread_counts: int) -> None:
        """That threads change nothing."""
        for num_threads in thread_counts:
            assert self.run(num_threads) == self.expected, num_threads
