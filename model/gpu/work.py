"""The host's plan of one step's attention: which pieces of it the card works through, and how they meet again.

It owns how rows are cut, and the order of the numbers that the kernels of model/gpu/attention.py read. It knows neither
torch nor triton, and no values: lengths only. NumPy does all of it, nothing runs row by row.

A row's query tokens are cut into tiles, and the positions that a tile sees into splits, whose borders are multiples of
a fixed number whatever the batch, the chunk and the window:

    positions    0 ......... split ......... 2 split ......... 3 split ...
    tile                  kv_lo |<------ what it sees ------>| kv_hi
    items                 |<--->|<---------->|<------------->|          one each, and each for every key/value head

An item that is alone in its tile writes the result. The others write partial results, side by side by token: token i of
a tile with n splits has the places [base + i * n, base + (i + 1) * n), split after split. One merge a token follows.

A plan is one array of int32:

    header   number of decode items, of prefill items, of merges; five zeros
    items    decode's, then prefill's, the longest first; eight numbers each:
             sequence, first query token of the step, number of query tokens, position of the first,
             kv_lo, kv_hi, place of the first token's partial result, number of the tile's splits
    merges   four numbers each: query token of the step, place of its first partial result, their number, zero

Tokens of a prompt are prefill's. Those behind it are decode's, each a tile of its own, also where a step brings several
of a row, as after a preemption: a token's kind never depends on how its row was cut into steps. Rows without tokens or
without context are padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]

HEADER_SIZE = 8
ITEM_SIZE = 8
MERGE_SIZE = 4


@dataclass(frozen=True, slots=True)
class Cut:
    """How the rows of one kind are cut."""

    num_queries: int
    """Query tokens of a tile, at most."""
    split: int
    """Positions of a split."""
    window: int | None = None
    """Positions that a token sees, its own with them; all of its past without one."""

    def max_splits(self, max_context: int) -> int:
        """The most splits that a tile can have where no context is longer than `max_context`."""
        most = -(-max_context // self.split)
        if self.window is None:
            return most
        return min(most, (self.window + self.num_queries - 3) // self.split + 2)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The most that plans within some limits can ask for."""

    num_words: int
    """Numbers of a plan."""
    num_partials: int
    """Partial results, of all query heads of a token each."""


def capacity_of(decode: Cut, prefill: Cut, max_rows: int, max_tokens: int, max_context: int) -> Capacity:
    """What plans need of steps of at most so many rows and query tokens, with contexts of at most `max_context`.

    Tokens of decode are at most as many as rows.
    """
    max_tiles = max_tokens // prefill.num_queries + max_rows
    decode_splits, prefill_splits = decode.max_splits(max_context), prefill.max_splits(max_context)
    num_items = max_rows * decode_splits + max_tiles * prefill_splits
    num_partials = max_rows * decode_splits * (decode_splits > 1) + max_tokens * prefill_splits * (prefill_splits > 1)
    num_merges = max_rows * (decode_splits > 1) + max_tokens * (prefill_splits > 1)
    return Capacity(HEADER_SIZE + num_items * ITEM_SIZE + num_merges * MERGE_SIZE, num_partials)


def plan_work(
    query_starts: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    prompt_lens: NDArray[np.integer[Any]],
    decode: Cut,
    prefill: Cut,
) -> NDArray[np.int32]:
    """The plan of one step: int32, one dimension.

    Row r brings the query tokens [query_starts[r], query_starts[r + 1]), the last of its context_lens[r] positions; the
    first prompt_lens[r] positions of all are its prompt's.
    """
    # What is reckoned with has one type: where they are mixed, NumPy takes several times as long.
    starts, context_lens = query_starts[:-1].astype(np.int64), context_lens.astype(np.int64)
    counts = (query_starts[1:] - starts) * (context_lens > 0)
    first_positions = context_lens - counts
    assert (first_positions >= 0).all()
    num_of_prompt = (prompt_lens - first_positions).clip(0, counts)
    behind = starts + num_of_prompt, counts - num_of_prompt, first_positions + num_of_prompt
    decode_items, decode_merges = _split(_cut_rows(*behind, most=1), decode, first_place=0)
    first_place = int(decode_merges[:, 2].sum())
    tiles = _cut_rows(starts, num_of_prompt, first_positions, prefill.num_queries)
    prefill_items, prefill_merges = _split(tiles, prefill, first_place)
    header = np.zeros(HEADER_SIZE, np.int32)
    header[:3] = len(decode_items), len(prefill_items), len(decode_merges) + len(prefill_merges)
    parts = header, decode_items, prefill_items, decode_merges, prefill_merges
    return np.concatenate([part.ravel() for part in parts])


