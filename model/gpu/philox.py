"""Exponential noise on a card: the numbers of model/philox.py, from the same keys and counters.

Triton brings the generator (Philox4x32-10); what is ours is which counter an index has and how a word becomes noise.
The words are equal bit for bit; the noise is float64, its logarithm the card's, so its last bit may differ. It does not
know what is drawn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.philox import NUM_WORDS

WORDS = tl.constexpr(NUM_WORDS)


@triton.jit
def exponential(low_key, high_key, position, index):
    """Standard exponential noise: float64 of the shape of `index` (int32, at least 0), all > 0.

    The keys are the two words of a seed as int64 scalars, `position` is an int32 scalar.
    """
    zero = index * 0
    first, second, third, fourth = tl.philox(low_key | (high_key << 32), index // WORDS, zero + position, zero, zero)
    place = index % WORDS
    word = tl.where(place < 2, tl.where(place == 0, first, second), tl.where(place == 2, third, fourth))
    return -tl.log((word.to(tl.float64) + 0.5) * 2.0**-32)
