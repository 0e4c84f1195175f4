"""TorchRunner as an engine sees it: loading, steps, slots, refusals."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from model import threads
from model.families.base import MatrixKind
from model.info import load_info
from model.interface import (
    MAX_THREADS,
    NO_LOGPROBS,
    Admission,
    Backend,
    Batch,
    Dtype,
    GpuAttention,
    Quantization,
    Row,
    RunnerOptions,
    Sampled,
    Sampling,
)
from model.native.library import Kernels
from model.runner import TorchRunner, load_runner
from model.threads import available_cpus, plan_threads
from tests.model.checkpoints import DEFAULT_MODEL, write_checkpoint
from tests.model.levels import SHORTENING_LEVELS
from tests.model.mini_loop import MiniLoop

GREEDY = Sampling(temperature=0.0)


pytestmark = pytest.mark.usefixtures("restored_threads")


def options(model_dir: Path = DEFAULT_MODEL, **changes: object) -> RunnerOptions:
    small = {"num_blocks": 64, "max_num_seqs": 4, "max_batch_tokens": 64, "num_threads": 2}
    return RunnerOptions(str(model_dir), **{**small, **changes})  # type: ignore[arg-type]


def admit(
    slot: int, ids: Sequence[int], num_tokens: int, first_block: int, sampling: Sampling = GREEDY, num_new: int = 0
) -> Row:
    """A first row, with blocks for the known and `num_new` further tokens."""
    blocks = range(first_block, first_block - (-(len(ids) + num_new) // 16))
    return Row(slot, 0, num_tokens, blocks, num_tokens == len(ids), Admission(ids, len(ids), sampling))


def launch(runner: TorchRunner, *rows: Row) -> Sampled:
    return runner.launch(Batch(rows, sum(row.num_tokens for row in rows))).result()


def generate(
    runner: TorchRunner, slot: int, ids: Sequence[int], num_new: int, sampling: Sampling = GREEDY
) -> list[int]:
    """Decodes without sending any drawn token back: the slot knows them."""
    tokens = launch(runner, admit(slot, ids, len(ids), 8 * slot, sampling, num_new)).token_ids
    for position in range(len(ids), len(ids) + num_new - 1):
        tokens += launch(runner, Row(slot, position, 1, wants_token=True)).token_ids
    return tokens


def near(packed: int, counted: dict[MatrixKind, int], least: float = 1.0) -> bool:
    """Packed matrices have tiles to fill up, and biases and scales that are not counted."""
    return least * sum(counted.values()) <= packed < 1.04 * sum(counted.values())


def test_facts_of_the_default_model() -> None:
    runner, facts = load_runner(options(num_blocks=None, kv_cache_bytes=2**20))
    assert facts.architecture == "LlamaForCausalLM"
    assert facts.digest.startswith("sha256:")
    assert (facts.dtype, facts.context_length, facts.vocab_size) == ("bfloat16", 1024, 4096)
    assert facts.eos_token_ids == (0, 2)
    info = load_info(DEFAULT_MODEL)
    assert facts.num_parameters == info.num_parameters
    least = 0.75 if facts.cpu_level in SHORTENING_LEVELS else 1.0
    assert near(facts.weight_bytes, info.weight_bytes(Dtype.BFLOAT16), least)
    assert facts.kv_bytes_per_token == info.config.kv_bytes_per_token(Dtype.BFLOAT16)
    assert (facts.default_temperature, facts.default_top_p, facts.default_max_tokens) == (0.7, 0.95, 128)
    assert facts.num_threads == torch.get_num_threads() == 2
    assert runner.shape.num_blocks == 2**20 // (16 * facts.kv_bytes_per_token)
    assert (runner.shape.num_slots, runner.shape.max_batch_tokens, runner.shape.block_size) == (4, 64, 16)


def test_facts_of_backends(native_kernels: Kernels) -> None:
    _, native = load_runner(options())
    assert (native.backend, native.cpu_level) == ("native", native_kernels.level)
    assert native.quantization == "none"
    _, torchs = load_runner(options(backend=Backend.TORCH))
    assert (torchs.backend, torchs.cpu_level) == ("torch", "")
    _, baseline = load_runner(options(backend=Backend.NATIVE, cpu_level="baseline"))
    assert (baseline.backend, baseline.cpu_level) == ("native", "baseline")


@pytest.mark.parametrize("backend", [Backend.AUTO, Backend.TORCH])
@pytest.mark.parametrize("dtype", list(Dtype))
def test_facts_of_8_bit_weights(backend: Backend, dtype: Dtype) -> None:
    runner, facts = load_runner(options(backend=backend, dtype=dtype, quantization=Quantization.INT8))
    assert (facts.quantization, facts.dtype) == ("int8", dtype.value)
    info = load_info(DEFAULT_MODEL)
    assert facts.num_parameters == info.num_parameters
    assert near(facts.weight_bytes, info.weight_bytes(dtype, Quantization.INT8))
    assert len(generate(runner, 0, range(40, 70), 5)) == 5


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.usefixtures("native_kernels")
def test_greedy_tokens_are_the_transformers(dtype: Dtype, quantization: Quantization) -> None:
    runner, _ = load_runner(options(dtype=dtype, quantization=quantization))
    prompt = list(range(40, 70))
    loop = MiniLoop(DEFAULT_MODEL, getattr(torch, dtype.value), quantization=quantization)
    assert generate(runner, 3, prompt, 12) == loop.generate([prompt], 12)[0]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9, top_p=0.9, seed=7)])
@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.usefixtures("native_kernels")
def test_tokens_do_not_depend_on_what_shares_the_step(sampling: Sampling, quantization: Quantization) -> None:
    runner, _ = load_runner(options(quantization=quantization, max_batch_tokens=65))
    prompt = list(range(100, 125))
    alone = generate(runner, 0, prompt, 10, sampling)
    others = [admit(slot, range(slot, slot + 20), 20, 16 * slot, Sampling(seed=slot), 20) for slot in (1, 2)]
    tokens = launch(runner, others[0], admit(0, prompt, 25, 0, sampling, 10), others[1]).token_ids[1:2]
    for step in range(9):
        decoding = [Row(slot, 20 + step, 1, wants_token=True) for slot in (1, 2)]
        tokens += launch(runner, decoding[1], Row(0, 25 + step, 1, wants_token=True), decoding[0]).token_ids[1:2]
    assert tokens == alone


@pytest.mark.usefixtures("native_kernels")
def test_tokens_do_not_depend_on_the_shares_of_the_prompt() -> None:
    runner, _ = load_runner(options())
    prompt = list(range(200, 250))
    whole = launch(runner, admit(0, prompt, 50, 0))
    assert launch(runner, admit(1, prompt, 20, 8)) == Sampled()
    assert launch(runner, Row(1, 20, 13)) == Sampled()
    assert launch(runner, Row(1, 33, 17, wants_token=True)) == whole


@pytest.mark.usefixtures("native_kernels")
def test_readmission_after_preemption_continues_alike() -> None:
    runner, _ = load_runner(options())
    prompt = list(range(300, 320))
    sampling = Sampling(temperature=1.0, seed=11)
    tokens = generate(runner, 0, prompt, 12, sampling)
    known = prompt + tokens[:5]
    again = launch(runner, Row(2, 0, 25, range(40, 43), True, Admission(known, len(prompt), sampling)))
    rest = again.token_ids
    for position in range(25, 31):
        rest += launch(runner, Row(2, position, 1, wants_token=True)).token_ids
    assert rest == tokens[5:]


def test_log_probabilities_come_for_rows_that_asked() -> None:
    runner, _ = load_runner(options())
    asking = Sampling(temperature=0.0, num_logprobs=3)
    sampled = launch(runner, admit(0, [5, 6], 2, 0), admit(1, [5, 6], 2, 1, asking))
    assert asking.num_logprobs != NO_LOGPROBS == GREEDY.num_logprobs
    assert sampled.token_ids[0] == sampled.token_ids[1]
    assert sampled.logprobs[0] is None
    chosen = sampled.logprobs[1]
    assert chosen is not None
    assert chosen.top_ids[0] == sampled.token_ids[1]
    assert chosen.chosen == chosen.top_logprobs[0] <= 0


def test_a_context_can_be_computed_to_its_end(tmp_path: Path) -> None:
    runner, facts = load_runner(options(write_checkpoint(tmp_path), context_length=32))
    assert facts.context_length == runner.shape.context_length == 32
    assert len(launch(runner, admit(0, range(32), 32, 0)).token_ids) == 1


def test_a_pool_smaller_than_a_step_still_warms_up(tmp_path: Path) -> None:
    runner, _ = load_runner(options(write_checkpoint(tmp_path), num_blocks=1, backend=Backend.TORCH, block_size=1))
    assert runner.shape.num_blocks == 1
    runner, _ = load_runner(options(tmp_path, num_blocks=1))
    assert runner.shape.num_blocks == 1


def test_progress_is_told(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_runner(options(write_checkpoint(tmp_path)), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > 0


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 2049}, "context_length: the model's own is 2048, 2049 is longer"),
        ({"num_blocks": None, "kv_cache_bytes": 100}, "needs 8192 bytes for one block, the budget is 100"),
        ({"num_blocks": 2**44}, "no memory for a key/value cache of 17592186044416 blocks"),
        ({"num_blocks": 2**60}, "no memory for a key/value cache of 1152921504606846976 blocks"),
        ({"num_blocks": None, "kv_cache_bytes": 2**80}, "no memory for a key/value cache of"),
        ({"backend": Backend.NATIVE, "cpu_level": "v9"}, "unknown instruction set level 'v9'"),
        ({"backend": Backend.TORCH, "cpu_level": "v3"}, "cpu_level: the torch backend has no levels"),
        (
            {"backend": Backend.NATIVE, "gpu_attention": GpuAttention.FLASH_ATTENTION_3},
            "gpu_attention: flash-attention-3 is for the gpu backend",
        ),
        ({"backend": Backend.NATIVE, "block_size": 8}, "block_size: the native backend takes multiples of 16, not 8"),
        ({"model_dir": "/nowhere"}, "No such file"),
        ({"backend": Backend.TORCH, "pins_threads": True}, "pin_threads: only the native backend's threads"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    directory = write_checkpoint(tmp_path)
    given = {"model_dir": str(directory), "num_threads": 2, "dtype": Dtype.FLOAT32, **changes}
    with pytest.raises(ValueError, match=message) as error:
        load_runner(RunnerOptions(**given))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "50000 100000"}, 1),
        ({"pod/cpu.max": "100000 100000", "cpu.max": "max 100000"}, 1),
        ({"pod/cpu.max": "max 100000", "cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, None),
        ({}, None),
    ],
)
def test_the_tightest_quota_counts(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, content in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(content + "\n")
    (tmp_path / "cgroup").write_text("0::/pod\n")
    everything = available_cpus(tmp_path / "absent", tmp_path / "absent")
    assert everything >= 1
    assert available_cpus(tmp_path / "root", tmp_path / "cgroup") == (expected or everything)


def test_the_quota_of_version_one(tmp_path: Path) -> None:
    group = tmp_path / "cpu" / "pod"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("100000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cgroup").write_text("4:memory:/pod\n3:cpu,cpuacct:/pod\n")
    assert available_cpus(tmp_path, tmp_path / "cgroup") == 1


@pytest.mark.parametrize(
    ("cpus", "quota", "asked", "pins", "num_threads", "places"),
    [
        ([0, 1], None, None, None, 2, ()),
        ([3], None, None, None, 1, ()),
        (range(4), None, None, None, 3, (0, 1, 2)),
        ([1, 3, 5, 7, 9], None, None, None, 4, (1, 3, 5, 7)),
        (range(4), None, 4, None, 4, ()),
        (range(8), 8.0, None, None, 7, ()),
        (range(8), 2.5, None, None, 2, ()),
        (range(4), None, None, False, 3, ()),
        ([0, 1], None, 2, True, 2, (0, 1)),
        ([2, 4], None, 3, True, 3, (2, 4, 2)),
        (range(8), None, 2, None, 2, ()),
        (range(8), None, 2, True, 2, (0, 1)),
        (range(256), None, None, False, 255, ()),
        (range(300), None, None, None, 255, tuple(range(255))),
    ],
)
def test_threads_are_planned_for_the_machine(
    monkeypatch: pytest.MonkeyPatch,
    cpus: Sequence[int],
    quota: float | None,
    asked: int | None,
    pins: bool | None,
    num_threads: int,
    places: tuple[int, ...],
) -> None:
    """One CPU is left to the front end where there are enough; each thread has its own where all others are ours."""
    monkeypatch.setattr(threads, "_allowed_cpus", lambda: list(cpus))
    monkeypatch.setattr(threads, "_quota", lambda *files: quota)
    monkeypatch.setattr(threads, "_can_tie", lambda: True)
    plan = plan_threads(asked, pins)
    assert (plan.num_threads, plan.cpus) == (num_threads, places)


def test_more_threads_than_the_kernels_take_are_refused() -> None:
    """Here, and in the settings; the kernels' own number is written in C."""
    assert plan_threads(MAX_THREADS, False).num_threads == MAX_THREADS
    with pytest.raises(ValueError, match=r"^threads: 255 compute together at most, not 256$"):
        plan_threads(256, None)
    header = (Path(threads.__file__).parent / "native" / "team.h").read_text()
    assert re.findall(r"#define MAX_THREADS (\d+)", header) == [str(MAX_THREADS)]


