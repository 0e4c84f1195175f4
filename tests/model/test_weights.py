"""Streaming checkpoints into parameters, and refusing unsound ones: tensor by tensor, and by several readers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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
from model.gpu.loading import load_onto
from model.weights import LoadedWeights, Progress, load_weights
from tests.model.checkpoints import write_checkpoint

WEIGHTS = "model.safetensors"
SMALL_PIECE = 1001
"""Bytes of a piece that cuts tensors, headers and elements."""


def load_by_readers(
    directory: Path, tensor_map: TensorMap, dtype: torch.dtype, progress: Progress | None
) -> LoadedWeights:
    return load_onto(directory, tensor_map, dtype, torch.device("cpu"), progress, num_readers=3)


LOADERS = {
    "one by one": (load_weights, SMALL_PIECE),
    "by readers": (load_by_readers, digest.PIECE_BYTES),
    "by readers, small pieces": (load_by_readers, SMALL_PIECE),
}
chosen = load_weights


@pytest.fixture(autouse=True, params=LOADERS)
def _loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test is run with each loader."""
    loader, piece_bytes = LOADERS[request.param]
    monkeypatch.setattr(digest, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr("tests.model.test_weights.chosen", loader)


def load(directory: Path, dtype: torch.dtype = torch.float32, progress: Progress | None = None) -> LoadedWeights:
    config = load_config(directory)
    return chosen(directory, import_module(FAMILIES[config.architecture]).tensor_map(config), dtype, progress)


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Saves the weights again after a change."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def edit_header(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Writes the file's header again after a change; the tensors' bytes stay."""
    content = (directory / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    (directory / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", bias=True)


def test_merged_parameters_are_their_parts_by_rows(directory: Path) -> None:
    ours, theirs = load(directory).parameters, load_file(directory / WEIGHTS)
    prefix = "model.layers.1."
    for end in ("weight", "bias"):
        suffix = "" if end == "weight" else ".bias"
        qkv = [theirs[f"{prefix}self_attn.{part}_proj.{end}"] for part in "qkv"]
        assert torch.equal(ours["layers.1.qkv" + suffix], torch.cat(qkv))
        gate_up = [theirs[f"{prefix}mlp.{part}_proj.{end}"] for part in ("gate", "up")]
        assert torch.equal(ours["layers.1.gate_up" + suffix], torch.cat(gate_up))
        assert torch.equal(ours["layers.1.down" + suffix], theirs[f"{prefix}mlp.down_proj.{end}"])
    assert torch.equal(ours["embedding"], theirs["model.embed_tokens.weight"])
    assert torch.equal(ours["unembedding"], theirs["lm_head.weight"])
    assert sum(value.numel() for value in ours.values()) == sum(value.numel() for value in theirs.values())


def test_shards_hold_the_same(tmp_path: Path) -> None:
    one = load(write_checkpoint(tmp_path / "one")).parameters
    two = load(write_checkpoint(tmp_path / "two", sharded=True)).parameters
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_converts_to_the_wanted_dtype(tmp_path: Path, stored: str) -> None:
    directory = write_checkpoint(tmp_path, dtype=stored)
    theirs = load_file(directory / WEIGHTS)["model.norm.weight"]
    assert torch.equal(load(directory, torch.bfloat16).parameters["norm"], theirs.bfloat16())


def test_progress_ends_at_the_total(directory: Path) -> None:
    calls: list[tuple[int, int]] = []
    load(directory, progress=lambda done, total: calls.append((done, total)))
    total = sum(value.nbytes for value in load_file(directory / WEIGHTS).values())
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_digest_names_everything_that_decides_an_answer(directory: Path, tmp_path: Path) -> None:
    digest = load(directory).digest
    assert digest.startswith("sha256:")
    assert len(digest) == len("sha256:") + 64
    assert load(shutil.copytree(directory, tmp_path / "copy")).digest == digest

    def add_one(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][0] += 1

    seen = {digest}
    edit(directory, add_one)
    seen.add(load(directory).digest)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (directory / name).write_text("{}")
        seen.add(load(directory).digest)
    assert len(seen) == 6


def test_harmless_extras_are_left_out_and_told(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tie=True)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(directory, add)
    loaded = load(directory, torch.bfloat16)
    assert loaded.unused == ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert "unembedding" not in loaded.parameters


def test_a_tied_matrix_that_differs_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tie=True)
    edit(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "incomplete: no tensor 'model.norm.weight'$"),
        (lambda t: (t.pop("lm_head.weight"), t.pop("model.norm.weight")), r"no tensor 'lm_head.weight' \(and 1 more\)"),
        (lambda t: t.update(surplus=torch.ones(3)), "'surplus' has no place"),
        (lambda t: t.update({"model.norm.weight": torch.ones(65)}), r"has shape \[65\], config.json implies \[64\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, 1)}), r"has shape \[64, 1\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}), "has type I32"),
        (lambda t: t.update({"lm_head.weight": torch.ones(512, 64).double()}), "has type F64"),
    ],
)
def test_mismatches_name_the_tensor(
    directory: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit(directory, change)
    with pytest.raises(ValueError, match=message):
        load(directory)


def shift(header: dict[str, Any], name: str, by: int) -> None:
    header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: shift(h, "model.norm.weight", 4),
        lambda h: shift(h, "model.norm.weight", -4),
        lambda h: h["model.norm.weight"].update(shape=[63]),
        lambda h: h["model.norm.weight"].update(shape=[2**70]),
        lambda h: h["model.norm.weight"].update(shape=[-64]),
        lambda h: h["model.norm.weight"].update(shape="64"),
        lambda h: h["model.norm.weight"].update(data_offsets=[0]),
        lambda h: h["model.norm.weight"].update(data_offsets=[0, 2**63]),
        lambda h: h["model.norm.weight"].update(data_offsets=[256, 0]),
        lambda h: h["model.norm.weight"].pop("dtype"),
        lambda h: h.update({"model.norm.weight": None}),
        lambda h: h.update({"model.norm.weight": dict(h["lm_head.weight"])}),
    ],
)
def test_unsound_headers_name_the_tensor(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_header(directory, change)
    with pytest.raises(ValueError, match=r"^model\.safetensors: tensor '[a-z0-9_.]+'[^\n]+$"):
        load(directory)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 20_000, -1])
