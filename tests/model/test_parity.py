"""Numbers against Hugging Face transformers, which we did not write: logits, and greedy tokens.

Theirs run once over prompt and our continuation together; the most likely token at each position is what their own
greedy decoding would draw there.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from model.config import load_config
from model.interface import Backend, Quantization
from tests.model.checkpoints import DEFAULT_MODEL, write_checkpoint
from tests.model.levels import LEVELS, needs_kernels
from tests.model.mini_loop import MiniLoop

pytestmark = needs_kernels

NEAR_TIE = 1e-4
"""Where their two best logits are closer than this, float32 rounding decides, and either token is right."""

QUANTIZATION_ERROR = 0.1
"""Of logits by 8-bit products, relative to those of whole weights."""

SHAPES: dict[str, dict[str, Any]] = {
    "as_many_kv_heads": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "hidden_size": 256},
    "grouped_tied": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "hidden_size": 192, "tie": True},
    "one_kv_head_odd_vocabulary": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 80, "vocab_size": 1001},
    "head_128_biases": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "hidden_size": 256, "bias": True},
    "llama3_rope": {
        "num_layers": 3,
        "config": {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    },
    "linear_rope_sharded": {"sharded": True, "config": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
}


def load_theirs(directory: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=dtype).eval()


@torch.inference_mode()
def their_logits(theirs: LlamaForCausalLM, ids: list[int]) -> Tensor:
    """Float32 [T, V]."""
    return theirs(torch.tensor([ids])).logits[0].float()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def random_prompts(lengths: list[int], vocab_size: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


def check_greedy(directory: Path, lengths: list[int], num_new: int, **names: Any) -> None:
    prompts = random_prompts(lengths, load_config(directory).vocab_size)
    loop = MiniLoop(directory, torch.float32, num_slots=len(prompts), **names)
    theirs = load_theirs(directory, torch.float32)
    for prompt, output in zip(prompts, loop.generate(prompts, num_new), strict=True):
        assert len(output) == num_new
        logits_TV = their_logits(theirs, prompt + output[:-1])[len(prompt) - 1 :]
        lead_T = logits_TV.max(-1).values - logits_TV[torch.arange(num_new), output]
        assert lead_T.max() < NEAR_TIE, (len(prompt), output, logits_TV.argmax(-1).tolist())


@cache
def their_last_logits(directory: Path, dtype: torch.dtype, length: int) -> tuple[list[int], Tensor]:
    """A random prompt, and their logits [V] after it; asked once for every level and backend."""
    ids = random_prompts([length], load_config(directory).vocab_size)[0]
    return ids, their_logits(load_theirs(directory, dtype), ids)[-1]


def check_logits(directory: Path, dtype: torch.dtype, length: int, share: int, tolerance: float, **names: Any) -> None:
    ids, theirs_V = their_last_logits(directory, dtype, length)
    assert relative_error(MiniLoop(directory, dtype, **names).prefill(0, ids, share), theirs_V) < tolerance


def test_greedy_tokens_of_the_default_model() -> None:
    check_greedy(DEFAULT_MODEL, [1, 2, 15, 16, 17, 64, 129, 300], num_new=16)


@pytest.mark.slow
def test_greedy_tokens_of_the_default_model_over_64_prompts() -> None:
    rng = random.Random(4)
    check_greedy(DEFAULT_MODEL, [1, 2, 900, *(rng.randint(1, 900) for _ in range(61))], num_new=32)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("share", [1000, 48])
def test_logits_of_the_default_model(share: int, level: str) -> None:
    check_logits(DEFAULT_MODEL, torch.float32, 230, share, tolerance=1e-4, level=level)


@pytest.mark.parametrize("level", LEVELS)
def test_bfloat16_logits_of_the_default_model(level: str) -> None:
    """Against the same weights computed in float32, and against theirs in bfloat16, which round on their own."""
    ids, in_bfloat16_V = their_last_logits(DEFAULT_MODEL, torch.bfloat16, 230)
    same_ids, in_float32_V = their_last_logits(DEFAULT_MODEL, torch.float32, 230)
    assert ids == same_ids
    ours_V = MiniLoop(DEFAULT_MODEL, torch.bfloat16, level=level).prefill(0, ids, 64)
    assert relative_error(ours_V, in_float32_V) < 2e-2
    assert relative_error(ours_V, in_bfloat16_V) < 3e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", LEVELS)
def test_8_bit_logits_of_the_default_model(level: str, dtype: torch.dtype) -> None:
    """Against what nobody has quantized."""
    ids, theirs_V = their_last_logits(DEFAULT_MODEL, torch.float32, 230)
    ours_V = MiniLoop(DEFAULT_MODEL, dtype, level=level, quantization=Quantization.INT8).prefill(0, ids, 64)
    assert relative_error(ours_V, theirs_V) < QUANTIZATION_ERROR


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for every test of this module that wants this shape."""
    return write_checkpoint(tmp_path_factory.mktemp(request.param), **SHAPES[request.param])


