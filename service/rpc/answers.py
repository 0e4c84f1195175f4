"""Answers from the domain to protobuf. It decides nothing; requests are convert.py's."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from model.interface import TokenLogprobs
from service.admission import Admission
from service.config import Settings
from service.engine.messages import StepStats
from service.generation import EndReason, Finish, Generation
from service.output import Delta
from service.pb.quire.v1 import inference_pb2 as pb
from service.rpc.convert import MAX_REQUEST_BYTES, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from service.rpc.model import ServedModel

REASONS = {
    EndReason.STOP: pb.FINISH_REASON_STOP,
    EndReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
    EndReason.CONTEXT_LENGTH: pb.FINISH_REASON_CONTEXT_LENGTH,
}


def started(generation: Generation) -> pb.Started:
    """What is known with the first token."""
    request = generation.request
    return pb.Started(
        generation_id=generation.id,
        model=request.model,
        prompt_tokens=len(request.token_ids),
        cached_prompt_tokens=generation.num_cached,
        seed=request.sampling.seed,
    )


def delta(new: Delta) -> pb.Delta:
    """New output."""
    message = pb.Delta()
    _fill_delta(message, new)
    return message


def delta_event(new: Delta) -> pb.StreamGenerateResponse:
    """New output as a message of a stream. Every token passes here: filling in place saves making a copy."""
    message = pb.StreamGenerateResponse()
    _fill_delta(message.delta, new)
    return message


def finished(generation: Generation) -> pb.Finished:
    """How a generation ended that ended well."""
    finish = generation.finish
    message = pb.Finished(
        reason=REASONS[finish.reason],
        usage=pb.Usage(
            prompt_tokens=len(generation.request.token_ids),
            cached_prompt_tokens=generation.num_cached,
            completion_tokens=finish.num_tokens,
            preemptions=finish.preemptions,
        ),
        timing=_timing(finish),
    )
    if isinstance(finish.stop, str):
        message.stop_match.stop_string = finish.stop
    elif finish.stop is not None:
        message.stop_match.token_id = finish.stop
    return message


def model(served: ServedModel, settings: Settings) -> pb.Model:
    """The description of the served model. Raises ServerStarting until it is known."""
    facts = served.facts
    return pb.Model(
        name=served.name,
        digest=facts.digest,
        architecture=facts.architecture,
        dtype=facts.dtype,
        context_length=served.shape.context_length,
        vocab_size=facts.vocab_size,
        eos_token_ids=facts.eos_token_ids,
        has_chat_template=served.chat is not None,
        defaults=pb.GenerationDefaults(
            temperature=facts.default_temperature,
            top_k=facts.default_top_k,
            top_p=facts.default_top_p,
            repetition_penalty=facts.default_repetition_penalty,
            max_tokens=facts.default_max_tokens,
        ),
        limits=_limits(served, settings),
    )


def load(served: ServedModel, admission: Admission, stats: StepStats, tokens_per_second: float) -> pb.GetLoadResponse:
    """The load at this moment; block counts are zero until the engine was up once."""
    message = pb.GetLoadResponse(
        running_requests=admission.num_running,
        waiting_requests=admission.num_waiting,
        waiting_tokens=admission.num_waiting_tokens,
        tokens_per_second=tokens_per_second,
        estimated_queue=_duration(admission.estimated_wait_seconds),
        accepting=admission.is_accepting,
    )
    if served.is_known:
        message.total_blocks = served.shape.num_blocks
        message.block_size = served.shape.block_size
        message.free_blocks = stats.free_blocks + stats.cached_blocks
    return message


def _limits(served: ServedModel, settings: Settings) -> pb.ServerLimits:
    return pb.ServerLimits(
        max_sequence_tokens=served.max_sequence_tokens,
        max_running_requests=served.shape.num_slots,
        max_waiting_requests=settings.max_waiting_requests,
        max_waiting_tokens=settings.max_waiting_tokens,
        default_deadline=_duration(settings.default_deadline_seconds),
        max_deadline=_duration(settings.max_deadline_seconds),
        max_request_bytes=MAX_REQUEST_BYTES,
        max_stop_strings=MAX_STOP_STRINGS,
        max_top_logprobs=MAX_TOP_LOGPROBS,
        reader_stall=_duration(settings.reader_stall_seconds),
    )


def _timing(finish: Finish) -> pb.Timing:
    return pb.Timing(
        queue=_duration(finish.queue_seconds),
        first_token=_duration(finish.first_token_seconds),
        total=_duration(finish.total_seconds),
    )


def _fill_delta(message: pb.Delta, new: Delta) -> None:
    message.num_tokens = new.num_tokens
    message.text = new.text
    message.token_ids.extend(new.token_ids)
    for token_id, entry in new.logprobs:
        message.logprobs.append(_token_logprobs(token_id, entry))


def _token_logprobs(token_id: int, entry: TokenLogprobs) -> pb.TokenLogprobs:
    top = zip(entry.top_ids, entry.top_logprobs, strict=True)
    return pb.TokenLogprobs(
        chosen=pb.Logprob(token_id=token_id, logprob=entry.chosen),
        top=[pb.Logprob(token_id=top_id, logprob=logprob) for top_id, logprob in top],
    )


def _duration(seconds: float) -> Duration:
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))
