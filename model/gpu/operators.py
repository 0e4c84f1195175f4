"""What a step computes beside its matrix products, its attention and its draws, fused into as few kernels as it takes.

It owns how these kernels are cut into programs. It does not know layers, steps or CUDA graphs: outputs go to buffers of
the caller's, the grids depend on shapes alone, and nothing waits for a value, so that every launch can be captured.

model/operators.py, model/rotary.py and torch are the specification. What only moves, adds or turns has their bits, in
float32 and in bfloat16. Two things have not, by some units in the last place of float32, which now and then tips a
rounding to bfloat16: norms, because their sums run in another order, and gates, because exp differs between libraries.

Each token is computed by itself, in a way that no other token and no number of tokens can change: a program has one row
or a part of one, and its tiles and warps depend on the row's width. The alignment of a pointer changes a kernel's code
and could change the order of a sum, so it is the same for all: buffers begin at multiples of 16 bytes. Shape letters:

    T tokens of the step   W wanted tokens     E hidden size   F intermediate size   V vocabulary   S slots
    H query heads          K key/value heads   N = H + 2 K     D head size           P positions
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import triton
import triton.language as tl
from torch import Tensor

from model.gpu.variant import Variant

Activation = Literal["silu", "gelu_tanh"]

MAX_WIDTH = 16_384
"""Of a row that one program holds."""
ALIGNMENT_BYTES = 16
GATE_BLOCK = 1024
"""Numbers of a gated row that one program computes: with four warps, 16 bytes of bfloat16 a thread."""

OTHER_TYPES = {"epsilon": "fp32", "cos_ptr": "*fp32", "signed_sin_ptr": "*fp32"} | dict.fromkeys(
    ("positions_ptr", "write_blocks_ptr", "write_offsets_ptr", "rows_ptr", "ids_ptr", "slots_ptr", "last_tokens_ptr"),
    "*i32",
)
"""Of the arguments that are no buffers of the model's dtype, on the card."""

IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
GELU_SLOPE = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))
GELU_CUBIC = tl.constexpr(0.044715)


def add_rms_norm(
    x_TE: Tensor,
    residual_TE: Tensor | None,
    weight_E: Tensor,
    epsilon: float,
    out_TE: Tensor,
    residual_out_TE: Tensor | None,
) -> None:
    """residual_out = residual + x, rounded to the dtype, and out = its RMS norm as in model.operators.rms_norm.

    Without a residual, `x_TE` is the stream already: only its norm is computed, and there is no residual_out. All have
    one dtype, bfloat16 or float32. An output may be the same tensor as an input, but not the other output. Raises
    ValueError for E > 16,384.
    """
    assert (residual_TE is None) == (residual_out_TE is None), "what is added goes somewhere"
    _check_buffers(x_TE, residual_TE, weight_E, out_TE, residual_out_TE)
    width = x_TE.shape[1]
    block, num_warps = _row_tile(width)
    _add_rms_norm_kernel[(x_TE.shape[0],)](
        x_TE, residual_TE, weight_E, out_TE, residual_out_TE, epsilon, E=width, BLOCK_E=block, num_warps=num_warps
    )


