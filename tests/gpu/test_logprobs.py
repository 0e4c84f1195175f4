"""Log-probabilities as a card tells them, against those of the CPU's sampler."""

from __future__ import annotations

import pytest
import torch

from model.gpu import logprobs
from model.interface import NO_LOGPROBS, Admission, Sampling
from model.sampling import SlotState, log_probabilities

INF = float("inf")


def tell(logits_WV: torch.Tensor, wanted: list[int], token_ids: list[int]) -> torch.Tensor:
    """What comes to the host, through memory that is told nothing beforehand."""
    asking = [row for row, num in enumerate(wanted) if num != NO_LOGPROBS]
    shape = len(asking), logprobs.words_of(min(max(wanted), logits_WV.shape[1]))
    told = torch.full(shape, -77, dtype=torch.int32)
    logprobs.tell(logits_WV, torch.tensor(asking, dtype=torch.int32), torch.tensor(token_ids, dtype=torch.int32), told)
    return told


@pytest.mark.parametrize("vocab_size", [5, 97, 1000])
def test_as_the_cpu_tells_them(vocab_size: int) -> None:
    """Some rows have ties and tokens that cannot be; more ask than are computed at a time."""
    num_rows = 2 * logprobs.MAX_ROWS + 3
    logits_WV = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 3
    logits_WV[1::4] = logits_WV[1::4].round()
    logits_WV[2::4] = -7.0
    logits_WV[3::4, vocab_size // 2 :] = -INF
    wanted = [(NO_LOGPROBS, 0, 3, 20)[row * 7 % 4] for row in range(num_rows)]
    token_ids = [row % (vocab_size // 2) for row in range(num_rows)]
    states = [SlotState.of(Admission((), 0, Sampling(num_logprobs=num))) for num in wanted]
    is_finite = [row != 8 for row in range(num_rows)]
    expected = log_probabilities(logits_WV, states, token_ids, is_finite)
    found = logprobs.read(tell(logits_WV, wanted, token_ids), wanted, is_finite)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.top_ids == other.top_ids
            assert one.chosen == pytest.approx(other.chosen, abs=1e-6)
            assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-6)


def test_equal_ones_are_ranked_by_id_whatever_their_sign() -> None:
    logprobs_AV = torch.tensor([[-1.0, -0.5, -INF, -0.5, -1.0, -0.5], [-3.0, -2.0, -1.0, -0.0, 0.0, -1e-30]])
    assert logprobs.most_likely(logprobs_AV, 6).tolist() == [[1, 3, 5, 0, 4, 2], [4, 3, 5, 2, 1, 0]]


def test_a_row_has_the_same_bits_alone_and_in_any_place() -> None:
    logits_WV = torch.randn(20, 97, generator=torch.Generator().manual_seed(0))
    together = tell(logits_WV, [4] * 20, [1] * 20)
    for row in (0, 7, 17):
        assert torch.equal(tell(logits_WV[row : row + 1], [4], [1]), together[row : row + 1])
