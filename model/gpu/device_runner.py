"""DeviceRunner: computes steps on a card, ahead of the host.

It owns what the host knows by slot, the steps in flight and the pinned memory that they read and write. `launch` packs
a step, has the device do it, and returns; only a step's result is waited for:

    host      | launch 1 | launch 2 | result 1 | launch 3 | result 2 |           two pieces of pinned memory take turns
    device         | bring, compute, draw 1 | bring, compute, draw 2 | ...       one set of buffers: a step at a time
    copies                                   | back 1 |               | back 2 |

A token that step 1 draws is an input of step 2 before the host knows it: it stays on the device, as the last one of its
slot. It does not know why rows were chosen, nor how anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from model.gpu import logprobs
from model.gpu.attention_base import Attention
from model.gpu.device import Device, Event
from model.gpu.graphs import Buckets, Graphs, Size
from model.gpu.inputs import PADDING, Ints, StepRows, read_rows
from model.gpu.step import DeviceStep, Results
from model.inputs import SlotTables
from model.interface import NO_LOGPROBS, Admission, Batch, Row, RunnerShape, Sampled

NUM_PIECES = 2
"""Steps that can be in flight before `launch` waits: the one that is computed and the one behind it."""


class DevicePending:
    """A step under way. See model.interface.Pending."""

    def __init__(self, event: Event, piece: Piece, wanted: Sequence[int], told: Tensor | None) -> None:
        """`wanted` says of each row that draws how many log-probabilities it asked for, `told` is where they come."""
        self._event, self._piece, self._wanted, self._told = event, piece, wanted, told
        self._sampled: Sampled | None = None

    @property
    def event(self) -> Event:
        """When the results have been copied."""
        return self._event

    def result(self) -> Sampled:
        """See Pending."""
        if self._sampled is None:
            self._event.wait()
            num_rows = len(self._wanted)
            token_ids, is_finite = (column[:num_rows].tolist() for column in self._piece.drawn)
            told = [] if self._told is None else logprobs.read(self._told, self._wanted, is_finite)
            self._sampled = Sampled(token_ids, is_finite, told)
        return self._sampled


class Piece:
    """Pinned memory of one step in flight."""

    def __init__(self, device: Device, num_words: int, max_wanted: int) -> None:
        self.inputs = device.pinned(num_words, dtype=torch.int32)
        self.words = self.inputs.numpy()
        self.results = device.pinned(Results.words_of(max_wanted), dtype=torch.int32)
        results = Results(self.results, max_wanted)
        self.drawn = results.token_ids_W.numpy(), results.is_finite_W.numpy()
        self.pending: DevicePending | None = None
        """The step that it was used for last."""


class Asked:
    """What the host must know by slot to launch a step."""

    def __init__(self, num_slots: int) -> None:
        self.prompt_lens_S = np.zeros(num_slots, dtype=np.int64)
        self.num_logprobs_S = np.full(num_slots, NO_LOGPROBS)
        self._is_changed_S = np.zeros(num_slots, dtype=np.bool_)
        self._ban_until_S = np.zeros(num_slots, dtype=np.int64)

    def admit(self, slot: int, admission: Admission) -> bool:
        """Takes what a sequence asks for. Returns whether its known tokens must be counted."""
        sampling, may_end = admission.sampling, admission.num_prompt + admission.min_new_tokens
        self.prompt_lens_S[slot] = admission.num_prompt
        self.num_logprobs_S[slot] = sampling.num_logprobs
        self._is_changed_S[slot] = sampling.has_penalties or bool(sampling.logit_bias)
        self._ban_until_S[slot] = may_end if admission.end_token_ids else 0
        return sampling.has_penalties

    def changes_logits(self, slots_W: Ints, positions_W: Ints) -> bool:
        """Whether any of these rows is drawn from other logits than the model's."""
        return bool((self._is_changed_S[slots_W] | (positions_W < self._ban_until_S[slots_W])).any())