def name_sequences(plan: NDArray[np.int32], names_R: NDArray[np.integer[Any]]) -> None:
    """Has a plan call its sequences not by their rows, but by these numbers, such as slots: block tables lie there."""
    num_items = int(plan[0] + plan[1])
    items = plan[HEADER_SIZE : HEADER_SIZE + num_items * ITEM_SIZE].reshape(-1, ITEM_SIZE)
    items[:, 0] = names_R[items[:, 0]]


class Tiles(NamedTuple):
    """Query tokens that are computed together, tile by tile."""

    row: Ints
    first_query: Ints
    num_queries: Ints
    first_position: Ints


def _cut_rows(first_queries: Ints, counts: Ints, first_positions: Ints, most: int) -> Tiles:
    """The tiles of at most so many query tokens of rows that bring `counts` of them."""
    rows = counts.nonzero()[0]
    if not len(rows):  # as in most steps
        return Tiles(rows, rows, rows, rows)
    num_tiles = -(-counts[rows] // most)
    if num_tiles.max() == 1:  # likewise
        return Tiles(rows, first_queries[rows], counts[rows], first_positions[rows])
    owner, place = _expand(num_tiles)
    row, before = rows[owner], place * most
    return Tiles(
        row,
        first_query=first_queries[row] + before,
        num_queries=np.minimum(most, counts[row] - before),
        first_position=first_positions[row] + before,
    )


def _split(tiles: Tiles, cut: Cut, first_place: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The items and merges of some tiles; their partial results lie from `first_place` on."""
    if not len(tiles.row):
        return np.empty((0, ITEM_SIZE), np.int32), np.empty((0, MERGE_SIZE), np.int32)
    row, first_query, num_queries, first_position = tiles
    kv_hi = first_position + num_queries
    num_splits = -(-kv_hi // cut.split)
    first_split = np.zeros_like(num_splits)
    if cut.window is not None:
        kv_lo = np.maximum(0, first_position - cut.window + 1)
        first_split = kv_lo // cut.split
        num_splits -= first_split
    num_merged = num_queries * (num_splits > 1)
    num_places = num_merged * num_splits
    base = first_place + num_places.cumsum() - num_places

    # The items of a tile begin as copies. What grows from one to the next counts through the items of all tiles, so
    # that a tile's own count is what comes before it less.
    before = num_splits.cumsum() - num_splits
    lo, place = (first_split - before) * cut.split, base - before
    items = _columns(row, first_query, num_queries, first_position, lo, kv_hi, place, num_splits)
    items = items.repeat(num_splits, axis=0)
    number = np.arange(len(items), dtype=np.int32)
    lo, hi, place = items[:, 4:7].T
    lo += number * cut.split
    place += number
    np.minimum(hi, lo + cut.split, out=hi)
    if cut.window is not None:
        np.maximum(lo, kv_lo.repeat(num_splits), out=lo, casting="same_kind")
    order = (lo - hi).argsort(kind="stable")  # the longest first: programs that take turns end together
    return items.take(order, axis=0), _merges(first_query, num_merged, num_splits, first_place)


def _merges(first_query: Ints, num_merged: Ints, num_splits: Ints, first_place: int) -> NDArray[np.int32]:
    """The merges of tiles, of so many tokens each; their partial results lie one after another."""
    splits = num_splits.repeat(num_merged)
    token = np.arange(len(splits)) + (first_query + num_merged - num_merged.cumsum()).repeat(num_merged)
    return _columns(token, first_place + splits.cumsum() - splits, splits, np.zeros_like(splits))


def _columns(*columns: Ints) -> NDArray[np.int32]:
    """As column_stack, which takes several times as long for small ones."""
    table = np.empty((len(columns[0]), len(columns)), np.int32)
    for place, column in enumerate(columns):
        table[:, place] = column
    return table


def _expand(counts: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For counts (2, 0, 3): whose each of the five is, (0, 0, 2, 2, 2), and its place there, (0, 1, 0, 1, 2)."""
    owners = np.arange(len(counts)).repeat(counts)
    before = counts.cumsum() - counts
    return owners, np.arange(len(owners)) - before[owners]
