"""The fused operators of a step on a card, against the bytes that they must move.

python -m loadtest.gpu.operators --records FILE
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loadtest.gpu.attention_cases import DRY_BLOCK_SIZE
from loadtest.gpu.limits import rates_of
from loadtest.gpu.measure import (
    Call,
    compile_ahead,
    measure,
    num_sets,
    open_device,
    random_tensor,
    relative_error,
    unwritten,
)
from loadtest.gpu.records import parse_part
from loadtest.gpu.shapes import names_of, shape_of
from loadtest.models import ModelShape
from model.gpu import operators
from model.gpu.tiles import BLOCK_SIZE
from model.operators import rms_norm, silu_mul
from model.rotary import rotate

NUM_TOKENS = (1, 64, 256, 8192)
DRY_NUM_TOKENS = (3,)
EPSILON = 1e-5
TOLERANCE = 0.01
"""Relative, of results in bfloat16."""
CHECKED_TOKENS = 64
COMPILE_SECONDS = 25.0


@dataclass(frozen=True, slots=True)
class Work:
    """One operator over one set of inputs."""

    call: Call
    num_bytes: float
    """Read and written, each number once."""
    found: Tensor
    """Where the call writes what is checked."""
    expected: Callable[[], Tensor]
    """The same in float32, on a CPU."""


Make = Callable[[ModelShape, int, torch.device], Work]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes. Returns the exit code."""
    options = parse_part("operators", arguments)
    if not options.is_dry:
        shapes = [shape_of(name, is_dry=False) for name in names_of(options.is_dry)]
        compile_ahead(
            [partial(compile_operator, make, shape) for make in OPERATORS.values() for shape in shapes], COMPILE_SECONDS
        )
    device, rates, is_sound = open_device(options.is_dry), rates_of(options), True
    for model, name, num_tokens in cases(options.is_dry):
        shape = shape_of(model, options.is_dry)
        work = OPERATORS[name](shape, num_tokens, device)
        others = [OPERATORS[name](shape, num_tokens, device) for _ in range(num_sets(work.num_bytes, device) - 1)]
        work.call()
        error = relative_error(work.found.cpu(), work.expected())
        timing = measure([work.call, *(other.call for other in others)], device)
        is_sound &= error < TOLERANCE
        options.records.write(
            "operator",
            model=model,
            operator=name,
            tokens=num_tokens,
            us=1e6 * timing.seconds,
            share=work.num_bytes / rates.bytes_read / timing.seconds,
            noise=timing.noise,
            error=error,
            is_right=error < TOLERANCE,
        )
    return 0 if is_sound else 1


def cases(is_dry: bool) -> Iterator[tuple[str, str, int]]:
    """Model, operator, tokens."""
    for model in names_of(is_dry):
        for name in OPERATORS:
            for num_tokens in DRY_NUM_TOKENS if is_dry else NUM_TOKENS:
                yield model, name, num_tokens


def compile_operator(make: Make, shape: ModelShape) -> None:
    """Launches an operator once."""
    make(shape, 4, torch.device("cuda")).call()
    torch.cuda.synchronize()


def make_add_rms_norm(shape: ModelShape, num_tokens: int, device: torch.device) -> Work:
    """The residual stream's sum and its norm."""
    x, residual = (random_tensor(num_tokens, shape.hidden_size, device=device) for _ in range(2))
    weight = random_tensor(shape.hidden_size, device=device)
    out, stream = (unwritten(num_tokens, shape.hidden_size, device=device) for _ in range(2))
    return Work(
        lambda: operators.add_rms_norm(x, residual, weight, EPSILON, out, stream),
        num_bytes=2 * (4 * x.numel() + weight.numel()),
        found=out[:CHECKED_TOKENS],
        expected=lambda: rms_norm(in_float32(x) + in_float32(residual), weight.cpu().float(), EPSILON),
    )


def make_gated_mul(shape: ModelShape, num_tokens: int, device: torch.device) -> Work:
    """SiLU of the gate, times up."""
    gate_up = random_tensor(num_tokens, 2 * shape.intermediate_size, device=device)
    out = unwritten(num_tokens, shape.intermediate_size, device=device)
    return Work(
        lambda: operators.gated_mul(gate_up, out, "silu"),
        num_bytes=2 * (gate_up.numel() + out.numel()),
        found=out[:CHECKED_TOKENS],
        expected=lambda: silu_mul(in_float32(gate_up)),
    )


def make_rotate_and_write(shape: ModelShape, num_tokens: int, device: torch.device) -> Work:
    """Rotated queries; keys and values into the cache. The queries are checked."""
    head_dim, kv_heads = shape.head_dim, shape.num_kv_heads
    block_size = DRY_BLOCK_SIZE if device.type == "cpu" else BLOCK_SIZE
    qkv = random_tensor(num_tokens, shape.num_heads + 2 * kv_heads, head_dim, device=device)
    angles = torch.rand(num_tokens, head_dim // 2, device=device) * 6
    cos = angles.cos().repeat(1, 2)
    signed_sin = torch.cat([-angles.sin(), angles.sin()], dim=1)
    place = -(-num_tokens // block_size), kv_heads, block_size, head_dim
    k_cache, v_cache = (torch.zeros(place, dtype=qkv.dtype, device=device) for _ in range(2))
    positions = torch.arange(num_tokens, dtype=torch.int32, device=device)
    blocks, offsets = positions // block_size, positions % block_size
    q_out = unwritten(num_tokens, shape.num_heads, head_dim, device=device)
    return Work(
        lambda: operators.rotate_and_write(qkv, positions, cos, signed_sin, k_cache, v_cache, blocks, offsets, q_out),
        num_bytes=2 * 2 * qkv.numel() + 4 * cos.numel(),
        found=q_out[:CHECKED_TOKENS],
        expected=lambda: rotate(
            in_float32(qkv)[:, : shape.num_heads], in_float32(cos)[:, None], in_float32(signed_sin)[:, None]
        ),
    )


def make_embed(shape: ModelShape, num_tokens: int, device: torch.device) -> Work:
    """Rows of the embeddings, half of them by what their slot drew last."""
    vocab_size = min(shape.vocab_size, 16_384)
    embedding = random_tensor(vocab_size, shape.hidden_size, device=device)
    last_tokens = torch.randint(vocab_size, (num_tokens,), dtype=torch.int32, device=device)
    slots = torch.arange(num_tokens, dtype=torch.int32, device=device)
    ids = torch.where(slots % 2 == 0, -1, torch.randint_like(slots, vocab_size))
    out = unwritten(num_tokens, shape.hidden_size, device=device)
    return Work(
        lambda: operators.embed(ids, slots, last_tokens, embedding, out),
        num_bytes=2 * 2 * out.numel(),
        found=out[:CHECKED_TOKENS],
        expected=lambda: embedding[torch.where(ids < 0, last_tokens, ids)[:CHECKED_TOKENS].long()].cpu().float(),
    )


def in_float32(x: Tensor) -> Tensor:
    """The tokens that are checked, on the CPU."""
    return x[:CHECKED_TOKENS].cpu().float()


OPERATORS: dict[str, Make] = {
    "add_rms_norm": make_add_rms_norm,
    "gated_mul": make_gated_mul,
    "rotate_and_write": make_rotate_and_write,
    "embed": make_embed,
}


if __name__ == "__main__":
    sys.exit(main())
