"""A whole step in one call: the bits of the operators one by one, in logits, peaks and cache, and its peaks."""

from __future__ import annotations

import random
from math import isfinite, isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.interface import Backend, Quantization, Row
from model.transformer import Logits
from tests.model.checkpoints import DEFAULT_MODEL, write_checkpoint
from tests.model.levels import LEVELS, needs_kernels
from tests.model.mini_loop import MiniLoop

pytestmark = [needs_kernels, pytest.mark.usefixtures("restored_threads")]

DTYPES = [torch.bfloat16, torch.float32]
NUM_SLOTS, CONTEXT_LENGTH = 12, 96

COMMON_SHAPES: dict[str, dict[str, Any]] = {
    "grouped_biases": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 24, "hidden_size": 96, "bias": True},
    "one_kv_head_tied": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 8, "hidden_size": 34, "tie": True},
}
MORE_SHAPES: dict[str, dict[str, Any]] = {
    "head_64_odd_vocabulary": {"num_kv_heads": 4, "head_dim": 64, "hidden_size": 130, "vocab_size": 501},
    "head_80_one_layer": {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 80, "intermediate_size": 50},
    "head_128_biases": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "hidden_size": 192, "bias": True},
    "head_256_wide": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 256, "intermediate_size": 1000},
}
ODD_SHAPES: dict[str, dict[str, Any]] = {
    "odd_hidden": {"hidden_size": 65, "bias": True},
    "odd_intermediate": {"intermediate_size": 97, "tie": True},
}
SHAPES = {**COMMON_SHAPES, **MORE_SHAPES, **ODD_SHAPES}


def shape_parameters() -> list[Any]:
    """Two shapes always, and the odd ones, which fall back; the others with what is slow."""
    marks = {name: [pytest.mark.slow] for name in MORE_SHAPES}
    return [pytest.param(name, marks=marks.get(name, [])) for name in SHAPES]


@pytest.fixture(scope="module", params=shape_parameters())
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name = request.param
    return name, write_checkpoint(tmp_path_factory.mktemp(name), **SHAPES[name])


def ragged_steps(loop: MiniLoop, vocab_size: int) -> list[list[Row]]:
    """Prompts whole and in chunks, rows that want nothing, decodes, all mixed, in the order of no slot."""
    rng = random.Random(0)
    lengths = [rng.randint(1, 80) for _ in range(NUM_SLOTS)]
    lengths[:3] = [1, 80, 64]
    steps: list[list[Row]] = [[] for _ in range(4)]
    for slot, length in enumerate(lengths):
        ids = [rng.randrange(vocab_size) for _ in range(length + 8)]
        start, known = 0, ids[:length]
        for index, step in enumerate(steps):
            share = length if slot % 3 == 0 or index == 2 else rng.randint(1, 30)
            if start < length:
                count = min(share, length - start)
                wants = start + count == length and slot % 4 != 3
                first = loop.admit(slot, known, count)
                admission = first.admission if start == 0 else None
                step.append(Row(slot, start, count, first.new_block_ids if start == 0 else (), wants, admission))
            else:
                count = 1
                step.append(Row(slot, start, 1, wants_token=True))
            start += count
    for step in steps:
        rng.shuffle(step)
    steps.append([Row(row.slot, row.start + row.num_tokens, 1) for row in steps[-1] if row.slot % 2])  # nobody wants
    return steps


def kept(logits: Logits) -> Logits:
    """What the next step does not overwrite."""
    return logits._replace(values_WV=logits.values_WV.clone())


def run(loop: MiniLoop, steps: list[list[Row]]) -> list[Logits]:
    """All that each step gives. A row that decodes is fed a token that depends on its place alone."""
    found = []
    for rows in steps:
        for row in rows:
            if row.admission is None and row.start == loop.tables._num_known[row.slot]:
                loop.tables.append([row.slot], [row.start], [(7 * row.start + row.slot) % 500])
        found.append(kept(loop.forward(rows)))
    return found


