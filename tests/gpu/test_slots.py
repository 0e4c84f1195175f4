"""What a card keeps by slot: patches of words lead to the same tables as one slot after another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.gpu.inputs import PADDING, InputBuffer
from model.gpu.penalties import Changes
from model.gpu.sampler import DrawParameters
from model.gpu.slots import SlotMemory, apply_patch, keep_tokens, variants
from model.interface import MAX_END_TOKEN_IDS, MAX_LOGIT_BIAS, Admission, Sampling

NUM_SLOTS, MAX_BLOCKS, VOCAB_SIZE = 3, 5, 97
CPU = torch.device("cpu")
DEMANDING = Sampling(
    temperature=0.7,
    top_k=9,
    top_p=0.123456789012345,
    min_p=0.25,
    repetition_penalty=1.7,
    presence_penalty=-0.3,
    frequency_penalty=0.6,
    logit_bias=((5, 1.5), (90, -2.5), (0, 0.1)),
    seed=2**64 - 7,
)
FEW = Sampling(temperature=1e-45, logit_bias=((6, 3.0),), seed=1)


class Card:
    """Tables, and inputs that bring patches to them."""

    def __init__(self) -> None:
        self.memory = SlotMemory(NUM_SLOTS, MAX_BLOCKS, VOCAB_SIZE, CPU)
        self.inputs = InputBuffer(4, 4, 8, self.memory.max_patch_words, CPU)

    def patch(self) -> int:
        """Brings what has changed. Returns how many words did."""
        patch = self.memory.take_patch()
        nothing = np.zeros(0, np.int64)
        self.inputs.pack(self.inputs.words.numpy(), PADDING, nothing, 4, 4, np.zeros(8, np.int32), patch)
        apply_patch(self.inputs.words, self.memory)
        return patch.shape[1]


def admissions() -> list[tuple[int, Admission]]:
    """By slot, in their order; slots 1 and 2 are given away again, with less to ask for."""
    return [
        (1, Admission((3, 4), 2, DEMANDING, 4, (7, 8, 9))),
        (2, Admission((1,), 1, DEMANDING, 2, tuple(range(MAX_END_TOKEN_IDS)))),
        (0, Admission((5, 6, 7), 2, Sampling())),
        (1, Admission((9,), 1, FEW, 1, (2,))),
        (2, Admission((1, 2), 2, Sampling(temperature=0.0))),
    ]


def test_tables_are_those_of_one_slot_after_another() -> None:
    card, drawn = Card(), DrawParameters.empty(NUM_SLOTS, VOCAB_SIZE, "cpu")
    changes = Changes.empty(NUM_SLOTS, VOCAB_SIZE, MAX_LOGIT_BIAS, MAX_END_TOKEN_IDS, "cpu")
    for slot, admission in admissions():
        card.memory.admit(slot, admission)
        assert card.patch() > 0
        drawn.admit(slot, admission.sampling)
        changes.admit(slot, admission)
        if not admission.min_new_tokens:
            changes.end_ids_SE[slot] = -1  # which are of no use then, and do not travel
    mine, mine_changes = card.memory.draw_parameters, card.memory.changes
    for name in ("temperature_S", "top_k_S", "top_p_S", "min_p_S", "key_S2"):
        assert torch.equal(getattr(mine, name), getattr(drawn, name)), name
    for name in ("repetition_S", "presence_S", "frequency_S", "ban_until_S", "bias_ids_SB", "end_ids_SE"):
        assert torch.equal(getattr(mine_changes, name), getattr(changes, name)), name
    is_biased = changes.bias_ids_SB >= 0
    assert torch.equal(mine_changes.biases_SB[is_biased], changes.biases_SB[is_biased])
    assert card.patch() == 0


def test_block_tables_and_tokens() -> None:
    card = Card()
    card.memory.extend(1, 0, range(40, 43))
    card.memory.extend(0, 2, (7,))
    card.patch()
    card.memory.extend(1, 3, [9])
    card.patch()
    assert card.memory.block_tables_SB.tolist() == [[0, 0, 7, 0, 0], [40, 41, 42, 9, 0], [0] * 5]
    slots_R = torch.tensor([2, -1, 0], dtype=torch.int32)
    keep_tokens(slots_R, torch.tensor([50, 51, 52], dtype=torch.int32), card.memory)
    assert card.memory.last_tokens_S.tolist() == [52, 0, 50]


def test_the_longest_patch_has_room_and_no_place_twice() -> None:
    memory = SlotMemory(NUM_SLOTS, MAX_BLOCKS, VOCAB_SIZE, CPU)
    bias = tuple((token_id % VOCAB_SIZE, 1.0) for token_id in range(MAX_LOGIT_BIAS))
    for slot in range(NUM_SLOTS):
        memory.admit(slot, Admission((1,), 1, Sampling(logit_bias=bias), 1, tuple(range(MAX_END_TOKEN_IDS))))
        memory.extend(slot, 0, range(MAX_BLOCKS))
    places, _ = memory.take_patch()
    assert len(set(places.tolist())) == len(places) == memory.max_patch_words - NUM_SLOTS  # but for the last tokens
    with pytest.raises(AssertionError, match="room"):
        memory.admit(0, Admission((1,), 1, Sampling(), 1, tuple(range(MAX_END_TOKEN_IDS + 1))))


def test_variants_name_every_argument() -> None:
    for variant in variants():
        assert {*variant.kernel.arg_names} == {*variant.signature, *variant.constants}
        assert {*variant.aligned} <= variant.signature.keys()