def rotate_and_write(
    qkv_TND: Tensor,
    positions_T: Tensor,
    cos_PD: Tensor,
    signed_sin_PD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    write_blocks_T: Tensor,
    write_offsets_T: Tensor,
    q_out_THD: Tensor,
    *,
    q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None,
    epsilon: float = 0.0,
) -> None:
    """Turns queries and keys by their positions; keys and values go to the cache, queries to q_out.

    The tables are a RotaryTables' (float32), the caches one layer's in the layout PLAIN [num_blocks, K, block_size, D].
    With weights, each query and key head goes through an RMS norm of its own before it is turned. Positions, blocks and
    offsets are int32 or int64. A token whose write block is negative is padding: nothing of it is read, nothing written
    to the cache, and its queries are zeros.
    """
    assert (q_norm_D is None) == (k_norm_D is None), "norms of both or of none"
    _check_buffers(qkv_TND, cos_PD, signed_sin_PD, k_cache, v_cache, q_out_THD, q_norm_D, k_norm_D)
    num_tokens, num_heads, head_dim = q_out_THD.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    assert qkv_TND.shape == (num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    # A product and a sum stay two roundings, as in the torch function.
    _rotate_and_write_kernel[(num_tokens, num_kv_heads)](
        qkv_TND,
        positions_T,
        cos_PD,
        signed_sin_PD,
        q_norm_D,
        k_norm_D,
        k_cache,
        v_cache,
        write_blocks_T,
        write_offsets_T,
        q_out_THD,
        epsilon,
        **_head_tile(num_heads, num_kv_heads, head_dim),
        BLOCK_SIZE=block_size,
        num_warps=1,
        enable_fp_fusion=False,
    )


def gated_mul(gate_up_T2F: Tensor, out_TF: Tensor, kind: Activation) -> None:
    """activation(gate) * up of the two halves of each row, the activation rounded to the dtype before the product.

    "silu" is model.operators.silu_mul; "gelu_tanh" is torch's gelu(approximate="tanh") times up.
    """
    _check_buffers(gate_up_T2F, out_TF)
    num_tokens, width = out_TF.shape
    assert gate_up_T2F.shape == (num_tokens, 2 * width)
    _gated_mul_kernel[(num_tokens, triton.cdiv(width, GATE_BLOCK))](
        gate_up_T2F, out_TF, F=width, IS_GELU=kind == "gelu_tanh", BLOCK_F=GATE_BLOCK, num_warps=4
    )


def gather_rows(x_TE: Tensor, rows_W: Tensor, out_WE: Tensor) -> None:
    """out[w] = x[rows[w]], or zeros where rows[w] < 0, which is padding. `rows_W` is int32 or int64.

    Raises ValueError for E > 16,384.
    """
    _check_buffers(x_TE, out_WE)
    width = x_TE.shape[1]
    block, num_warps = _row_tile(width)
    _gather_rows_kernel[(out_WE.shape[0],)](x_TE, rows_W, out_WE, E=width, BLOCK_E=block, num_warps=num_warps)


def embed(ids_T: Tensor, slots_T: Tensor, last_tokens_S: Tensor, embedding_VE: Tensor, out_TE: Tensor) -> None:
    """out[t] = embedding[ids[t]], or embedding[last_tokens[slots[t]]] where ids[t] < 0.

    So a step is launched before the host knows what the step before it draws into `last_tokens_S`. Slots of other
    tokens are not read; padding may have any id of the vocabulary. The integers are int32 or int64. Raises ValueError
    for E > 16,384.
    """
    _check_buffers(embedding_VE, out_TE)
    width = embedding_VE.shape[1]
    block, num_warps = _row_tile(width)
    _embed_kernel[(ids_T.shape[0],)](
        ids_T, slots_T, last_tokens_S, embedding_VE, out_TE, E=width, BLOCK_E=block, num_warps=num_warps
    )


@triton.jit
def widen(x):
    """A tile in float32."""
    # The interpreter takes numbers of bfloat16 below the normal ones for others.
    if IS_INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """A tile of float32 rounded to the nearest of a dtype, to the even one of two."""
    # The interpreter cuts off what bfloat16 has no room for.
    if IS_INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(dtype)
    return rounded


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, residual_out_ptr, epsilon, E: tl.constexpr, BLOCK_E: tl.constexpr
):
    """One program a token."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * E
    columns = tl.arange(0, BLOCK_E)
    is_inside = columns < E
    x = widen(tl.load(x_ptr + row + columns, mask=is_inside, other=0.0))
    if residual_ptr is not None:
        residual = widen(tl.load(residual_ptr + row + columns, mask=is_inside, other=0.0))
        stream = narrow(residual + x, dtype)
        tl.store(residual_out_ptr + row + columns, stream, mask=is_inside)
        x = widen(stream)
    scale = tl.rsqrt(tl.div_rn(tl.sum(x * x, axis=0), E * 1.0) + epsilon)
    weight = widen(tl.load(weight_ptr + columns, mask=is_inside, other=0.0))
    normed = widen(narrow(x * scale, dtype))
    tl.store(out_ptr + row + columns, narrow(weight * normed, dtype), mask=is_inside)


@triton.jit
def _load_turned(
    heads_ptr, is_inside, weight_ptr, half, is_in_half, cos, sin, epsilon, D: tl.constexpr, dtype: tl.constexpr
):
    """Both halves [heads, D / 2] of some heads, normed where there is a weight, turned, and rounded.

    `heads_ptr` points to the left ones:   head   |<---- left ---->|<---- right --->|
                                                  0               D/2               D
    """
    HALF: tl.constexpr = D // 2
    left = widen(tl.load(heads_ptr, mask=is_inside, other=0.0))
    right = widen(tl.load(heads_ptr + HALF, mask=is_inside, other=0.0))
    if weight_ptr is not None:
        mean = tl.div_rn(tl.sum(left * left + right * right, axis=1), D * 1.0)
        scale = tl.rsqrt(mean + epsilon)[:, None]
        left_weight = widen(tl.load(weight_ptr + half, mask=is_in_half, other=0.0))
        right_weight = widen(tl.load(weight_ptr + HALF + half, mask=is_in_half, other=0.0))
        left = widen(narrow(left_weight * widen(narrow(left * scale, dtype)), dtype))
        right = widen(narrow(right_weight * widen(narrow(right * scale, dtype)), dtype))
    return narrow(left * cos - right * sin, dtype), narrow(right * cos + left * sin, dtype)


@triton.jit
def _rotate_and_write_kernel(
    qkv_ptr,
    positions_ptr,
    cos_ptr,
    signed_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_cache_ptr,
    v_cache_ptr,
    write_blocks_ptr,
    write_offsets_ptr,
    q_out_ptr,
    epsilon,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """One program a token and key/value head, with the G = H / K query heads that read it.

    A token's heads [N, D]   | q 0 .. q G-1 | q G ..     | ... | k 0 | k 1 | ... | v 0 | v 1 | ... |
    program                    0              1                  0     1           0     1
    """
    dtype: tl.constexpr = q_out_ptr.dtype.element_ty
    H: tl.constexpr = K * G
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    half = tl.arange(0, BLOCK_HALF)[None, :]
    is_in_half = half < HALF
    in_group = tl.arange(0, BLOCK_G)[:, None]
    is_query = (in_group < G) & is_in_half
    queries = (kv_head * G + in_group) * D + half
    q_out = q_out_ptr + token * (H * D) + queries

    block = tl.load(write_blocks_ptr + token).to(tl.int64)
    if block < 0:
        tl.store(q_out, 0.0, mask=is_query)
        tl.store(q_out + HALF, 0.0, mask=is_query)
        return

    # Cosines are the same for both halves of a head. Sines, too, but for the sign, which is plus in the right half.
    angles = tl.load(positions_ptr + token).to(tl.int64) * D + HALF + half
    cos = tl.load(cos_ptr + angles, mask=is_in_half, other=0.0)
    sin = tl.load(signed_sin_ptr + angles, mask=is_in_half, other=0.0)
    heads = qkv_ptr + token * ((H + 2 * K) * D)
    left, right = _load_turned(
        heads + queries, is_query, q_norm_ptr, half, is_in_half, cos, sin, epsilon, D=D, dtype=dtype
    )
    tl.store(q_out, left, mask=is_query)
    tl.store(q_out + HALF, right, mask=is_query)

    offset = tl.load(write_offsets_ptr + token).to(tl.int64)
    place = ((block * K + kv_head) * BLOCK_SIZE + offset) * D
    key = heads + (H + kv_head) * D + half
    left, right = _load_turned(key, is_in_half, k_norm_ptr, half, is_in_half, cos, sin, epsilon, D=D, dtype=dtype)
    tl.store(k_cache_ptr + place + half, left, mask=is_in_half)
    tl.store(k_cache_ptr + place + HALF + half, right, mask=is_in_half)

    columns = tl.arange(0, 2 * BLOCK_HALF)
    value = tl.load(heads + (H + K + kv_head) * D + columns, mask=columns < D)
    tl.store(v_cache_ptr + place + columns, value, mask=columns < D)


@triton.jit
def _gated_mul_kernel(gate_up_ptr, out_ptr, F: tl.constexpr, IS_GELU: tl.constexpr, BLOCK_F: tl.constexpr):
    """One program a token and part of its row.

    Both activations are x / (1 + exp(-z)). With GELU's tanh so replaced, by 1 + tanh(z / 2) = 2 / (1 + exp(-z)), what
    it gives for numbers far below zero is not lost in a difference.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_inside = columns < F
    gate_ptr = gate_up_ptr + token * (2 * F) + columns
    gate = widen(tl.load(gate_ptr, mask=is_inside, other=0.0))
    up = widen(tl.load(gate_ptr + F, mask=is_inside, other=0.0))
    z = gate
    if IS_GELU:
        z = (gate + gate * gate * gate * GELU_CUBIC) * GELU_SLOPE
    activated = widen(narrow(tl.div_rn(gate, tl.exp(-z) + 1.0), dtype))
    tl.store(out_ptr + token * F + columns, narrow(activated * up, dtype), mask=is_inside)


