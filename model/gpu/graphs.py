"""Whole steps as CUDA graphs: which sizes there are, and the one that a step is padded to.

A graph replays launches in a fraction of the time that it takes the host to make them, but of one size only. So a step
is padded to the next size, which changes no bit of its rows. Larger steps, whose launches the device outlasts, are
padded a little and launched. It owns what was captured, and knows nothing of what is computed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from model.gpu.device import Device, Work

LARGE_STEP_MULTIPLE = 128
"""Of tokens: products compute rows in tiles of so many. One that pads them itself takes memory for them, which only
steps of the sizes that were warmed up have been given."""


class Size(NamedTuple):
    """What the launches of a step's forward pass depend on."""

    num_tokens: int
    num_wanted: int
    is_decode_only: bool


@dataclass(frozen=True, slots=True)
class Buckets:
    """The sizes of captured steps, ascending."""

    decode: tuple[int, ...] = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
    """Rows of one token each; and rows of a draw."""
    mixed: tuple[int, ...] = (64, 128, 192, 256, 384, 512, 768, 1024)
    """Tokens of other steps. Here padding costs time, so that no bucket is much larger than the one before."""

    def up_to(self, max_rows: int, max_tokens: int) -> Buckets:
        """Those that steps of at most so many rows and tokens need."""
        return Buckets(_up_to(self.decode, max_rows), _up_to(self.mixed, max_tokens))

    def room_for(self, num_slots: int, max_batch_tokens: int) -> tuple[int, int]:
        """The most tokens and wanted rows of any step of such a shape, padding included."""
        max_wanted = max(num_slots, *self.decode)
        return max(max_batch_tokens, max_wanted, *self.mixed), max_wanted

    def of_rows(self, num_rows: int) -> int:
        """The bucket of so many rows; their own number where there is none."""
        place = bisect_left(self.decode, num_rows)
        return self.decode[place] if place < len(self.decode) else num_rows

    def of_step(self, num_tokens: int, num_wanted: int, max_tokens: int, max_wanted: int, *, is_decode: bool) -> Size:
        """The bucket of a step; where there is none, its own size, or a little more of at most `max_tokens`.

        No bucket wants more than `max_wanted` rows.
        """
        if is_decode:
            num_tokens = self.of_rows(num_tokens)
            return Size(num_tokens, num_tokens, is_decode_only=True)
        place = bisect_left(self.mixed, num_tokens)
        if place == len(self.mixed):
            num_padded = -(-num_tokens // LARGE_STEP_MULTIPLE) * LARGE_STEP_MULTIPLE
            return Size(min(num_padded, max_tokens), num_wanted, is_decode_only=False)
        return self._mixed_size(self.mixed[place], max_wanted)

    def sizes(self, max_wanted: int) -> list[Size]:
        """All that `of_step` may give but for steps without a bucket, the largest first."""
        decode = [Size(num_rows, num_rows, is_decode_only=True) for num_rows in self.decode]
        return sorted([*decode, *(self._mixed_size(bucket, max_wanted) for bucket in self.mixed)], reverse=True)

    @staticmethod
    def _mixed_size(num_tokens: int, max_wanted: int) -> Size:
        return Size(num_tokens, min(num_tokens, max_wanted), is_decode_only=False)


def _up_to(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    return sizes[: bisect_left(sizes, most) + 1]


class Graphs:
    """Work by key: replayed where it was captured, launched anew where not."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._replays: dict[Hashable, Work] = {}

    def __len__(self) -> int:
        return len(self._replays)

    def enqueue(self, key: Hashable, work: Work) -> None:
        """Has the device do this work, of which `key` says all that its launches depend on."""
        self._device.enqueue(self._replays.get(key, work))

    def capture(self, key: Hashable, work: Work) -> None:
        """Captures work: from now on, it is replayed wherever it is asked for under this key."""
        self._replays[key] = self._device.capture(work)
