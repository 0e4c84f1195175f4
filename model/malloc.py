"""What the C library keeps of memory that was released: as little as it can while a model is loaded.

Loading takes and releases pieces of every size. By its own rule the library soon takes them from its heap, where small
ones that stay keep large ones from going back to the system: hundreds of megabytes at the peak, a few for good.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of GNU's malloc.h. What is larger than the second is memory of its own; the first is what a heap may leave unused."""
SMALLEST = 128 << 10
LARGEST = 32 << 20
"""The sizes that the library itself begins with, and ends with where pieces of them come again and again."""


@contextmanager
def large_pieces_given_back() -> Iterator[None]:
    """Within, a large piece goes back to the system when it is released; after it such pieces are kept for the next."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):  # not every C library is GNU's
        yield
        return
    library.mallopt(M_MMAP_THRESHOLD, SMALLEST)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_THRESHOLD, LARGEST)
        library.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)
        library.malloc_trim(0)
