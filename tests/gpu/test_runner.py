"""Building a runner on a card: who is refused, how memory is given away, which backend a load leads to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import backend, cards
from model import runner as cpu_runner
from model.gpu import runner
from model.gpu.graphs import Buckets
from model.gpu.runner import BLOCK_SIZE, RESERVE_BYTES, load_device_runner
from model.interface import Backend, Dtype, Quantization, RunnerOptions
from model.runner import load_runner
from tests.gpu.late_device import LIBRARY, LateDevice
from tests.model.checkpoints import write_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("restored_threads"),
]

KV_BYTES_PER_TOKEN = 2 * 2 * 16 * 4
"""Keys and values, layers, numbers of a token, bytes of each."""


def options(directory: Path, **changes: object) -> RunnerOptions:
    small = {
        "dtype": Dtype.FLOAT32,
        "max_num_seqs": 1,
        "max_batch_tokens": 2,
        "captures_graphs": False,
        "num_threads": 1,
        "context_length": 100,
    }
    return RunnerOptions(str(directory), **{**small, **changes})  # type: ignore[arg-type]


def write_small(directory: Path, **changes: object) -> Path:
    small = {"vocab_size": 67, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 48}
    return write_checkpoint(directory, **{**small, **changes})  # type: ignore[arg-type]


def load(given: RunnerOptions, free_bytes: int = 2**31) -> runner.DeviceRunner:
    return load_device_runner(given, None, LateDevice(free_bytes=free_bytes), Buckets((1,), (2,)), LIBRARY)[0]


def test_the_pool_takes_what_is_free_but_for_a_reserve(tmp_path: Path) -> None:
    mine = load(options(write_small(tmp_path)), free_bytes=RESERVE_BYTES + 2**20 - 1)
    assert mine.shape.block_size == BLOCK_SIZE
    assert mine.shape.num_blocks == (2**20 - 1) // (BLOCK_SIZE * KV_BYTES_PER_TOKEN)
    asked = load(options(tmp_path, kv_cache_bytes=2**20, block_size=16))
    assert (asked.shape.num_blocks, asked.shape.block_size) == (2**20 // (16 * KV_BYTES_PER_TOKEN), 16)
    assert load(options(tmp_path, num_blocks=3)).shape.num_blocks == 3


def test_facts_and_progress(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    given = options(write_small(tmp_path, tie=True), num_blocks=2)
    _, facts = load_device_runner(given, lambda *call: calls.append(call), LateDevice(), Buckets((1,), (2,)), LIBRARY)
    assert calls[-1][0] == calls[-1][1] > 0
    assert (facts.backend, facts.card, facts.cpu_level, facts.quantization) == ("gpu", LateDevice.name, "", "none")
    assert facts.weight_bytes == 4 * facts.num_parameters, "a tied embedding lies there once"
    assert facts.kv_bytes_per_token == KV_BYTES_PER_TOKEN
    theirs = load_runner(options(tmp_path, num_blocks=2, backend=Backend.TORCH))[1]
    assert (facts.digest, facts.num_parameters) == (theirs.digest, theirs.num_parameters)


def test_what_graphs_take_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load(options(write_small(tmp_path), captures_graphs=True, num_blocks=2))
    assert "3 graphs captured" in caplog.text and "they take 0 MiB" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": Quantization.INT8}, "quantize: the gpu backend does not compute int8"),
        ({"cpu_level": "v3"}, "cpu_level: the gpu backend has no levels"),
        ({"pins_threads": True}, "pin_threads: only the native backend's threads"),
        ({"context_length": 2049}, "context_length: the model's own is 2048, 2049 is longer"),
        ({"block_size": 48}, "block_size: .*a power of two"),
        ({"kv_cache_bytes": 2**30 + 2**20}, "kv_cache_mib: late device has 1024 MiB left, not 1025"),
        ({"kv_cache_bytes": 100}, "needs 16384 bytes for one block, the budget is 100"),
        ({"num_blocks": 2**20}, "no memory for a key/value cache of 1048576 blocks"),
        ({"num_blocks": 2**44}, "no memory for a key/value cache of 17592186044416 blocks"),
        ({"model_dir": "/nowhere"}, "No such file"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    given = {"model_dir": str(write_small(tmp_path)), "dtype": Dtype.FLOAT32, "max_num_seqs": 1, "max_batch_tokens": 2}
    with pytest.raises(ValueError, match=message) as error:
        load(RunnerOptions(**{"context_length": 100, "captures_graphs": False, **given, **changes}))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_card_without_memory_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_small(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 16.00 GiB")

    monkeypatch.setattr(runner, "load_onto", too_small)
    with pytest.raises(ValueError, match=r"^no memory on late device for this model, its buffers and its steps$"):
        load(options(write_small(tmp_path)))


def test_without_a_card_the_gpu_backend_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(ValueError, match=r"^backend: torch finds no NVIDIA card$"):
        load_runner(options(write_small(tmp_path), backend=Backend.GPU))


class Cuda(SimpleNamespace):
    """What torch says of a card."""

    @classmethod
    def of(cls, capability: tuple[int, int] | None) -> Cuda:
        return cls(is_available=lambda: capability is not None, get_device_capability=lambda: capability)


@pytest.mark.parametrize(
    ("capability", "finds_triton", "fault"),
    [
        (None, True, "torch finds no NVIDIA card"),
        ((7, 5), True, "the card has compute capability 7.5, 8.0 is needed"),
        ((9, 0), False, "triton, which compiles the kernels for a card, is not installed"),
        ((8, 0), True, None),
    ],
)
def test_a_card_is_used_where_it_can_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    finds_triton: bool,
    fault: str | None,
) -> None:
    monkeypatch.setattr(backend.torch, "cuda", Cuda.of(capability))
    monkeypatch.setattr(cards, "find_spec", lambda name: finds_triton or None)
    assert backend.find_card_fault() == fault
    loaded: list[str] = []

    def told(name: str) -> Callable[..., tuple[str, str]]:
        return lambda *arguments: loaded.append(name) or (name, "facts")  # type: ignore[func-returns-value]

    monkeypatch.setattr(runner, "load_device_runner", told("card"))
    monkeypatch.setattr(cpu_runner, "load_torch_runner", told("CPU"))
    for asked in (Backend.AUTO, Backend.GPU, Backend.NATIVE, Backend.TORCH):
        load_runner(options(tmp_path, backend=asked))
    assert loaded == ["card" if fault is None else "CPU", "card", "CPU", "CPU"]


def test_a_card_without_a_c_compiler_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """triton would fail at the first launch. That the CPU computes beside a card is no secret."""
    monkeypatch.setattr(backend.torch, "cuda", Cuda.of((9, 0)))
    monkeypatch.setattr(cards, "find_spec", lambda name: True)
    assert backend.find_card_fault() is None
    monkeypatch.setenv("PATH", "")
    fault = "triton needs a C compiler, and there is none of gcc, clang"
    assert backend.find_card_fault() == fault
    monkeypatch.setattr(cpu_runner, "load_torch_runner", lambda *arguments: ("CPU", "facts"))
    assert load_runner(options(tmp_path, backend=Backend.AUTO)) == ("CPU", "facts")
    assert f"the CPU computes, though there is a card: {fault}" in caplog.text
