"""Paged causal attention on a card: decode and prefill in one step, in Triton.

It owns the kernels and the device buffers that they share, of partial results. It does not know layers, sequences or
CUDA graphs. Grids are constant: every program takes items off the step's plan (model/gpu/work.py), as many as are
there, so that one captured graph serves any mix of rows. A launch allocates nothing and waits for no value.

model/attention/reference.py is the specification. An item is one tile of query tokens, one split of positions, one
key/value head; the query heads that share that head are lanes of the tile beside one another (G = H / K):

    lane       0 ... G - 1 | G ... 2 G - 1 | ...         tiles of 64 lanes and more multiply by wgmma on a card of
    query      0           | 1             | ...         compute capability 9.0, smaller ones by mma.sync
    head       first ... last of the group | ...

The softmax is online, over tiles of keys in ascending order, in float32 and powers of two. Only tiles of keys that some
lane sees a part of are masked: a prompt's last ones and, with a window, the first.

What a token's bits depend on: its query, what it sees, and its kind of tile, prefill (tokens of prompts) or decode
(those behind them). Not on the batch, the cut of its sequence into steps, the block ids, or the grid. It holds because
tiles of keys and splits begin at multiples of their sizes; because masked and plain tiles compute alike (products that
are added to something are fused by name, not as the compiler pleases); because a tile of keys that a lane does not see
adds zeros and multiplies by one; and because splits are merged one after another, where one that is empty changes
nothing. Decode and prefill may differ in the last bits: tensor cores add up in other ways, and so do reductions of
other tiles. So the engine keeps their blocks apart (RunnerShape.max_generated_tokens).

    T query tokens of a step    R rows          H query heads    K key/value heads    D head size
    M lanes of a tile           N keys of a tile
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from model.gpu import work
from model.gpu.variant import Variant

MIN_LANES = 16
"""The least that a product of tiles may have on a side."""

IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-1e38)
"""The peak of no scores. Finite, so that exp2(LOWEST - LOWEST) is 1, and below any score, so that the rest gives 0."""
HEADER_SIZE = tl.constexpr(work.HEADER_SIZE)
ITEM_SIZE = tl.constexpr(work.ITEM_SIZE)
MERGE_SIZE = tl.constexpr(work.MERGE_SIZE)
PEAKS_BLOCK = tl.constexpr(16)
"""Splits whose peaks are read at a time."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What the layers that share a plan have in common."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    scale: float
    window: int | None = None
    """Positions that a token sees, its own with them; all of its past without one."""
    soft_cap: float = 0.0
    """Scores s become soft_cap * tanh(s / soft_cap); 0 leaves them."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How the rows of one kind are computed."""

    num_lanes: int
    """M, a power of two: query tokens times query heads of one key/value head."""
    num_keys: int
    """N, a power of two, which divides the block size or is a multiple of it."""
    split: int
    """Positions of a split, a multiple of num_keys."""
    num_warps: int
    num_stages: int


DECODE = Tile(num_lanes=16, num_keys=64, split=512, num_warps=4, num_stages=3)
PREFILL = Tile(num_lanes=128, num_keys=64, split=8192, num_warps=8, num_stages=3)
MERGE_WARPS = 4


