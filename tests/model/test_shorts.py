"""bfloat16 in 12 bits: the products of plain words, bit by bit, whatever the exponents are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.linear_native import NativeLinear, NativeLinears, Numbers
from tests.model.levels import LEVELS, SHORTENING_LEVELS, kernels_of, needs_kernels

pytestmark = needs_kernels


SMALL, HUGE, ODD = 1e-30, 1e30, [0.0, -0.0, float("inf"), -float("inf"), 1e-40, float("nan")]
"""Numbers that are not among the usual ones of a weight."""
SHAPES = [(64, 40), (1028, 66), (6144, 34), (6148, 34), (62, 34), (3, 32)]
"""(inputs, outputs): few groups and many, a widened tile that fills its room, one that is too large for it, an odd
number of words, one group."""


def spread(kind: str, shape: tuple[int, int]) -> Tensor:
    """A weight [inputs, outputs] in bfloat16 whose exponents are of one kind."""
    generator = torch.Generator().manual_seed(len(kind))
    weight = torch.randn(shape[1], shape[0], generator=generator)
    chosen = torch.rand(weight.shape, generator=generator)
    if kind == "a_few_others":
        weight[chosen < 1e-4] *= SMALL
        weight[chosen > 1 - 1e-4] *= HUGE
        weight.view(-1)[: len(ODD)] = torch.tensor(ODD)
    elif kind == "ends_of_tiles":
        weight[::5, :2] *= SMALL
        weight[::7, -2:] *= SMALL
    elif kind == "all_alike":
        weight.fill_(-0.5)
    elif kind == "zeros":
        weight[chosen < 0.5] = 0.0
    elif kind == "everything":
        weight *= torch.exp(30 * torch.randn(weight.shape, generator=generator))
    return weight.bfloat16()


def num_escapes(linear: NativeLinear) -> int:
    """Of all tiles, each of which has a list of them with an end."""
    _, _, starts, escapes, _ = linear.packed
    return 0 if starts is None or escapes is None else len(escapes) - len(starts)


@pytest.mark.parametrize("level", [level for level in LEVELS if level in SHORTENING_LEVELS])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["usual", "a_few_others", "ends_of_tiles", "all_alike", "zeros", "everything"])
def test_twelve_bits_lose_nothing(level: str, kind: str, shape: tuple[int, int], is_gated: bool) -> None:
    """The same bits as of plain words, in about three quarters of the room where exponents are as usual."""
    weight = spread(kind, shape)
    short, plain = (NativeLinears(kernels_of(level), torch.bfloat16) for _ in range(2))
    assert short.shortens
    plain.shortens = False
    ours, expected = short.pack(weight, is_gated=is_gated), plain.pack(weight, is_gated=is_gated)
    is_short = ours.struct.numbers == Numbers.SHORT_BF16S
    assert expected.struct.numbers == Numbers.BF16S
    if expected.packed.words.shape[1] % 2 or kind == "everything":
        assert not is_short
    elif kind in ("usual", "all_alike", "zeros"):
        assert is_short and ours.packed.words.nbytes == 0.75 * expected.packed.words.nbytes
        # A single group saves less than the room for an escape takes.
        assert ours.num_bytes < 0.9 * expected.num_bytes or shape[0] == 3
    elif shape[0] > 1000:  # so many groups that those which escape are few
        assert is_short and num_escapes(ours) > 0
    generator = torch.Generator().manual_seed(shape[0])
    for num_rows in (*range(1, 11), 17, 32, 33, 40):
        x = torch.randn(num_rows, shape[0], generator=generator).bfloat16()
        assert torch.equal(ours(x).view(torch.int16), expected(x).view(torch.int16)), num_rows


@pytest.mark.parametrize("level", LEVELS)
def test_only_what_gains_is_kept_in_twelve_bits(level: str) -> None:
    """Codes and float32 never; bfloat16 where there are shuffles of bytes."""
    kernels = kernels_of(level)
    assert not NativeLinears(kernels, torch.float32).shortens
    assert not NativeLinears(kernels, torch.bfloat16, has_codes=True).shortens
    assert NativeLinears(kernels, torch.bfloat16).shortens == (level in SHORTENING_LEVELS)