def test_random_shapes(shape: Path) -> None:
    check_logits(shape, torch.float32, 333, share=100, tolerance=1e-4)
    check_greedy(shape, [1, 40], num_new=8)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_random_shapes_on_every_level(shape: Path, level: str) -> None:
    check_logits(shape, torch.float32, 333, share=100, tolerance=1e-4, level=level)


@pytest.mark.parametrize("level", LEVELS)
def test_random_shapes_in_bfloat16(shape: Path, level: str) -> None:
    """Against their float32: a model of random weights spreads the rounding of either."""
    check_logits(shape, torch.bfloat16, 100, share=64, tolerance=2e-2, level=level)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", LEVELS)
def test_8_bit_products_by_either_backend(shape: Path, level: str, dtype: torch.dtype) -> None:
    """Rounding tips a code now and then, and each that it tips tips others: no more than quantizing itself does."""
    ids, theirs_V = their_last_logits(shape, torch.float32, 333)
    torch_V = int8_logits_by_torch(shape, dtype)
    ours_V = MiniLoop(shape, dtype, level=level, quantization=Quantization.INT8).prefill(0, ids, 100)
    assert relative_error(ours_V, torch_V) < (4e-2 if dtype is torch.bfloat16 else 2e-2)
    assert relative_error(ours_V, theirs_V) < QUANTIZATION_ERROR


@pytest.mark.parametrize("level", LEVELS)
def test_8_bit_products_by_either_backend_agree_until_a_code_is_tipped(tmp_path: Path, level: str) -> None:
    """A single layer and a single token, where that is rare."""
    directory = write_checkpoint(tmp_path, num_layers=1, hidden_size=128, bias=True)
    ours, torchs = (
        MiniLoop(directory, torch.float32, backend=backend, level=name, quantization=Quantization.INT8)
        for backend, name in ((Backend.NATIVE, level), (Backend.TORCH, None))
    )
    errors = [relative_error(ours.prefill(0, [token], 1), torchs.prefill(0, [token], 1)) for token in range(40)]
    assert sorted(errors)[35] < 1e-5


@cache
def int8_logits_by_torch(directory: Path, dtype: torch.dtype) -> Tensor:
    loop = MiniLoop(directory, dtype, backend=Backend.TORCH, quantization=Quantization.INT8)
    return loop.prefill(0, their_last_logits(directory, torch.float32, 333)[0], 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_random_shapes_with_long_prompts(tmp_path: Path, name: str) -> None:
    directory = write_checkpoint(tmp_path, **SHAPES[name])
    check_greedy(directory, [1, 2, 31, 200, 515, 900, 1024, 1500], num_new=24)
    check_logits(directory, torch.float32, 1500, share=1500, tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by_operators", [False, True])
@pytest.mark.parametrize("backend", [Backend.NATIVE, Backend.TORCH])
def test_backends_agree_with_theirs(tmp_path: Path, backend: Backend, by_operators: bool, dtype: torch.dtype) -> None:
    directory = write_checkpoint(tmp_path, **SHAPES["grouped_tied"])
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-4
    check_logits(directory, dtype, 150, 50, tolerance, backend=backend, by_operators=by_operators)
