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
    c0, c1, c2, c3, k0, k1 = torch.broadcast_tensors(*counter, *key)  # type: ignore[no-untyped-call]
    pair = (2, *([1] * c0.ndim))
    multipliers, steps = torch.tensor(MULTIPLIERS).view(pair), torch.tensor(KEY_STEPS).view(pair)
    # Both halves of a round run as one tensor [2, ...]. A round swaps the halves; so do we, by taking the other order
    # of multipliers and keys in every second round. An even number of rounds ends in the order it began with.
    even, odd, keys = torch.stack((c0, c2)), torch.stack((c1, c3)), torch.stack((k0, k1))
    for _ in range(NUM_ROUNDS):
        # A product of two words may reach the sign bit of int64: it wraps there, and masking gives the right halves.
        product = even * multipliers
        multipliers, swapped_keys = multipliers.flip(0), keys.flip(0)
        even, odd = (product >> 32) & LOW_32_BITS ^ odd.flip(0) ^ swapped_keys, product & LOW_32_BITS
        steps = steps.flip(0)
        keys = (swapped_keys + steps) & LOW_32_BITS
    return even[0], odd[0], even[1], odd[1]


def split_seed(seed: int) -> tuple[int, int]:
    """The two key words of a 64-bit seed, low word first; higher bits are ignored."""
    return seed & LOW_32_BITS, (seed >> 32) & LOW_32_BITS


def exponential(key_R2: Tensor, position_R: Tensor, num: int) -> Tensor:
    """Standard exponential noise for the indices [0, num) of each row: float64 [R, num], all > 0.

    The number at an index depends on (key, position, index) only. All tensors are int64.
    """
    counter_C = torch.arange(-(-num // NUM_WORDS))
    zero = torch.zeros((), dtype=torch.int64)
    counter = (counter_C, position_R[:, None], zero, zero)
    words_RC4 = torch.stack(philox_4x32(counter, (key_R2[:, :1], key_R2[:, 1:])), dim=-1)
    uniform_RN = (words_RC4.flatten(1)[:, :num].double() + 0.5) * 2.0**-32
    return -uniform_RN.log()
