"""The benches of a card, on a CPU: what they call right and wrong, their limits, and what they choose between."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from loadtest.gpu import (  # noqa: E402
    attention,
    attention_cases,
    engine,
    logits,
    operators,
    products,
    sampler,
    server,
    steps,
    tiles,
)
from loadtest.gpu import models as write_models  # noqa: E402
from loadtest.gpu.attention import DRY_TILES, TILES  # noqa: E402
from loadtest.gpu.attention_cases import Cache, Case, Spans  # noqa: E402
from loadtest.gpu.measure import compile_ahead, measure, num_repeats, num_sets, relative_error  # noqa: E402
from loadtest.gpu.records import PartOptions, Records, read_records  # noqa: E402
from loadtest.gpu.shapes import DRY_SHAPES, cost_of, matrices_of, shape_of  # noqa: E402
from loadtest.gpu.works import CARD, DRY, closed_works, wide_works  # noqa: E402
from loadtest.models import CARD_SHAPES, write_model  # noqa: E402
from loadtest.roofline import MachineRates  # noqa: E402
from model.gpu.attention import PagedAttention, Tile  # noqa: E402
from model.gpu.flash_attention import MODULE  # noqa: E402
from model.interface import Batch, Dtype, GpuAttention, RunnerOptions  # noqa: E402
from model.runner import load_runner  # noqa: E402
from tests.gpu import fake_flash_attn  # noqa: E402

CPU = torch.device("cpu")
RATES = MachineRates(bytes_read=1e9, product_operations=1e12, attention_operations=1e12)
TINY = DRY_SHAPES["1B"]


def options_in(folder: Path, seconds: float = 60.0) -> PartOptions:
    return PartOptions(Records(folder / "found.jsonl", "part"), True, "1B", folder, time.monotonic() + seconds)


def test_an_error_is_relative_and_nothing_missing_is_right() -> None:
    ones = torch.ones(4)
    assert relative_error(ones * 1.1, ones) == pytest.approx(0.1)
    ones[2] = float("nan")
    assert not relative_error(ones, torch.ones(4)) < 1e9


def test_matrices_are_all_of_a_models_weights() -> None:
    for shape in (*CARD_SHAPES.values(), *DRY_SHAPES.values()):
        found = sum(matrix.count * matrix.num_outputs * matrix.num_inputs for matrix in matrices_of(shape))
        assert found == cost_of(shape).weights
    with pytest.raises(ValueError, match="model 'X' is none of 1B, 8B"):
        shape_of("X", is_dry=False)


def test_attentions_limit_is_its_bytes_or_its_operations() -> None:
    shape = CARD_SHAPES["8B"]
    decode = Spans(64, 1024).least_seconds(shape, RATES)
    assert decode == pytest.approx(64 * 1024 * 2 * 8 * 128 * 2 / 1e9)
    pairs = sum(range(7169, 8193))
    assert Spans(1, 8192, 1024).least_seconds(shape, RATES) == pytest.approx(4 * pairs * 32 * 128 / 1e12)


def test_a_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, spans = Cache(TINY, 512, CPU), Spans(2, 70)
    assert Case(cache, spans, DRY_TILES).error() < 0.01
    attend = PagedAttention.attend

    def forgetful(self: PagedAttention, *tensors: torch.Tensor, is_decode_only: bool, plan: torch.Tensor) -> None:
        attend(self, *tensors, is_decode_only=is_decode_only, plan=plan)
        tensors[4][-1] = 0

    monkeypatch.setattr(PagedAttention, "attend", forgetful)
    assert Case(cache, spans, DRY_TILES).error() > 0.1
    monkeypatch.setattr(PagedAttention, "attend", lambda self, *tensors, is_decode_only, plan: None)
    assert not Case(cache, spans, DRY_TILES).error() < 1e9


def test_flash_attention_3_is_measured_where_it_computes_and_named_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, MODULE, fake_flash_attn.module())
    for fault, found in ((None, "attention"), ("it is not there", "attention left out")):
        folder = tmp_path / found
        folder.mkdir()
        monkeypatch.setattr(attention, "find_flash_fault", lambda options, name, fault=fault: fault)
        monkeypatch.setattr(attention, "DRY_SPANS", [Spans(2, 70), Spans(1, 20, 20)])
        assert attention.main(["--dry", "--records", str(folder / "found.jsonl")]) == 0
        records = [record for record in read_records(folder / "found.jsonl") if "by" in record]
        assert [record["kind"] for record in records if record["by"] == GpuAttention.TRITON] == ["attention"] * 2
        assert {record["kind"] for record in records if record["by"] == GpuAttention.FLASH_ATTENTION_3} == {found}
        assert all(record["is_right"] for record in records if record["kind"] == "attention")


def test_blocks_are_in_random_places_and_none_twice() -> None:
    cache = Cache(TINY, 512, CPU)
    table = cache.tables(3, 100, seed=1)
    assert table.shape == (3, 7) and len(set(table.flatten().tolist())) == 21
    assert table[0].tolist() != sorted(table[0].tolist())
    assert not torch.equal(table, cache.tables(3, 100, seed=2))


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_choices_are_the_present_one_and_what_differs_from_it_in_one_phase(phase: str) -> None:
    present, *others = tiles.choices_of(phase, TILES)
    assert present == TILES and len(others) == len(set(others)) > 8 and present not in others
    other_phase = {"decode": "prefill", "prefill": "decode"}[phase]
    assert all(choice.tile_of(other_phase) == TILES.tile_of(other_phase) for choice in others)
    grids = [choice for choice in others if choice.per_multiprocessor != TILES.per_multiprocessor]
    assert len(grids) == 3 and all(choice.tile_of(phase) == TILES.tile_of(phase) for choice in grids)


def test_the_best_tile_is_the_quickest_and_one_that_does_not_fit_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {DRY_TILES: [2.0], (faster := replace(DRY_TILES, per_multiprocessor=1)): [1.0]}
    misfit = DRY_TILES.with_tile("decode", Tile(16, 24, 48, 4, 3))
    measure = tiles.measure_choice

    def invented(options: object, cache: Cache, spans: object, choice: tiles.Tiles) -> list[float] | str:
        return seconds[choice] if choice in seconds else measure(options, cache, spans, choice)

    monkeypatch.setattr(tiles, "measure_choice", invented)
    monkeypatch.setattr(tiles, "rates_of", lambda options: RATES)
    options = options_in(tmp_path)
    assert tiles.measure_phase(options, "1B", "decode", [DRY_TILES, misfit, faster], Cache(TINY, 256, CPU))
    *_, best = records = read_records(options.records.file)
    assert records[1]["failure"] == "ValueError: 24 keys: a power of two from 16 on is needed"
    assert best["kind"] == "best tile" and best["programs_per_multiprocessor"] == 1
    assert best["time_by_present"] == pytest.approx(0.5) and not best["is_present"]


def test_no_choice_is_begun_when_the_time_is_short(tmp_path: Path) -> None:
    options = options_in(tmp_path, seconds=1.0)
    tiles.rates_of(options)
    assert not tiles.measure_phase(options, "1B", "decode", [DRY_TILES], Cache(TINY, 256, CPU))
    assert {record["kind"] for record in read_records(options.records.file)} == {"limits"}


def test_a_product_whose_rows_depend_on_their_number_is_told() -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(16, 8).bfloat16()
    matrix = products.Matrix("o", 16, 8, 1)
    assert products.examine(products.library_product, matrix, x, weight)[1]

    def dependent(x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: None, out_MO: torch.Tensor) -> None:
        products.library_product(x_MI, weight_OI, bias_O, out_MO)
        out_MO *= 1 + 2**-7 * (len(x_MI) > 1)

    error, has_own_bits = products.examine(dependent, matrix, x, weight)
    assert error < 0.01 and not has_own_bits


def test_a_products_limit_is_its_weights_or_its_operations() -> None:
    matrix = products.Matrix("o", 1000, 500, 1)
    assert products.least_seconds(matrix, 1, RATES) == pytest.approx(1e6 / 1e9)
    assert products.least_seconds(matrix, 4000, RATES) == pytest.approx(2 * 4000 * 5e5 / 1e12)


def test_a_wrong_operator_fails_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "OPERATORS", {"embed": operators.make_embed})
    command = ["--dry", "--records", str(tmp_path / "found.jsonl")]
    assert operators.main(command) == 0
    monkeypatch.setattr(operators.operators, "embed", lambda *tensors: tensors[-1].zero_())
    assert operators.main(command) == 1


def test_draws_that_differ_from_the_cpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 300) * 3
    slots = sampler.Slots(sampler.WAYS["penalties"], 3, 300, CPU)
    assert slots.num_different(logits) == 0
    monkeypatch.setattr(sampler, "apply_penalties", lambda logits_RV, *_: logits_RV.neg_())
    assert slots.num_different(logits) >= 2


def test_compiling_ahead_is_done_by_forks_of_which_none_can_hold_up_or_break_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("out of shared memory")

    started_at = time.monotonic()
    touched = [tmp_path / name for name in "abcd"]
    # Forks take every n-th call each: what fails comes before what touches, what hangs comes last.
    calls = [fail] * 8 + [partial(path.touch) for path in touched for _ in range(4)] + [partial(time.sleep, 60)]
    compile_ahead(calls, 3.0)
    assert time.monotonic() - started_at < 30
    assert all(path.exists() for path in touched)
    assert "compiling ahead: RuntimeError: out of shared memory" in capfd.readouterr().out


def test_the_time_of_a_call_is_the_smaller_of_two_and_its_noise_their_difference() -> None:
    seconds = iter([0.06, 0.02])
    timing = measure([lambda: time.sleep(next(seconds))], CPU)
    assert timing.seconds == pytest.approx(0.02, rel=0.5)
    assert timing.noise > 0.5


@pytest.mark.parametrize(
    ("seconds", "num_calls", "repeats"), [(1e-5, 1, 64), (1e-4, 1, 20), (1e-4, 7, 3), (1e-4, 48, 1), (0.1, 1, 1)]
)
def test_a_replay_is_long_enough_to_be_timed(seconds: float, num_calls: int, repeats: int) -> None:
    assert num_repeats(seconds, num_calls) == repeats


def test_inputs_are_one_set_where_there_is_no_card() -> None:
    assert num_sets(1.0, CPU) == 1


def test_a_prompt_in_parts_brings_its_blocks_once_and_draws_once() -> None:
    admission = steps.Admission((1,) * 20, 20, steps.GREEDY)
    rows = list(steps.prompt_rows(3, range(5), admission, 8))
    assert [(row.start, row.num_tokens) for row in rows] == [(0, 8), (8, 8), (16, 4)]
    assert [row.wants_token for row in rows] == [False, False, True]
    assert [(row.admission, list(row.new_block_ids)) for row in rows[1:]] == [(None, [])] * 2
    assert rows[0].admission == admission and list(rows[0].new_block_ids) == list(range(5))


class Recorded:
    """A runner's steps, and in which order they were launched and waited for."""

    def __init__(self, runner: steps.Runner) -> None:
        self._runner = runner
        self.shape = runner.shape
        self.events: list[str] = []

    def launch(self, batch: Batch) -> Recorded:
        self.events.append("launch")
        self._runner.launch(batch)
        return self

    def result(self) -> None:
        self.events.append("result")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> steps.Runner:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(TINY, folder)
    options = RunnerOptions(str(folder), Dtype.BFLOAT16, max_num_seqs=2, max_batch_tokens=32)
    return load_runner(options)[0]


