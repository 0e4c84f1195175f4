"""The cache's layout DOTS told a second time, by nothing but the order of its dimensions."""

from __future__ import annotations

from torch import Tensor

from model.kv_cache import GROUP, WORD_BYTES


def keys_as_dots(plain: Tensor) -> Tensor:
    """[blocks, K, S, D] to [blocks, K, S / 16, D / w, 16, w]."""
    grouped = plain.unflatten(2, (-1, GROUP)).unflatten(-1, (-1, WORD_BYTES // plain.itemsize))
    return grouped.permute(0, 1, 2, 4, 3, 5).contiguous()


def values_as_dots(plain: Tensor) -> Tensor:
    """[blocks, K, S, D] to [blocks, K, S / w, D, w]."""
    return plain.unflatten(2, (-1, WORD_BYTES // plain.itemsize)).transpose(3, 4).contiguous()


def keys_as_plain(dots: Tensor) -> Tensor:
    """Back again."""
    return dots.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)


def values_as_plain(dots: Tensor) -> Tensor:
    """Back again."""
    return dots.transpose(3, 4).flatten(2, 3)
