"""The one exception tree, and the closed list of reasons a caller can be given.

Anything that ends a call on purpose raises a QuireError. service/rpc maps it to a gRPC status; nothing else does. Texts
are fixed and brief: no exception text, path or address leaves the process. This module knows neither gRPC nor engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

UNMEASURED_RETRY_SECONDS = 1.0
"""Retry hint where no measurement gives one: at start, while draining, after an engine was lost."""


class Code(StrEnum):
    """gRPC status codes in use, by name."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    ABORTED = "ABORTED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    CANCELLED = "CANCELLED"


class Reason(StrEnum):
    """google.rpc.ErrorInfo.reason: closed, documented in the README."""

    INVALID_FIELD = "INVALID_FIELD"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    EXCEEDS_KV_CAPACITY = "EXCEEDS_KV_CAPACITY"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    QUEUE_FULL = "QUEUE_FULL"
    DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    READER_STALLED = "READER_STALLED"
    SERVER_STARTING = "SERVER_STARTING"
    SERVER_DRAINING = "SERVER_DRAINING"
    ENGINE_LOST = "ENGINE_LOST"
    NON_FINITE_LOGITS = "NON_FINITE_LOGITS"
    FEATURE_DISABLED = "FEATURE_DISABLED"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field: its path in the request, such as "spec.sampling.top_p", and what it must be."""

    field: str
    description: str


class QuireError(Exception):
    """Ends a call with a status. `metadata` holds the dynamic parts; `message` never does."""

    code: Code = Code.INTERNAL
    reason: Reason = Reason.INTERNAL
    message: str = "internal error"

    def __init__(
        self,
        *,
        metadata: Mapping[str, str | int] | None = None,
        retry_after_seconds: float | None = None,
        violations: Sequence[FieldViolation] = (),
    ) -> None:
        super().__init__(self.message)
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        self.retry_after_seconds = retry_after_seconds
        self.violations = tuple(violations)


class InvalidField(QuireError):
    """All violations of a request at once."""

    code, reason = Code.INVALID_ARGUMENT, Reason.INVALID_FIELD
    message = "the request has invalid fields; see the violations"


class ContextLengthExceeded(QuireError):
    """metadata: promptTokens, limit."""

    code, reason = Code.INVALID_ARGUMENT, Reason.CONTEXT_LENGTH_EXCEEDED
    message = "prompt and max_tokens exceed the model's context"


class ExceedsKvCapacity(QuireError):
    """metadata: blocksNeeded, blocksTotal."""

    code, reason = Code.INVALID_ARGUMENT, Reason.EXCEEDS_KV_CAPACITY
    message = "prompt and max_tokens can never fit the key/value pool"


class ModelNotFound(QuireError):
    """metadata: model."""

    code, reason = Code.NOT_FOUND, Reason.MODEL_NOT_FOUND
    message = "no such model; ListModels names the served ones"


class QueueFull(QuireError):
    """metadata: queueDepth; with a retry hint."""

    code, reason = Code.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL
    message = "the queue is full"


class DeadlineUnreachable(QuireError):
    """metadata: estimatedWaitMs; with a retry hint."""

    code, reason = Code.RESOURCE_EXHAUSTED, Reason.DEADLINE_UNREACHABLE
    message = "the queue is longer than the deadline allows"


class DeadlineExceeded(QuireError):
    """metadata: generatedTokens."""

    code, reason = Code.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED
    message = "the deadline passed"


class ReaderStalled(QuireError):
    """The caller took nothing for the stall limit."""

    code, reason = Code.ABORTED, Reason.READER_STALLED
    message = "the reader made no progress"


class ServerStarting(QuireError):
    """With a retry hint."""

    code, reason = Code.UNAVAILABLE, Reason.SERVER_STARTING
    message = "the model is being loaded"


class ServerDraining(QuireError):
    """With a retry hint."""

    code, reason = Code.UNAVAILABLE, Reason.SERVER_DRAINING
    message = "the server is shutting down"


class EngineLost(QuireError):
    """metadata: generatedTokens; with a retry hint."""

    code, reason = Code.UNAVAILABLE, Reason.ENGINE_LOST
    message = "the engine was lost"


class NonFiniteLogits(QuireError):
    """The model gave NaN for this sequence."""

    code, reason = Code.INTERNAL, Reason.NON_FINITE_LOGITS
    message = "the model produced non-finite values for this request"


class FeatureDisabled(QuireError):
    """A known option that this server has turned off or this model lacks. metadata: feature."""

    code, reason = Code.UNIMPLEMENTED, Reason.FEATURE_DISABLED
    message = "this feature is not available here"


class InternalError(QuireError):
    """A bug. metadata: errorId, which names a log line."""


class StartupError(Exception):
    """A user's mistake at start (flag, file, port, checkpoint): one clear line and exit code 2, no traceback."""
