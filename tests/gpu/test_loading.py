"""Loading by readers: the parameters and digest of load_weights, whatever the pieces; failures that end it.

The checkpoints that must be refused are in tests/model/test_weights.py, which runs with this loader, too.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import digest
from model.config import FAMILIES, load_config
from model.families.base import TensorMap
from model.gpu import loading, rings
from model.gpu.loading import load_onto
from model.gpu.rings import NUM_BUFFERS, Ring
from model.weights import LoadedWeights, Progress, load_weights
from tests.model.checkpoints import write_checkpoint

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
PIECES = [999, 4096, digest.PIECE_BYTES]


def map_of(directory: Path) -> TensorMap:
    config = load_config(directory)
    tensor_map: TensorMap = import_module(FAMILIES[config.architecture]).tensor_map(config)
    return tensor_map


def load(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    num_readers: int = 3,
    device: torch.device = CPU,
) -> LoadedWeights:
    return load_onto(directory, map_of(directory), dtype, device, progress, num_readers)


def assert_as_load_weights(directory: Path, dtype: torch.dtype, **options: Any) -> None:
    expected = load_weights(directory, map_of(directory), dtype)
    found = load(directory, dtype, **options)
    assert (found.digest, found.unused) == (expected.digest, expected.unused)
    assert found.parameters.keys() == expected.parameters.keys()
    for name, parameter in found.parameters.items():
        assert parameter.dtype is dtype
        assert torch.equal(parameter.cpu(), expected.parameters[name]), name


def add_duplicate(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, directory / WEIGHTS)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("reader")]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", hidden_size=32, vocab_size=130, tie=True)


@pytest.mark.parametrize("num_readers", [1, 4])
@pytest.mark.parametrize("piece_bytes", PIECES)
@pytest.mark.parametrize(("stored", "wanted"), [("float32", "bfloat16"), ("float16", "float32"), ("bfloat16",) * 2])
def test_equals_load_weights(
    tmp_path: Path, stored: str, wanted: str, piece_bytes: int, num_readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "PIECE_BYTES", piece_bytes)
    for options in ({"sharded": True, "bias": True}, {"tie": True}):
        folder = write_checkpoint(tmp_path / str(len(options)), hidden_size=32, vocab_size=130, dtype=stored, **options)
        if "tie" in options:
            add_duplicate(folder)
        assert_as_load_weights(folder, getattr(torch, wanted), num_readers=num_readers)


@pytest.mark.parametrize("shift", range(1, 4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_that_begin_anywhere(
    directory: Path, shift: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header of any length moves all tensors; pieces then cut elements of four bytes at each of them."""
    add_duplicate(directory)
    content = (directory / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip(b" ")
    header += b" " * ((-len(header)) % 8 + shift)
    (directory / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    monkeypatch.setattr(digest, "PIECE_BYTES", 1024)
    assert_as_load_weights(directory, dtype)


def test_a_file_without_tensors_counts(directory: Path) -> None:
    """It is hashed, and names nothing."""
    names = list(load_file(directory / WEIGHTS))
    (directory / WEIGHTS).rename(directory / "b.safetensors")
    (directory / "a.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    weight_map = {"nothing": "a.safetensors"} | dict.fromkeys(names, "b.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_as_load_weights(directory, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_may_be_made_in_inference_mode(directory: Path, dtype: torch.dtype) -> None:
    """A mode is a thread's own: readers that were not in it could not write what was made in it."""
    with torch.inference_mode():
        assert_as_load_weights(directory, dtype)
        assert load(directory, dtype).parameters["norm"].is_inference()
    assert not load(directory, dtype).parameters["norm"].is_inference()


class LateRing(Ring):
    """Copies nothing until it is waited for: what a buffer held then is what is copied."""

    def __init__(self, device: torch.device, *, has_scratch: bool) -> None:
        super().__init__(device, has_scratch=has_scratch)
        self.enqueued: list[tuple[int, Callable[[], None]]] = []

    def _do(self, turn: int, work: Callable[[], None]) -> None:
        self.enqueued.append((turn, work))

    def _wait(self, turn: int) -> None:
        """All up to the last copy of this buffer, since a stream does things in order."""
        last = max([index for index, (other, _) in enumerate(self.enqueued) if other == turn], default=-1)
        for _, work in self.enqueued[: last + 1]:
            work()
        del self.enqueued[: last + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_are_not_filled_before_they_are_copied(
    directory: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[LateRing] = []

    def late_ring(device: torch.device, *, has_scratch: bool) -> Ring:
        made.append(LateRing(device, has_scratch=has_scratch))
        return made[-1]

    add_duplicate(directory)
    monkeypatch.setattr(digest, "PIECE_BYTES", 1000)
    monkeypatch.setattr(loading, "ring_for", late_ring)
    assert_as_load_weights(directory, dtype)
    assert len(made) == 3 and not any(ring.enqueued for ring in made)


def test_a_ring_has_as_many_buffers_in_use_as_it_says() -> None:
    ring = LateRing(CPU, has_scratch=False)
    ran = []
    for turn in range(5):
        ring.take()
        assert ran == list(range(max(0, turn - NUM_BUFFERS + 1))), "copies go on while the other buffer is filled"
        ring.enqueue(lambda turn=turn: ran.append(turn))
    ring.finish()
    assert ran == list(range(5))


def test_memory_is_bounded_by_the_rings(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that is made is larger than a buffer, but for parameters; there are two buffers a reader."""
    monkeypatch.setattr(digest, "PIECE_BYTES", 1000)
    allocated = []
    allocate = Ring._allocate
    monkeypatch.setattr(Ring, "_allocate", lambda ring, size: allocated.append(size) or allocate(ring, size))
    add_duplicate(directory)
    load(directory, torch.bfloat16, num_readers=2)
    assert allocated == [1004] * 4


def test_progress_is_told_in_the_callers_thread(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PIECE_BYTES", 1000)
    add_duplicate(directory)
    calls, threads = [], set()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        threads.add(threading.get_ident())

    load(directory, progress=progress)
    total = sum(tensor.nbytes for tensor in load_file(directory / WEIGHTS).values())
    assert len(calls) > 10 and calls == sorted(calls) and calls[-1] == (total, total)
    assert threads == {threading.get_ident()}


def cut_behind_the_header(directory: Path, monkeypatch: pytest.MonkeyPatch, keep: Callable[[int], int]) -> None:
    """Shortens the file once its header was read; `keep` says to how much."""
    file = directory / WEIGHTS
    opened = loading.open_checkpoint

    def open_and_cut(model_dir: Path) -> Any:
        checkpoint = opened(model_dir)
        real = os.preadv

        def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
            os.truncate(file, keep(checkpoint.tensors[-1].begin))
            return real(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        return checkpoint

    monkeypatch.setattr(loading, "open_checkpoint", open_and_cut)


@pytest.mark.parametrize(
    ("keep", "place"),
    [
        (lambda begin: begin + 3, "tensor 'model.norm.weight'"),
        (lambda _: 100, "its header"),
        (lambda _: 0, "its header"),
    ],
)
def test_a_file_that_is_cut_off_meanwhile(
    directory: Path, keep: Callable[[int], int], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_behind_the_header(directory, monkeypatch, keep)
    with pytest.raises(ValueError, match=rf"^model\.safetensors: cut off while it was read, in {place}$"):
        load(directory)


@pytest.mark.parametrize("num_readers", [1, 3])
def test_a_reader_that_fails_fails_the_load(directory: Path, num_readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails at its first piece, while others wait for nothing; and the file is named."""
    monkeypatch.setattr(digest, "PIECE_BYTES", 1000)
    real, failed = os.preadv, threading.Event()

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= 5000:
            failed.set()
            raise OSError(5, "Input/output error")
        if num_readers > 1 and offset < 1000:
            assert failed.wait(timeout=60), "another reader fails meanwhile"
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(ValueError, match=rf"^{directory}/model\.safetensors: Input/output error$"):
        load(directory, num_readers=num_readers)


def slow_reads(monkeypatch: pytest.MonkeyPatch, fails_at: int | None = None) -> list[int]:
    """Makes reads slow, and one of them fail. Returns the offsets of those that began, as they come."""
    real, offsets = os.preadv, list[int]()

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        if offset == fails_at:
            raise OSError(5, "Input/output error")
        time.sleep(0.02)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return offsets


def test_readers_stop_when_one_failed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PIECE_BYTES", 1000)
    offsets = slow_reads(monkeypatch, fails_at=4000)
    with pytest.raises(ValueError, match="Input/output error"):
        load(directory)
    assert len(offsets) < (directory / WEIGHTS).stat().st_size // 2000


def test_a_progress_that_raises_ends_the_load(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PIECE_BYTES", 1000)
    offsets = slow_reads(monkeypatch)

    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(directory, progress=progress)
    assert len(offsets) < (directory / WEIGHTS).stat().st_size // 2000


def test_short_reads_go_on(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:777]], offset))
    assert_as_load_weights(directory, torch.float32)


def test_a_duplicate_that_differs_in_its_last_element(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PIECE_BYTES", 1000)
    tensors = load_file(directory / WEIGHTS)
    other: Tensor = tensors["model.embed_tokens.weight"].clone()
    other[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": other}, directory / WEIGHTS)
    with pytest.raises(ValueError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        load(directory)


def test_a_loader_for_a_cpu_needs_no_card() -> None:
    assert type(rings.ring_for(CPU, has_scratch=False)) is Ring


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")
@pytest.mark.parametrize("piece_bytes", [1000, digest.PIECE_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onto_a_card(directory: Path, dtype: torch.dtype, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    add_duplicate(directory)
    monkeypatch.setattr(digest, "PIECE_BYTES", piece_bytes)
    assert_as_load_weights(directory, dtype, device=torch.device("cuda"))
