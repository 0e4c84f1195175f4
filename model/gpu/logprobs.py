"""Log-probabilities on a card, for the rows that ask: of the model's own distribution, as model/sampling.py tells them.

It owns how they are ranked without a sort and without waiting, and how they come to the host as one piece of memory. It
does not know who asked for them. Rows are taken a few at a time, so that a vocabulary's worth of temporaries stays
small; a row's bits do not depend on the others: each begins at a multiple of 16 bytes, and operators go row by row.

What comes to the host of each row, in words of 32 bits: log-probability of the drawn token; ids of the most likely
ones; their log-probabilities. Shape letters: W wanted rows, A asking rows, V vocabulary, N most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from model.interface import NO_LOGPROBS, TokenLogprobs

MAX_ROWS = 16
"""That are computed at a time."""
ALIGNED_NUMBERS = 4
LOW_32_BITS = 0xFFFFFFFF


def words_of(num_most_likely: int) -> int:
    """The length of what is told of one row."""
    return 1 + 2 * num_most_likely


def tell(logits_WV: Tensor, asking_A: Tensor, token_ids_W: Tensor, told: Tensor) -> None:
    """Writes what is told of the asking rows into `told`, int32 [A, 1 + 2 N]; log-probabilities by their bits.

    `asking_A` are numbers of rows, `token_ids_W` the drawn tokens, int32 both. N is at most V.
    """
    num_most_likely = (told.shape[1] - 1) // 2
    for first in range(0, len(asking_A), MAX_ROWS):
        rows = asking_A[first : first + MAX_ROWS]
        logprobs_AV = _log_softmax(logits_WV.index_select(0, rows))
        chosen_A1 = token_ids_W.index_select(0, rows).unsqueeze(1).long()
        ids_AN = most_likely(logprobs_AV, num_most_likely)
        part = told[first : first + MAX_ROWS]
        part[:, :1] = logprobs_AV.gather(1, chosen_A1).view(torch.int32)
        part[:, 1 : 1 + num_most_likely] = ids_AN
        part[:, 1 + num_most_likely :] = logprobs_AV.gather(1, ids_AN).view(torch.int32)


def most_likely(logprobs_AV: Tensor, num: int) -> Tensor:
    """Ids of the `num` largest of each row, largest first, equal ones by id: int64 [A, num].

    `topk` says nothing about equal ones, so it is given numbers that are all different: the bits of a float as an
    integer that has the same order, then the id, counted down.
    """
    bits_AV = logprobs_AV.view(torch.int32)
    ordered_AV = (bits_AV ^ ((bits_AV >> 31) & 0x7FFFFFFF)).long()
    ids_V = torch.arange(logprobs_AV.shape[1], device=logprobs_AV.device)
    keys_AV = (ordered_AV << 32) + (LOW_32_BITS - ids_V)
    return LOW_32_BITS - (keys_AV.topk(num, dim=1).values & LOW_32_BITS)


def read(told: Tensor, wanted: Sequence[int], is_finite: Sequence[bool]) -> list[TokenLogprobs | None]:
    """What each row is to be told, from `told` on the host.

    `wanted` says of all rows how many most likely ones they asked for (NO_LOGPROBS: nothing).
    """
    num_most_likely = (told.shape[1] - 1) // 2
    words, values = iter(told.tolist()), iter(told.view(torch.float32).tolist())
    found: list[TokenLogprobs | None] = []
    for num, is_sound in zip(wanted, is_finite, strict=True):
        if num == NO_LOGPROBS:
            found.append(None)
            continue
        ids, (chosen, *numbers) = next(words)[1:], next(values)
        top = min(num, num_most_likely)
        logprobs = TokenLogprobs(chosen, ids[:top], numbers[num_most_likely:][:top])
        found.append(logprobs if is_sound else None)
    return found


def _log_softmax(logits_AV: Tensor) -> Tensor:
    """As torch's, over rows filled up to a multiple of 16 bytes with tokens of no probability."""
    padding = -logits_AV.shape[1] % ALIGNED_NUMBERS
    if padding:
        logits_AV = functional.pad(logits_AV, (0, padding), value=float("-inf"))
    return logits_AV.log_softmax(dim=-1)
