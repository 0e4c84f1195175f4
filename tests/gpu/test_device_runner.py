"""DeviceRunner against TorchRunner, on a device that does everything at the last moment, in Triton's interpreter.

Block size, model and steps are the same for both, so that a script of batches says what either computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.gpu import device_runner
from model.gpu.device_runner import DeviceRunner
from model.gpu.graphs import Buckets
from model.gpu.products import Candidate, library_product
from model.gpu.runner import load_device_runner
from model.interface import Admission, Backend, Batch, Dtype, Row, Runner, RunnerOptions, Sampled, Sampling
from model.runner import load_runner
from tests.gpu.late_device import LIBRARY, LateDevice, LateEvent
from tests.model.checkpoints import write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

VOCAB_SIZE = 131
BLOCK_SIZE = 64
CONTEXT_LENGTH = 160
NUM_SLOTS = 4
BUCKETS = Buckets(decode=(1, 2, 4), mixed=(8, 16))
GREEDY = Sampling(temperature=0.0)
TOLD = Sampling(temperature=0.0, num_logprobs=4)
SAMPLINGS = (
    TOLD,
    Sampling(temperature=0.9, top_p=0.9, seed=3),
    Sampling(
        temperature=1.1,
        top_k=40,
        min_p=0.01,
        seed=2**40 + 1,
        repetition_penalty=1.3,
        frequency_penalty=0.2,
        presence_penalty=0.1,
        logit_bias=((7, 2.0), (9, -1.0)),
        num_logprobs=2,
    ),
    Sampling(temperature=1.4, seed=11, num_logprobs=0),
)
PROMPTS = ([5, 6, 7], [9], list(range(20, 33)), list(range(100, 84, -2)))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("model"), vocab_size=VOCAB_SIZE, hidden_size=32, num_heads=2, num_kv_heads=1,
        head_dim=16, intermediate_size=48, context_length=CONTEXT_LENGTH, bias=True,
    )  # fmt: skip


def options(model_dir: Path, **changes: object) -> RunnerOptions:
    small = {
        "dtype": Dtype.FLOAT32,
        "num_blocks": 12,
        "block_size": BLOCK_SIZE,
        "max_num_seqs": NUM_SLOTS,
        "max_batch_tokens": 32,
        "num_threads": 1,
    }
    return RunnerOptions(str(model_dir), **{**small, **changes})  # type: ignore[arg-type]


@cache
def loaded(
    model_dir: Path, runs_ahead: bool = False, captures_graphs: bool = True, buckets: Buckets = BUCKETS
) -> tuple[DeviceRunner, LateDevice]:
    """One runner serves many tests, one after the other: an admission leaves nothing of a slot's past."""
    device = LateDevice(runs_ahead)
    given = options(model_dir, captures_graphs=captures_graphs, backend=Backend.GPU)
    return load_device_runner(given, device=device, buckets=buckets, products=LIBRARY)[0], device


@cache
def on_the_cpu(model_dir: Path) -> Runner:
    return load_runner(options(model_dir, backend=Backend.TORCH))[0]


def admit(slot: int, ids: Sequence[int], num_tokens: int, sampling: Sampling = GREEDY, **limits: object) -> Row:
    """The first row of a sequence, with blocks for a whole context."""
    first_block = 3 * slot
    admission = Admission(ids, len(ids), sampling, **limits)  # type: ignore[arg-type]
    return Row(slot, 0, num_tokens, range(first_block, first_block + 3), num_tokens == len(ids), admission)


def decode(slot: int, start: int, num_steps: int) -> list[list[Row]]:
    """Steps of one sequence's next tokens."""
    return [[Row(slot, position, 1, wants_token=True)] for position in range(start, start + num_steps)]