class DeviceRunner:
    """Computes steps of one model with one set of slots. See model.interface.Runner."""

    def __init__(
        self, device: Device, step: DeviceStep, attention: Attention, shape: RunnerShape, buckets: Buckets
    ) -> None:
        """`step` must have room for the largest of the buckets, which are this shape's, and for its largest step."""
        self._device, self._step, self._attention, self._shape = device, step, attention, shape
        self._buckets = buckets
        self._graphs = Graphs(device)
        self._tables = SlotTables(shape.num_slots, shape.context_length, shape.num_blocks, shape.block_size)
        self._asked = Asked(shape.num_slots)
        num_words = len(step.inputs.words)
        self._pieces = cycle([Piece(device, num_words, step.max_wanted) for _ in range(NUM_PIECES)])
        self._last: DevicePending | None = None

    @property
    def shape(self) -> RunnerShape:
        """The sizes an engine plans with."""
        return self._shape

    def launch(self, batch: Batch) -> DevicePending:
        """Starts a step. Tokens that it draws are known to their slots at once; rows need not bring them back."""
        self._take_in(batch.rows)
        rows = read_rows(batch.rows, self._tables, self._asked.prompt_lens_S)
        assert rows.num_tokens == batch.num_tokens, "a batch counts its rows' tokens"
        _, slots_W, positions_W = rows.wanted
        piece = self._next_piece()
        wanted = self._asked.num_logprobs_S[slots_W]
        asking = (wanted != NO_LOGPROBS).nonzero()[0]
        self._compute(rows, piece, asking)
        copies = []
        if rows.num_wanted:
            copies = self._draw(rows.num_wanted, piece, self._asked.changes_logits(slots_W, positions_W))
        told = self._tell(wanted[asking], copies) if len(asking) else None
        pending = DevicePending(self._device.copy_back(copies), piece, wanted.tolist(), told)
        self._tables.expect(slots_W, positions_W)
        self._last = piece.pending = pending
        return pending

    def capture(self) -> int:
        """Captures a step of every bucket, and a draw. Returns how many there are. None must be in flight."""
        for size in self._buckets.sizes(self._step.max_wanted):
            self._bring(PADDING, next(self._pieces), size, asking=PADDING.slots_R)
            self._graphs.capture(size, partial(self._step.compute, *size))
        for num_rows in reversed(self._buckets.decode):
            self._bring(PADDING, next(self._pieces), Size(1, num_rows, is_decode_only=True), asking=PADDING.slots_R)
            self._graphs.capture(num_rows, partial(self._step.draw, num_rows))
        return len(self._graphs)

    def _take_in(self, rows: Sequence[Row]) -> None:
        """Takes in what rows bring: admissions, which empty the slot first, and new blocks."""
        for row in rows:
            if row.admission is not None:
                self._admit(row.slot, row.admission)
            if row.new_block_ids:
                first = self._tables.extend(row.slot, row.new_block_ids)
                self._step.slots.extend(row.slot, first, row.new_block_ids)

    def _admit(self, slot: int, admission: Admission) -> None:
        self._tables.admit(slot, admission.token_ids)
        self._step.slots.admit(slot, admission)
        if self._asked.admit(slot, admission):
            known = self._device.pinned(len(admission.token_ids), dtype=torch.int64)
            known.copy_(torch.tensor(admission.token_ids))
            self._device.enqueue(partial(self._step.count_known, slot, known, admission.num_prompt))

    def _next_piece(self) -> Piece:
        """Pinned memory that no step in flight uses."""
        piece = next(self._pieces)
        if piece.pending is not None:
            piece.pending.result()
        return piece

    def _compute(self, rows: StepRows, piece: Piece, asking: Ints) -> None:
        """Has the device compute the logits of a step."""
        limits = self._shape.max_batch_tokens, self._step.max_wanted
        size = self._buckets.of_step(rows.num_tokens, rows.num_wanted, *limits, is_decode=rows.is_decode)
        self._bring(rows, piece, size, asking)
        self._graphs.enqueue(size, partial(self._step.compute, *size))

    def _bring(self, rows: StepRows, piece: Piece, size: Size, asking: Ints) -> None:
        """Packs a step's inputs, padded to a size and to a draw's bucket, and has them brought to the device."""
        plan = self._attention.plan(rows.query_starts, rows.ends_R, rows.prompt_lens_R, rows.slots_R)
        patch = self._step.slots.take_patch()
        num_wanted = max(size.num_wanted, self._buckets.of_rows(rows.num_wanted))
        num_words = self._step.inputs.pack(piece.words, rows, asking, size.num_tokens, num_wanted, plan, patch)
        self._device.enqueue(partial(self._step.bring, piece.inputs[:num_words]))

    def _draw(self, num_rows: int, piece: Piece, is_changed: bool) -> list[tuple[Tensor, Tensor]]:
        """Has the device draw. Returns what is to be copied back."""
        if self._last is not None:
            self._last.event.hold()  # the draw overwrites what that step's copy may still read
        num_padded = self._buckets.of_rows(num_rows)
        if is_changed:
            self._device.enqueue(partial(self._step.draw_changed, num_padded))
        else:
            self._graphs.enqueue(num_padded, partial(self._step.draw, num_padded))
        return [(self._step.results.words, piece.results)]

    def _tell(self, num_logprobs_W: Ints, copies: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Has the device tell log-probabilities to the rows that asked. Returns where they will be."""
        most = min(int(num_logprobs_W.max()), self._shape.vocab_size)
        shape = len(num_logprobs_W), logprobs.words_of(most)
        told = torch.empty(shape, dtype=torch.int32, device=self._device.torch_device)
        self._device.enqueue(partial(self._step.tell, told))
        at_host = self._device.pinned(*shape, dtype=torch.int32)
        copies.append((told, at_host))
        return at_host
