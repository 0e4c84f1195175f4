"""What the runner knows about each slot, and how a batch becomes tensors.

`SlotTables` owns token ids and block tables by slot; a step's rows change only what they bring. Everything is NumPy on
memory that torch and the kernels share, because on small arrays it costs a fraction of torch's price. It does not know
the model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.attention.base import AttentionPlan
from model.interface import Batch, Row

Ints = npt.NDArray[np.int64]

NOT_YET_KNOWN = -1
"""In the place of a token that a step in flight draws."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The tensors of one step. T tokens in the batch's row order; the last token of each wanting row is wanted."""

    ids_T: Tensor
    positions_T: Tensor
    plan: AttentionPlan
    wanted_W: Tensor


class SlotTables:
    """Token ids [num_slots, context_length + 1] and block tables [num_slots, most blocks], int32, by slot.

        tokens[slot]   | known: prompt, then generated ....| stale |
                       0                                   ^ num_known[slot]     at most context_length + 1

    The last column takes a token drawn at the very end of the context, which is never computed.
    """

    def __init__(self, num_slots: int, context_length: int, num_blocks: int, block_size: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self.tokens = np.zeros((num_slots, context_length + 1), dtype=np.int32)
        self.block_tables = np.zeros((num_slots, -(-context_length // block_size)), dtype=np.int32)
        self.addresses = self.tokens.ctypes.data, self.block_tables.ctypes.data
        # Numbers that are asked for one by one, or by NumPy all at once.
        self._num_known, self._num_blocks_of = (array("q", [0]) * num_slots for _ in range(2))
        self._num_known_S, self._num_blocks_S = (
            np.frombuffer(numbers, np.int64) for numbers in (self._num_known, self._num_blocks_of)
        )

    def take_in(self, batch: Batch) -> None:
        """Takes in what a batch's rows bring: admissions, which empty the slot first, and new blocks.

        What an engine must not send is an AssertionError.
        """
        for row in batch.rows:
            if row.admission is not None:
                self.admit(row.slot, row.admission.token_ids)
            if row.new_block_ids:
                self.extend(row.slot, row.new_block_ids)
            end = row.start + row.num_tokens
            assert row.num_tokens > 0 and row.start >= 0, "a row computes at least one token"
            assert end <= self._num_known[row.slot], "a row computes known tokens"
            assert end <= self._num_blocks_of[row.slot] * self._block_size, "a row's positions have blocks"
        assert batch.num_tokens == sum(row.num_tokens for row in batch.rows), "a batch counts its rows' tokens"

    def admit(self, slot: int, token_ids: Sequence[int]) -> None:
        """Takes in a new sequence's known tokens; the slot has no blocks."""
        self.tokens[slot, : len(token_ids)] = token_ids
        self._num_known[slot] = len(token_ids)
        self._num_blocks_of[slot] = 0

    def extend(self, slot: int, block_ids: Sequence[int]) -> int:
        """Takes in a slot's new blocks. Returns how many it had before."""
        assert min(block_ids) >= 0 and max(block_ids) < self._num_blocks, "block ids lie in the pool"
        length = self._num_blocks_of[slot]
        self.block_tables[slot, length : length + len(block_ids)] = block_ids
        self._num_blocks_of[slot] = length + len(block_ids)
        return length

    def check(self, slots_R: Ints, starts_R: Ints, ends_R: Ints) -> None:
        """What `take_in` asserts of rows, of many at once."""
        assert starts_R.min() >= 0 and (starts_R < ends_R).all(), "a row computes at least one token"
        assert (ends_R <= self._num_known_S[slots_R]).all(), "a row computes known tokens"
        assert (ends_R <= self._num_blocks_S[slots_R] * self._block_size).all(), "a row's positions have blocks"

    def build(self, rows: Sequence[Row]) -> StepInputs:
        """Makes the tensors of a step whose rows were taken in."""
        slots, starts, counts = (
            np.array([getattr(row, name) for row in rows], dtype=np.int64) for name in ("slot", "start", "num_tokens")
        )
        ends = starts + counts
        query_starts = np.zeros(len(rows) + 1, dtype=np.int64)
        counts.cumsum(out=query_starts[1:])
        slots_T = slots.repeat(counts)
        positions_T = np.arange(query_starts[-1]) + (starts - query_starts[:-1]).repeat(counts)
        most_blocks = -(-ends.max() // self._block_size)
        plan = self._plan(query_starts, ends, self.block_tables[slots, :most_blocks], slots_T, positions_T)
        wanting = [index for index, row in enumerate(rows) if row.wants_token]
        return StepInputs(
            ids_T=torch.from_numpy(self.tokens[slots_T, positions_T].astype(np.int64)),
            positions_T=torch.from_numpy(positions_T),
            plan=plan,
            wanted_W=torch.from_numpy(query_starts[1:][wanting] - 1),
        )

    def look_up(self, slots_T: Ints, positions_T: Ints) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Ints]:
        """Of tokens at these places: their ids, the blocks that take their keys and values, and the offsets there."""
        blocks_T = self.block_tables[slots_T, positions_T // self._block_size]
        return self.tokens[slots_T, positions_T], blocks_T, positions_T % self._block_size

    def append(self, slots: Sequence[int], positions: Sequence[int], token_ids: Sequence[int]) -> None:
        """Stores drawn tokens, each as the last known one of its slot."""
        for slot, position, token_id in zip(slots, positions, token_ids, strict=True):
            self.tokens[slot, position] = token_id
            self._num_known[slot] = position + 1

    def expect(self, slots_W: npt.NDArray[np.integer[Any]], positions_W: npt.NDArray[np.integer[Any]]) -> None:
        """Likewise, of tokens that only the device will have: NOT_YET_KNOWN."""
        self.tokens[slots_W, positions_W] = NOT_YET_KNOWN
        self._num_known_S[slots_W] = positions_W + 1

    def _plan(
        self, query_starts: Ints, ends: Ints, tables: npt.NDArray[np.int32], slots_T: Ints, positions_T: Ints
    ) -> AttentionPlan:
        blocks_T = self.block_tables[slots_T, positions_T // self._block_size]
        return AttentionPlan(
            query_starts=torch.from_numpy(query_starts.astype(np.int32)),
            context_lens=torch.from_numpy(ends.astype(np.int32)),
            block_tables=torch.from_numpy(np.ascontiguousarray(tables)),
            write_blocks_T=torch.from_numpy(blocks_T.astype(np.int64)),
            write_offsets_T=torch.from_numpy(positions_T % self._block_size),
        )
