"""Counter-based random numbers: Philox4x32-10, and exponential noise made from it.

A number is a pure function of a key and a counter, so a draw needs no state: the same (seed, position, index) gives the
same number in any batch, on any day, after any restart. Algorithm and constants: Salmon, Moraes, Dror and Shaw,
"Parallel random numbers: as easy as 1, 2, 3", SC'11. It does not know what is drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW_32_BITS = 0xFFFFFFFF
NUM_WORDS = 4
"""Random words that one counter gives."""


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Scrambles counters of four 32-bit words under keys of two: four random words per counter.

    All tensors are int64 that hold values in [0, 2**32), of shapes that broadcast together.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        # A product of two words may reach the sign bit of int64: it wraps there, and masking gives the right halves.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (p1 >> 32) & LOW_32_BITS ^ c1 ^ k0, (p0 >> 32) & LOW_32_BITS ^ c3 ^ k1
        c1, c3 = p1 & LOW_32_BITS, p0 & LOW_32_BITS
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW_32_BITS, (k1 + KEY_STEPS[1]) & LOW_32_BITS
    return c0, c1, c2, c3


def split_seed(seed: int) -> tuple[int, int]:
    """The two key words of a 64-bit seed, low word first; higher bits are ignored."""
    return seed & LOW_32_BITS, (seed >> 32) & LOW_32_BITS


def exponential(key_R2: Tensor, position_R: Tensor, first_R: Tensor, num: int, stream: int) -> Tensor:
    """Standard exponential noise for the indices [first, first + num) of each row: float64 [R, num], all > 0.

    The number at an index depends on (key, position, stream, index) only. `first_R` is a multiple of NUM_WORDS; all
    tensors are int64; streams keep different uses of one position apart.
    """
    num_counters = -(-num // NUM_WORDS)
    index_RC = first_R[:, None] // NUM_WORDS + torch.arange(num_counters)
    zero = torch.zeros((), dtype=torch.int64)
    counter = (index_RC, position_R[:, None], zero + stream, zero)
    words_RC4 = torch.stack(philox_4x32(counter, (key_R2[:, :1], key_R2[:, 1:])), dim=-1)
    uniform_RN = (words_RC4.flatten(1)[:, :num].double() + 0.5) * 2.0**-32
    return -uniform_RN.log()
