"""Which backend computes: what is refused, in one line, and when torch steps in."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import info
from model.backend import choose_kernels
from model.config import ModelConfig, load_config
from model.info import backend_here
from model.interface import Backend, Dtype, Quantization
from model.native import library
from model.native.levels import LEVELS as ALL_LEVELS
from model.native.levels import Level
from model.native.limits import MAX_CODED_INPUTS
from tests.model.checkpoints import DEFAULT_MODEL, write_checkpoint
from tests.model.levels import LEVELS, needs_kernels
from tests.model.mini_loop import MiniLoop

DTYPES = [torch.bfloat16, torch.float32]


def choose(
    backend: Backend,
    level: str | None = None,
    config: ModelConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quantization: Quantization = Quantization.NONE,
    block_size: int = 16,
) -> str | None:
    """The level of the kernels that are chosen, None where torch computes."""
    kernels = choose_kernels(backend, level, config or load_config(DEFAULT_MODEL), dtype, quantization, block_size)
    return None if kernels is None else kernels.level


@pytest.fixture
def odd_heads(tmp_path: Path) -> ModelConfig:
    return load_config(write_checkpoint(tmp_path, head_dim=20, hidden_size=80))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 256])
def test_the_kernels_are_chosen_where_they_take_the_model(dtype: torch.dtype, block_size: int) -> None:
    for backend in (Backend.AUTO, Backend.NATIVE):
        assert choose(backend, dtype=dtype, block_size=block_size) == LEVELS[0]
        for level in LEVELS:
            assert choose(backend, level, dtype=dtype, block_size=block_size) == level


def test_torch_has_no_levels() -> None:
    assert choose(Backend.TORCH) is None
    with pytest.raises(ValueError, match=r"^cpu_level: the torch backend has no levels$"):
        choose(Backend.TORCH, "v3")


@pytest.mark.parametrize("backend", [Backend.AUTO, Backend.NATIVE])
def test_levels_that_are_not_there_are_refused(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A level that was asked for is not quietly another one."""
    with pytest.raises(ValueError, match="unknown instruction set level 'v5'"):
        choose(backend, "v5")
    monkeypatch.setattr(library, "runnable_levels", lambda: [ALL_LEVELS[-1]])
    with pytest.raises(ValueError, match=r"^this machine cannot execute kernels of level 'v4_vnni'$"):
        choose(backend, "v4_vnni")


@needs_kernels
def test_what_the_kernels_do_not_take_is_refused_where_they_were_asked_for(odd_heads: ModelConfig) -> None:
    for backend, level in ((Backend.NATIVE, None), (Backend.NATIVE, LEVELS[0]), (Backend.AUTO, LEVELS[0])):
        for changes, message in (
            ({"config": odd_heads}, "head sizes 8, 16, … 256, not 20"),
            ({"block_size": 24}, "block_size: the native backend takes multiples of 16, not 24"),
            ({"dtype": torch.float16}, "takes bfloat16 and float32, not float16"),
        ):
            with pytest.raises(ValueError, match=message) as error:
                choose(backend, level, **changes)  # type: ignore[arg-type]
            assert "\n" not in str(error.value)


@needs_kernels
def test_torch_steps_in_with_a_warning(odd_heads: ModelConfig, caplog: pytest.LogCaptureFixture) -> None:
    for changes, message in (({"config": odd_heads}, "not 20"), ({"block_size": 24}, "not 24")):
        caplog.clear()
        assert choose(Backend.AUTO, **changes) is None  # type: ignore[arg-type]
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "without the promise of equal bits" in record.message and message in record.message


def test_torch_steps_in_where_nothing_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "library_path", lambda level: tmp_path / level.name)
    assert choose(Backend.AUTO) is None
    assert "run `python -m model.native.build`" in caplog.text
    for backend, level in ((Backend.NATIVE, None), (Backend.AUTO, "baseline")):
        with pytest.raises(ValueError, match="not built"):
            choose(backend, level)


