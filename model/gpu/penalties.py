"""Changes logits on a card before the draw: bans, bias, penalties, and the bitmasks of structured output.

It owns what a slot asks for and how often its output holds each token; model/sampling.py (`change`, `repeat`) is the
specification, and the numbers are the same bits. It does not know how a token is drawn.

A broken row stays broken: whatever would forbid a token leaves a NaN or +inf as it is, so that the draw still sees that
the model's logits were not finite. On a CPU the draw is told by the logits before any change, so one thing is told
otherwise here: a row of which every token was forbidden counts as broken too.

Every row is treated alone, and is left untouched, at the price of a few loads, where its slot asks for nothing. A row
whose slot is negative is padding.

Shape letters: R rows, S slots, V vocabulary, B biased tokens, E tokens that end a sequence, W words of a bitmask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.gpu.variant import Variant
from model.interface import Admission
from model.sampling import LARGEST, SMALLEST

TILE_SIZE = 4096
COUNT_TILE_SIZE = 128
BITS_PER_WORD = 32
NOTHING = -1
"""Fills up the lists of token ids."""

LARGEST_SCORE = tl.constexpr(LARGEST)
WORD_BITS = tl.constexpr(BITS_PER_WORD)


@dataclass(frozen=True, slots=True)
class Changes:
    """What changes each slot's logits. The ids that a slot biases are distinct."""

    repetition_S: Tensor
    presence_S: Tensor
    frequency_S: Tensor
    bias_ids_SB: Tensor
    biases_SB: Tensor
    end_ids_SE: Tensor
    ban_until_S: Tensor
    """The first position at which the sequence may end."""
    in_prompt_SV: Tensor
    """int8: 1 where the prompt holds the token."""
    counts_SV: Tensor
    """How often the output holds the token."""

    @classmethod
    def empty(cls, num_slots: int, vocab_size: int, max_num_biases: int, max_num_ends: int, device: str) -> Changes:
        """Slots that ask for nothing."""

        def table(*shape: int, value: float = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full((num_slots, *shape), value, dtype=dtype, device=device)

        return cls(
            repetition_S=table(value=1, dtype=torch.float32),
            presence_S=table(dtype=torch.float32),
            frequency_S=table(dtype=torch.float32),
            bias_ids_SB=table(max_num_biases, value=NOTHING),
            biases_SB=table(max_num_biases, dtype=torch.float32),
            end_ids_SE=table(max_num_ends, value=NOTHING),
            ban_until_S=table(),
            in_prompt_SV=table(vocab_size, dtype=torch.int8),
            counts_SV=table(vocab_size),
        )

    def admit(self, slot: int, admission: Admission) -> None:
        """Takes what the sequence that has just got this slot asks for, waiting for the device.

        What the one before did is forgotten.
        """
        sampling, device = admission.sampling, self.counts_SV.device
        tables = self.repetition_S, self.presence_S, self.frequency_S, self.ban_until_S
        for table_S, value in zip(tables, change_values(admission), strict=True):
            table_S[slot] = value
        self.bias_ids_SB[slot] = NOTHING
        self.end_ids_SE[slot] = NOTHING
        ids, biases = [token_id for token_id, _ in sampling.logit_bias], [bias for _, bias in sampling.logit_bias]
        self.bias_ids_SB[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32, device=device)
        self.biases_SB[slot, : len(ids)] = torch.tensor(biases, dtype=torch.float32, device=device)
        ends = torch.tensor(admission.end_token_ids, dtype=torch.int32, device=device)
        self.end_ids_SE[slot, : len(ends)] = ends
        self.count_known(
            slot, torch.tensor(admission.token_ids, dtype=torch.int64, device=device), admission.num_prompt
        )

    def count_known(self, slot: int, token_ids: Tensor, num_prompt: int) -> None:
        """Counts a sequence's known tokens (int64, on the device) anew."""
        output = token_ids[num_prompt:]
        self.in_prompt_SV[slot].zero_().index_fill_(0, token_ids[:num_prompt], 1)
        self.counts_SV[slot].zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))


def change_values(admission: Admission) -> tuple[float, float, float, int]:
    """What a slot's tables hold for a sequence: repetition, presence and frequency penalty, ban_until."""
    sampling, may_end = admission.sampling, admission.num_prompt + admission.min_new_tokens
    repetition = max(sampling.repetition_penalty, SMALLEST)
    return repetition, sampling.presence_penalty, sampling.frequency_penalty, may_end


@triton.jit
def forbid(scores):
    """-inf, but for what no sane model gives."""
    return tl.where(scores < float("inf"), float("-inf"), scores)