def all_equal(a: list[Logits], b: list[Logits]) -> bool:
    return all(torch.equal(x.values_WV, y.values_WV) and x[1:] == y[1:] for x, y in zip(a, b, strict=True))


MOST_THREADS = 4


def make_loop(directory: Path, dtype: torch.dtype, **names: Any) -> MiniLoop:
    torch.set_num_threads(MOST_THREADS)  # it takes steps on so many threads, or fewer
    return MiniLoop(directory, dtype, num_slots=NUM_SLOTS, context_length=CONTEXT_LENGTH, **names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize("level", LEVELS)
def test_one_call_has_the_bits_of_the_operators(
    shape: tuple[str, Path], level: str, quantization: Quantization, dtype: torch.dtype
) -> None:
    name, directory = shape
    whole, parts = (
        make_loop(directory, dtype, level=level, quantization=quantization, by_operators=by_operators)
        for by_operators in (False, True)
    )
    falls_back = name in ODD_SHAPES and dtype is torch.bfloat16 and quantization is Quantization.NONE
    assert whole.is_one_call is not falls_back and not parts.is_one_call
    steps = ragged_steps(whole, 500)
    torch.set_num_threads(1)
    expected = run(parts, steps)
    assert len(expected[0][0]) < len(steps[0]) and len(expected[-1][0]) == 0
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        assert all_equal(run(whole, steps), expected), num_threads
        for ours, theirs in ((whole.cache.k, parts.cache.k), (whole.cache.v, parts.cache.v)):
            assert all(map(torch.equal, ours, theirs))
        for tensor in (*whole.cache.k, *whole.cache.v):
            tensor.fill_(3.0)  # the next round starts on what others left
        for layer in range(len(whole.cache.k)):
            parts.cache.k[layer].fill_(3.0)
            parts.cache.v[layer].fill_(3.0)
        expected_again = run(parts, steps)
        assert all_equal(expected_again, expected)


@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_model_goes_through_in_one_call(dtype: torch.dtype, quantization: Quantization) -> None:
    whole = make_loop(DEFAULT_MODEL, dtype, quantization=quantization)
    parts = make_loop(DEFAULT_MODEL, dtype, quantization=quantization, by_operators=True)
    assert whole.is_one_call
    steps = ragged_steps(whole, 4096)
    expected = run(parts, steps)
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        assert all_equal(run(whole, steps), expected), num_threads


def test_large_and_small_steps_take_turns(tmp_path: Path) -> None:
    """Small ones are not worth a second thread: one that is late out of a large one must not disturb them."""
    loop = make_loop(write_checkpoint(tmp_path, hidden_size=128), torch.float32)
    large = [loop.admit(slot, range(slot, slot + 60), 60) for slot in range(4)]
    small = [loop.admit(NUM_SLOTS - 1, [3, 4], 2)]
    torch.set_num_threads(1)
    expected = loop.step(large), loop.step(small)
    rng = random.Random(0)
    for _ in range(150):
        torch.set_num_threads(rng.randint(2, MOST_THREADS))
        assert torch.equal(loop.step(large), expected[0])
        for _ in range(rng.randint(1, 4)):
            assert torch.equal(loop.step(small), expected[1])


def test_logits_belong_to_the_decoder_until_the_next_step(tmp_path: Path) -> None:
    """They are not copied: who wants to keep them does that."""
    loop = make_loop(write_checkpoint(tmp_path), torch.float32)
    first = loop.forward([loop.admit(0, [1, 2, 3], 3)])
    before = first.values_WV.clone()
    assert torch.equal(first.values_WV, before)
    second = loop.forward([loop.admit(1, [4, 5, 6], 3)])
    assert second.values_WV.data_ptr() == first.values_WV.data_ptr()
    assert not torch.equal(first.values_WV, before)


def test_a_step_larger_than_its_room_is_our_mistake(tmp_path: Path) -> None:
    loop = MiniLoop(write_checkpoint(tmp_path), torch.float32, num_slots=2, context_length=32)
    loop._forward.__self__._max_tokens = 5  # type: ignore[attr-defined]
    loop.forward([loop.admit(0, range(5), 5)])
    with pytest.raises(AssertionError):
        loop.forward([loop.admit(0, range(6), 6)])


NAN, INF = float("nan"), float("inf")
SPECIAL: dict[str, dict[int, float]] = {
    "plain": {},
    "equal": {1: 100.0, 2: 100.0, -1: 100.0},
    "equal_at_the_end": {-2: 100.0, -1: 100.0},
    "first": {0: 100.0},
    "last": {-1: 100.0},
    "nan_first": {0: NAN},
    "nan_last": {-1: NAN},
    "nan_beside_the_largest": {0: INF, 1: NAN},
    "infinite": {-1: INF, 1: INF},
    "some_minus_infinite": {0: -INF, -1: -INF},
}


def check_peaks(loop: MiniLoop, biases: Tensor) -> Logits:
    """The unembedding's bias makes the logits what they should be."""
    unembedding = loop.transformer.unembedding
    unembedding._bias.zero_()  # type: ignore[attr-defined]
    unembedding._bias[: len(biases)] = biases  # type: ignore[attr-defined]
    prompts = [[(slot + i) % len(biases) for i in range(3)] for slot in range(NUM_SLOTS)]
    found = loop.forward([loop.admit(slot, ids, 3) for slot, ids in enumerate(prompts)])
    expected = Logits.of(found.values_WV)
    assert found.peaks == pytest.approx(expected.peaks, rel=0, abs=0, nan_ok=True)
    for peak, peak_id, expected_id in zip(expected.peaks, found.peak_ids, expected.peak_ids, strict=True):
        assert peak_id in range(len(biases)) if isnan(peak) else peak_id == expected_id
    return found


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vocab_size", [3, 5, 16, 17, 31, 64, 333])
def test_peaks_are_torchs(tmp_path: Path, level: str, vocab_size: int) -> None:
    directory = write_checkpoint(tmp_path, vocab_size=vocab_size, num_layers=1, config={"eos_token_id": None})
    torch.set_num_threads(MOST_THREADS)
    loop = MiniLoop(directory, torch.float32, num_slots=NUM_SLOTS, context_length=16, level=level)
    assert loop.is_one_call
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        for special in SPECIAL.values():
            biases = torch.zeros(vocab_size)
            for place, value in special.items():
                biases[place] = value
            check_peaks(loop, biases)
        assert check_peaks(loop, torch.full((vocab_size,), -INF)).peaks == [-INF] * NUM_SLOTS
        assert all(map(isnan, check_peaks(loop, torch.full((vocab_size,), NAN)).peaks))
        loop.transformer.unembedding.packed.words.zero_()  # type: ignore[attr-defined]
        assert set(check_peaks(loop, torch.zeros(vocab_size)).peak_ids) == {0}  # all are equal
        for place in range(0, vocab_size, 1 + vocab_size // 40):
            biases = torch.zeros(vocab_size)
            biases[place:] = 1.0
            assert set(check_peaks(loop, biases).peak_ids) == {place}


@pytest.mark.parametrize("backend", [Backend.NATIVE, Backend.TORCH])
def test_a_broken_sequence_breaks_no_other(tmp_path: Path, backend: Backend) -> None:
    directory = write_checkpoint(tmp_path)
    loop = make_loop(directory, torch.bfloat16, backend=backend)
    rows = [loop.admit(slot, range(slot, slot + 20), 20) for slot in range(NUM_SLOTS)]
    expected = kept(loop.forward(rows))
    loop.transformer.embedding_VE[25] = NAN
    found = loop.forward(rows)
    broken = [slot for slot in range(NUM_SLOTS) if 25 in range(slot, slot + 20)]
    whole = [slot for slot in range(NUM_SLOTS) if slot not in broken]
    assert broken and whole
    assert not any(isfinite(found.peaks[slot]) for slot in broken)
    assert torch.equal(found.values_WV[whole], expected.values_WV[whole])
    for slot in whole:
        assert (found.peaks[slot], found.peak_ids[slot]) == (expected.peaks[slot], expected.peak_ids[slot])
