"""Sizes of a model on disk, counted without reading a weight."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from model.config import load_config
from model.families.base import MatrixKind
from model.info import load_info
from model.interface import Dtype, Quantization
from tests.model.checkpoints import DEFAULT_MODEL, write_checkpoint


def test_default_model() -> None:
    info, config = load_info(DEFAULT_MODEL), load_config(DEFAULT_MODEL)
    width, layers = config.hidden_size, config.num_layers
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    assert info.parameters == {
        MatrixKind.EMBEDDING: config.vocab_size * width,
        MatrixKind.ATTENTION: layers * heads * config.head_dim * width,
        MatrixKind.MLP: layers * 3 * config.intermediate_size * width,
        MatrixKind.NORM: (2 * layers + 1) * width,
        MatrixKind.UNEMBEDDING: 0,
    }
    stored = load_file(DEFAULT_MODEL / "model.safetensors")
    assert info.num_parameters == sum(value.numel() for value in stored.values())
    unembedding = config.vocab_size * width  # tied, but packed for itself
    norms = info.parameters[MatrixKind.NORM]
    assert sum(info.weight_bytes(Dtype.BFLOAT16).values()) == 2 * (info.num_parameters + unembedding)
    assert sum(info.weight_bytes(Dtype.FLOAT32).values()) == 4 * (info.num_parameters + unembedding)
    coded = info.weight_bytes(Dtype.BFLOAT16, Quantization.INT8)
    assert sum(coded.values()) == 2 * (unembedding + norms) + (info.num_parameters - norms)
    assert coded[MatrixKind.MLP] == info.parameters[MatrixKind.MLP]
    assert coded[MatrixKind.NORM] == 2 * norms
    assert info.file_bytes == (DEFAULT_MODEL / "model.safetensors").stat().st_size


def test_sequences_that_fit() -> None:
    info = load_info(DEFAULT_MODEL)
    per_token = info.config.kv_bytes_per_token(Dtype.BFLOAT16)
    assert info.sequences_that_fit(160 * per_token, 33, 16, Dtype.BFLOAT16) == 3  # 10 blocks, 3 for each
    assert info.sequences_that_fit(160 * per_token, 33, 16, Dtype.FLOAT32) == 1
    assert info.sequences_that_fit(100, 1, 16, Dtype.BFLOAT16) == 0


def test_counts_what_the_files_hold(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, bias=True, sharded=True, vocab_size=1001)
    stored = [value for file in directory.glob("*.safetensors") for value in load_file(file).values()]
    info = load_info(directory)
    assert info.num_parameters == sum(value.numel() for value in stored)
    assert info.parameters[MatrixKind.UNEMBEDDING] == 1001 * 64


def test_an_incomplete_model_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, sharded=True)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002"):
        load_info(directory)


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, model.info; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=DEFAULT_MODEL.parents[1], check=True, timeout=60)