@triton.jit
def ban_and_bias_kernel(
    logits_ptr,
    slots_ptr,
    positions_ptr,
    bias_ids_ptr,
    biases_ptr,
    end_ids_ptr,
    ban_until_ptr,
    stride,
    NUM_BIASES: tl.constexpr,
    BIAS_TILE: tl.constexpr,
    NUM_ENDS: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    is_banning = tl.load(positions_ptr + row) < tl.load(ban_until_ptr + slot)
    column = tl.arange(0, BIAS_TILE)
    bias_ids = tl.load(bias_ids_ptr + slot * NUM_BIASES + column, mask=column < NUM_BIASES, other=-1)
    is_biased = bias_ids >= 0
    biases = tl.load(biases_ptr + slot * NUM_BIASES + column, mask=is_biased, other=0.0)
    scores = tl.load(row_ptr + bias_ids, mask=is_biased, other=0.0) + biases
    # A token may be both biased and banned. Whichever of the two stores comes last, it stores the same.
    for i in range(tl.where(is_banning, NUM_ENDS, 0)):
        end_id = tl.load(end_ids_ptr + slot * NUM_ENDS + i)
        is_banned = end_id >= 0
        scores = tl.where(is_banned & (bias_ids == end_id), forbid(scores), scores)
        banned = tl.load(row_ptr + end_id, mask=is_banned, other=0.0)
        tl.store(row_ptr + end_id, forbid(banned), mask=is_banned)
    tl.store(row_ptr + bias_ids, scores, mask=is_biased)


@triton.jit
def penalize_kernel(
    logits_ptr,
    slots_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    in_prompt_ptr,
    counts_ptr,
    stride,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row and part of the vocabulary. A product and a sum must not become one fused operation."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    repetition = tl.load(repetition_ptr + slot)
    presence = tl.load(presence_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    if (repetition == 1.0) & (presence == 0.0) & (frequency == 0.0):
        return
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_token = ids < VOCAB_SIZE
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    scores = tl.load(row_ptr + ids, mask=is_token, other=0.0)
    counts = tl.load(counts_ptr + slot * VOCAB_SIZE + ids, mask=is_token, other=0)
    in_prompt = tl.load(in_prompt_ptr + slot * VOCAB_SIZE + ids, mask=is_token, other=0)
    repeated = tl.where(scores > 0, tl.div_rn(scores, repetition), scores * repetition)
    has_overflowed = (repeated > LARGEST_SCORE) & (scores <= LARGEST_SCORE)
    repeated = tl.where(has_overflowed, LARGEST_SCORE, repeated)
    scores = tl.where((counts > 0) | (in_prompt != 0), repeated, scores)
    scores -= tl.where(counts > 0, presence, 0.0) + frequency * counts.to(tl.float32)
    tl.store(row_ptr + ids, scores, mask=is_token)


@triton.jit(do_not_specialize=["num_rows"])
def count_kernel(slots_ptr, token_ids_ptr, counts_ptr, num_rows, VOCAB_SIZE: tl.constexpr, TILE: tl.constexpr):
    """One program per TILE rows, whose slots are distinct."""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slots = tl.load(slots_ptr + rows, mask=rows < num_rows, other=-1).to(tl.int64)
    token_ids = tl.load(token_ids_ptr + rows, mask=slots >= 0, other=0)
    places = counts_ptr + slots * VOCAB_SIZE + token_ids
    tl.store(places, tl.load(places, mask=slots >= 0, other=0) + 1, mask=slots >= 0)


@triton.jit
def mask_kernel(
    logits_ptr,
    bitmask_ptr,
    is_masked_ptr,
    stride,
    VOCAB_SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row and part of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(is_masked_ptr + row) == 0:
        return
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_token = ids < VOCAB_SIZE
    words = tl.load(bitmask_ptr + row * NUM_WORDS + ids // WORD_BITS, mask=is_token, other=-1)
    is_forbidden = ((words >> (ids % WORD_BITS)) & 1) == 0
    places = logits_ptr + row * stride + ids
    tl.store(places, forbid(tl.load(places, mask=is_forbidden, other=0.0)), mask=is_forbidden)


def apply_penalties(logits_RV: Tensor, slots_R: Tensor, positions_R: Tensor, changes: Changes) -> None:
    """Applies bans, bias and penalties to float32 logits in place.

    `positions_R` are the places that the drawn tokens will have; they and `slots_R` are int32. The counts must hold
    every output token before that place (`count_tokens`).
    """
    num_rows, vocab_size = check_logits(logits_RV)
    assert slots_R.dtype == positions_R.dtype == torch.int32, "slots and positions are int32"
    assert changes.counts_SV.shape[1] == vocab_size, "the tables are of another vocabulary"
    num_biases, num_ends = changes.bias_ids_SB.shape[1], changes.end_ids_SE.shape[1]
    ban_and_bias_kernel[(num_rows,)](
        logits_RV,
        slots_R,
        positions_R,
        changes.bias_ids_SB,
        changes.biases_SB,
        changes.end_ids_SE,
        changes.ban_until_S,
        logits_RV.stride(0),
        NUM_BIASES=num_biases,
        BIAS_TILE=triton.next_power_of_2(max(num_biases, 1)),
        NUM_ENDS=num_ends,
    )
    penalize_kernel[(num_rows, triton.cdiv(vocab_size, TILE_SIZE))](
        logits_RV,
        slots_R,
        changes.repetition_S,
        changes.presence_S,
        changes.frequency_S,
        changes.in_prompt_SV,
        changes.counts_SV,
        logits_RV.stride(0),
        VOCAB_SIZE=vocab_size,
        TILE=TILE_SIZE,
        enable_fp_fusion=False,
    )


def count_tokens(slots_R: Tensor, token_ids_R: Tensor, changes: Changes) -> None:
    """Counts one more output token of each row's slot: int32 [R] both, every slot at most once."""
    assert slots_R.dtype == token_ids_R.dtype == torch.int32, "slots and token ids are int32"
    num_rows, vocab_size = len(slots_R), changes.counts_SV.shape[1]
    count_kernel[(triton.cdiv(num_rows, COUNT_TILE_SIZE),)](
        slots_R, token_ids_R, changes.counts_SV, num_rows, VOCAB_SIZE=vocab_size, TILE=COUNT_TILE_SIZE
    )


def apply_bitmask(logits_RV: Tensor, bitmask_RW: Tensor, is_masked_R: Tensor) -> None:
    """Forbids tokens of float32 logits in place, in the rows where `is_masked_R` (bool) says so.

    `bitmask_RW` is int32 [R, ceil(V / 32)]: bit i % 32 of word i // 32, from the lowest, is set where token i is
    allowed. The bits past the vocabulary do not matter.
    """
    num_rows, vocab_size = check_logits(logits_RV)
    num_words = triton.cdiv(vocab_size, BITS_PER_WORD)
    assert bitmask_RW.dtype == torch.int32 and bitmask_RW.is_contiguous() and is_masked_R.dtype == torch.bool
    assert bitmask_RW.shape == (num_rows, num_words), f"the bitmask is {tuple(bitmask_RW.shape)}"
    mask_kernel[(num_rows, triton.cdiv(vocab_size, TILE_SIZE))](
        logits_RV,
        bitmask_RW,
        is_masked_R,
        logits_RV.stride(0),
        VOCAB_SIZE=vocab_size,
        NUM_WORDS=num_words,
        TILE=TILE_SIZE,
    )


def check_logits(logits_RV: Tensor) -> tuple[int, int]:
    """The shape of float32 logits whose rows are contiguous."""
    assert logits_RV.dtype == torch.float32 and logits_RV.stride(1) == 1, "logits are float32, row by row"
    num_rows, vocab_size = logits_RV.shape
    return num_rows, vocab_size


def variants() -> list[Variant]:
    """What is compiled for two usual vocabularies."""
    slots = {"slots_ptr": "*i32", "stride": "i32", "logits_ptr": "*fp32"}
    of_one_size = [
        Variant(
            name="ban_and_bias",
            kernel=ban_and_bias_kernel,
            signature=slots
            | {"positions_ptr": "*i32", "bias_ids_ptr": "*i32", "biases_ptr": "*fp32", "end_ids_ptr": "*i32"}
            | {"ban_until_ptr": "*i32"},
            constants={"NUM_BIASES": 1024, "BIAS_TILE": 1024, "NUM_ENDS": 16},
        )
    ]
    return of_one_size + [variant for vocab_size in (128256, 32000) for variant in variants_of(vocab_size)]


def variants_of(vocab_size: int) -> list[Variant]:
    """What is compiled for a vocabulary."""
    row = {"logits_ptr": "*fp32", "stride": "i32"}
    penalties = {"repetition_ptr": "*fp32", "presence_ptr": "*fp32", "frequency_ptr": "*fp32"}
    tables = {"slots_ptr": "*i32", "in_prompt_ptr": "*i8", "counts_ptr": "*i32"}
    num_words = triton.cdiv(vocab_size, BITS_PER_WORD)
    return [
        Variant(
            name=f"penalize_v{vocab_size}",
            kernel=penalize_kernel,
            signature=row | penalties | tables,
            constants={"VOCAB_SIZE": vocab_size, "TILE": TILE_SIZE},
            has_fp_fusion=False,
            aligned=("logits_ptr", "stride", "in_prompt_ptr", "counts_ptr"),
        ),
        Variant(
            name=f"count_v{vocab_size}",
            kernel=count_kernel,
            signature={"slots_ptr": "*i32", "token_ids_ptr": "*i32", "counts_ptr": "*i32", "num_rows": "i32"},
            constants={"VOCAB_SIZE": vocab_size, "TILE": COUNT_TILE_SIZE},
        ),
        Variant(
            name=f"mask_v{vocab_size}",
            kernel=mask_kernel,
            signature=row | {"bitmask_ptr": "*i32", "is_masked_ptr": "*i1"},
            constants={"VOCAB_SIZE": vocab_size, "NUM_WORDS": num_words, "TILE": TILE_SIZE},
            aligned=("logits_ptr", "stride"),
        ),
    ]
