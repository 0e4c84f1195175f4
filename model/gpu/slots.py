"""What a card keeps of each slot: its block table, the token drawn last, and what its sequence asks of the draw.

It owns these tables. They lie in one piece of memory, as words of 32 bits, so that whatever a step changes in them is
one list of places and words, a patch, which comes with the step's other inputs: block tables as wide as the context do
not travel with every step, and an admission costs no copy of its own. It knows neither batches nor kernels of a step.

    words    | block tables [S, B] | last tokens [S] | temperatures [S] | ... | biased ids [S, 1024] | ...
    place      slot * B + index      slot              slot                     slot * 1024 + i           and the start

Only what penalties count, a number for each slot and token of the vocabulary, lies apart: prompts are brought there by
copies of their own, for the few sequences that ask.

Shape letters: S slots, B blocks of a table, V vocabulary, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from model.gpu.penalties import NOTHING, Changes, change_values
from model.gpu.sampler import DrawParameters, draw_values
from model.gpu.variant import Variant
from model.interface import MAX_END_TOKEN_IDS, MAX_LOGIT_BIAS, Admission

WORD_BYTES = 4
ALIGNED_WORDS = 4
"""Tables begin at multiples of 16 bytes."""
PATCH_PROGRAMS = 16
PATCH_TILE = 1024
KEEP_TILE = 128

NO_PATCH = np.zeros((2, 0), np.int32)

INT32, FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
TERMS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float64),
        ("min_p", np.float32),
        ("key", np.int64, 2),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("ban_until", np.int32),
    ]
)
"""What every admission brings: a table for each, of so many words a slot. In the order of the two functions' values."""
TORCH_TYPES = {
    FLOAT32: torch.float32,
    np.dtype(np.float64): torch.float64,
    INT32: torch.int32,
    np.dtype(np.int64): torch.int64,
}


