"""What the engine checks again before it indexes with what a front end sent.

The door has validated every request, so a refusal here means a bug at the door: it costs that request, not the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, isnan

from model.interface import MAX_END_TOKEN_IDS, MAX_LOGIT_BIAS, NO_LOGPROBS, RunnerShape, Sampling
from service.engine.messages import Limits, Submit


def is_sound(submit: Submit, shape: RunnerShape) -> bool:
    """Whether a runner of this shape can be given this sequence, and the pool can hold it to its end."""
    return (
        _has_sound_lengths(submit, shape)
        and _are_tokens(submit.token_ids, shape.vocab_size)
        and _has_sound_limits(submit.limits, shape.vocab_size)
        and _has_sound_sampling(submit.sampling, shape.vocab_size)
    )


def _has_sound_lengths(submit: Submit, shape: RunnerShape) -> bool:
    """There is a prompt, something is left to generate, and both fit the context and the pool."""
    most = submit.num_prompt + submit.limits.max_new_tokens
    fits = most <= min(shape.context_length, shape.num_blocks * shape.block_size)
    return fits and 1 <= submit.num_prompt <= len(submit.token_ids) < most


def _has_sound_limits(limits: Limits, vocab_size: int) -> bool:
    return (
        0 <= limits.min_new_tokens <= limits.max_new_tokens
        and len(limits.end_token_ids) <= MAX_END_TOKEN_IDS
        and _are_tokens(limits.end_token_ids, vocab_size)
        and not isnan(limits.deadline)
        and not isnan(limits.arrival)
    )


def _has_sound_sampling(sampling: Sampling, vocab_size: int) -> bool:
    numbers = (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        *(bias for _, bias in sampling.logit_bias),
    )
    return (
        all(map(isfinite, numbers))
        and sampling.temperature >= 0
        and sampling.repetition_penalty > 0
        and 0 <= sampling.top_k <= vocab_size
        and 0 <= sampling.seed < 2**64
        and NO_LOGPROBS <= sampling.num_logprobs <= vocab_size
        and len(sampling.logit_bias) <= MAX_LOGIT_BIAS
        and _are_tokens([token_id for token_id, _ in sampling.logit_bias], vocab_size)
    )


def _are_tokens(token_ids: Sequence[int], vocab_size: int) -> bool:
    return not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size)
