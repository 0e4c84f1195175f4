"""The token streams on disk, and the rows that training and measuring draw from them.

It knows the format that `corpus` writes and nothing of the network. B is rows, T is positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.training.network import document_mask
from model.training.tokens import END_OF_TEXT_ID

IGNORED = -100
"""Target of a position whose successor belongs to another document: cross entropy skips it."""

SHARES = {"library": 0.40, "textbook": 0.12, "chat": 0.48}
"""The part of a batch's rows that each training stream provides."""

STREAMS = (*SHARES, "held_out")


class Batch(NamedTuple):
    """Packed rows: what the network reads, what it should say next, and which positions see each other."""

    ids_BT: Tensor
    targets_BT: Tensor
    mask: Tensor

    @classmethod
    def of_windows(cls, windows: Tensor) -> Batch:
        """Split windows of T + 1 tokens into inputs and targets, one document blind to the next."""
        ids_BT = windows[:, :-1].contiguous()
        targets_BT = windows[:, 1:].masked_fill(ids_BT == END_OF_TEXT_ID, IGNORED)
        return cls(ids_BT, targets_BT, document_mask(ids_BT, END_OF_TEXT_ID))


@dataclass(frozen=True)
class Stream:
    """One stream of documents, each closed by the end token."""

    ids: Tensor
    starts: Tensor
    """Where a training window may begin."""

    @classmethod
    def read(cls, path: Path, num_positions: int, anywhere: bool) -> Stream:
        """Windows begin anywhere, or only where a document does: short ones are asked for from their first token."""
        ids = torch.from_numpy(np.fromfile(path, dtype=np.dtype("<u2")).astype(np.int64))
        last = len(ids) - num_positions - 1
        if last < 0:
            raise ValueError(f"{path} is shorter than one row of {num_positions} positions")
        opens = torch.cat((torch.zeros(1, dtype=torch.long), (ids == END_OF_TEXT_ID).nonzero().flatten() + 1))
        return cls(ids, torch.arange(last + 1) if anywhere else opens[opens <= last])

    def sample(self, num_rows: int, num_positions: int, generator: torch.Generator) -> Tensor:
        """Windows (B, T + 1) at random starts."""
        chosen = self.starts[torch.randint(len(self.starts), (num_rows,), generator=generator)]
        return self.ids[chosen[:, None] + torch.arange(num_positions + 1)]

    def consecutive(self, max_rows: int, num_positions: int) -> Tensor:
        """The first windows (B, T + 1) of the stream, side by side."""
        num_rows = min(max_rows, (len(self.ids) - 1) // num_positions)
        return self.ids[: num_rows * num_positions + 1].unfold(0, num_positions + 1, num_positions)


def read_streams(data: Path, num_positions: int) -> dict[str, Stream]:
    """All streams of a folder that `corpus` wrote."""
    return {name: Stream.read(data / f"{name}.bin", num_positions, name == "library") for name in STREAMS}


def sample_batch(streams: dict[str, Stream], num_rows: int, num_positions: int, generator: torch.Generator) -> Batch:
    """A batch in which every training stream has its share of the rows."""
    rows = {name: max(1, round(num_rows * share)) for name, share in SHARES.items()}
    windows = [streams[name].sample(count, num_positions, generator) for name, count in rows.items()]
    return Batch.of_windows(torch.cat(windows))