def test_truncated_files_are_refused(directory: Path, keep: int) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"^model\.safetensors: [^\n]*cut off[^\n]*$"):
        load(directory)


@pytest.mark.parametrize(
    "content",
    [
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x02\0\0\0\0\0\0\0{{",
        b"\xff" * 64,
        b"\x80\x04\x95 a pickle",
        b"PK\x03\x04" + bytes(99),
    ],
)
def test_other_files_are_refused(directory: Path, content: bytes) -> None:
    (directory / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"^model\.safetensors: not a safetensors file"):
        load(directory)


def test_bytes_behind_the_last_tensor_are_refused(directory: Path) -> None:
    with (directory / WEIGHTS).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ValueError, match="1 bytes behind the last tensor"):
        load(directory)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, sharded=True)
    first, second = sorted(directory.glob("model-*.safetensors"))
    tensors = load_file(first)
    name, value = tensors.popitem()
    save_file({**load_file(second), name: value}, second)
    with pytest.raises(ValueError, match=rf"tensor '{name}' is also in {first.name}"):
        load(directory)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../outside.safetensors"}, "is not the name of a safetensors file"),
        ({"a": "weights.bin"}, "is not the name of a safetensors file"),
        ({"a": "absent.safetensors"}, "No such file"),
        ({}, "weight_map: expected an object"),
        (None, "weight_map: expected an object"),
    ],
)
def test_bad_indexes_are_refused(tmp_path: Path, weight_map: object, message: str) -> None:
    directory = write_checkpoint(tmp_path, sharded=True)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_pickled_weights_are_not_looked_at(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load(directory)
