"""The inputs of one step on a card: packed by the host into pinned memory, and brought to the device by one copy.

It owns where everything lies. A step is padded to a bucket of tokens, and where a bucket's inputs lie never changes, so
that a captured step finds them. It does not know what computes them. All are words of int32:

    | header | wanted rows | tokens of the bucket | plan of attention | patch of the slots |
             in the same place always             |                   where the header says
                                                  where the bucket says

    header   length of the patch, its place, six zeros
    wanted   place among the step's tokens (-1: padding), slot (-1: padding), position of the token that is drawn;
             besides, which of these rows ask for log-probabilities
    tokens   id (-1: the one drawn last in its slot, which the host may not know yet), position, slot,
             block that takes its keys and values (-1: padding), offset in that block
    patch    places, then words (model/gpu/slots.py)

Shape letters: R rows, T tokens, W wanted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.inputs import SlotTables
from model.interface import Row

HEADER_SIZE = 8
ALIGNED_WORDS = 4
"""Columns begin at multiples of 16 bytes."""
TOKEN_PADDING = np.array([[0], [0], [0], [-1], [0]], np.int32)
WANTED_PADDING = np.array([[-1], [-1], [0]], np.int32)

Ints = NDArray[np.integer[Any]]
Words = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepRows:
    """A batch as arrays."""

    slots_R: Ints
    query_starts: Words
    """[R + 1]: the tokens of row r are [query_starts[r], query_starts[r + 1])."""
    ends_R: Words
    """Positions that a row's last token sees, its own with them."""
    prompt_lens_R: Ints
    tokens: tuple[Ints, ...]
    """The columns of the tokens, [T] each."""
    wanted: tuple[Ints, ...]
    """The columns of the wanted rows, [W] each."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens[0])

    @property
    def num_wanted(self) -> int:
        return len(self.wanted[0])

    @property
    def is_decode(self) -> bool:
        """Whether each row has one token, and one behind its prompt."""
        return self.num_tokens == len(self.slots_R) and bool((self.ends_R > self.prompt_lens_R).all())


def read_rows(rows: Sequence[Row], tables: SlotTables, prompt_lens_S: Ints) -> StepRows:
    """The arrays of rows whose admissions and blocks the tables have taken in.

    `prompt_lens_S` are the lengths of the slots' prompts.
    """
    slots_R = np.array([row.slot for row in rows])
    positions_T = starts_R = np.array([row.start for row in rows])
    counts_R = np.array([row.num_tokens for row in rows])
    wanting = np.array([row.wants_token for row in rows]).nonzero()[0]
    slots_T, ends_R = slots_R, starts_R + counts_R
    tables.check(slots_R, starts_R, ends_R)
    query_starts = np.zeros(len(rows) + 1, dtype=np.int32)
    counts_R.cumsum(out=query_starts[1:])
    if query_starts[-1] > len(rows):
        slots_T = slots_R.repeat(counts_R)
        positions_T = np.arange(len(slots_T)) + (starts_R - query_starts[:-1]).repeat(counts_R)
    ids_T, blocks_T, offsets_T = tables.look_up(slots_T, positions_T)
    return StepRows(
        slots_R=slots_R,
        query_starts=query_starts,
        ends_R=ends_R.astype(np.int32),
        prompt_lens_R=prompt_lens_S[slots_R],
        tokens=(ids_T, positions_T, slots_T, blocks_T, offsets_T),
        wanted=(query_starts[1:][wanting] - 1, slots_R[wanting], ends_R[wanting]),
    )


PADDING = StepRows(
    slots_R=np.zeros(0, np.int64),
    query_starts=np.zeros(1, np.int32),
    ends_R=np.zeros(0, np.int32),
    prompt_lens_R=np.zeros(0, np.int64),
    tokens=(np.zeros(0, np.int64),) * len(TOKEN_PADDING),
    wanted=(np.zeros(0, np.int64),) * len(WANTED_PADDING),
)
"""A step of nothing else."""


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """A bucket's tokens on the device, int32 [T] each, and the plan, which lies behind them."""

    ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    write_blocks_T: Tensor
    write_offsets_T: Tensor
    plan: Tensor


@dataclass(frozen=True, slots=True)
class WantedInputs:
    """The rows that draw a token, int32 [W] each."""

    places_W: Tensor
    slots_W: Tensor
    positions_W: Tensor


class InputBuffer:
    """The inputs' place on the device, and how a step's are laid out."""

    def __init__(
        self, max_tokens: int, max_wanted: int, max_plan_words: int, max_patch_words: int, device: torch.device
    ) -> None:
        """Room for steps of at most so many tokens and wanted rows, padding included."""
        self._wanted_stride = _aligned(max_wanted)
        self._tokens_at = HEADER_SIZE + (len(WANTED_PADDING) + 1) * self._wanted_stride
        num_words = self._plan_at(max_tokens) + _aligned(max_plan_words) + 2 * max_patch_words
        self.words = torch.zeros(num_words, dtype=torch.int32, device=device)

    def tokens(self, num_tokens: int) -> TokenInputs:
        """Where the tokens of a bucket lie."""
        plan_at = self._plan_at(num_tokens)
        columns_5T = self.words[self._tokens_at : plan_at].view(len(TOKEN_PADDING), -1)[:, :num_tokens]
        ids_T, positions_T, slots_T, blocks_T, offsets_T = columns_5T
        return TokenInputs(ids_T, positions_T, slots_T, blocks_T, offsets_T, plan=self.words[plan_at:])

    def wanted(self, num_rows: int) -> WantedInputs:
        """Where the first wanted rows lie, whatever the bucket."""
        columns = self.words[HEADER_SIZE : self._tokens_at].view(-1, self._wanted_stride)[
            : len(WANTED_PADDING), :num_rows
        ]
        return WantedInputs(*columns)

    def asking(self, num_rows: int) -> Tensor:
        """Where it lies which of the wanted rows ask for log-probabilities, int32 [as many as do]."""
        return self.words[self._tokens_at - self._wanted_stride :][:num_rows]

    def pack(
        self, host: Words, step: StepRows, asking: Ints, num_tokens: int, num_wanted: int, plan: Words, patch: Words
    ) -> int:
        """Lays a step out in host memory as long as `words`, padded to so many tokens and wanted rows.

        Returns how much of it is to be brought over.
        """
        plan_at = self._plan_at(num_tokens)
        patch_at = plan_at + len(plan)
        host[:HEADER_SIZE] = 0
        host[:2] = patch.shape[1], patch_at
        wanted = host[HEADER_SIZE : self._tokens_at].reshape(-1, self._wanted_stride)
        _fill(wanted[:-1], step.wanted, WANTED_PADDING, num_wanted)
        wanted[-1, : len(asking)] = asking
        tokens = host[self._tokens_at : plan_at].reshape(len(TOKEN_PADDING), -1)
        _fill(tokens, step.tokens, TOKEN_PADDING, num_tokens)
        host[plan_at:patch_at] = plan
        host[patch_at : patch_at + patch.size] = patch.ravel()
        return patch_at + patch.size

    def _plan_at(self, num_tokens: int) -> int:
        return self._tokens_at + len(TOKEN_PADDING) * _aligned(num_tokens)


def _fill(columns: Words, given: Sequence[Ints], padding: Words, length: int) -> None:
    """Columns that begin with what is given and are padded up to a length."""
    num_given = len(given[0])
    for column, values in zip(columns, given, strict=True):
        column[:num_given] = values
    if num_given < length:
        columns[:, num_given:length] = padding


def _aligned(num_words: int) -> int:
    return -(-num_words // ALIGNED_WORDS) * ALIGNED_WORDS