def test_torch_takes_what_the_kernels_do_not(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, head_dim=20, hidden_size=80)
    loop = MiniLoop(directory, torch.float32, context_length=32, backend=Backend.AUTO)
    assert not loop.is_one_call
    assert loop.prefill(0, range(20), 7).isfinite().all()


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "cards", list)


@needs_kernels
@pytest.mark.usefixtures("no_card")
def test_what_would_compute_here_is_told_as_it_is_chosen(odd_heads: ModelConfig) -> None:
    """And why, where torch would."""
    config = load_config(DEFAULT_MODEL)
    for dtype in Dtype:
        level = choose(Backend.AUTO, dtype=getattr(torch, dtype))
        assert backend_here(config, dtype, Quantization.NONE, 16) == f"native {level}"
        told = "torch, slowly: native attention takes head sizes 8, 16, … 256, not 20"
        assert backend_here(odd_heads, dtype, Quantization.NONE, 16) == told
    told = "torch, slowly: block_size: the native backend takes multiples of 16, not 24"
    assert backend_here(config, Dtype.BFLOAT16, Quantization.NONE, 24) == told


@needs_kernels
@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "num_heads"])
def test_torch_steps_in_where_a_matrix_is_too_wide(name: str) -> None:
    """Before any weight is read, and told by the command as well."""
    config = replace(load_config(DEFAULT_MODEL), **{name: MAX_CODED_INPUTS + 1})
    if "v3" in LEVELS:
        with pytest.raises(ValueError, match=r"^kernels of level v3 take bfloat16 matrices of 76458 inputs at most"):
            choose(Backend.NATIVE, "v3", replace(config, **{name: 76459}))
    assert choose(Backend.AUTO, config=config, quantization=Quantization.INT8) is None
    told = backend_here(config, Dtype.BFLOAT16, Quantization.INT8, 16)
    assert told.startswith(f"torch, slowly: kernels of level {LEVELS[0]} take 8-bit codes of {MAX_CODED_INPUTS} inputs")
    with pytest.raises(ValueError, match="inputs at most"):
        choose(Backend.NATIVE, config=config, quantization=Quantization.INT8)


@needs_kernels
@pytest.mark.usefixtures("no_card")
def test_kernels_that_do_not_compute_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stale ones, and those that the system does not permit, though their files are there."""
    config = load_config(DEFAULT_MODEL)
    with monkeypatch.context() as patch:
        patch.setattr(library, "source_digest", lambda level: "0" * 64)
        told = backend_here(config, Dtype.BFLOAT16, Quantization.NONE, 16)
        assert told.startswith("torch, slowly: ") and "is older than its sources" in told
    real = library._open

    def open_refusing(path: Path, level: Level) -> ctypes.CDLL:
        opened = real(path, level)
        if level.name == LEVELS[0]:
            opened.quire_permit = lambda: 0  # type: ignore[assignment]
        return opened

    monkeypatch.setattr(library, "_open", open_refusing)
    told = backend_here(config, Dtype.BFLOAT16, Quantization.NONE, 16)
    assert told == f"native {LEVELS[1]}" if len(LEVELS) > 1 else "the system does not let" in told


@pytest.mark.parametrize("fault", [None, "torch 2.13.0+cpu is not built for NVIDIA cards"])
def test_a_card_is_told_where_what_is_installed_can_use_it(
    monkeypatch: pytest.MonkeyPatch, odd_heads: ModelConfig, fault: str | None
) -> None:
    monkeypatch.setattr(info, "cards", lambda: ["NVIDIA H100"])
    monkeypatch.setattr(info, "find_install_fault", lambda: fault)
    told = backend_here(odd_heads, Dtype.BFLOAT16, Quantization.NONE, 16)
    if fault is None:
        assert told == "gpu, NVIDIA H100"
        coded = backend_here(odd_heads, Dtype.BFLOAT16, Quantization.INT8, 16)
        assert coded == "gpu, NVIDIA H100, which refuses int8"
    else:
        assert told.startswith("torch, slowly: ") and told.endswith(f" (not NVIDIA H100: {fault})")


@needs_kernels
def test_the_quick_way_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    choose(Backend.AUTO)
    assert not caplog.records
