"""Turns logits into tokens: bias, penalties, temperature, filters, one draw; and log-probabilities.

The sampler owns each slot's sampling parameters and nothing else: penalties are counted afresh from the runner's table
of known tokens, draws come from a counter-based generator, so there is no state that a preemption could spoil. It does
not know how logits are computed, nor when a sequence ends.

Every row is treated alone: its token and its log-probabilities are the same bits whatever other rows are there.

Shape letters: R rows, V vocabulary, F the rows that a function concerns (drawn, filtered), N most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from model.interface import NO_LOGPROBS, Admission, Sampled, Sampling, TokenLogprobs
from model.philox import exponential, split_seed
from model.transformer import Logits

GROUP_SIZE = 64
FIRST_NUM_RANKED = 64
SMALLEST = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class SlotState:
    """What changes a slot's logits before the draw, and what its sequence wants to be told."""

    sampling: Sampling
    num_prompt: int
    min_new_tokens: int
    end_ids: Tensor
    bias_ids: Tensor
    biases: Tensor

    @classmethod
    def of(cls, admission: Admission) -> SlotState:
        """Turns lists into tensors once, when the sequence comes."""
        bias = admission.sampling.logit_bias
        return cls(
            sampling=admission.sampling,
            num_prompt=admission.num_prompt,
            min_new_tokens=admission.min_new_tokens,
            end_ids=torch.tensor(admission.end_token_ids, dtype=torch.int64),
            bias_ids=torch.tensor([token_id for token_id, _ in bias], dtype=torch.int64),
            biases=torch.tensor([value for _, value in bias], dtype=torch.float32),
        )

    def bans_end(self, position: int) -> bool:
        """Whether the token at this position must not end the sequence."""
        return position - self.num_prompt < self.min_new_tokens and len(self.end_ids) > 0

    def changes_logits(self, position: int) -> bool:
        """Whether the token at this position is drawn from other logits than the model's."""
        return self.sampling.has_penalties or bool(self.sampling.logit_bias) or self.bans_end(position)


class Sampler:
    """Draws the next token of each row. `tokens` is the runner's int32 [num_slots, context_length + 1] table."""

    def __init__(self, num_slots: int, vocab_size: int, tokens: Tensor) -> None:
        self._vocab_size = vocab_size
        self._tokens = tokens
        self._slots: list[SlotState | None] = [None] * num_slots
        self._temperature = torch.zeros(num_slots)
        self._top_k = torch.zeros(num_slots, dtype=torch.int64)
        self._top_p = torch.ones(num_slots, dtype=torch.float64)
        self._min_p = torch.zeros(num_slots)
        self._key = torch.zeros(num_slots, 2, dtype=torch.int64)

    def admit(self, slot: int, admission: Admission) -> None:
        """Takes the parameters of the sequence that has just got this slot; those of the one before are forgotten."""
        sampling = admission.sampling
        self._slots[slot] = SlotState.of(admission)
        # A temperature below float32's range still means "almost greedy", not a division by zero.
        self._temperature[slot] = max(sampling.temperature, SMALLEST) if sampling.temperature > 0 else 0.0
        self._top_k[slot] = min(sampling.top_k or self._vocab_size, self._vocab_size)
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._key[slot] = torch.tensor(split_seed(sampling.seed))

    def sample(self, logits: Logits, slots: Sequence[int], positions: Sequence[int]) -> Sampled:
        """Draws one token per row from logits, which are left as they are.

        `positions[i]` is the place that the drawn token will have in its sequence, which is also the number of tokens
        known before it.
        """
        states = [self._state(slot) for slot in slots]
        logits_RV, token_ids = logits.values_WV, list(logits.peak_ids)
        # A peak is NaN or infinite where any logit is NaN or +inf, or all are -inf.
        is_finite = [isfinite(peak) for peak in logits.peaks]
        changed = [i for i, state in enumerate(states) if state.changes_logits(positions[i])]
        drawn = [i for i, state in enumerate(states) if state.sampling.temperature > 0]
        scores_RV = logits_RV
        if changed:
            scores_RV = logits_RV.clone()
            for i in changed:
                change(scores_RV[i], states[i], self._tokens[slots[i], : positions[i]].long())
            token_ids = scores_RV.argmax(dim=-1).tolist()
        if drawn:
            slots_F, positions_F = (torch.tensor([column[i] for i in drawn]) for column in (slots, positions))
            rows_F = torch.tensor(drawn)
            drawn_ids = self._draw(take_rows(scores_RV, rows_F), slots_F, positions_F).tolist()
            for i, token_id in zip(drawn, drawn_ids, strict=True):
                token_ids[i] = token_id
        return Sampled(token_ids, is_finite, log_probabilities(logits_RV, states, token_ids, is_finite))

    def _state(self, slot: int) -> SlotState:
        state = self._slots[slot]
        assert state is not None, f"slot {slot} was never admitted"
        return state

    def _draw(self, scores_FV: Tensor, slots_F: Tensor, positions_F: Tensor) -> Tensor:
        """Draws from softmax(scores / temperature) restricted to what the filters keep: int64 [F]."""
        # Subtracting the maximum first keeps the quotient from overflowing at any temperature.
        scaled_FV = (scores_FV - scores_FV.amax(dim=-1, keepdim=True)).div_(self._temperature[slots_F, None])
        weights_FV = scaled_FV.exp()
        top_k_F, top_p_F, min_p_F = self._top_k[slots_F], self._top_p[slots_F], self._min_p[slots_F]
        ranked = ((top_k_F < self._vocab_size) | (top_p_F < 1)).nonzero().flatten()
        if len(ranked):
            scaled, weights = take_rows(scaled_FV, ranked), take_rows(weights_FV, ranked)
            dropped = ~most_likely(scaled, weights, top_k_F[ranked], top_p_F[ranked])
            weights_FV.index_copy_(0, ranked, weights.masked_fill(dropped, 0))
        if bool((min_p_F > 0).any()):  # the largest weight is 1, so weights are ratios to it
            weights_FV.masked_fill_(weights_FV < min_p_F[:, None], 0)
        return race(weights_FV, self._key[slots_F], positions_F)