@triton.jit
def _gather_rows_kernel(x_ptr, rows_ptr, out_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """One program a row."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place).to(tl.int64)
    columns = tl.arange(0, BLOCK_E)
    num_read = tl.where(row < 0, 0, E)
    x = tl.load(x_ptr + row * E + columns, mask=columns < num_read, other=0.0)
    tl.store(out_ptr + place * E + columns, x, mask=columns < E)


@triton.jit
def _embed_kernel(ids_ptr, slots_ptr, last_tokens_ptr, embedding_ptr, out_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """One program a token."""
    token = tl.program_id(0).to(tl.int64)
    token_id = tl.load(ids_ptr + token).to(tl.int64)
    is_last = token_id < 0
    slot = tl.load(slots_ptr + token, mask=is_last, other=0)
    last_id = tl.load(last_tokens_ptr + slot, mask=is_last, other=0).to(tl.int64)
    columns = tl.arange(0, BLOCK_E)
    row = tl.where(is_last, last_id, token_id) * E
    embedded = tl.load(embedding_ptr + row + columns, mask=columns < E)
    tl.store(out_ptr + token * E + columns, embedded, mask=columns < E)


def _row_tile(width: int) -> tuple[int, int]:
    """Tile and warps of a program that holds a row: 16 numbers a thread, 32 in the widest."""
    if width > MAX_WIDTH:
        raise ValueError(f"hidden_size: kernels take at most {MAX_WIDTH}, not {width}")
    block: int = triton.next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


def _head_tile(num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, int]:
    group = num_heads // num_kv_heads
    return {
        "K": num_kv_heads,
        "G": group,
        "D": head_dim,
        "BLOCK_G": triton.next_power_of_2(group),
        "BLOCK_HALF": triton.next_power_of_2(head_dim // 2),
    }


def _check_buffers(*buffers: Tensor | None) -> None:
    """What would be computed wrongly, or with other bits."""
    for buffer in buffers:
        assert buffer is None or buffer.is_contiguous(), "buffers are contiguous"
        assert buffer is None or buffer.data_ptr() % ALIGNMENT_BYTES == 0, "buffers are aligned"


def variants() -> list[Variant]:
    """The shapes of Llama 3.1 8B and Llama 3.2 1B in bfloat16, and what other families do in their places."""
    found = []
    for width in (4096, 2048):
        block, num_warps = _row_tile(width)
        row = {"E": width, "BLOCK_E": block}
        alone = {"residual_ptr": None, "residual_out_ptr": None}
        found += [
            _variant(f"add_rms_norm E{width}", _add_rms_norm_kernel, row, num_warps),
            _variant(f"rms_norm E{width}", _add_rms_norm_kernel, row | alone, num_warps),
            _variant(f"gather_rows E{width}", _gather_rows_kernel, row, num_warps),
            _variant(f"embed E{width}", _embed_kernel, row, num_warps),
        ]
    for width in (14336, 8192):
        tile = {"F": width, "BLOCK_F": GATE_BLOCK}
        found += [
            _variant(f"silu_mul F{width}", _gated_mul_kernel, tile | {"IS_GELU": False}, num_warps=4),
            _variant(f"gelu_mul F{width}", _gated_mul_kernel, tile | {"IS_GELU": True}, num_warps=4),
        ]
    for head_dim in (128, 64):
        heads = _head_tile(32, 8, head_dim) | {"BLOCK_SIZE": 64}
        without = {"q_norm_ptr": None, "k_norm_ptr": None}
        found += [
            _variant(f"rotate_and_write D{head_dim}", _rotate_and_write_kernel, heads | without, num_warps=1),
            _variant(f"norm_rotate_and_write D{head_dim}", _rotate_and_write_kernel, heads, num_warps=1),
        ]
    return found


def _variant(name: str, kernel: Any, constants: Mapping[str, Any], num_warps: int) -> Variant:
    signature = {
        argument: OTHER_TYPES.get(argument, "*bf16") for argument in kernel.arg_names if argument not in constants
    }
    buffers = tuple(argument for argument, type_ in signature.items() if type_ in ("*bf16", "*fp32"))
    has_fusion = kernel is not _rotate_and_write_kernel
    return Variant(name, kernel, signature, constants, num_warps=num_warps, has_fp_fusion=has_fusion, aligned=buffers)
