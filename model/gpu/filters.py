"""Which tokens top_k, top_p and min_p leave: filters of a card's draw that neither sort a row nor copy it.

model/sampling.py (`most_likely`) is the specification; what is promised stands in model/gpu/sampler.py, which runs
these kernels. This module owns how a row is ranked and cut; it does not know how a token is drawn from what is left.

The vocabulary is cut into groups of GROUP_SIZE tokens, which the race needs anyway. Filters use them not to walk the
whole row again and again: the k largest group peaks are k tokens, so no token below the k-th of them is among the k
most likely ones, and groups without one that is as large need no second look. Those that remain are live. So it is with
top_p, when the peaks alone reach it.

A row's ranking is by depth: the bits of its scaled score (logit - peak) / temperature, without the sign. Such a score
is never above zero, so the bits of its magnitude are an integer that grows from 0, the peak, to LOWEST, -inf. The cut
is found by bisection on it: it is a depth, and the last id that is kept of the tokens at just that depth.

Shape letters: R rows, G groups, P parts, N groups of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.sampling import GROUP_SIZE

PART_GROUPS = 64
"""Groups that one program takes at a time."""

GROUP = tl.constexpr(GROUP_SIZE)
TILE = tl.constexpr(PART_GROUPS)
LOWEST = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def load_groups(row_ptr, groups, VOCAB_SIZE: tl.constexpr):
    """Token ids and logits of some groups, [N, GROUP] both; -inf where there is no such token."""
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return ids, tl.load(row_ptr + ids, mask=ids < VOCAB_SIZE, other=float("-inf"))


@triton.jit
def load_peak(peaks_ptr, row, NUM_PARTS: tl.constexpr, PART_TILE: tl.constexpr):
    """A row's largest logit, and whether the row is one to draw from."""
    part = tl.arange(0, PART_TILE)
    peaks = tl.load(peaks_ptr + row * NUM_PARTS + part, mask=part < NUM_PARTS, other=float("-inf"))
    has_nan = tl.max((peaks != peaks).to(tl.int32)) > 0
    peak = tl.max(tl.where(peaks == peaks, peaks, float("-inf")))
    return peak, (peak > float("-inf")) & (peak < float("inf")) & (has_nan == 0)


@triton.jit
def scale(logits, peak, temperature):
    """Scores of at most zero. Both operations round as IEEE 754 says: equal scores are a matter of bits."""
    return tl.div_rn(logits - peak, temperature)


@triton.jit
def depth_of(scaled):
    """How far below the peak: an integer in the order of the scores, that of -0.0 and 0.0 being 0."""
    return scaled.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def weight_at(depth):
    """The weight of the tokens at this depth."""
    return tl.exp(-depth.to(tl.float32, bitcast=True)).to(tl.float64)


@triton.jit
def keep(scaled, ids, cut_depth, cut_id, min_p):
    """Weights: float32, 0 for what the filters drop."""
    depth = depth_of(scaled)
    weights = tl.exp(scaled)
    is_kept = (depth < cut_depth) | ((depth == cut_depth) & (ids <= cut_id))
    return tl.where(is_kept & (weights >= min_p), weights, 0.0)


@triton.jit
def load_live(row_ptr, live_ptr, start, num_live, VOCAB_SIZE: tl.constexpr, NUM_GROUPS: tl.constexpr):
    """A tile of live groups, their token ids and logits; past the last one, a group past the vocabulary."""
    place = start + tl.arange(0, TILE)
    groups = tl.load(live_ptr + place, mask=place < num_live, other=NUM_GROUPS)
    ids, logits = load_groups(row_ptr, groups, VOCAB_SIZE)
    return groups, ids, logits