def take_rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """The rows of these ascending numbers: the matrix itself when they are all, else a copy."""
    return matrix if len(rows) == len(matrix) else matrix.index_select(0, rows)


def change(scores_V: Tensor, state: SlotState, known: Tensor) -> None:
    """Applies bans, bias and penalties to one row in place; `known` are the sequence's token ids so far, int64."""
    sampling = state.sampling
    if state.bans_end(len(known)):
        scores_V[state.end_ids] = float("-inf")
    scores_V[state.bias_ids] += state.biases
    if sampling.repetition_penalty != 1:
        repeat(scores_V, known, sampling.repetition_penalty)
    if sampling.counts_output:
        counts_V = known[state.num_prompt :].bincount(minlength=len(scores_V))
        scores_V -= sampling.presence_penalty * (counts_V > 0) + sampling.frequency_penalty * counts_V


def repeat(scores_V: Tensor, known: Tensor, penalty: float) -> None:
    """Divides the positive and multiplies the negative scores of known tokens, in place (Keskar et al., CTRL, 2019)."""
    penalty = max(penalty, SMALLEST)
    scores = scores_V[known]
    scores_V[known] = torch.where(scores > 0, scores / penalty, scores * penalty).clamp_(max=LARGEST)


def most_likely(scaled_FV: Tensor, weights_FV: Tensor, top_k_F: Tensor, top_p_F: Tensor) -> Tensor:
    """Which tokens stay: bool [F, V]. The k most likely, and of these the fewest whose probabilities reach top_p.

    Tokens are ranked by score, equal ones by id. Nucleus sampling: Holtzman et al., 2020. `top_p_F` is a share of what
    top_k left. A row's ranking is cut off where its filters cannot reach, which changes no number.
    """
    vocab_size = scaled_FV.shape[1]
    total_F = in_groups(weights_FV).sum(dim=-1).double().sum(dim=-1)
    limited = top_k_F < vocab_size
    largest_k = int(top_k_F[limited].max()) if bool(limited.any()) else 0
    num_ranked = min(vocab_size, max(FIRST_NUM_RANKED, largest_k))
    kept_FV = torch.empty_like(scaled_FV, dtype=torch.bool)
    rows = torch.arange(len(scaled_FV))
    while len(rows):
        scores_FV = take_rows(scaled_FV, rows)
        top_FN = scores_FV.topk(num_ranked, dim=-1).values
        num_kept_F = count_kept(top_FN, limited[rows], total_F[rows], top_k_F[rows], top_p_F[rows])
        done = (num_kept_F <= num_ranked) | (num_ranked == vocab_size)
        ready = done.nonzero().flatten()
        kept = keep_first(take_rows(scores_FV, ready), top_FN[ready], num_kept_F[ready].clamp(max=num_ranked))
        kept_FV.index_copy_(0, rows[ready], kept)
        rows, num_ranked = rows[~done], min(vocab_size, 8 * num_ranked)
    return kept_FV


