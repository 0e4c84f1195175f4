"""What every call passes, outermost: requests are decoded, errors become statuses, ends are counted.

Nothing a handler raises reaches a caller as it is: a QuireError becomes its status, anything else is a bug, told as
INTERNAL with an errorId that names a log line. It knows no method by name.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from service.errors import FieldViolation, InternalError, InvalidField, QuireError
from service.generations import DEADLINE_SLACK_SECONDS
from service.logs import with_fields
from service.rpc.status import code_of, trailers_of

log = logging.getLogger("quire.rpc")

UNKNOWN_METHOD = "other"

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Guards every handler of a server. `on_handled` hears each call's method and code."""

    def __init__(self, on_handled: Callable[[str, str], None]) -> None:
        self._on_handled = on_handled
        self._guarded: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The guarded handler; None, which gRPC answers with UNIMPLEMENTED, where there is none."""
        path = handler_call_details.method
        if path not in self._guarded:
            handler = await continuation(handler_call_details)
            if handler is None:
                self._on_handled(UNKNOWN_METHOD, grpc.StatusCode.UNIMPLEMENTED.name)
                return None
            self._guarded[path] = self._guard(path.rpartition("/")[2], handler)
        return self._guarded[path]

    def _guard(self, method: str, handler: Any) -> Handler:
        """The same handler on raw bytes: gRPC would answer a request that does not decode with INTERNAL."""
        if handler.request_streaming:
            assert handler.response_streaming, "no client-streaming methods yet"
            stream = self._stream_stream(method, handler)
            return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        one = self._one_request(method, handler)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(one, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(one, None, handler.response_serializer)

    def _one_request(self, method: str, handler: Any) -> Any:
        """For handlers of one request that are coroutines; those that stream write to the context."""
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def guarded(raw: bytes, context: Context) -> Any:
            async def answer() -> Any:
                return await behaviour(_decode(handler, raw), context)

            return await self._answer(method, context, answer())

        return guarded

    def _stream_stream(self, method: str, handler: Any) -> Any:
        """For handlers that are async generators over requests (reflection)."""

        async def guarded(raws: AsyncIterator[bytes], context: Context) -> None:
            async def requests() -> AsyncIterator[Any]:
                async for raw in raws:
                    yield _decode(handler, raw)

            async def answer() -> None:
                async for response in handler.stream_stream(requests(), context):
                    await context.write(response)

            await self._answer(method, context, answer())

        return guarded

    async def _answer(self, method: str, context: Context, answer: Awaitable[Any]) -> Any:
        """Awaits the handler's answer and turns whatever it raises into a status, counted before it is sent."""
        try:
            response = await answer
        except asyncio.CancelledError as cancelled:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                self._on_handled(method, _code_of_leave(context))
                raise
            error: QuireError = _bug(cancelled)  # nobody cancelled this call: it would never be answered
        except grpc.aio.AbortError:
            self._on_handled(method, context.code().name)
            raise
        except grpc.aio.InternalError:
            self._on_handled(method, _code_of_leave(context))
            raise _gone() from None  # the connection broke under a write
        except QuireError as expected:
            error = expected
        except Exception as unexpected:
            error = _bug(unexpected)
        else:
            self._on_handled(method, grpc.StatusCode.OK.name)
            return response
        self._on_handled(method, error.code.value)
        try:
            return await context.abort(code_of(error), error.message, trailers_of(error))
        except grpc.aio.InternalError:
            raise _gone() from None


def _decode(handler: Any, raw: bytes) -> Any:
    try:
        return handler.request_deserializer(raw)
    except DecodeError:
        must = "must be a well-formed message whose strings are UTF-8"
        raise InvalidField(violations=[FieldViolation("request", must)]) from None


def _code_of_leave(context: Context) -> str:
    """A call that ended under us was cancelled by its caller, or by its deadline."""
    seconds_left: float | None = context.time_remaining()
    has_expired = seconds_left is not None and seconds_left <= DEADLINE_SLACK_SECONDS
    return (grpc.StatusCode.DEADLINE_EXCEEDED if has_expired else grpc.StatusCode.CANCELLED).name


def _gone() -> asyncio.CancelledError:
    """For a call whose caller is gone: gRPC takes it in silence, where its own exception would be logged as a bug."""
    return asyncio.CancelledError()


def _bug(error: BaseException) -> InternalError:
    """Logs what was not expected under a new id, and gives the id alone to the caller."""
    error_id = secrets.token_hex(8)
    log.error("unexpected error", exc_info=error, extra=with_fields(error_id=error_id))
    return InternalError(metadata={"errorId": error_id})