class SlotMemory:
    """The tables on the device, and the patch of the step that is being put together."""

    def __init__(self, num_slots: int, max_blocks: int, vocab_size: int, device: torch.device) -> None:
        """`max_blocks` is the length of a block table, B."""
        terms = {name: TERMS[name].itemsize // WORD_BYTES for name in TERMS.names or ()}
        lists = {"bias_ids": MAX_LOGIT_BIAS, "biases": MAX_LOGIT_BIAS, "end_ids": MAX_END_TOKEN_IDS}
        self._widths = {"block_tables": max_blocks, "last_tokens": 1, **terms, **lists}
        sizes = [-(-num_slots * width // ALIGNED_WORDS) * ALIGNED_WORDS for width in self._widths.values()]
        self._starts = dict(zip(self._widths, [0, *accumulate(sizes)], strict=False))
        self._num_slots = num_slots
        self.words = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.block_tables_SB = self._table("block_tables", INT32)
        self.last_tokens_S = self._table("last_tokens", INT32).flatten()
        self.draw_parameters = self._draw_parameters(vocab_size)
        self.changes = self._changes(vocab_size)
        self._term_widths = np.repeat([*terms.values()], [*terms.values()])
        self._term_places = np.concatenate([self._starts[name] + np.arange(width) for name, width in terms.items()])
        self._lengths = {"bias_ids": [0] * num_slots, "end_ids": [0] * num_slots}
        self._places: list[int] = []
        self._patch: list[int] = []

    @property
    def max_patch_words(self) -> int:
        """Words of the longest patch: all slots are admitted in one step, each with all that there can be."""
        return self._num_slots * sum(self._widths.values())

    def admit(self, slot: int, admission: Admission) -> None:
        """Takes what the sequence that has just got this slot asks for; what the one before did is forgotten."""
        bias, ends = admission.sampling.logit_bias, admission.end_token_ids
        assert len(bias) <= MAX_LOGIT_BIAS and len(ends) <= MAX_END_TOKEN_IDS, "a slot has room for so many tokens"
        terms = (*draw_values(admission.sampling, self.draw_parameters.vocab_size), *change_values(admission))
        self._places += (self._term_places + slot * self._term_widths).tolist()
        self._patch += np.array([terms], dtype=TERMS).view(np.int32).tolist()
        self._list("bias_ids", slot, [token_id for token_id, _ in bias])
        self._write("biases", slot, 0, np.array([value for _, value in bias], FLOAT32).view(np.int32).tolist())
        self._list("end_ids", slot, ends if admission.min_new_tokens else ())

    def extend(self, slot: int, first: int, block_ids: Sequence[int]) -> None:
        """The slot's block table goes on with these blocks, from its place `first` on."""
        self._write("block_tables", slot, first, block_ids)

    def take_patch(self) -> NDArray[np.int32]:
        """What has changed since the last call: [2, length], places, each once, and the words that go there."""
        if not self._places:  # as in most steps
            return NO_PATCH
        patch = np.array([self._places, self._patch], dtype=np.int32)
        self._places, self._patch = [], []
        return patch

    def _list(self, name: str, slot: int, token_ids: Sequence[int]) -> None:
        """A list of token ids, over whatever is left of a longer one."""
        num_left = self._lengths[name][slot] - len(token_ids)
        self._lengths[name][slot] = len(token_ids)
        self._write(name, slot, 0, [*token_ids, *([NOTHING] * num_left)])

    def _write(self, name: str, slot: int, first: int, words: Sequence[int]) -> None:
        place = self._starts[name] + slot * self._widths[name] + first
        self._places += range(place, place + len(words))
        self._patch += words

    def _table(self, name: str, dtype: np.dtype[Any]) -> Tensor:
        """[S, numbers of a slot]."""
        start, num_words = self._starts[name], self._num_slots * self._widths[name]
        return self.words[start : start + num_words].view(TORCH_TYPES[dtype]).view(self._num_slots, -1)

    def _terms(self, *names: str) -> dict[str, Tensor]:
        return {f"{name}_S": self._table(name, TERMS[name].base).flatten() for name in names}

    def _draw_parameters(self, vocab_size: int) -> DrawParameters:
        key_S2 = self._table("key", TERMS["key"].base)
        return DrawParameters(
            **self._terms("temperature", "top_k", "top_p", "min_p"), key_S2=key_S2, vocab_size=vocab_size
        )

    def _changes(self, vocab_size: int) -> Changes:
        device = self.words.device
        return Changes(
            **self._terms("repetition", "presence", "frequency", "ban_until"),
            bias_ids_SB=self._table("bias_ids", INT32).fill_(NOTHING),
            biases_SB=self._table("biases", FLOAT32),
            end_ids_SE=self._table("end_ids", INT32).fill_(NOTHING),
            in_prompt_SV=torch.zeros(self._num_slots, vocab_size, dtype=torch.int8, device=device),
            counts_SV=torch.zeros(self._num_slots, vocab_size, dtype=torch.int32, device=device),
        )


@triton.jit
def patch_kernel(inputs_ptr, words_ptr, TILE: tl.constexpr):
    """Programs take turns. The patch's length and place stand at the head of the inputs (model/gpu/inputs.py)."""
    num_words = tl.load(inputs_ptr)
    patch_ptr = inputs_ptr + tl.load(inputs_ptr + 1)
    for start in tl.range(tl.program_id(0) * TILE, num_words, tl.num_programs(0) * TILE):
        index = start + tl.arange(0, TILE)
        place = tl.load(patch_ptr + index, mask=index < num_words, other=0)
        word = tl.load(patch_ptr + num_words + index, mask=index < num_words, other=0)
        tl.store(words_ptr + place, word, mask=index < num_words)


@triton.jit(do_not_specialize=["num_rows"])
def keep_tokens_kernel(slots_ptr, token_ids_ptr, last_tokens_ptr, num_rows, TILE: tl.constexpr):
    """One program per TILE rows, whose slots are distinct."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slot = tl.load(slots_ptr + row, mask=row < num_rows, other=-1)
    token_id = tl.load(token_ids_ptr + row, mask=slot >= 0, other=0)
    tl.store(last_tokens_ptr + slot, token_id, mask=slot >= 0)


def apply_patch(inputs: Tensor, memory: SlotMemory) -> None:
    """Writes the patch that came with a step's inputs (int32, header first) to its places."""
    patch_kernel[(PATCH_PROGRAMS,)](inputs, memory.words, TILE=PATCH_TILE)


def keep_tokens(slots_R: Tensor, token_ids_R: Tensor, memory: SlotMemory) -> None:
    """The tokens drawn (int32 [R]) are now the last ones of their slots (int32 [R]); a negative slot is padding."""
    num_rows = len(slots_R)
    grid = (triton.cdiv(num_rows, KEEP_TILE),)
    keep_tokens_kernel[grid](slots_R, token_ids_R, memory.last_tokens_S, num_rows, TILE=KEEP_TILE)


def variants() -> list[Variant]:
    """What is compiled, whatever the model."""
    return [
        Variant(
            name="patch",
            kernel=patch_kernel,
            signature={"inputs_ptr": "*i32", "words_ptr": "*i32"},
            constants={"TILE": PATCH_TILE},
            aligned=("inputs_ptr", "words_ptr"),
        ),
        Variant(
            name="keep_tokens",
            kernel=keep_tokens_kernel,
            signature=dict.fromkeys(("slots_ptr", "token_ids_ptr", "last_tokens_ptr"), "*i32") | {"num_rows": "i32"},
            constants={"TILE": KEEP_TILE},
        ),
    ]