def script() -> list[list[Row]]:
    """Four sequences that come one after another, one of them in chunks, and decode beside one another."""
    late = admit(3, PROMPTS[3], 8, SAMPLINGS[3], min_new_tokens=3, end_token_ids=(4, 30))
    return [
        [admit(0, PROMPTS[0], 3, SAMPLINGS[0])],
        [*decode(0, 3, 1)[0], admit(2, PROMPTS[2], 7, SAMPLINGS[2])],
        [admit(1, PROMPTS[1], 1, SAMPLINGS[1]), Row(2, 7, 1), *decode(0, 4, 1)[0]],
        [Row(2, 8, 5, wants_token=True), *decode(1, 1, 1)[0]],
        [*decode(2, 13, 1)[0], late],
        *([row for (row,) in rows] for rows in zip(decode(3, 8, 2), decode(0, 5, 2), decode(2, 14, 2), strict=True)),
        *decode(3, 10, 1),
    ]


def play(runner: Runner, steps: Sequence[list[Row]], depth: int = 0) -> list[Sampled]:
    """Launches all steps, each `depth` ahead of the one whose result is asked for."""
    pendings, found = [], []
    for rows in steps:
        pendings.append(runner.launch(Batch(rows, sum(row.num_tokens for row in rows))))
        if len(pendings) > depth:
            found.append(pendings.pop(0).result())
    return found + [pending.result() for pending in pendings]