def test_a_system_that_refuses_places_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself nothing is tied there; who asks for it hears so."""
    monkeypatch.setattr(threads, "_allowed_cpus", lambda: list(range(4)))
    monkeypatch.setattr(threads, "_quota", lambda *files: None)
    monkeypatch.setattr(threads.os, "sched_setaffinity", lambda pid, cpus: None, raising=False)
    assert plan_threads(None, None).cpus == (0, 1, 2)

    def refuse(pid: int, cpus: set[int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(threads.os, "sched_setaffinity", refuse, raising=False)
    assert plan_threads(None, None).cpus == ()
    with pytest.raises(ValueError, match=r"^pin_threads: this system does not tie threads to CPUs$"):
        plan_threads(None, True)


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize(("num_threads", "tied"), [(3, "5, 2"), (1, None)])
def test_threads_that_are_tied_are_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_threads: int,
    tied: str | None,
) -> None:
    """In the log and the facts; the engine's own thread, alone, is not tied."""
    places: list[Sequence[int]] = []
    monkeypatch.setattr(threads, "_allowed_cpus", lambda: [2, 5])
    monkeypatch.setattr(threads, "_can_tie", lambda: True)
    monkeypatch.setattr(Kernels, "keep_to_cpus", lambda kernels, cpus: places.append(cpus))
    with caplog.at_level(logging.INFO):
        _, facts = load_runner(options(write_checkpoint(tmp_path), num_threads=num_threads, pins_threads=True))
    assert facts.has_tied_threads == (tied is not None)
    assert places == ([] if tied is None else [(2, 5, 2)])
    assert ("tied to the CPUs" in caplog.text) == (tied is not None)
    assert tied is None or f"tied to the CPUs {tied}" in caplog.text
    _, facts = load_runner(options(tmp_path, num_threads=num_threads))
    assert not facts.has_tied_threads
