"""What no status may hold, and what each must: checked on every call of every test in this folder."""

from __future__ import annotations

import re
from typing import Any

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo, RetryInfo
from google.rpc.status_pb2 import Status

from service.errors import Reason

LEAKS = re.compile(
    r"(/[a-z_]+/[a-z_])|(\d+\.\d+\.\d+\.\d+)|(\[::)|(localhost)|(Traceback)|(\.py\b)|(0x[0-9a-f]{6})"
    r"|([A-Z][a-z]+Error\b)|(Exception)|(service\.)",
)
MADE_BY_CLIENTS = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
DETAILS = {cls.DESCRIPTOR.full_name: cls for cls in (ErrorInfo, BadRequest, RetryInfo, ResourceInfo)}


class Failure:
    """A failed call, taken apart."""

    def __init__(self, code: grpc.StatusCode, message: str, trailers: dict[str, Any]) -> None:
        self.code = code
        self.message = message
        self.pushback_ms = int(trailers["grpc-retry-pushback-ms"]) if "grpc-retry-pushback-ms" in trailers else None
        raw = trailers.get("grpc-status-details-bin")
        self.status = Status.FromString(raw) if raw is not None else None
        self.details: list[Any] = []
        for packed in self.status.details if self.status else ():
            detail = DETAILS[packed.TypeName()]()
            assert packed.Unpack(detail)
            self.details.append(detail)

    @classmethod
    async def of(cls, call: Any) -> Failure:
        return cls(await call.code(), await call.details(), dict(await call.trailing_metadata()))

    def one(self, kind: type) -> Any:
        found = [detail for detail in self.details if isinstance(detail, kind)]
        assert len(found) == 1, f"{len(found)} details of {kind}"
        return found[0]

    @property
    def reason(self) -> str:
        return self.one(ErrorInfo).reason

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.one(ErrorInfo).metadata)

    @property
    def fields(self) -> dict[str, str]:
        return {v.field: v.description for v in self.one(BadRequest).field_violations}

    def check(self) -> None:
        """One ErrorInfo of ours, the same code and message inside and out, and nothing that must stay inside."""
        assert self.code is not grpc.StatusCode.UNKNOWN
        assert not LEAKS.search(self.message), self.message
        if self.status is None:
            assert self.code in MADE_BY_CLIENTS, (self.code, self.message)
            return
        # A client whose own deadline fires puts its own words over our trailers.
        if self.code not in MADE_BY_CLIENTS:
            assert (self.status.code, self.status.message) == (self.code.value[0], self.message)
        info = self.one(ErrorInfo)
        assert info.domain == "quire"
        assert info.reason in list(Reason)
        assert not LEAKS.search(str(self.details)), str(self.details)
        retries = [detail for detail in self.details if isinstance(detail, RetryInfo)]
        assert bool(retries) == (self.pushback_ms is not None)
        for retry in retries:
            assert retry.retry_delay.ToMilliseconds() == self.pushback_ms
