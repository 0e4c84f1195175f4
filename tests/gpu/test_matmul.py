"""Products by tiles, in Triton's interpreter: right, and with bits that no number of rows changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from model.gpu import matmul
from model.gpu.matmul import (
    ALL_TILES,
    FEW,
    LARGE,
    MIDDLE,
    NARROW,
    ONE_TILE,
    WGMMA_TILES,
    Tile,
    TiledProduct,
    tile_for,
    tiles_within,
)
from model.linear import cancelling_rows

DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [(64, 256), (130, 300), (33, 96), (1, 1), (40, 129)]
POISON = float("nan")


def matrix(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight and a bias."""
    generator = torch.Generator().manual_seed(num_outputs)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
    return weight.to(dtype), torch.randn(num_outputs, generator=generator).to(dtype)


def multiply(
    tiles: tuple[Tile, ...], x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The product; what is behind its last row must stay as it was."""
    room = torch.full((x.shape[0] + 1, weight.shape[0]), POISON, dtype=dtype or x.dtype)
    TiledProduct(tiles)(x, weight, bias, room[:-1])
    assert room[-1].isnan().all() and not room[:-1].isnan().any()
    return room[:-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", ALL_TILES, ids=["large", "middle", "narrow", "few"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_plain_product(shape: tuple[int, int], tile: Tile, dtype: torch.dtype) -> None:
    weight, bias = matrix(*shape, dtype)
    x = torch.randn(19, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ weight.double().T
    for added in (None, bias):
        exact = expected if added is None else expected + bias.double()
        wide = multiply((tile,), x, weight, added, torch.float32)
        torch.testing.assert_close(wide.double(), exact, atol=1e-5, rtol=1e-5)
        found = multiply((tile,), x, weight, added)
        assert torch.equal(found, wide.to(dtype)), "rounded once"


@pytest.mark.usefixtures("_one_by_one")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_tile_adds_up_alike(dtype: torch.dtype, has_bias: bool) -> None:
    """Each result is one running sum in float32, from the first input to the last: what NumPy's cumsum computes."""
    weight, bias = matrix(70, 300, dtype)
    x = cancelling_rows(weight, bias if has_bias else None, 70)
    terms = (x.float()[:, None] * weight.float()[None]).numpy()
    expected = torch.from_numpy(np.cumsum(terms, axis=2)[:, :, -1]) + (bias.float() if has_bias else 0.0)
    for tile in ALL_TILES:
        assert torch.equal(multiply((tile,), x, weight, bias if has_bias else None, torch.float32), expected)
    backwards = torch.from_numpy(np.cumsum(terms[:, :, ::-1], axis=2)[:, :, -1])
    assert (backwards.diagonal() != (expected - (bias.float() if has_bias else 0.0)).diagonal()).sum() > 35


@pytest.mark.usefixtures("_one_by_one")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_number_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its tile changes with that number, and groups of tiles are full, cut off and several."""
    monkeypatch.setattr(matmul, "MIN_PROGRAMS", 2)
    monkeypatch.setattr(matmul, "GROUP_ROWS", 2)
    weight, bias = matrix(130, 160, dtype)
    x = cancelling_rows(weight, bias, 700)
    together = multiply(ALL_TILES, x, weight, bias)
    used = {tile_for(ALL_TILES, len(x), 130)}
    for num_rows, start in ((1, 0), (2, 5), (16, 3), (17, 1), (33, 60), (65, 2), (129, 7), (257, 400)):
        used.add(tile_for(ALL_TILES, num_rows, 130))
        rows = slice(start, start + num_rows)
        assert torch.equal(multiply(ALL_TILES, x[rows].clone(), weight, bias), together[rows]), num_rows
    assert used == set(ALL_TILES)


def test_nothing_of_other_rows_comes_in() -> None:
    """Not even what is no number; nor what is behind the weight and the rows."""
    weight, _ = matrix(33, 96, torch.float32)
    room = torch.full((34, 96), POISON)
    room[:33] = weight
    x = torch.randn(18, 96)
    expected = multiply((FEW,), x[:17].clone(), weight)
    x[17] = POISON
    out = torch.full((17, 33), POISON)
    TiledProduct((FEW,))(x[:17], room[:33], None, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "tile"),
    [
        (1, 128256, FEW),
        (16, 4096, FEW),
        (17, 4096, NARROW),
        (17, 2048, FEW),
        (64, 4096, NARROW),
        (64, 6144, NARROW),
        (64, 28672, MIDDLE),
        (65, 28672, LARGE),
        (128, 4096, MIDDLE),
        (256, 4096, MIDDLE),
        (512, 4096, LARGE),
        (8192, 4096, LARGE),
    ],
)
def test_tiles_give_a_card_work(num_rows: int, num_outputs: int, tile: Tile) -> None:
    assert tile_for(ALL_TILES, num_rows, num_outputs) == tile
    assert tile_for(WGMMA_TILES, num_rows, num_outputs) == (NARROW if tile is FEW else tile)
    assert tile_for(ONE_TILE, num_rows, num_outputs) == NARROW


@pytest.mark.parametrize(
    ("card", "kib", "tiles"),
    [("9.0", 227, ALL_TILES), ("8.0", 163, ALL_TILES), ("8.6 and 8.9", 99, (MIDDLE, NARROW, FEW))],
)
def test_smaller_cards_do_without_what_they_have_no_room_for(card: str, kib: int, tiles: tuple[Tile, ...]) -> None:
    assert tiles_within(ALL_TILES, kib * 2**10) == tiles
    assert tiles_within(WGMMA_TILES, kib * 2**10) == tuple(tile for tile in tiles if tile is not FEW)
    assert tiles_within(ONE_TILE, kib * 2**10) == ONE_TILE


def test_buffers_that_would_change_the_code_are_refused() -> None:
    weight, out = torch.ones(8, 16), torch.empty(2, 8)
    with pytest.raises(AssertionError, match="contiguous"):
        TiledProduct()(torch.ones(16, 2).T, weight, None, out)
    with pytest.raises(AssertionError, match="aligned"):
        TiledProduct()(torch.ones(33)[1:].view(2, 16), weight, None, out)


def test_variants_ask_for_what_tiles_are_for() -> None:
    """Whole warp groups for all tiles but the small one, unless numbers are float32."""
    for variant in matmul.variants():
        is_wide = variant.constants["BLOCK_M"] >= 64 and "float32" not in variant.name
        assert variant.uses_wgmma == is_wide
    assert {variant.constants["BLOCK_M"] for variant in matmul.variants()} == {LARGE.num_rows, MIDDLE.num_rows, 16}
