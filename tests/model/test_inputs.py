"""Tables by slot and the tensors of a step, against the same thing done with Python lists."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from model.inputs import NOT_YET_KNOWN, SlotTables, StepInputs
from model.interface import Admission, Batch, Row, Sampling

CONTEXT, BLOCK_SIZE, NUM_BLOCKS = 40, 4, 99


def tables(num_slots: int = 4) -> SlotTables:
    return SlotTables(num_slots, CONTEXT, NUM_BLOCKS, BLOCK_SIZE)


def admitted(slot: int, token_ids: Sequence[int], num_tokens: int, blocks: Sequence[int], wants: bool = False) -> Row:
    return Row(slot, 0, num_tokens, blocks, wants, Admission(token_ids, len(token_ids), Sampling()))


def batch(*rows: Row) -> Batch:
    return Batch(rows, sum(row.num_tokens for row in rows))


def prepare(t: SlotTables, b: Batch) -> StepInputs:
    t.take_in(b)
    return t.build(b.rows)


def test_a_ragged_step() -> None:
    t = tables()
    prepare(t, batch(admitted(2, range(100, 109), 7, [5, 6])))
    step = prepare(t, batch(Row(2, 7, 2, [9], wants_token=True), admitted(0, [11, 12, 13], 2, [4])))
    assert step.ids_T.tolist() == [107, 108, 11, 12]
    assert step.positions_T.tolist() == [7, 8, 0, 1]
    assert step.plan.query_starts.tolist() == [0, 2, 4]
    assert step.plan.context_lens.tolist() == [9, 2]
    assert step.plan.block_tables[0].tolist() == [5, 6, 9]
    assert step.plan.block_tables[1, 0].item() == 4
    assert step.plan.write_blocks_T.tolist() == [6, 9, 4, 4]
    assert step.plan.write_offsets_T.tolist() == [3, 0, 0, 1]
    assert step.wanted_W.tolist() == [1]


def test_types_are_what_backends_take() -> None:
    step = prepare(tables(), batch(admitted(1, [1, 2, 3], 3, [0], wants=True)))
    plan = step.plan
    for tensor in (plan.query_starts, plan.context_lens, plan.block_tables):
        assert tensor.dtype is torch.int32
        assert tensor.is_contiguous()
    for tensor in (step.ids_T, step.positions_T, step.wanted_W, plan.write_blocks_T, plan.write_offsets_T):
        assert tensor.dtype is torch.int64
        assert tensor.is_contiguous()


def test_drawn_tokens_feed_the_next_row() -> None:
    t = tables()
    prepare(t, batch(admitted(3, [1, 2, 3], 3, [8], wants=True)))
    t.append([3], [3], [42])
    step = prepare(t, batch(Row(3, 3, 1, wants_token=True)))
    assert step.ids_T.tolist() == [42]
    assert t.tokens[3, :4].tolist() == [1, 2, 3, 42]


def test_a_token_that_is_expected_can_be_computed() -> None:
    t = tables()
    prepare(t, batch(admitted(3, [1, 2, 3], 3, [8]), admitted(1, [5], 1, [9])))
    t.expect(np.array([3, 1]), np.array([3, 1]))
    step = prepare(t, batch(Row(3, 2, 2), Row(1, 1, 1)))
    assert step.ids_T.tolist() == [3, NOT_YET_KNOWN, NOT_YET_KNOWN]
    with pytest.raises(AssertionError, match="known tokens"):
        check(t, [Row(3, 3, 2)])


def test_a_token_at_the_end_of_the_context_is_kept() -> None:
    t = tables()
    prepare(t, batch(admitted(0, range(CONTEXT), CONTEXT, range(10), wants=True)))
    t.append([0], [CONTEXT], [7])
    assert t.tokens[0, CONTEXT] == 7


def test_an_admission_empties_the_slot() -> None:
    t = tables()
    prepare(t, batch(admitted(1, range(20), 20, [1, 2, 3, 4, 5])))
    step = prepare(t, batch(admitted(1, [50, 51], 2, [7])))
    assert step.ids_T.tolist() == [50, 51]
    assert step.plan.block_tables.tolist() == [[7]]


def test_a_step_that_wants_nothing() -> None:
    step = prepare(tables(), batch(admitted(0, range(9), 4, [1])))
    assert step.wanted_W.shape == (0,)


def check(t: SlotTables, rows: Sequence[Row]) -> None:
    """Of rows that bring nothing."""
    slots, starts, counts = (np.array([getattr(row, name) for row in rows]) for name in ("slot", "start", "num_tokens"))
    t.check(slots, starts, starts + counts)


@pytest.mark.parametrize(
    "rows",
    [
        [Row(0, 9, 1)],  # beyond the known tokens
        [Row(0, 8, 0)],  # nothing to compute
        [Row(0, -1, 1)],
        [Row(0, 4, 4, [NUM_BLOCKS])],  # a block outside the pool
        [Row(0, 4, 4, [-1])],
        [Row(1, 0, 1)],  # a slot that was never admitted
    ],
)
def test_what_an_engine_must_not_send_fails(rows: list[Row]) -> None:
    t = tables()
    prepare(t, batch(admitted(0, range(9), 4, [1, 2])))
    with pytest.raises(AssertionError):
        prepare(t, batch(*rows))
    if not any(row.new_block_ids for row in rows):
        with pytest.raises(AssertionError):
            check(t, [Row(0, 4, 4), *rows])


def test_positions_without_blocks_fail() -> None:
    t = tables()
    with pytest.raises(AssertionError, match="have blocks"):
        prepare(t, batch(admitted(0, range(9), 9, [1, 2])))
    check(t, [Row(0, 0, 8)])
    with pytest.raises(AssertionError, match="have blocks"):
        check(t, [Row(0, 0, 9)])


def test_the_count_of_tokens_is_checked() -> None:
    with pytest.raises(AssertionError, match="counts"):
        prepare(tables(), Batch([admitted(0, range(9), 4, [1])], 5))


@pytest.mark.parametrize("seed", range(5))
def test_random_steps_against_lists(seed: int) -> None:
    rng = random.Random(seed)
    num_slots = 6
    t = tables(num_slots)
    known: dict[int, list[int]] = {}
    blocks: dict[int, list[int]] = {}
    computed: dict[int, int] = {}
    for _ in range(60):
        rows = []
        for slot in rng.sample(range(num_slots), rng.randint(1, num_slots)):
            admission = None
            if slot not in known or computed[slot] == len(known[slot]) or rng.random() < 0.05:
                known[slot] = [rng.randrange(1000) for _ in range(rng.randint(1, CONTEXT))]
                blocks[slot], computed[slot] = [], 0
                admission = Admission(known[slot], len(known[slot]), Sampling())
            start = computed[slot]
            num_tokens = rng.randint(1, len(known[slot]) - start)
            new = [rng.randrange(NUM_BLOCKS) for _ in range(-(-(start + num_tokens) // BLOCK_SIZE) - len(blocks[slot]))]
            blocks[slot] += new
            computed[slot] += num_tokens
            rows.append(Row(slot, start, num_tokens, new, computed[slot] == len(known[slot]), admission))
        step = prepare(t, batch(*rows))
        places = [(row.slot, row.start + index) for row in rows for index in range(row.num_tokens)]
        assert step.ids_T.tolist() == [known[slot][position] for slot, position in places]
        assert step.positions_T.tolist() == [position for _, position in places]
        assert step.plan.write_blocks_T.tolist() == [blocks[slot][p // BLOCK_SIZE] for slot, p in places]
        assert step.plan.write_offsets_T.tolist() == [p % BLOCK_SIZE for _, p in places]
        assert step.plan.context_lens.tolist() == [row.start + row.num_tokens for row in rows]
        for index, row in enumerate(rows):
            assert step.plan.block_tables[index, : len(blocks[row.slot])].tolist() == blocks[row.slot]
        wanting = [row for row in rows if row.wants_token]
        lasts = [place for place, (slot, p) in enumerate(places) if p == computed[slot] - 1]
        assert step.wanted_W.tolist() == [place for place in lasts if places[place][0] in {row.slot for row in wanting}]
        drawn = [rng.randrange(1000) for _ in wanting]
        t.append([row.slot for row in wanting], [row.start + row.num_tokens for row in wanting], drawn)
        for row, token in zip(wanting, drawn, strict=True):
            if len(known[row.slot]) < CONTEXT and rng.random() < 0.8:
                known[row.slot].append(token)
