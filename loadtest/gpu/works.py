"""The workloads of a card: more and longer than a CPU's, the same ids for every engine. Standard library only.

W1   one stream: prompt 128, 256 new
W2   a batch of equal requests: prompt 128, 64 new
W2n  nano-vllm's bench: 256 requests, prompts and answers of 100 to 1,024, drawn at temperature 0.6
W3   64 requests at once: prompts of 16 to 512, answers of 16 to 128
W4   64 requests that share 1,500 tokens and have 100 of their own, 64 new
W5   a prompt of 8,192 or 32,768 alone, and among 16 streams
W6   an open loop of a chat's lengths (loadtest/open_loop.py)
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from loadtest.peers.works import SEED, STREAM_TOKENS, mixed_works
from loadtest.workloads import Work, random_prompt, shared_prefix_works, uniform_works

W2N_TEMPERATURE = 0.6
LEAST_SECONDS = 10.0
"""With less left, no workload is begun."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the workloads are."""

    single: tuple[int, int]
    """Tokens of W1's prompt and answer."""
    equal: tuple[int, int]
    """Of each of W2's."""
    batches: tuple[int, ...]
    """Of W2."""
    num_wide: int
    """Requests of W2n."""
    wide: tuple[int, int]
    """The fewest and the most tokens of its prompts and answers."""
    num_mixed: int
    """Requests of W3."""
    num_sharing: int
    """Requests of W4."""
    shared: tuple[int, int, int]
    """Tokens that they share, that each has of its own, and new ones."""
    long_prompts: tuple[int, ...]
    """Of W5."""
    num_streams: int
    """That run beside a long prompt."""
    stream_tokens: int
    """That each of them may generate."""


CARD = Sizes(
    (128, 256), (128, 64), (8, 32, 64, 128, 256), 256, (100, 1024), 64, 64, (1500, 100, 64), (8192, 32_768), 16,
    STREAM_TOKENS,
)  # fmt: skip
DRY = Sizes((8, 4), (8, 4), (2,), 3, (4, 8), 0, 3, (40, 4, 3), (80,), 2, 100)


def wide_works(sizes: Sizes, vocab_size: int) -> list[Work]:
    """W2n's."""
    generator = random.Random(0)
    lengths = [(generator.randint(*sizes.wide), generator.randint(*sizes.wide)) for _ in range(sizes.num_wide)]
    return [Work(random_prompt(generator, num_prompt, vocab_size), num_new) for num_prompt, num_new in lengths]


def closed_works(sizes: Sizes, vocab_size: int) -> dict[tuple[str, int], list[Work]]:
    """By workload and batch, those whose requests begin together and share nothing: W1, W2, W3."""
    found = {("W1", 1): uniform_works(SEED, 1, *sizes.single, vocab_size)}
    for batch in sizes.batches:
        found["W2", batch] = uniform_works(SEED, batch, *sizes.equal, vocab_size)
    if sizes.num_mixed:
        found["W3", sizes.num_mixed] = mixed_works(SEED, sizes.num_mixed, vocab_size)
    return found


def sharing_works(sizes: Sizes, vocab_size: int) -> list[Work]:
    """W4's."""
    num_shared, num_own, num_new = sizes.shared
    return shared_prefix_works(SEED, sizes.num_sharing, num_shared, num_own, vocab_size, num_new)


def streams(sizes: Sizes, vocab_size: int) -> list[Work]:
    """What runs while W5's long prompt comes."""
    return uniform_works(SEED, sizes.num_streams, 64 if sizes is CARD else 8, sizes.stream_tokens, vocab_size)


def long_work(num_tokens: int, vocab_size: int) -> Work:
    """W5's prompt, for one token."""
    return uniform_works(SEED + 1, 1, num_tokens, 1, vocab_size)[0]