def test_steps_are_launched_one_ahead_or_alone(runner: steps.Runner) -> None:
    recorded = Recorded(runner)
    driver = steps.Driver(recorded, steps.DRY_PLAN, TINY.vocab_size)
    assert driver.admit(range(2), 40, 20, seed=1) > 0
    assert recorded.events.count("launch") == recorded.events.count("result") == 4  # 32 + 8 tokens each
    assert driver.contexts(range(2)) == [41, 41]
    for depth, most in ((0, 1), (1, 2)):
        recorded.events.clear()
        ends = driver.decode(range(2), 5, depth)
        assert len(ends) == 5 and ends == sorted(ends)
        ahead = accumulate(1 if event == "launch" else -1 for event in recorded.events)
        assert max(ahead) == most
    assert driver.contexts(range(2)) == [51, 51]


def test_blocks_of_sequences_do_not_overlap(runner: steps.Runner) -> None:
    seen: list[int] = []

    class Watching(Recorded):
        def launch(self, batch: Batch) -> Recorded:
            seen.extend(block for row in batch.rows for block in row.new_block_ids)
            return super().launch(batch)

    driver = steps.Driver(Watching(runner), steps.DRY_PLAN, TINY.vocab_size)
    driver.admit(range(2), 20, 20, seed=1)
    size = runner.shape.block_size
    assert len(seen) == len(set(seen)) == 2 * -(-40 // size)


def test_gaps_leave_the_warm_up_out() -> None:
    assert steps.median_gap([0.0, 50.0, 51.0, 52.5, 53.5], 1) == pytest.approx(1.0)


def test_only_a_dry_run_takes_another_backend_than_the_cards(tmp_path: Path) -> None:
    write_model(TINY, tmp_path / "1B")
    options = options_in(tmp_path)
    steps.load(options, steps.DRY_PLAN)
    with pytest.raises(ValueError, match="not for the card"):
        steps.load(replace(options, is_dry=False), steps.DRY_PLAN)


def test_workloads_have_their_sizes() -> None:
    works = closed_works(CARD, 1_000)
    assert [(name, batch, len(works[name, batch])) for name, batch in works] == [
        ("W1", 1, 1),
        *(("W2", batch, batch) for batch in (8, 32, 64, 128, 256)),
        ("W3", 64, 64),
    ]
    assert {(len(work.prompt), work.num_new) for work in works["W2", 8]} == {(128, 64)}
    wide = wide_works(CARD, 1_000)
    assert len(wide) == 256 and wide == wide_works(CARD, 1_000)
    lengths = [length for work in wide for length in (len(work.prompt), work.num_new)]
    assert min(lengths) >= 100 and max(lengths) <= 1024 and max(lengths) - min(lengths) > 900
    assert attention_cases.BLOCK_SIZE % 16 == 0 and all(len(works) < 10 for works in closed_works(DRY, 300).values())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "models"
    command = ["--dry", "--models", str(folder), "--records", str(folder.parent / "models.jsonl")]
    assert write_models.main(command) == write_models.main(command) == 0
    assert [record["was_there"] for record in read_records(folder.parent / "models.jsonl")] == [False] * 2 + [True] * 2
    return folder


@pytest.mark.parametrize(
    ("part", "kinds"),
    [
        (products, {"limits", "product", "products of a step"}),
        (operators, {"limits", "operator"}),
        (sampler, {"limits", "draw"}),
        (tiles, {"limits", "tile", "best tile"}),
        (steps, {"limits", "loaded", "prefill", "decode"}),
        (logits, {"logits"}),
        (engine, {"limits", "workload"}),
        pytest.param(server, {"ready", "workload", "W6", "W6 highest rate"}, marks=pytest.mark.e2e),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if hasattr(value, "__name__") else "",
)
def test_every_part_runs_dry(part: ModuleType, kinds: set[str], models: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    assert part.main(["--dry", "--model", "1B", "--models", str(models), "--records", str(file)]) == 0
    records = read_records(file)
    assert {record["kind"] for record in records} == kinds
    assert all(record.get("is_right", True) for record in records)
    assert not any(record.get("failure") or record.get("failed") for record in records)


def test_the_engines_workloads_are_all_there(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    engine.main(["--dry", "--model", "1B", "--models", str(models), "--records", str(file)])
    found = [record["workload"] for record in read_records(file) if record["kind"] == "workload"]
    assert found == ["W1", "W2", "W4", "W4", "W5", "W2n"]
    command = [
        "--dry",
        "--model",
        "1B",
        "--models",
        str(models),
        "--records",
        str(file),
        "--until",
        str(time.monotonic() + 1),
    ]
    assert engine.main(command) == 1  # too little time for all is a failure


class FakeCard:
    """In the place of torch.cuda: a clock that calls and replays move on, and graphs that keep what they captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.now, self.seconds, self.captured = 0.0, seconds, 0
        self._is_capturing = False
        card = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = card.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return 1_000 * (end.at - self.at)

        class CUDAGraph:
            def replay(self) -> None:
                card.now += card.captured * card.seconds

        @contextmanager
        def graph(_: CUDAGraph) -> Iterator[None]:
            card.captured, card._is_capturing = 0, True
            yield
            card._is_capturing = False

        stream = SimpleNamespace(wait_stream=lambda _: None)
        fakes = {
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda _: nullcontext(),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def call(self) -> None:
        if self._is_capturing:
            self.captured += 1
        else:
            self.now += 3 * self.seconds  # launched one by one, work takes longer


@pytest.mark.parametrize(("seconds", "num_sets"), [(1e-5, 1), (1e-4, 5), (0.05, 2)])
def test_a_cards_time_is_a_replays_by_its_calls(seconds: float, num_sets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCard(monkeypatch, seconds)
    timing = measure([card.call] * num_sets, torch.device("cuda"))
    assert timing.seconds == pytest.approx(seconds) and timing.noise == pytest.approx(0.0, abs=1e-9)
    assert card.captured % num_sets == 0
    assert card.now < 2 * (0.2 + 10 * num_sets * seconds)


def test_what_flash_attention_refuses_when_it_is_built_is_why_it_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("built without paged KV")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(attention, "find_fault", lambda *_: None)
    monkeypatch.setattr(attention, "FlashAttention", refuse)
    given = replace(options_in(tmp_path), is_dry=False)
    assert attention.find_flash_fault(given, "8B") == "built without paged KV"
    monkeypatch.setattr(attention, "find_fault", lambda *_: "it is not there")
    assert attention.find_flash_fault(given, "8B") == "it is not there"
