"""Numbers against Hugging Face transformers, which we did not write: logits, and greedy tokens.

Theirs run once over prompt and our continuation together; the most likely token at each position is what their own
greedy decoding would draw there.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from model.config import load_config
from tests.model.checkpoints import DEFAULT_MODEL, write_checkpoint
from tests.model.mini_loop import MiniLoop

NEAR_TIE = 1e-4
"""Where their two best logits are closer than this, float32 rounding decides, and either token is right."""

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


def check_greedy(directory: Path, lengths: list[int], num_new: int) -> None:
    prompts = random_prompts(lengths, load_config(directory).vocab_size)
    loop = MiniLoop(directory, torch.float32, num_slots=len(prompts))
    theirs = load_theirs(directory, torch.float32)
    for prompt, output in zip(prompts, loop.generate(prompts, num_new), strict=True):
        assert len(output) == num_new
        logits_TV = their_logits(theirs, prompt + output[:-1])[len(prompt) - 1 :]
        lead_T = logits_TV.max(-1).values - logits_TV[torch.arange(num_new), output]
        assert lead_T.max() < NEAR_TIE, (len(prompt), output, logits_TV.argmax(-1).tolist())


def check_logits(directory: Path, dtype: torch.dtype, length: int, share: int, tolerance: float) -> None:
    ids = random_prompts([length], load_config(directory).vocab_size)[0]
    ours_V = MiniLoop(directory, dtype).prefill(0, ids, share)
    theirs_V = their_logits(load_theirs(directory, dtype), ids)[-1]
    assert relative_error(ours_V, theirs_V) < tolerance


def test_greedy_tokens_of_the_default_model() -> None:
    check_greedy(DEFAULT_MODEL, [1, 2, 15, 16, 17, 64, 129, 300], num_new=16)


@pytest.mark.slow
def test_greedy_tokens_of_the_default_model_over_64_prompts() -> None:
    rng = random.Random(4)
    check_greedy(DEFAULT_MODEL, [1, 2, 900, *(rng.randint(1, 900) for _ in range(61))], num_new=32)


@pytest.mark.parametrize("share", [1000, 48])
def test_logits_of_the_default_model(share: int) -> None:
    check_logits(DEFAULT_MODEL, torch.float32, 230, share, tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_logits_of_the_default_model(dtype: torch.dtype) -> None:
    """Against theirs in bfloat16, and against the same weights computed in float32."""
    ids = random_prompts([230], 4096)[0]
    ours_V = MiniLoop(DEFAULT_MODEL, torch.bfloat16).prefill(0, ids, 64)
    theirs_V = their_logits(load_theirs(DEFAULT_MODEL, dtype), ids)[-1]
    assert relative_error(ours_V, theirs_V) < 2e-2


@pytest.mark.parametrize("name", SHAPES)
def test_random_shapes(tmp_path: Path, name: str) -> None:
    directory = write_checkpoint(tmp_path, **SHAPES[name])
    check_logits(directory, torch.float32, 333, share=100, tolerance=1e-4)
    check_greedy(directory, [1, 40], num_new=8)


@pytest.mark.parametrize("name", SHAPES)
def test_random_shapes_in_bfloat16(tmp_path: Path, name: str) -> None:
    directory = write_checkpoint(tmp_path, dtype="bfloat16", **SHAPES[name])
    check_logits(directory, torch.bfloat16, 100, share=64, tolerance=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_random_shapes_with_long_prompts(tmp_path: Path, name: str) -> None:
    directory = write_checkpoint(tmp_path, **SHAPES[name])
    check_greedy(directory, [1, 2, 31, 200, 515, 900, 1024, 1500], num_new=24)
    check_logits(directory, torch.float32, 1500, share=1500, tolerance=1e-4)


@pytest.mark.parametrize("linear", ["native", "onednn", "plain"])
@pytest.mark.parametrize("attention", ["native", "reference"])
def test_backends_agree_with_theirs(tmp_path: Path, attention: str, linear: str) -> None:
    directory = write_checkpoint(tmp_path, **SHAPES["grouped_tied"])
    try:
        loop = MiniLoop(directory, torch.float32, attention=attention, linear=linear)
    except ValueError as error:
        pytest.skip(str(error))
    ids = random_prompts([150], 500)[0]
    expected = their_logits(load_theirs(directory, torch.float32), ids)[-1]
    assert relative_error(loop.prefill(0, ids, 50), expected) < 1e-4