class PagedAttention:
    """Attention of steps of at most `max_rows` rows and `max_tokens` query tokens, with contexts up to `max_context`.

    See model.gpu.attention_base.Attention. A step: `plan` on the host, a copy of it to the device, then `attend` for
    each layer. A captured `attend` reads whatever plan lies there.
    """

    def __init__(
        self,
        heads: Heads,
        *,
        max_rows: int,
        max_tokens: int,
        max_context: int,
        num_programs: int,
        device: torch.device,
        decode: Tile = DECODE,
        prefill: Tile = PREFILL,
    ) -> None:
        """`num_programs` is the constant grid: some programs for each of the card's multiprocessors.

        Raises ValueError for heads that are no multiple of the key/value heads, and for tiles that do not fit the heads
        or the blocks.
        """
        if heads.num_heads % heads.num_kv_heads:
            raise ValueError(f"{heads.num_heads} query heads are no multiple of {heads.num_kv_heads} key/value heads")
        for tile in (decode, prefill):
            _check(tile, heads)
        self._heads, self._decode, self._prefill = heads, decode, prefill
        self._max_rows, self._max_tokens, self._max_context = max_rows, max_tokens, max_context
        self._num_programs = num_programs
        self._cuts = _cut_of(decode, heads), _cut_of(prefill, heads)
        capacity = work.capacity_of(*self._cuts, max_rows, max_tokens, max_context)
        self._num_plan_words = capacity.num_words
        places = capacity.num_partials, heads.num_heads
        self._partials = torch.empty(*places, heads.head_dim, dtype=torch.float32, device=device)
        self._peaks = torch.empty(places, dtype=torch.float32, device=device)
        self._totals = torch.empty(places, dtype=torch.float32, device=device)

    @property
    def num_plan_words(self) -> int:
        """See Attention."""
        return self._num_plan_words

    def plan(
        self,
        query_starts: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        prompt_lens: NDArray[np.integer[Any]],
        tables_R: NDArray[np.integer[Any]] | None = None,
    ) -> NDArray[np.int32]:
        """See Attention. A row whose context is 0 is padding; tokens behind prompts must be no more than `max_rows`."""
        num_rows, num_tokens = len(context_lens), int(query_starts[-1])
        longest = int(context_lens.max(initial=0))
        if num_rows > self._max_rows or num_tokens > self._max_tokens or longest > self._max_context:
            raise ValueError(
                f"{num_rows} rows, {num_tokens} tokens, contexts up to {longest}: "
                f"at most {self._max_rows}, {self._max_tokens} and {self._max_context} are planned for"
            )
        if num_tokens > self._max_rows:
            counts = query_starts[1:] - query_starts[:-1]
            num_behind = int(np.minimum(counts, context_lens - prompt_lens).clip(min=0).sum())
            if num_behind > self._max_rows:
                raise ValueError(f"{num_behind} tokens lie behind their prompts, of {self._max_rows} at most")
        plan = work.plan_work(query_starts, context_lens, prompt_lens, *self._cuts)
        if tables_R is not None:
            work.name_sequences(plan, tables_R)
        return plan

    def attend(
        self,
        q_THD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        out_THD: Tensor,
        sinks_H: Tensor | None = None,
        *,
        plan: Tensor,
        is_decode_only: bool = False,
    ) -> None:
        """Attention of one layer, into `out_THD`; tokens of padding are not written.

        `q_THD` [T, H, D] may be a part of a wider row, its heads side by side; the caches are of Layout.PLAIN,
        contiguous [num_blocks, K, block_size, D]; `block_tables` int32 [tables, blocks]; `out_THD` contiguous. All but
        the tables have one dtype and begin at multiples of 16 bytes. `sinks_H` float32 [H] are logits that take part in
        the sums of the softmax only. `plan`, on the device, begins with the step's. `is_decode_only` leaves out the
        launch for tokens of prompts: none may be in the plan.
        """
        heads = self._heads
        assert q_THD.stride()[1:] == (heads.head_dim, 1) and block_tables.stride(1) == 1
        assert k_cache.shape[1:] == (heads.num_kv_heads, heads.block_size, heads.head_dim)
        assert k_cache.is_contiguous() and v_cache.is_contiguous() and out_THD.is_contiguous()
        has_sinks = sinks_H is not None
        sinks = self._totals if sinks_H is None else sinks_H
        partials = self._partials, self._peaks, self._totals
        for is_prefill, tile in enumerate((self._decode,) if is_decode_only else (self._decode, self._prefill)):
            attend_items[(self._num_programs,)](
                q_THD,
                k_cache,
                v_cache,
                block_tables,
                sinks,
                plan,
                out_THD,
                *partials,
                q_THD.stride(0),
                block_tables.stride(0),
                **_constants_of(heads, tile, is_prefill=bool(is_prefill), has_sinks=has_sinks),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
        if len(self._peaks):
            merge_splits[(self._num_programs,)](
                sinks, plan, out_THD, *partials, **_merge_constants_of(heads, has_sinks), num_warps=MERGE_WARPS
            )


def _check(tile: Tile, heads: Heads) -> None:
    group = heads.num_heads // heads.num_kv_heads
    sizes = {"lanes": tile.num_lanes, "keys": tile.num_keys, "positions of a block": heads.block_size}
    for name, size in sizes.items():
        if size < MIN_LANES or size & (size - 1):
            raise ValueError(f"{size} {name}: a power of two from {MIN_LANES} on is needed")
    if group > tile.num_lanes:
        raise ValueError(f"{group} query heads of one key/value head have no place in a tile of {tile.num_lanes} lanes")
    if tile.split % tile.num_keys:
        raise ValueError(f"splits of {tile.split} positions are no multiple of {tile.num_keys} keys")


def _cut_of(tile: Tile, heads: Heads) -> work.Cut:
    return work.Cut(tile.num_lanes * heads.num_kv_heads // heads.num_heads, tile.split, heads.window)


def _constants_of(heads: Heads, tile: Tile, *, is_prefill: bool, has_sinks: bool) -> dict[str, Any]:
    return {
        "H": heads.num_heads,
        "K": heads.num_kv_heads,
        "D": heads.head_dim,
        "D_PADDED": triton.next_power_of_2(heads.head_dim),
        "BLOCK_SIZE": heads.block_size,
        "M": tile.num_lanes,
        "N": tile.num_keys,
        "SCALE": heads.scale,
        "WINDOW": heads.window or 0,
        "SOFT_CAP": heads.soft_cap,
        "HAS_SINKS": has_sinks,
        "IS_PREFILL": is_prefill,
    }


def _merge_constants_of(heads: Heads, has_sinks: bool) -> dict[str, Any]:
    return {
        "H": heads.num_heads,
        "K": heads.num_kv_heads,
        "D": heads.head_dim,
        "G_PADDED": triton.next_power_of_2(heads.num_heads // heads.num_kv_heads),
        "D_PADDED": triton.next_power_of_2(heads.head_dim),
        "HAS_SINKS": has_sinks,
    }


@triton.jit(do_not_specialize=["table_stride"])
def attend_items(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    sinks_ptr,
    work_ptr,
    out_ptr,
    partials_ptr,
    peaks_ptr,
    totals_ptr,
    q_stride,
    table_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_PREFILL: tl.constexpr,
):
    """The decode items of the plan, or its prefill items: their results, or partial results where there are splits."""
    G: tl.constexpr = H // K
    lanes, dims = tl.arange(0, M), tl.arange(0, D_PADDED)
    num_items = tl.load(work_ptr + (1 if IS_PREFILL else 0))
    items_ptr = work_ptr + HEADER_SIZE
    if IS_PREFILL:
        items_ptr += tl.load(work_ptr) * ITEM_SIZE
    for index in tl.range(tl.program_id(0), num_items * K, tl.num_programs(0), num_stages=1):
        item_ptr = items_ptr + index // K * ITEM_SIZE
        kv_head = index % K
        sequence = tl.load(item_ptr).to(tl.int64)
        first_query, num_queries = tl.load(item_ptr + 1).to(tl.int64), tl.load(item_ptr + 2)
        first_position = tl.load(item_ptr + 3)
        kv_lo, kv_hi = tl.load(item_ptr + 4), tl.load(item_ptr + 5)
        place, num_splits = tl.load(item_ptr + 6).to(tl.int64), tl.load(item_ptr + 7)

        # Lanes beyond the tile's tokens repeat the last one, and are not stored.
        query_M = tl.minimum(lanes // G, num_queries - 1)
        position_M = first_position + query_M
        head_M = kv_head * G + lanes % G
        q_ptrs = q_ptr + ((first_query + query_M) * q_stride + head_M * D)[:, None] + dims[None, :]
        q_MD = tl.load(q_ptrs, mask=(dims < D)[None, :], other=0.0)

        # Tiles of keys, from the one that holds kv_lo. All lanes see all of those in [first_plain, end_plain):
        # the first lane looks back from its own position, the last lane's window begins at the highest position.
        begin = kv_lo // N * N
        first_plain = begin
        if WINDOW:
            last_start = tl.maximum(first_position + num_queries - WINDOW, begin)
            first_plain = tl.cdiv(last_start, N) * N
        end_plain = tl.minimum(first_position + 1, kv_hi) // N * N

        peak_M = tl.full([M], LOWEST, tl.float32)
        total_M = tl.zeros([M], tl.float32)
        acc_MD = tl.zeros([M, D_PADDED], tl.float32)
        table_ptr = tables_ptr + sequence * table_stride
        if WINDOW:
            peak_M, total_M, acc_MD = _attend_keys(
                q_MD, k_ptr, v_ptr, table_ptr, kv_head, position_M, kv_lo, kv_hi, begin, tl.minimum(first_plain, kv_hi),
                peak_M, total_M, acc_MD, K, D, D_PADDED, BLOCK_SIZE, N, SCALE, WINDOW, SOFT_CAP, True,
            )  # fmt: skip
        peak_M, total_M, acc_MD = _attend_keys(
            q_MD, k_ptr, v_ptr, table_ptr, kv_head, position_M, kv_lo, kv_hi, first_plain, end_plain,
            peak_M, total_M, acc_MD, K, D, D_PADDED, BLOCK_SIZE, N, SCALE, WINDOW, SOFT_CAP, False,
        )  # fmt: skip
        peak_M, total_M, acc_MD = _attend_keys(
            q_MD, k_ptr, v_ptr, table_ptr, kv_head, position_M, kv_lo, kv_hi, tl.maximum(first_plain, end_plain), kv_hi,
            peak_M, total_M, acc_MD, K, D, D_PADDED, BLOCK_SIZE, N, SCALE, WINDOW, SOFT_CAP, True,
        )  # fmt: skip

        is_stored_M = lanes // G < num_queries
        is_stored_MD = is_stored_M[:, None] & (dims < D)[None, :]
        if num_splits == 1:
            out_MD = _finish(peak_M, total_M, acc_MD, sinks_ptr + head_M, HAS_SINKS)
            out_ptrs = out_ptr + ((first_query + query_M) * H + head_M)[:, None] * D + dims[None, :]
            tl.store(out_ptrs, out_MD.to(out_ptr.dtype.element_ty), mask=is_stored_MD)
        else:
            place_M = (place + query_M * num_splits) * H + head_M
            tl.store(partials_ptr + place_M[:, None] * D + dims[None, :], acc_MD, mask=is_stored_MD)
            tl.store(peaks_ptr + place_M, peak_M, mask=is_stored_M)
            tl.store(totals_ptr + place_M, total_M, mask=is_stored_M)


@triton.jit
def _attend_keys(
    q_MD,
    k_ptr,
    v_ptr,
    table_ptr,
    kv_head,
    position_M,
    kv_lo,
    kv_hi,
    begin,
    end,
    peak_M,
    total_M,
    acc_MD,
    K: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """The online softmax over the keys of [begin, end), a multiple of N to begin with (Milakov and Gimelshein, 2018).

    Peaks are of scores times log2(e); totals and acc are of weights 2^(score - peak). Masked, positions outside of
    [kv_lo, kv_hi) are not read: nobody may have written them yet, and zero times what is there need not be zero.
    """
    # What products (or their tanh) are multiplied by, so that 2^x of it is e^x of the score.
    FACTOR: tl.constexpr = (SOFT_CAP if SOFT_CAP > 0 else SCALE) * LOG2_E
    key_N, dims = tl.arange(0, N), tl.arange(0, D_PADDED)
    blocks = _blocks_of(table_ptr, begin, kv_hi, BLOCK_SIZE, N)
    for start in tl.range(begin, end, N):
        # The next tile's block is asked for now: waiting for it would hold up the loads that depend on it.
        blocks_now = blocks
        blocks = _blocks_of(table_ptr, start + N, kv_hi, BLOCK_SIZE, N)
        seen_N = start + key_N
        offset_N = start % BLOCK_SIZE + key_N if N <= BLOCK_SIZE else seen_N % BLOCK_SIZE
        place_N = ((blocks_now * K + kv_head) * BLOCK_SIZE + offset_N) * D
        places_ND = place_N[:, None] + dims[None, :]
        if IS_MASKED:
            is_read_N = (seen_N >= kv_lo) & (seen_N < kv_hi)
            is_read_ND = is_read_N[:, None] & (dims < D)[None, :]
            k_ND = tl.load(k_ptr + places_ND, mask=is_read_ND, other=0.0)
            v_ND = tl.load(v_ptr + places_ND, mask=is_read_ND, other=0.0)
        elif D < D_PADDED:
            k_ND = tl.load(k_ptr + places_ND, mask=(dims < D)[None, :], other=0.0)
            v_ND = tl.load(v_ptr + places_ND, mask=(dims < D)[None, :], other=0.0)
        else:
            k_ND = tl.load(k_ptr + places_ND)
            v_ND = tl.load(v_ptr + places_ND)

        scores_MN = _dot(q_MD, tl.trans(k_ND), tl.zeros([q_MD.shape[0], N], tl.float32))
        if SOFT_CAP > 0:
            # tanh(x) = 1 - 2 / (e^2x + 1), which is right at both ends: e^2x becomes infinite or zero.
            powers_MN = tl.exp2(scores_MN * (2.0 * SCALE / SOFT_CAP * LOG2_E))
            scores_MN = 1.0 - 2.0 / (powers_MN + 1.0)
        if IS_MASKED:
            is_seen_MN = seen_N[None, :] <= position_M[:, None]
            if WINDOW:
                is_seen_MN &= seen_N[None, :] > position_M[:, None] - WINDOW
            scores_MN = tl.where(is_seen_MN, scores_MN, float("-inf"))
        next_peak_M = tl.maximum(peak_M, tl.max(scores_MN, 1) * FACTOR)
        weights_MN = tl.exp2(tl.fma(scores_MN, tl.full(scores_MN.shape, FACTOR, tl.float32), -next_peak_M[:, None]))
        shrink_M = tl.exp2(peak_M - next_peak_M)
        total_M = tl.fma(total_M, shrink_M, tl.sum(weights_MN, 1))
        acc_MD = _dot(weights_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None])
        peak_M = next_peak_M
    return peak_M, total_M, acc_MD


@triton.jit
def _blocks_of(table_ptr, start, kv_hi, BLOCK_SIZE: tl.constexpr, N: tl.constexpr):
    """The block of a tile of keys, or of each key where a tile is wider than a block. The table ends with kv_hi."""
    position = start if N <= BLOCK_SIZE else start + tl.arange(0, N)
    return tl.load(table_ptr + position // BLOCK_SIZE, mask=position < kv_hi, other=0).to(tl.int64)


@triton.jit
def _dot(a, b, acc):
    """acc + a b in float32. The interpreter's products of bfloat16 are wrong."""
    if IS_INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _finish(peak_L, total_L, acc_LD, sink_ptrs, HAS_SINKS: tl.constexpr):
    """The weighted means of lanes whose last split is in; a sink adds to the total alone."""
    if HAS_SINKS:
        sink_L = tl.load(sink_ptrs).to(tl.float32)
        factor_L = tl.full(sink_L.shape, LOG2_E, tl.float32)
        next_peak_L = tl.maximum(peak_L, sink_L * LOG2_E)
        shrink_L = tl.exp2(peak_L - next_peak_L)
        total_L = tl.fma(total_L, shrink_L, tl.exp2(tl.fma(sink_L, factor_L, -next_peak_L)))
        acc_LD = acc_LD * shrink_L[:, None]
    return acc_LD / total_L[:, None]


@triton.jit
def merge_splits(
    sinks_ptr,
    work_ptr,
    out_ptr,
    partials_ptr,
    peaks_ptr,
    totals_ptr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    G_PADDED: tl.constexpr,
    D_PADDED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """The results of tokens whose positions were split, from their partial results, the heads of a group at a time."""
    G: tl.constexpr = H // K
    dims, group, splits = tl.arange(0, D_PADDED), tl.arange(0, G_PADDED), tl.arange(0, PEAKS_BLOCK)
    num_items = tl.load(work_ptr) + tl.load(work_ptr + 1)
    num_merges = tl.load(work_ptr + 2)
    merges_ptr = work_ptr + HEADER_SIZE + num_items * ITEM_SIZE
    for index in tl.range(tl.program_id(0), num_merges * K, tl.num_programs(0), num_stages=1):
        merge_ptr = merges_ptr + index // K * MERGE_SIZE
        token, first = tl.load(merge_ptr).to(tl.int64), tl.load(merge_ptr + 1).to(tl.int64)
        num_splits = tl.load(merge_ptr + 2)
        # Lanes beyond the group repeat its last head, and are not stored.
        head_G = index % K * G + tl.minimum(group, G - 1)
        is_stored_GD = (group < G)[:, None] & (dims < D)[None, :]

        peak_G = tl.full([G_PADDED], LOWEST, tl.float32)
        for start in tl.range(0, num_splits, PEAKS_BLOCK):
            peaks_ptrs = peaks_ptr + (first + start + splits)[:, None] * H + head_G[None, :]
            peaks_SG = tl.load(peaks_ptrs, mask=(start + splits < num_splits)[:, None], other=LOWEST)
            peak_G = tl.maximum(peak_G, tl.max(peaks_SG, 0))

        total_G = tl.zeros([G_PADDED], tl.float32)
        acc_GD = tl.zeros([G_PADDED, D_PADDED], tl.float32)
        for split in tl.range(0, num_splits, loop_unroll_factor=4):
            place_G = (first + split) * H + head_G
            weight_G = tl.exp2(tl.load(peaks_ptr + place_G) - peak_G)
            total_G = tl.fma(tl.load(totals_ptr + place_G), weight_G, total_G)
            partial_ptrs = partials_ptr + place_G[:, None] * D + dims[None, :]
            partial_GD = tl.load(partial_ptrs, mask=(dims < D)[None, :], other=0.0)
            acc_GD = tl.fma(partial_GD, tl.broadcast_to(weight_G[:, None], [G_PADDED, D_PADDED]), acc_GD)

        out_GD = _finish(peak_G, total_G, acc_GD, sinks_ptr + head_G, HAS_SINKS)
        out_ptrs = out_ptr + (token * H + head_G)[:, None] * D + dims[None, :]
        tl.store(out_ptrs, out_GD.to(out_ptr.dtype.element_ty), mask=is_stored_GD)


def variants() -> list[Variant]:
    """Decode, prefill and the merging of splits, for two models in bfloat16, with and without a window."""
    tensors = {"sinks_ptr": "*fp32", "work_ptr": "*i32", "out_ptr": "*bf16"}
    tensors |= dict.fromkeys(("partials_ptr", "peaks_ptr", "totals_ptr"), "*fp32")
    inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16") | {"tables_ptr": "*i32"}
    strides = {"q_stride": "i32", "table_stride": "i32"}
    listed = []
    for model, head_dim in (("llama-3.1-8b", 128), ("llama-3.2-1b", 64)):
        plain, windowed = (Heads(32, 8, head_dim, 64, head_dim**-0.5, window) for window in (None, 4096))
        for heads, suffix in ((plain, ""), (windowed, " window")):
            for kind, tile in (("decode", DECODE), ("prefill", PREFILL)):
                is_prefill = tile is PREFILL
                listed.append(
                    Variant(
                        name=f"attention {kind} {model}{suffix}",
                        kernel=attend_items,
                        signature=inputs | tensors | strides,
                        constants=_constants_of(heads, tile, is_prefill=is_prefill, has_sinks=False),
                        num_warps=tile.num_warps,
                        num_stages=tile.num_stages,
                        uses_wgmma=is_prefill,
                        aligned=(*inputs, *tensors, "q_stride"),
                    )
                )
        listed.append(
            Variant(
                name=f"attention merge {model}",
                kernel=merge_splits,
                signature=tensors,
                constants=_merge_constants_of(plain, has_sinks=False),
                num_warps=MERGE_WARPS,
                aligned=tuple(tensors),
            )
        )
    return listed
