"""Turns the API's answers into the client's types, and checks that a stream is whole."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2

from service.client.errors import QuireClientError
from service.client.types import (
    Defaults,
    Delta,
    Event,
    Finished,
    FinishReason,
    Generation,
    HealthStatus,
    Limits,
    Load,
    Logprob,
    Model,
    Started,
    Timing,
    TokenLogprobs,
    Usage,
)
from service.pb.quire.v1 import inference_pb2 as pb

REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_MAX_TOKENS: FinishReason.MAX_TOKENS,
    pb.FINISH_REASON_CONTEXT_LENGTH: FinishReason.CONTEXT_LENGTH,
}


class StreamReader:
    """Reads one stream's messages: numbered without gaps, Started first, Finished last."""

    def __init__(self) -> None:
        self._next_number = 0
        self._is_finished = False

    def read(self, message: pb.StreamGenerateResponse) -> Event | None:
        """The event; None for one that a newer server has and this client does not know.

        Raises QuireClientError when a message is missing.
        """
        if message.sequence_number != self._next_number or self._is_finished:
            raise QuireClientError("INTERNAL", "the stream has a gap: a message is missing or out of order")
        self._next_number += 1
        kind = message.WhichOneof("event")
        if kind == "delta":
            return delta(message.delta)
        if kind == "started":
            return started(message.started)
        if kind == "finished":
            self._is_finished = True
            return finished(message.finished)
        return None

    def close(self) -> None:
        """Call at the stream's end. Raises QuireClientError when Finished has not come."""
        if not self._is_finished:
            raise QuireClientError("INTERNAL", "the stream ended before the generation did")


def generation(answer: pb.GenerateResponse) -> Generation:
    output = delta(answer.output)
    return Generation(
        text=output.text,
        token_ids=output.token_ids,
        logprobs=output.logprobs,
        started=started(answer.started),
        finished=finished(answer.finished),
    )


def started(message: pb.Started) -> Started:
    return Started(
        generation_id=message.generation_id,
        model=message.model,
        prompt_tokens=message.prompt_tokens,
        cached_prompt_tokens=message.cached_prompt_tokens,
        seed=message.seed,
    )


def delta(message: pb.Delta) -> Delta:
    return Delta(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(TokenLogprobs(_logprob(entry.chosen), _logprobs(entry.top)) for entry in message.logprobs),
        num_tokens=message.num_tokens,
    )


def finished(message: pb.Finished) -> Finished:
    match = message.stop_match.WhichOneof("match")
    usage, timing = message.usage, message.timing
    return Finished(
        reason=REASONS.get(message.reason, FinishReason.UNKNOWN),
        stop_match=getattr(message.stop_match, match) if match else None,
        usage=Usage(usage.prompt_tokens, usage.cached_prompt_tokens, usage.completion_tokens, usage.preemptions),
        timing=Timing(seconds(timing.queue), seconds(timing.first_token), seconds(timing.total)),
    )


def model(message: pb.Model) -> Model:
    defaults = message.defaults
    return Model(
        name=message.name,
        digest=message.digest,
        architecture=message.architecture,
        dtype=message.dtype,
        context_length=message.context_length,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        has_chat_template=message.has_chat_template,
        defaults=Defaults(
            temperature=defaults.temperature,
            top_k=defaults.top_k,
            top_p=defaults.top_p,
            repetition_penalty=defaults.repetition_penalty,
            max_tokens=defaults.max_tokens if defaults.HasField("max_tokens") else None,
        ),
        limits=_limits(message.limits),
    )


def load(message: pb.GetLoadResponse) -> Load:
    return Load(
        running_requests=message.running_requests,
        waiting_requests=message.waiting_requests,
        waiting_tokens=message.waiting_tokens,
        free_blocks=message.free_blocks,
        total_blocks=message.total_blocks,
        block_size=message.block_size,
        tokens_per_second=message.tokens_per_second,
        estimated_queue_seconds=seconds(message.estimated_queue),
        accepting=message.accepting,
    )


def health(message: health_pb2.HealthCheckResponse) -> HealthStatus:
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(message.status)
    return HealthStatus.__members__.get(name, HealthStatus.UNKNOWN)


def seconds(duration: Duration) -> float:
    """A protobuf duration in seconds."""
    return duration.seconds + duration.nanos / 1e9


def _limits(message: pb.ServerLimits) -> Limits:
    return Limits(
        max_sequence_tokens=message.max_sequence_tokens,
        max_running_requests=message.max_running_requests,
        max_waiting_requests=message.max_waiting_requests,
        max_waiting_tokens=message.max_waiting_tokens,
        default_deadline_seconds=seconds(message.default_deadline),
        max_deadline_seconds=seconds(message.max_deadline),
        max_request_bytes=message.max_request_bytes,
        max_stop_strings=message.max_stop_strings,
        max_top_logprobs=message.max_top_logprobs,
        reader_stall_seconds=seconds(message.reader_stall),
    )


def _logprob(message: pb.Logprob) -> Logprob:
    return Logprob(message.token_id, message.logprob)


def _logprobs(messages: Iterable[pb.Logprob]) -> tuple[Logprob, ...]:
    return tuple(_logprob(message) for message in messages)
