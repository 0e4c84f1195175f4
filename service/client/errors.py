"""The client's one exception, and how it is read from a failed call's status and its google.rpc details."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

DETAILS = "grpc-status-details-bin"
PUSHBACK = "grpc-retry-pushback-ms"


@dataclass(frozen=True, slots=True)
class Violation:
    """One bad field of a request, and what it must be."""

    field: str
    description: str


class QuireClientError(Exception):
    """A call that failed.

    `code` is the gRPC status code's name. `reason` (None when the status is not Quire's own, such as a refused
    connection), `metadata`, `violations` and `retry_after_seconds` are what the server tells; the reasons are listed in
    the README.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        bad_fields = "".join(f"; {violation.field}: {violation.description}" for violation in self.violations)
        facts = ", ".join(f"{key}={value}" for key, value in sorted(self.metadata.items()))
        return f"{self.reason or self.code}: {self.message}{bad_fields}{f' ({facts})' if facts else ''}"


class FailedCall(Protocol):
    """What blocking and asyncio errors have in common."""

    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str | None: ...

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def error_of(call: FailedCall) -> QuireClientError:
    """The error of a failed call. Details that cannot be read are left out: they may be another server's."""
    trailing = dict(call.trailing_metadata() or ())
    info, request, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    _unpack(trailing.get(DETAILS), (info, request, retry))
    return QuireClientError(
        call.code().name,
        call.details() or "no details given",
        reason=info.reason or None,
        metadata=info.metadata,
        violations=[Violation(violation.field, violation.description) for violation in request.field_violations],
        retry_after_seconds=_retry_after(retry, trailing.get(PUSHBACK)),
    )


def _unpack(packed: str | bytes | None, wanted: Sequence[Message]) -> None:
    """Fills those of the wanted messages that the status carries."""
    if not isinstance(packed, bytes):
        return
    try:
        status = status_pb2.Status.FromString(packed)
        for detail in status.details:
            for message in wanted:
                if detail.Is(message.DESCRIPTOR):
                    detail.Unpack(message)
    except DecodeError:
        return


def _retry_after(retry: error_details_pb2.RetryInfo, pushback: str | bytes | None) -> float | None:
    if retry.HasField("retry_delay"):
        return float(retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)
    if isinstance(pushback, str) and pushback.isdecimal():
        return int(pushback) / 1_000
    return None
