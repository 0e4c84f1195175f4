"""Draws tokens from logits on a card, without sorting them and without waiting for the host.

model/sampling.py is the specification. It owns the order of a draw; it does not know what changed the logits before
(model/gpu/penalties.py), nor what becomes of the token.

What is promised:
- Greedy rows, `is_finite` and what top_k keeps are exactly those of the CPU for the same logits, ties and all.
- The noise comes from the same counters, its words are the same bits. Weights, and their sums over a group, are
  float32, what is done with these sums is float64; but the last bits of an exponential, a logarithm or a sum may
  differ from the CPU's. So another token is drawn only where two quantities that are compared differ by less than
  about 1e-5 of themselves: the mass that reaches top_p, a weight and min_p, or the two best of a race.
- A row's token depends on its logits, parameters, key and position only: not on other rows, its place or the grid.

Five kernels, of one program per row, or per row and part of PART_GROUPS groups of GROUP_SIZE tokens:

    find_peaks   (row, part)   the largest logit of each group and part; is anything NaN?
    weigh        (row, part)   the sum of each group's weights exp((logit - peak) / temperature)
    find_live    (row)         the filters' live groups
    cut          (row)         the last token that the filters keep; the live groups' weights without the others
    race         (row)         the winning group, then the winning token in it

Shape letters: R rows, S slots, V vocabulary, G groups, P parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.gpu.filters import (
    GROUP,
    LOWEST,
    PART_GROUPS,
    TILE,
    cut_kernel,
    find_live_kernel,
    keep,
    load_groups,
    load_peak,
    scale,
)
from model.gpu.penalties import check_logits
from model.gpu.philox import exponential
from model.gpu.variant import Variant
from model.interface import Sampling
from model.philox import split_seed
from model.sampling import GROUP_SIZE, SMALLEST


@dataclass(frozen=True, slots=True)
class DrawParameters:
    """How each slot's tokens are drawn."""

    temperature_S: Tensor
    top_k_S: Tensor
    top_p_S: Tensor
    min_p_S: Tensor
    key_S2: Tensor
    vocab_size: int

    @classmethod
    def empty(cls, num_slots: int, vocab_size: int, device: str) -> DrawParameters:
        """Greedy slots."""
        return cls(
            temperature_S=torch.zeros(num_slots, device=device),
            top_k_S=torch.full((num_slots,), vocab_size, dtype=torch.int32, device=device),
            top_p_S=torch.ones(num_slots, dtype=torch.float64, device=device),
            min_p_S=torch.zeros(num_slots, device=device),
            key_S2=torch.zeros(num_slots, 2, dtype=torch.int64, device=device),
            vocab_size=vocab_size,
        )

    def admit(self, slot: int, sampling: Sampling) -> None:
        """Takes the parameters of the sequence that has just got this slot, waiting for the device."""
        tables = self.temperature_S, self.top_k_S, self.top_p_S, self.min_p_S
        *values, key = draw_values(sampling, self.vocab_size)
        for table_S, value in zip(tables, values, strict=True):
            table_S[slot] = value
        self.key_S2[slot] = torch.tensor(key)


def draw_values(sampling: Sampling, vocab_size: int) -> tuple[float, int, float, float, tuple[int, int]]:
    """What a slot's tables hold for a sequence: temperature, top_k, top_p, min_p, key."""
    # A temperature below float32's range still means "almost greedy", not a division by zero.
    temperature = max(sampling.temperature, SMALLEST) if sampling.temperature > 0 else 0.0
    top_k = min(sampling.top_k or vocab_size, vocab_size)
    return temperature, top_k, sampling.top_p, sampling.min_p, split_seed(sampling.seed)