def assert_same(found: Sequence[Sampled], expected: Sequence[Sampled]) -> None:
    """Equal tokens; log-probabilities that differ by rounding at most."""
    assert [step.token_ids for step in found] == [step.token_ids for step in expected]
    assert [step.is_finite for step in found] == [step.is_finite for step in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for one, other in zip(mine.logprobs, theirs.logprobs, strict=True):
            if one is None or other is None:
                assert one is other
                continue
            assert one.top_ids == other.top_ids
            assert [one.chosen, *one.top_logprobs] == pytest.approx([other.chosen, *other.top_logprobs], abs=2e-5)


def tokens_of(slot: int, steps: Sequence[list[Row]], found: Sequence[Sampled]) -> list[int]:
    """What was drawn for one slot."""
    drawing = [[row.slot for row in rows if row.wants_token] for rows in steps]
    return [step.token_ids[slots.index(slot)] for slots, step in zip(drawing, found, strict=True) if slot in slots]


@pytest.mark.parametrize(
    ("runs_ahead", "captures_graphs", "depth"),
    [
        pytest.param(False, True, 1, id="graphs, late"),
        pytest.param(True, True, 1, id="graphs, ahead", marks=pytest.mark.slow),
        pytest.param(False, False, 0, id="eager, a step at a time", marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_the_cpu(model_dir: Path, runs_ahead: bool, captures_graphs: bool, depth: int) -> None:
    steps = script()
    expected = play(on_the_cpu(model_dir), steps)
    assert len({token for step in expected for token in step.token_ids}) > 8
    mine, device = loaded(model_dir, runs_ahead, captures_graphs)
    num_replayed = device.num_replayed
    assert_same(play(mine, steps, depth), expected)
    # Each step has a bucket, and each draw; where a row has penalties or must not end yet, the draw is launched anew.
    assert device.num_replayed - num_replayed == (8 + 4 if captures_graphs else 0)


def test_a_sequence_alone_has_the_same_tokens(model_dir: Path) -> None:
    expected = tokens_of(0, script(), play(on_the_cpu(model_dir), script()))
    steps = [[admit(1, PROMPTS[0], 3, SAMPLINGS[0])], *decode(1, 3, 4)]
    assert tokens_of(1, steps, play(loaded(model_dir)[0], steps, depth=1)) == expected


@pytest.mark.parametrize("chunks", [[13], [4, 9], [1] * 13, [11, 2]], ids=str)
def test_chunks_of_a_prompt_change_nothing(model_dir: Path, chunks: list[int]) -> None:
    prompt, mine = PROMPTS[2], loaded(model_dir)[0]
    expected = play(on_the_cpu(model_dir), [[admit(0, prompt, 13, TOLD)], *decode(0, 13, 1)])
    steps, start = [[admit(0, prompt, chunks[0], TOLD)]], chunks[0]
    for size in chunks[1:]:
        steps.append([Row(0, start, size, wants_token=start + size == 13)])
        start += size
    assert_same(play(mine, [*steps, *decode(0, 13, 1)], depth=1)[-2:], expected)


def test_a_sequence_goes_on_in_another_slot_after_preemption(model_dir: Path) -> None:
    """With penalties, which count what was generated before; its own slot and blocks have gone to another sequence."""
    mine, theirs = loaded(model_dir)[0], on_the_cpu(model_dir)
    prompt, sampling = PROMPTS[3], Sampling(temperature=0.0, repetition_penalty=1.2, frequency_penalty=1.0)
    whole = [[admit(0, prompt, 8, sampling)], *decode(0, 8, 7)]
    tokens = tokens_of(0, whole, play(theirs, whole))
    only_of_prompt = [[admit(0, prompt, 8, replace(sampling, frequency_penalty=0.0))], *decode(0, 8, 7)]
    assert tokens_of(0, only_of_prompt, play(theirs, only_of_prompt)) != tokens, "what was generated counts"
    assert tokens_of(0, whole[:5], play(mine, whole[:5], depth=1)) == tokens[:5]
    again = Row(3, 0, 13, range(9, 12), True, Admission([*prompt, *tokens[:5]], 8, sampling))
    again = replace(again, num_tokens=10, wants_token=False)
    rest = [[admit(0, PROMPTS[2], 13), again], [Row(3, 10, 3, wants_token=True)], *decode(3, 13, 2)]
    assert tokens_of(3, rest, play(mine, rest, depth=1)) == tokens[5:]


def test_a_slot_forgets_who_was_there_before(model_dir: Path) -> None:
    mine, theirs = loaded(model_dir)[0], on_the_cpu(model_dir)
    demanding = Sampling(temperature=0.0, logit_bias=tuple((i, 50.0) for i in range(20)), presence_penalty=2.0)
    before = [[admit(0, [1, 2], 2, demanding, min_new_tokens=9, end_token_ids=tuple(range(3, 9)))]]
    steps = [[admit(0, PROMPTS[3], 8, TOLD)], *decode(0, 8, 2)]
    assert_same(play(mine, [*before, *steps], depth=1)[1:], play(theirs, steps))
    some = Sampling(temperature=0.0, logit_bias=((3, 1.0),), presence_penalty=0.5)
    steps[0] = [admit(0, PROMPTS[3], 8, some, min_new_tokens=2, end_token_ids=(5,))]
    assert_same(play(mine, [*before, *steps], depth=1)[1:], play(theirs, steps))


def test_a_context_is_computed_to_its_end_and_blocks_come_as_they_are_needed(model_dir: Path) -> None:
    mine, theirs = loaded(model_dir)[0], on_the_cpu(model_dir)
    prompt = [position % VOCAB_SIZE for position in range(CONTEXT_LENGTH)]
    steps = [[Row(0, 0, 30, (11,), admission=Admission(prompt, CONTEXT_LENGTH, TOLD))], [Row(0, 30, 32)]]
    steps += [[Row(0, 62, 32, (4,))], [Row(0, 94, 32)], [Row(0, 126, 3, (7,))], [Row(0, 129, 31, wants_token=True)]]
    assert_same(play(mine, steps, depth=1), play(theirs, steps))


@pytest.mark.slow
def test_bfloat16_is_near_the_cpus(model_dir: Path) -> None:
    """Both round at the same places; the interpreter cuts bits off where a card rounds."""
    given = {"dtype": Dtype.BFLOAT16, "captures_graphs": False}
    mine, _ = load_device_runner(options(model_dir, **given), device=LateDevice(), buckets=BUCKETS, products=LIBRARY)
    theirs, _ = load_runner(options(model_dir, backend=Backend.TORCH, **given))
    steps = [[admit(0, PROMPTS[2], 13, TOLD)], [admit(1, PROMPTS[2], 13, TOLD)]]
    for found, expected in zip(play(mine, steps), play(theirs, steps), strict=True):
        one, other = found.logprobs[0], expected.logprobs[0]
        assert one is not None and other is not None
        assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=0.1)
        assert found.token_ids == expected.token_ids


def by_rows(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_MO: Tensor) -> None:
    """A product whose rows have the same bits whatever their number."""
    for row in range(len(x_MI)):
        library_product(x_MI[row : row + 1], weight_OI, bias_O, out_MO[row : row + 1])


def test_padding_and_neighbours_change_no_bit(model_dir: Path) -> None:
    """Where products keep rows apart. Log-probabilities of a row that asks show its logits."""
    steps = [[admit(slot, PROMPTS[slot], len(PROMPTS[slot]), TOLD) for slot in (0, 1)]]
    steps += [[*rows, *others] for rows, others in zip(decode(0, 3, 2), decode(1, 1, 2), strict=True)]
    found = []
    for buckets in (Buckets((2,), (4,)), Buckets((3,), (11,)), Buckets((4,), ())):
        given, products = options(model_dir, captures_graphs=False), [Candidate("by rows", by_rows)]
        mine, _ = load_device_runner(given, device=LateDevice(), buckets=buckets, products=products)
        found.append(play(mine, steps))
    assert found[0] == found[1] == found[2]
    alone = play(mine, [[row for row in rows if row.slot == 0] for rows in steps])
    assert [step.logprobs[0] for step in alone] == [step.logprobs[0] for step in found[0]]


def test_launch_waits_for_nothing(model_dir: Path) -> None:
    mine, device = loaded(model_dir)
    pendings = []
    for rows in script()[:2]:
        num_done = device.num_done
        pendings.append(mine.launch(Batch(rows, sum(row.num_tokens for row in rows))))
        assert device.num_done == num_done
    assert pendings[0].result() == pendings[0].result()
    assert device.num_done < device.num_enqueued, "the second step has not run"
    assert pendings[1].result().token_ids


def test_memory_of_a_step_in_flight_is_left_alone(model_dir: Path) -> None:
    """Without asking for a result in between, `launch` waits for the step before the last."""
    mine, device = loaded(model_dir)
    steps = script()
    assert_same(play(mine, steps, depth=len(steps)), play(on_the_cpu(model_dir), steps))
    assert device.num_done == device.num_enqueued


def reuse_at_once(mine: DeviceRunner) -> Callable[[DeviceRunner], device_runner.Piece]:
    """In place of `_next_piece`: the same memory for every step, whatever is in flight."""
    piece = next(mine._pieces)
    return lambda runner: piece


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["pinned memory is written too early", "results are overwritten"])
def test_the_device_of_these_tests_shows_faults(model_dir: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A single sequence that decodes, so that wrong inputs are those of another step and nothing worse."""
    is_of_results = fault == "results are overwritten"
    mine, _ = loaded(model_dir, runs_ahead=is_of_results)
    prompt, steps = [admit(0, PROMPTS[3], 8, SAMPLINGS[3])], decode(0, 8, 5)
    expected = play(on_the_cpu(model_dir), [prompt, *steps])
    assert len({step.token_ids[0] for step in expected[1:]}) == 5
    assert_same(play(mine, [prompt]), expected[:1])
    if is_of_results:
        monkeypatch.setattr(LateEvent, "hold", lambda event: None)
    else:
        monkeypatch.setattr(DeviceRunner, "_next_piece", reuse_at_once(mine))
    with pytest.raises(AssertionError):
        assert_same(play(mine, steps, depth=1), expected[1:])


def test_a_broken_row_is_told_and_spoils_no_other(tmp_path: Path) -> None:
    directory = write_checkpoint(
        tmp_path, vocab_size=VOCAB_SIZE, hidden_size=32, num_heads=2, num_kv_heads=1, num_layers=1
    )
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][50] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    given = options(directory, context_length=CONTEXT_LENGTH)
    mine, _ = load_device_runner(given, device=LateDevice(), buckets=BUCKETS, products=LIBRARY)
    theirs, _ = load_runner(options(directory, context_length=CONTEXT_LENGTH, backend=Backend.TORCH))
    steps = [[admit(0, [5, 50, 7], 3, TOLD), admit(1, [5, 51, 7], 3, TOLD)]]
    (found,), (expected,) = play(mine, steps), play(theirs, steps)
    assert found.is_finite == expected.is_finite == [False, True]
    assert found.token_ids[1] == expected.token_ids[1]
    assert found.logprobs[0] is None and found.logprobs[1] is not None
