"""What a card does in one step: takes in the inputs, computes logits, draws. Each is work that can be captured.

It owns the buffers around the forward pass: inputs, what is kept by slot, results. What a piece of work launches
depends on its arguments only; everything else stands in these buffers. It does not know batches.

Shape letters: T tokens of the step, W wanted tokens (rows that draw one), S slots, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.gpu import logprobs
from model.gpu.forward import Forward
from model.gpu.inputs import InputBuffer
from model.gpu.penalties import apply_penalties, count_tokens
from model.gpu.sampler import Workspace, draw
from model.gpu.slots import SlotMemory, apply_patch, keep_tokens


class Results:
    """What a step drew, on the device or in pinned memory: [W] token ids and whether the rows were finite."""

    def __init__(self, words: Tensor, max_wanted: int) -> None:
        """Over int32 words, of which there must be `words_of` many."""
        self.words = words
        self.token_ids_W = words[:max_wanted]
        self.is_finite_W = words[max_wanted:].view(torch.bool)[:max_wanted]

    @staticmethod
    def words_of(max_wanted: int) -> int:
        """How many words so many rows take."""
        return max_wanted + -(-max_wanted // np.dtype(np.int32).itemsize)


class DeviceStep:
    """Steps of one model with one set of slots."""

    def __init__(self, forward: Forward, slots: SlotMemory, inputs: InputBuffer) -> None:
        self.slots, self.inputs, self._forward = slots, inputs, forward
        max_wanted, vocab_size = forward.logits_WV.shape
        device = forward.logits_WV.device
        self._changed_WV = torch.zeros_like(forward.logits_WV)
        """Logits with bans, bias and penalties, where a row of the step has any."""
        self.max_wanted = max_wanted
        """Rows that can draw a token in one step, padding included."""
        self._workspace = Workspace.empty(max_wanted, vocab_size, str(device))
        self.results = Results(torch.zeros(Results.words_of(max_wanted), dtype=torch.int32, device=device), max_wanted)

    def bring(self, packed: Tensor) -> None:
        """Copies a step's inputs to their place; `packed` is pinned."""
        self.inputs.words[: len(packed)].copy_(packed, non_blocking=True)

    def count_known(self, slot: int, token_ids: Tensor, num_prompt: int) -> None:
        """Has penalties count a new sequence's known tokens; `token_ids`, int64, are pinned."""
        known = token_ids.to(self.inputs.words.device, non_blocking=True)
        self.slots.changes.count_known(slot, known, num_prompt)

    def compute(self, num_tokens: int, num_wanted: int, is_decode_only: bool) -> None:
        """Takes in what changes by slot, then computes logits. The inputs were packed for just these numbers."""
        apply_patch(self.inputs.words, self.slots)
        self._forward.compute(
            self.inputs.tokens(num_tokens),
            self.inputs.wanted(num_wanted).places_W,
            self.slots.last_tokens_S,
            self.slots.block_tables_SB,
            is_decode_only=is_decode_only,
        )

    def draw(self, num_rows: int) -> None:
        """Draws tokens from the logits; they become the last ones of their slots."""
        self._draw(self._forward.logits_WV, num_rows)

    def draw_changed(self, num_rows: int) -> None:
        """Likewise, from logits with each slot's bans, bias and penalties; what is drawn counts from now on."""
        wanted, changes = self.inputs.wanted(num_rows), self.slots.changes
        self._changed_WV[:num_rows].copy_(self._forward.logits_WV[:num_rows])
        apply_penalties(self._changed_WV[:num_rows], wanted.slots_W, wanted.positions_W, changes)
        self._draw(self._changed_WV, num_rows)
        count_tokens(wanted.slots_W, self.results.token_ids_W[:num_rows], changes)

    def tell(self, told: Tensor) -> None:
        """Writes log-probabilities of the rows that the inputs name, int32 [as many, words of each]."""
        logprobs.tell(self._forward.logits_WV, self.inputs.asking(len(told)), self.results.token_ids_W, told)

    def _draw(self, scores_WV: Tensor, num_rows: int) -> None:
        wanted = self.inputs.wanted(num_rows)
        token_ids_W, is_finite_W = self.results.token_ids_W[:num_rows], self.results.is_finite_W[:num_rows]
        draw(
            scores_WV[:num_rows],
            wanted.slots_W,
            wanted.positions_W,
            self.slots.draw_parameters,
            self._workspace,
            token_ids_W,
            is_finite_W,
        )
        keep_tokens(wanted.slots_W, token_ids_W, self.slots)
