"""The workloads on which engines are compared: seeded token ids in, a fixed number of tokens out, greedy, ends ignored.

    W1  one stream: prompt 128, 128 new
    W2  a batch of equal requests: prompt 64, 64 new
    W3  64 requests at once: prompts of 16 to 512, answers of 16 to 128
    W5  16 streams, and while they run a prompt of 1,500 for one token: how long it and they wait

Standard library only. It does not know how an engine is called.
"""

from __future__ import annotations

import random

from loadtest.workloads import Work, random_prompt, uniform_works

SEED = 7
WORKLOADS = ("W1", "W2", "W3", "W5")
DEFAULT_BATCH = {"W1": 1, "W2": 8, "W3": 64, "W5": 16}

STREAM_TOKENS = 448
"""What each stream of W5 may generate: enough to outlast the long prompt, after which the streams are cancelled."""
SETTLED_TOKENS = 16
"""The long prompt of W5 is sent when every stream has this many tokens."""
LONG_PROMPT = 1_500


def works_of(workload: str, batch: int, vocab_size: int) -> list[Work]:
    """The requests that begin together. Raises ValueError for a workload that is not known."""
    if workload == "W1":
        return uniform_works(SEED, 1, 128, 128, vocab_size)
    if workload == "W2":
        return uniform_works(SEED, batch, 64, 64, vocab_size)
    if workload == "W3":
        return mixed_works(SEED, batch, vocab_size)
    if workload == "W5":
        return uniform_works(SEED, batch, 64, STREAM_TOKENS, vocab_size)
    raise ValueError(f"workload {workload!r} is not one of {' '.join(WORKLOADS)}")


def mixed_works(seed: int, count: int, vocab_size: int) -> list[Work]:
    """Requests of W3: all lengths are drawn before the first prompt, so that they do not depend on the vocabulary."""
    generator = random.Random(seed)
    lengths = [(generator.randint(16, 512), generator.randint(16, 128)) for _ in range(count)]
    return [Work(random_prompt(generator, num_prompt, vocab_size), num_new) for num_prompt, num_new in lengths]


def long_prompt(vocab_size: int) -> Work:
    """The request that W5 sends among the streams."""
    return uniform_works(SEED + 1, 1, LONG_PROMPT, 1, vocab_size)[0]


def warm_up_of(works: list[Work]) -> list[Work]:
    """A little of the same: what touches all memory and code before the clock runs."""
    return [Work(work.prompt[:64], 8) for work in works[:8]]