@triton.jit
def amount_within(
    row_ptr,
    live_ptr,
    num_live,
    peak,
    temperature,
    depth,
    VOCAB_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """The number (COUNTS) or weight of live tokens that are at most so deep, float64, and the depths around `depth`.

    These are the largest that is at most as large, and the smallest that is larger: bisection need not stop at depths
    that no token has.
    """
    amounts_N = tl.zeros([TILE], tl.float64)
    within_N = tl.zeros([TILE], tl.int32)
    beyond_N = tl.full([TILE], MAGNITUDE, tl.int32)
    for start in range(0, num_live, TILE):
        _, _, logits = load_live(row_ptr, live_ptr, start, num_live, VOCAB_SIZE, NUM_GROUPS)
        scaled = scale(logits, peak, temperature)
        depths = depth_of(scaled)
        is_within = depths <= depth
        amounts = is_within.to(tl.float32) if COUNTS else tl.where(is_within, tl.exp(scaled), 0.0)
        amounts_N += tl.sum(amounts, axis=1).to(tl.float64)
        within_N = tl.maximum(within_N, tl.max(tl.where(is_within, depths, 0), axis=1))
        beyond_N = tl.minimum(beyond_N, tl.min(tl.where(is_within, MAGNITUDE, depths), axis=1))
    return tl.sum(amounts_N), tl.max(within_N), tl.min(beyond_N)


@triton.jit
def narrow(low, high, is_reached, within, beyond):
    """The part of [low, high] that bisection goes on with, cut down to depths that tokens have."""
    return tl.where(is_reached, low, tl.minimum(beyond, high)), tl.where(is_reached, within, high)


@triton.jit
def find_depth(
    row_ptr,
    live_ptr,
    num_live,
    peak,
    temperature,
    target,
    deepest,
    VOCAB_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """The smallest depth within which the amount reaches the target; `deepest` where none does."""
    low = deepest * 0  # a tensor, as in every turn of the loop
    high = deepest
    while low < high:
        middle = low + (high - low) // 2
        amount, within, beyond = amount_within(
            row_ptr, live_ptr, num_live, peak, temperature, middle, VOCAB_SIZE, NUM_GROUPS, COUNTS
        )
        low, high = narrow(low, high, amount >= target, within, beyond)
    return high


@triton.jit
def find_live_kernel(
    slots_ptr,
    peaks_ptr,
    group_peaks_ptr,
    group_weights_ptr,
    live_groups_ptr,
    num_live_ptr,
    targets_ptr,
    cut_depths_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    NUM_GROUPS: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PART_TILE: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,
):
    """Lists the live groups in order, and takes the weight from the others. Leaves a depth that surely suffices."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    temperature = tl.load(temperature_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    peak, is_finite = load_peak(peaks_ptr, row, NUM_PARTS, PART_TILE)
    is_limited = top_k < VOCAB_SIZE
    if (temperature == 0.0) | (is_finite == 0) | ((is_limited == 0) & (top_p >= 1.0)):
        return
    groups = tl.arange(0, GROUP_TILE)
    is_group = groups < NUM_GROUPS
    peaks = tl.load(group_peaks_ptr + row * NUM_GROUPS + groups, mask=is_group, other=float("-inf"))
    is_weighed = groups < tl.where(is_limited, 0, NUM_GROUPS)
    weights = tl.load(group_weights_ptr + row * NUM_GROUPS + groups, mask=is_weighed, other=0.0)
    scaled = scale(peaks, peak, temperature)
    depth = depth_of(scaled)
    target = tl.where(is_limited, top_k.to(tl.float64), top_p * tl.sum(weights.to(tl.float64)))
    amounts = tl.where(is_limited, 1.0, tl.exp(scaled)).to(tl.float64)
    low = slot * 0  # a tensor, as in every turn of the loop
    high = low + LOWEST
    while low < high:
        middle = low + (high - low) // 2
        is_within = depth <= middle
        is_reached = tl.sum(tl.where(is_within, amounts, 0.0)) >= target
        within, beyond = tl.max(tl.where(is_within, depth, 0)), tl.min(tl.where(is_within, MAGNITUDE, depth))
        low, high = narrow(low, high, is_reached, within, beyond)
    is_live = is_group & (depth <= high)
    place = tl.cumsum(is_live.to(tl.int32), axis=0) - 1
    tl.store(live_groups_ptr + row * NUM_GROUPS + place, groups, mask=is_live)
    tl.store(group_weights_ptr + row * NUM_GROUPS + groups, 0.0, mask=is_group & (depth > high))
    tl.store(num_live_ptr + row, tl.sum(is_live.to(tl.int32)))
    tl.store(targets_ptr + row, target)
    tl.store(cut_depths_ptr + row, high)


@triton.jit
def cut_kernel(
    logits_ptr,
    slots_ptr,
    peaks_ptr,
    group_weights_ptr,
    live_groups_ptr,
    num_live_ptr,
    targets_ptr,
    cut_depths_ptr,
    cut_ids_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    stride,
    VOCAB_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PART_TILE: tl.constexpr,
):
    """Finds what top_k keeps, then what top_p keeps of it; weighs the live groups anew. Nothing for other rows."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    temperature = tl.load(temperature_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    peak, is_finite = load_peak(peaks_ptr, row, NUM_PARTS, PART_TILE)
    is_limited = top_k < VOCAB_SIZE
    if (temperature == 0.0) | (is_finite == 0) | ((is_limited == 0) & (top_p >= 1.0)):
        return
    row_ptr = logits_ptr + row * stride
    live_ptr = live_groups_ptr + row * NUM_GROUPS
    num_live = tl.load(num_live_ptr + row)
    target = tl.load(targets_ptr + row)
    cut_depth = tl.load(cut_depths_ptr + row)
    num_tied = top_k  # how many are kept of the tokens at the depth of the cut
    if is_limited:
        cut_depth = find_depth(
            row_ptr, live_ptr, num_live, peak, temperature, target, cut_depth, VOCAB_SIZE, NUM_GROUPS, True
        )
        above = cut_depth - 1
        num_above, _, _ = amount_within(
            row_ptr, live_ptr, num_live, peak, temperature, above, VOCAB_SIZE, NUM_GROUPS, True
        )
        num_tied = top_k - num_above.to(tl.int32)
        if top_p < 1.0:
            weight_above, _, _ = amount_within(
                row_ptr, live_ptr, num_live, peak, temperature, above, VOCAB_SIZE, NUM_GROUPS, False
            )
            target = top_p * (weight_above + num_tied.to(tl.float64) * weight_at(cut_depth))
    if top_p < 1.0:
        depth = find_depth(
            row_ptr, live_ptr, num_live, peak, temperature, target, cut_depth, VOCAB_SIZE, NUM_GROUPS, False
        )
        weight_above, _, _ = amount_within(
            row_ptr, live_ptr, num_live, peak, temperature, depth - 1, VOCAB_SIZE, NUM_GROUPS, False
        )
        weight = weight_at(depth)
        # A weight of 0 is one that rounding has led to: nothing that could be drawn is missing.
        num_needed = tl.where(weight > 0, tl.ceil((target - weight_above) / tl.where(weight > 0, weight, 1.0)), 1.0)
        num_needed = tl.minimum(tl.maximum(num_needed, 1.0), VOCAB_SIZE * 1.0).to(tl.int32)
        num_tied = tl.where(depth == cut_depth, tl.minimum(num_tied, num_needed), num_needed)
        cut_depth = depth
    # The live groups, and the tokens in each, come in the order of their ids.
    cut_id = cut_depth * 0 + VOCAB_SIZE
    num_seen = cut_depth * 0
    for start in range(0, num_live, TILE):
        _, ids, logits = load_live(row_ptr, live_ptr, start, num_live, VOCAB_SIZE, NUM_GROUPS)
        is_tied = depth_of(scale(logits, peak, temperature)) == cut_depth
        ties_in_group = tl.cumsum(is_tied.to(tl.int32), axis=1)
        ties_N = tl.sum(is_tied.to(tl.int32), axis=1)
        ties_before_N = num_seen + tl.cumsum(ties_N, axis=0) - ties_N
        is_last = is_tied & (ties_before_N[:, None] + ties_in_group == num_tied)
        cut_id = tl.minimum(cut_id, tl.min(tl.where(is_last, ids, VOCAB_SIZE)))
        num_seen += tl.sum(ties_N)
    tl.store(cut_depths_ptr + row, cut_depth)
    tl.store(cut_ids_ptr + row, cut_id)
    for start in range(0, num_live, TILE):
        groups, ids, logits = load_live(row_ptr, live_ptr, start, num_live, VOCAB_SIZE, NUM_GROUPS)
        weights = keep(scale(logits, peak, temperature), ids, cut_depth, cut_id, min_p)
        tl.store(group_weights_ptr + row * NUM_GROUPS + groups, tl.sum(weights, axis=1), mask=groups < NUM_GROUPS)
