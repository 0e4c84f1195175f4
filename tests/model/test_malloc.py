"""Memory that was released while a model was loaded goes back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
SCRIPT = """
from model.malloc import large_pieces_given_back

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) >> 10

def load():
    bytearray(30 << 20)  # behind whose release the library would take what is smaller from its heap
    kept = []
    for _ in range(100):
        large = bytearray(b"x" * (1 << 20))
        kept.append(bytes(2000))  # from the same heap, and it stays
        released.append(large)
    return kept

released = []
with large_pieces_given_back():
    kept = load()
    before = resident()
    released.clear()
    print(before - resident())
"""


@pytest.mark.skipif(not STATUS.exists(), reason="resident memory is read from /proc")
def test_large_pieces_go_back_at_once_though_small_ones_between_them_stay() -> None:
    given_back = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
    assert int(given_back) >= 90  # of 100 MiB