@dataclass(frozen=True, slots=True)
class Workspace:
    """What the kernels of a draw tell each other; its numbers mean nothing between two draws."""

    peaks_RP: Tensor
    peak_ids_RP: Tensor
    group_peaks_RG: Tensor
    group_weights_RG: Tensor
    live_groups_RG: Tensor
    num_live_R: Tensor
    targets_R: Tensor
    """The weight that top_p wants kept, where top_k does not limit the row."""
    cut_depths_R: Tensor
    cut_ids_R: Tensor

    @classmethod
    def empty(cls, max_num_rows: int, vocab_size: int, device: str) -> Workspace:
        """Room for so many rows."""
        sizes = sizes_of(vocab_size)
        num_groups, num_parts = sizes["NUM_GROUPS"], sizes["NUM_PARTS"]

        def table(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(max_num_rows, *shape, dtype=dtype, device=device)

        return cls(
            peaks_RP=table(num_parts, dtype=torch.float32),
            peak_ids_RP=table(num_parts),
            group_peaks_RG=table(num_groups, dtype=torch.float32),
            group_weights_RG=table(num_groups, dtype=torch.float32),
            live_groups_RG=table(num_groups),
            num_live_R=table(),
            targets_R=table(dtype=torch.float64),
            cut_depths_R=table(),
            cut_ids_R=table(),
        )


@triton.jit
def find_peaks_kernel(
    logits_ptr,
    slots_ptr,
    peaks_ptr,
    peak_ids_ptr,
    group_peaks_ptr,
    stride,
    VOCAB_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    """The peak of each group and of each part; NaN for a part that holds one."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if tl.load(slots_ptr + row) < 0:
        return
    groups = part * TILE + tl.arange(0, TILE)
    ids, logits = load_groups(logits_ptr + row * stride, groups, VOCAB_SIZE)
    has_nan = tl.max((logits != logits).to(tl.int32)) > 0
    logits = tl.where(logits == logits, logits, float("-inf"))
    group_peaks = tl.max(logits, axis=1)
    tl.store(group_peaks_ptr + row * NUM_GROUPS + groups, group_peaks, mask=groups < NUM_GROUPS)
    peak = tl.max(group_peaks)
    tl.store(peaks_ptr + row * NUM_PARTS + part, tl.where(has_nan, float("nan"), peak))
    tl.store(peak_ids_ptr + row * NUM_PARTS + part, tl.min(tl.where(logits == peak, ids, VOCAB_SIZE)))


@triton.jit
def weigh_kernel(
    logits_ptr,
    slots_ptr,
    peaks_ptr,
    group_weights_ptr,
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
    """The weight of each group, which nobody needs where top_k will leave few of them."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    temperature = tl.load(temperature_ptr + slot)
    peak, is_finite = load_peak(peaks_ptr, row, NUM_PARTS, PART_TILE)
    if (temperature == 0.0) | (is_finite == 0) | (tl.load(top_k_ptr + slot) < VOCAB_SIZE):
        return
    # top_p is a share of everything; min_p comes after it.
    min_p = tl.where(tl.load(top_p_ptr + slot) < 1.0, 0.0, tl.load(min_p_ptr + slot))
    groups = tl.program_id(1) * TILE + tl.arange(0, TILE)
    ids, logits = load_groups(logits_ptr + row * stride, groups, VOCAB_SIZE)
    weights = keep(scale(logits, peak, temperature), ids, LOWEST, VOCAB_SIZE, min_p)
    tl.store(group_weights_ptr + row * NUM_GROUPS + groups, tl.sum(weights, axis=1), mask=groups < NUM_GROUPS)


@triton.jit
def first_of_largest(values, ids, NONE: tl.constexpr):
    """The smallest id among those of the largest value."""
    return tl.min(tl.where(values == tl.max(values), ids, NONE))


@triton.jit
def race_kernel(
    logits_ptr,
    slots_ptr,
    positions_ptr,
    peaks_ptr,
    peak_ids_ptr,
    group_weights_ptr,
    cut_depths_ptr,
    cut_ids_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    key_ptr,
    token_ids_ptr,
    is_finite_ptr,
    stride,
    VOCAB_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PART_TILE: tl.constexpr,
):
    """The token of a row. The noise of a group's tokens has the indices [0, GROUP), that of the groups those after."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    peak, is_finite = load_peak(peaks_ptr, row, NUM_PARTS, PART_TILE)
    tl.store(is_finite_ptr + row, is_finite)
    temperature = tl.load(temperature_ptr + slot)
    part = tl.arange(0, PART_TILE)
    peaks = tl.load(peaks_ptr + row * NUM_PARTS + part, mask=part < NUM_PARTS, other=float("-inf"))
    peak_ids = tl.load(peak_ids_ptr + row * NUM_PARTS + part, mask=part < NUM_PARTS, other=VOCAB_SIZE)
    token_id = tl.where(is_finite, tl.min(tl.where(peaks == peak, peak_ids, VOCAB_SIZE)), 0)
    if is_finite & (temperature > 0.0):
        low_key = tl.load(key_ptr + 2 * slot)
        high_key = tl.load(key_ptr + 2 * slot + 1)
        position = tl.load(positions_ptr + row)
        groups = tl.arange(0, GROUP_TILE)
        is_group = groups < NUM_GROUPS
        weights_G = tl.load(group_weights_ptr + row * NUM_GROUPS + groups, mask=is_group, other=0.0)
        times_G = weights_G.to(tl.float64) / exponential(low_key, high_key, position, groups + GROUP)
        group = first_of_largest(times_G, groups, GROUP_TILE)
        member = tl.arange(0, GROUP)
        ids = group * GROUP + member
        logits = tl.load(logits_ptr + row * stride + ids, mask=ids < VOCAB_SIZE, other=float("-inf"))
        is_filtered = (tl.load(top_k_ptr + slot) < VOCAB_SIZE) | (tl.load(top_p_ptr + slot) < 1.0)
        cut_depth = tl.load(cut_depths_ptr + row, mask=is_filtered, other=LOWEST)
        cut_id = tl.load(cut_ids_ptr + row, mask=is_filtered, other=VOCAB_SIZE)
        weights = keep(scale(logits, peak, temperature), ids, cut_depth, cut_id, tl.load(min_p_ptr + slot))
        times = weights.to(tl.float64) / exponential(low_key, high_key, position, member)
        token_id = first_of_largest(times, ids, VOCAB_SIZE)
    tl.store(token_ids_ptr + row, token_id)


@dataclass(frozen=True, slots=True)
class Step:
    """A kernel of a draw."""

    kernel: Any
    num_warps: int
    is_by_part: bool = False
    """One program per row and part; otherwise one per row."""


STEPS = (
    Step(find_peaks_kernel, 4, is_by_part=True),
    Step(weigh_kernel, 4, is_by_part=True),
    Step(find_live_kernel, 8),
    Step(cut_kernel, 8),
    Step(race_kernel, 8),
)
TYPES = {
    "logits_ptr": "*fp32",
    "stride": "i32",
    "slots_ptr": "*i32",
    "positions_ptr": "*i32",
    "temperature_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "top_p_ptr": "*fp64",
    "min_p_ptr": "*fp32",
    "key_ptr": "*i64",
    "peaks_ptr": "*fp32",
    "peak_ids_ptr": "*i32",
    "group_peaks_ptr": "*fp32",
    "group_weights_ptr": "*fp32",
    "live_groups_ptr": "*i32",
    "num_live_ptr": "*i32",
    "targets_ptr": "*fp64",
    "cut_depths_ptr": "*i32",
    "cut_ids_ptr": "*i32",
    "token_ids_ptr": "*i32",
    "is_finite_ptr": "*i1",
}


def draw(
    logits_RV: Tensor,
    slots_R: Tensor,
    positions_R: Tensor,
    parameters: DrawParameters,
    workspace: Workspace,
    token_ids_R: Tensor,
    is_finite_R: Tensor,
) -> None:
    """Draws one token per row from float32 logits, which are left as they are, into `token_ids_R` (int32).

    `slots_R` and `positions_R` are int32; a position is the place that the drawn token will have. A row whose slot is
    negative is padding: nothing is drawn for it. `is_finite_R` (bool) is False where the logits hold a NaN or +inf, or
    are all -inf; such a row's token is 0. All tensors are on one device; nothing waits for it, nothing is allocated.
    """
    num_rows, vocab_size = check_logits(logits_RV)
    assert slots_R.dtype == positions_R.dtype == token_ids_R.dtype == torch.int32 and is_finite_R.dtype == torch.bool
    assert vocab_size == parameters.vocab_size and num_rows <= len(workspace.peaks_RP), "more than there is room for"
    sizes = sizes_of(vocab_size)
    assert workspace.group_peaks_RG.shape[1] == sizes["NUM_GROUPS"], "the workspace is of another vocabulary"
    arguments = sizes | {
        "logits_ptr": logits_RV,
        "stride": logits_RV.stride(0),
        "slots_ptr": slots_R,
        "positions_ptr": positions_R,
        "temperature_ptr": parameters.temperature_S,
        "top_k_ptr": parameters.top_k_S,
        "top_p_ptr": parameters.top_p_S,
        "min_p_ptr": parameters.min_p_S,
        "key_ptr": parameters.key_S2,
        "peaks_ptr": workspace.peaks_RP,
        "peak_ids_ptr": workspace.peak_ids_RP,
        "group_peaks_ptr": workspace.group_peaks_RG,
        "group_weights_ptr": workspace.group_weights_RG,
        "live_groups_ptr": workspace.live_groups_RG,
        "num_live_ptr": workspace.num_live_R,
        "targets_ptr": workspace.targets_R,
        "cut_depths_ptr": workspace.cut_depths_R,
        "cut_ids_ptr": workspace.cut_ids_R,
        "token_ids_ptr": token_ids_R,
        "is_finite_ptr": is_finite_R,
    }
    for step in STEPS:
        grid = (num_rows, sizes["NUM_PARTS"] if step.is_by_part else 1)
        step.kernel[grid](**{name: arguments[name] for name in step.kernel.arg_names}, num_warps=step.num_warps)


def sizes_of(vocab_size: int) -> dict[str, int]:
    """What the kernels are compiled for."""
    num_groups = triton.cdiv(vocab_size, GROUP_SIZE)
    num_parts = triton.cdiv(num_groups, PART_GROUPS)
    return {
        "VOCAB_SIZE": vocab_size,
        "NUM_GROUPS": num_groups,
        "GROUP_TILE": triton.next_power_of_2(num_groups),
        "NUM_PARTS": num_parts,
        "PART_TILE": triton.next_power_of_2(num_parts),
    }


def variants() -> list[Variant]:
    """What is compiled for two usual vocabularies."""
    return [
        Variant(
            name=f"{step.kernel.__name__.removesuffix('_kernel')}_v{vocab_size}",
            kernel=step.kernel,
            signature={name: TYPES[name] for name in step.kernel.arg_names if name in TYPES},
            constants={name: size for name, size in sizes_of(vocab_size).items() if name in step.kernel.arg_names},
            num_warps=step.num_warps,
            aligned=tuple(name for name in ("logits_ptr", "stride") if name in step.kernel.arg_names),
        )
        for vocab_size in (128256, 32000)
        for step in STEPS
    ]
