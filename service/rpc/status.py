"""Errors from the domain to gRPC: the one place where a QuireError becomes a status with its details.

Every status carries one google.rpc.ErrorInfo of domain "quire". Retry hints go out twice: RetryInfo for programs that
read details, grpc-retry-pushback-ms for gRPC's own retries, which read nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo, RetryInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

from service.errors import ModelNotFound, QuireError

DOMAIN = "quire"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
MODEL_TYPE = "quire.v1.Model"


def code_of(error: QuireError) -> grpc.StatusCode:
    """The gRPC code of an error."""
    return grpc.StatusCode[error.code.value]


def trailers_of(error: QuireError) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata: the details, and the pushback where there is a retry hint."""
    status = Status(code=code_of(error).value[0], message=error.message)
    for detail in _details(error):
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    details = (DETAILS_KEY, status.SerializeToString())
    if error.retry_after_seconds is None:
        return (details,)
    return details, (PUSHBACK_KEY, str(_milliseconds(error.retry_after_seconds)))


def _details(error: QuireError) -> Iterator[Message]:
    yield ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    if error.violations:
        violations = [
            BadRequest.FieldViolation(field=violation.field, description=violation.description)
            for violation in error.violations
        ]
        yield BadRequest(field_violations=violations)
    if isinstance(error, ModelNotFound):
        yield ResourceInfo(resource_type=MODEL_TYPE, resource_name=error.metadata["model"])
    if error.retry_after_seconds is not None:
        milliseconds = _milliseconds(error.retry_after_seconds)
        delay = Duration(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 1_000_000)
        yield RetryInfo(retry_delay=delay)


def _milliseconds(seconds: float) -> int:
    return max(round(seconds * 1000), 1)