def count_kept(top_FN: Tensor, is_limited_F: Tensor, total_F: Tensor, top_k_F: Tensor, top_p_F: Tensor) -> Tensor:
    """How many of the ranked tokens stay: int64 [F], at least 1; N + 1 where N of them do not reach top_p.

    A row that is limited by top_k has its k within N.
    """
    cumulated_FN = top_FN.double().exp().cumsum(dim=-1)
    num_ranked = top_FN.shape[1]
    within_k_F = cumulated_FN.gather(1, (top_k_F.clamp(max=num_ranked) - 1)[:, None]).squeeze(1)
    target_F = top_p_F * torch.where(is_limited_F, within_k_F, total_F)
    num_needed_F = 1 + (cumulated_FN < target_F[:, None]).sum(dim=-1)
    num_needed_F = torch.where(top_p_F < 1, num_needed_F, top_k_F)
    return torch.minimum(num_needed_F, top_k_F)


def keep_first(scaled_FV: Tensor, top_FN: Tensor, num_kept_F: Tensor) -> Tensor:
    """Marks the first `num_kept` tokens of each row in the order of score, then id: bool [F, V]."""
    cut_F1 = top_FN.gather(1, num_kept_F[:, None] - 1)
    num_tied_F = num_kept_F - (top_FN > cut_F1).sum(dim=-1)
    kept_FV = scaled_FV >= cut_F1
    crowded = (kept_FV.sum(dim=-1) > num_kept_F).nonzero().flatten()
    if len(crowded):
        is_tied = scaled_FV[crowded] == cut_F1[crowded]
        too_late = is_tied & (is_tied.cumsum(dim=-1) > num_tied_F[crowded, None])
        kept_FV[crowded] &= ~too_late
    return kept_FV


def race(weights_FV: Tensor, key_F2: Tensor, positions_F: Tensor) -> Tensor:
    """Draws one index per row with probability proportional to its weight: int64 [F].

    An exponential race: the largest weight / noise wins with exactly that probability, which is the Gumbel-max trick
    without the outer logarithm (Efraimidis and Spirakis, 2006; Maddison et al., 2014). It is run in two rounds, first
    between groups of tokens by their summed weights, then within the winning group: the same distribution for
    V / 64 + 64 random numbers instead of V.
    """
    weights_FGM = in_groups(weights_FV)
    num_rows, num_groups, _ = weights_FGM.shape
    noise_FN = exponential(key_F2, positions_F, GROUP_SIZE + num_groups)
    member_noise_FM, group_noise_FG = noise_FN[:, :GROUP_SIZE], noise_FN[:, GROUP_SIZE:]
    group_F = (weights_FGM.sum(dim=-1).double() / group_noise_FG).argmax(dim=-1)
    members_FM = weights_FGM[torch.arange(num_rows), group_F].double()
    return group_F * GROUP_SIZE + (members_FM / member_noise_FM).argmax(dim=-1)


def in_groups(weights_FV: Tensor) -> Tensor:
    """Cuts the vocabulary into groups of GROUP_SIZE, the last one filled up with zeros: [F, G, GROUP_SIZE].

    Sums over a whole row go through groups too: torch may cut a single long row among threads, and sum it otherwise
    than the same row among others.
    """
    padding = -weights_FV.shape[1] % GROUP_SIZE
    padded_FV = torch.nn.functional.pad(weights_FV, (0, padding)) if padding else weights_FV
    return padded_FV.view(len(weights_FV), -1, GROUP_SIZE)


def log_probabilities(
    logits_RV: Tensor, states: Sequence[SlotState], token_ids: Sequence[int], is_finite: Sequence[bool]
) -> list[TokenLogprobs | None]:
    """What each row asked to be told of the model's own distribution; [] when none asked, None for a broken row."""
    wanted = [state.sampling.num_logprobs for state in states]
    if all(num == NO_LOGPROBS for num in wanted):
        return []
    found: list[TokenLogprobs | None] = [None] * len(states)
    for i, num in enumerate(wanted):
        if num != NO_LOGPROBS and is_finite[i]:
            logprobs_V = logits_RV[i].log_softmax(dim=-1)
            ids, top = rank(logprobs_V, num)
            found[i] = TokenLogprobs(logprobs_V[token_ids[i]].item(), ids, top)
    return found


def rank(logprobs_V: Tensor, num: int) -> tuple[list[int], list[float]]:
    """Ids and values of the `num` largest, largest first, equal ones by id."""
    if num == 0:
        return [], []
    num = min(num, len(logprobs_V))
    candidates = (logprobs_V >= logprobs_V.topk(num).values[-1]).nonzero().flatten()
    values, order = logprobs_V[candidates].sort(descending=True, stable=True)
    return candidates[order[:num]].tolist(), values[:num].tolist()
