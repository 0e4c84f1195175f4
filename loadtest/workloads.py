"""What the load consists of: prompts as token ids, and lengths drawn from measured distributions. Seeded, no I/O.

Standard library only: runners of other engines, in environments of their own, import it too.

Token ids instead of text keep the lengths exact and the work equal for every engine. It does not know how requests are
sent.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass

FIRST_PLAIN_TOKEN = 16
"""Ids below may be special tokens in small vocabularies; random prompts leave them out."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution of lengths in tokens, known at a few probabilities; between them it is linear."""

    probabilities: tuple[float, ...]
    lengths: tuple[int, ...]

    def at(self, probability: float) -> float:
        """The length at a probability; beyond the table's ends, the end's."""
        after = min(max(bisect_right(self.probabilities, probability), 1), len(self.probabilities) - 1)
        (left, right), (low, high) = (values[after - 1 : after + 1] for values in (self.probabilities, self.lengths))
        share = (probability - left) / (right - left)
        return low + (high - low) * min(max(share, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Profile:
    """Lengths of prompts and answers; the two are drawn independently."""

    prompt: Quantiles
    answer: Quantiles


PROBABILITIES = (0.10, 0.25, 0.50, 0.75, 0.90, 0.99)

CHAT = Profile(
    Quantiles(PROBABILITIES, (207, 396, 1020, 1189, 2735, 4142)),
    Quantiles(PROBABILITIES, (54, 85, 129, 395, 424, 601)),
)
"""Azure LLM inference trace 2023, conversation (CC-BY)."""

CODE = Profile(
    Quantiles(PROBABILITIES, (147, 578, 1469, 2745, 5188, 7436)),
    Quantiles(PROBABILITIES, (7, 9, 13, 24, 55, 251)),
)
"""Azure LLM inference trace 2023, code (CC-BY)."""

PROFILES = {"chat": CHAT, "code": CODE}


@dataclass(frozen=True, slots=True)
class Work:
    """One request: continue these ids by exactly so many tokens."""

    prompt: tuple[int, ...]
    num_new: int


def random_prompt(generator: random.Random, num_tokens: int, vocab_size: int) -> tuple[int, ...]:
    """Plain token ids, uniformly drawn."""
    return tuple(generator.randrange(FIRST_PLAIN_TOKEN, vocab_size) for _ in range(num_tokens))


def uniform_works(seed: int, count: int, num_prompt: int, num_new: int, vocab_size: int) -> list[Work]:
    """Requests of one size."""
    generator = random.Random(seed)
    return [Work(random_prompt(generator, num_prompt, vocab_size), num_new) for _ in range(count)]


def shared_prefix_works(
    seed: int, count: int, num_shared: int, num_own: int, vocab_size: int, num_new: int = 1
) -> list[Work]:
    """Requests of one size, whose prompts begin alike and end differently."""
    generator = random.Random(seed)
    shared = random_prompt(generator, num_shared, vocab_size)
    return [Work(shared + random_prompt(generator, num_own, vocab_size), num_new) for _ in range(count)]


class ProfileWorks:
    """An endless supply of requests of a profile, scaled so that its longest prompt and answer fit the context."""

    def __init__(self, profile: Profile, seed: int, context_length: int, vocab_size: int) -> None:
        self._profile = profile
        self._generator = random.Random(seed)
        self._vocab_size = vocab_size
        longest = profile.prompt.lengths[-1] + profile.answer.lengths[-1]
        self._scale = min(1.0, (context_length - 2) / longest)

    def next(self) -> Work:
        """The next request; at least one token in and one out."""
        num_prompt = self._draw(self._profile.prompt)
        return Work(random_prompt(self._generator, num_prompt, self._vocab_size), self._draw(self._profile.answer))

    def _draw(self, lengths: Quantiles) -> int:
        return max(1, round(self._scale * lengths.at(self._generator.random())))
