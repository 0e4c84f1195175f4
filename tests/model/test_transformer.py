"""The decoder's parts, and its promise: a row's logits have the same bits whatever shares the step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from model.config import Rope
from model.interface import Backend, Quantization, Row
from model.operators import rms_norm, silu_mul
from model.rotary import RotaryTables, inverse_frequencies, rotate
from tests.model.checkpoints import DEFAULT_MODEL, write_checkpoint
from tests.model.levels import LEVELS
from tests.model.mini_loop import MiniLoop

DTYPES = [torch.bfloat16, torch.float32]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def random_ids(rng: random.Random, length: int, vocab_size: int = 500) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(length)]


def rows_of(x: Tensor, start: int, count: int) -> Tensor:
    """Rows at the start of a fresh storage, as a step of their own would have them."""
    return x[start : start + count].clone()


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(
    ("rope", "theirs"),
    [
        (Rope(5e5, "linear", 4.0), {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}),
        (
            Rope(5e5, "llama3", 8.0, 1.0, 4.0, 512),
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3, "original_max_position_embeddings": 512},
        ),
    ],
)
def test_scaled_frequencies(head_dim: int, rope: Rope, theirs: dict[str, Any]) -> None:
    config = LlamaConfig(head_dim=head_dim, rope_parameters=theirs, max_position_embeddings=4096)
    expected, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config)
    assert factor == 1
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), expected, rtol=1e-6, atol=0)


def test_rotation_is_hugging_faces() -> None:
    embedding = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=80, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    )
    q, k = torch.randn(2, 70, 3, 80, generator=torch.Generator().manual_seed(0)).unbind()
    positions = torch.randperm(2000, generator=torch.Generator().manual_seed(1))[:70]
    cos, sin = embedding(q, positions[None])
    expected_q, expected_k = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    rotation = RotaryTables(Rope(1e4), 80, 2000).at(positions)
    assert torch.equal(rotate(q, *rotation), expected_q[0])
    assert torch.equal(rotate(k, *rotation), expected_k[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_hugging_faces(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(192, eps=1e-5)
    norm.weight.data = torch.randn(192, generator=torch.Generator().manual_seed(0))
    norm.to(dtype)
    x = torch.randn(40, 192, generator=torch.Generator().manual_seed(1)).to(dtype) * 3
    assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 333, 1001, 4096])
def test_norm_rows_are_independent(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(300, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.ones(width, dtype=dtype)
    together = rms_norm(x, weight, 1e-5)
    for start, count in ((0, 1), (7, 1), (3, 2), (100, 127), (41, 255), (0, 299)):
        assert torch.equal(rms_norm(rows_of(x, start, count), weight, 1e-5), together[start : start + count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [100, 333, 500, 512, 1536])
def test_silu_rows_are_independent(dtype: torch.dtype, width: int) -> None:
    """Widths and counts at which threads split inside a row: there the library's own float32 silu differs."""
    x = torch.randn(520, 2 * width, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    together = silu_mul(x)
    for start, count in ((0, 1), (7, 3), (3, 127), (1, 129), (100, 171), (41, 255), (0, 333), (9, 511)):
        assert torch.equal(silu_mul(rows_of(x, start, count)), together[start : start + count])


def test_silu_of_every_bfloat16() -> None:
    """The element-wise and the vector code of the library agree, which the bfloat16 path relies on."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    spread = torch.zeros(len(every), 3, dtype=torch.bfloat16)
    spread[:, 1] = every
    assert torch.equal(functional.silu(every), functional.silu(spread[:, 1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_is_silu(dtype: torch.dtype) -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).to(dtype) * 30
    gate, up = x.double().chunk(2, -1)
    expected = (functional.silu(gate) * up).to(dtype)
    torch.testing.assert_close(silu_mul(x), expected, rtol=1.6e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-30)


def ragged_rows(loop: MiniLoop, rng: random.Random, vocab_size: int) -> list[Row]:
    """64 rows of which a third are prompts of various lengths, a third end one, and a third decode."""
    rows = []
    for slot in range(loop.num_slots):
        length = rng.randint(2, 90)
        ids = random_ids(rng, length, vocab_size)
        if slot % 3 == 0:
            rows.append(loop.admit(slot, ids, length))
            continue
        computed = length - 1 if slot % 3 == 1 else rng.randint(1, length - 1)
        loop.step([loop.admit(slot, ids, computed)])
        rows.append(Row(slot, computed, length - computed, wants_token=True))
    return rows


def forget(loop: MiniLoop, row: Row, ids: list[int]) -> Row:
    """Prepares the same row again in a fresh loop that has no other sequence."""
    if row.start:
        loop.step([loop.admit(row.slot, ids, row.start)])
        return Row(row.slot, row.start, row.num_tokens, wants_token=True)
    return loop.admit(row.slot, ids, row.num_tokens)


def check_alone_equals_together(directory: Path, dtype: torch.dtype, vocab_size: int, every: int, **names: Any) -> None:
    together = MiniLoop(directory, dtype, num_slots=64, context_length=96, **names)
    rows = ragged_rows(together, random.Random(0), vocab_size)
    logits_WV = together.step(rows)
    ids = {row.slot: together.tables.tokens[row.slot, : row.start + row.num_tokens].tolist() for row in rows}
    alone = MiniLoop(directory, dtype, num_slots=64, context_length=96, **names)
    for index in range(0, len(rows), every):
        row = rows[index]
        assert torch.equal(alone.step([forget(alone, row, ids[row.slot])])[0], logits_WV[index]), row


QUANTIZATIONS = list(Quantization)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small"), hidden_size=96, intermediate_size=200, bias=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.usefixtures("native_kernels")
def test_a_row_alone_has_the_bits_of_a_row_among_64(dtype: torch.dtype, quantization: Quantization) -> None:
    check_alone_equals_together(DEFAULT_MODEL, dtype, 4096, every=7, quantization=quantization)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("level", LEVELS[1:])
def test_a_row_alone_has_the_bits_of_a_row_among_64_on_every_level(
    small: Path, dtype: torch.dtype, quantization: Quantization, level: str
) -> None:
    check_alone_equals_together(small, dtype, 500, every=7, quantization=quantization, level=level)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 320, "num_heads": 4, "num_kv_heads": 1, "head_dim": 80, "vocab_size": 1001, "tie": True},
        {"hidden_size": 256, "num_heads": 2, "num_kv_heads": 2, "head_dim": 128, "intermediate_size": 1999},
        {"hidden_size": 2048, "num_layers": 1, "head_dim": 64, "intermediate_size": 1536, "bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_row_alone_has_the_bits_of_a_row_among_64_for_other_shapes(
    tmp_path: Path, dtype: torch.dtype, shape: dict[str, Any], quantization: Quantization, level: str
) -> None:
    directory = write_checkpoint(tmp_path, **shape)
    check_alone_equals_together(directory, dtype, 500, every=3, quantization=quantization, level=level)


def check_shares(directory: Path, dtype: torch.dtype, length: int, shares: range, **names: Any) -> None:
    """The logits after a prompt have the same bits however the prompt is cut."""
    loop = MiniLoop(directory, dtype, context_length=256, **names)
    ids = random_ids(random.Random(1), length)
    whole = loop.prefill(0, ids, length)
    for share in shares:
        assert torch.equal(loop.prefill(0, ids, share), whole), share


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.usefixtures("native_kernels")
def test_shares_of_a_prompt_do_not_change_bits(dtype: torch.dtype, quantization: Quantization) -> None:
    check_shares(DEFAULT_MODEL, dtype, 130, range(5, 65, 8), quantization=quantization)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("level", LEVELS[1:])
def test_shares_of_a_prompt_do_not_change_bits_on_any_level(
    small: Path, dtype: torch.dtype, quantization: Quantization, level: str
) -> None:
    check_shares(small, dtype, 130, range(5, 65, 8), quantization=quantization, level=level)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_no_share_of_a_prompt_changes_bits(dtype: torch.dtype, level: str) -> None:
    check_shares(DEFAULT_MODEL, dtype, 200, range(1, 65), level=level)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_old_content_of_blocks_is_never_seen(
    small: Path, dtype: torch.dtype, quantization: Quantization, level: str
) -> None:
    ids = random_ids(random.Random(2), 50)
    clean, poisoned = (
        MiniLoop(small, dtype, context_length=64, quantization=quantization, level=level) for _ in range(2)
    )
    for cache in (*poisoned.cache.k, *poisoned.cache.v):
        cache.fill_(float("nan"))
    assert torch.equal(poisoned.prefill(0, ids, 7), clean.prefill(0, ids, 7))
    for position in range(50, 60):
        for loop in (clean, poisoned):
            loop.tables.append([0], [position], [position])
        row = Row(0, position, 1, wants_token=True)
        assert torch.equal(poisoned.step([row]), clean.step([row]))


@pytest.mark.parametrize("backend", [Backend.TORCH, Backend.AUTO])
@pytest.mark.parametrize("by_operators", [True, False])
def test_rows_that_want_nothing_still_compute(tmp_path: Path, backend: Backend, by_operators: bool) -> None:
    directory = write_checkpoint(tmp_path)
    loop = MiniLoop(directory, torch.float32, context_length=64, backend=backend, by_operators=by_operators)
    assert loop.step([loop.admit(0, list(range(20)), 10)]).shape == (0, 512)
    assert loop.cache.k[1][0].abs().sum() > 0
