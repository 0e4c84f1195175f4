"""The asyncio client. Owns its channels, which belong to the event loop of the first call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.client import responses
from service.client.channel import SERVICE, channel_options, probe_options, target
from service.client.errors import QuireClientError, error_of
from service.client.requests import build_detokenize, build_spec, build_tokenize
from service.client.types import Event, Generation, HealthStatus, Load, Message, Model, Options, Prompt, Tokenized
from service.pb.quire.v1 import inference_pb2 as pb
from service.pb.quire.v1.inference_pb2_grpc import InferenceServiceStub


class Stream(AsyncIterator[Event]):
    """The events of one generation: Started, Deltas, Finished. Leaving it early cancels the generation.

    Best used in an `async with` statement, which cancels however it is left. A stream that is dropped is cancelled,
    too: gRPC's own asyncio calls are not, and would generate to the end for nobody.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._messages = aiter(call)
        self._reader = responses.StreamReader()
        self._is_closed = False

    async def __anext__(self) -> Event:
        """The next event. Raises QuireClientError when the call fails or the stream is not whole."""
        try:
            while not self._is_closed:
                event = self._reader.read(await anext(self._messages))
                if event is not None:
                    return event
        except StopAsyncIteration:
            self._is_closed = True
            self._reader.close()
        except grpc.aio.AioRpcError as error:
            self._is_closed = True
            raise error_of(error) from None
        except BaseException:  # a gap in the stream, or the task was cancelled: nobody will read on
            self.close()
            raise
        raise StopAsyncIteration

    def close(self) -> None:
        """Cancels the generation if it is still running."""
        self._is_closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Client:
    """Calls a Quire server at `address`: host:port, [v6]:port, unix:path or dns:///host:port.

    Every call takes a deadline, None leaves it to the server, and raises QuireClientError when it fails. Raises
    ValueError for an address or an option that cannot be sent.
    """

    def __init__(self, address: str) -> None:
        self.address = target(address)

    # Channels bind to the running event loop, so they are made by the first call and not before.

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.address, channel_options())

    @cached_property
    def _probe_channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.address, probe_options())

    @cached_property
    def _stub(self) -> Any:
        return _inference(self._channel)

    async def generate(
        self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Unpack[Options]
    ) -> Generation:
        """Generates and returns the whole result. Cancelling the task cancels the generation."""
        request = pb.GenerateRequest(spec=build_spec(prompt, options))
        return responses.generation(await _finish(self._stub.Generate(request, timeout=timeout_seconds)))

    def stream(self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Unpack[Options]) -> Stream:
        """Generates and returns the events as they come: `async with client.stream(…) as events: async for …`."""
        request = pb.StreamGenerateRequest(spec=build_spec(prompt, options))
        return Stream(self._stub.StreamGenerate(request, timeout=timeout_seconds))

    async def tokenize(
        self, given: str | Sequence[Message], *, model: str = "", timeout_seconds: float | None = None
    ) -> Tokenized:
        """Token ids of a text, or of a conversation through the chat template."""
        request = build_tokenize(given, model)
        answer = await _finish(self._stub.Tokenize(request, timeout=timeout_seconds))
        return Tokenized(tuple(answer.token_ids), answer.rendered_text)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        keep_special_tokens: bool = False,
        timeout_seconds: float | None = None,
    ) -> str:
        """Text of token ids."""
        request = build_detokenize(token_ids, model, keep_special_tokens)
        return str((await _finish(self._stub.Detokenize(request, timeout=timeout_seconds))).text)

    async def get_model(self, name: str = "", *, timeout_seconds: float | None = None) -> Model:
        """A served model and the server's limits."""
        answer = await _finish(self._stub.GetModel(pb.GetModelRequest(model=name), timeout=timeout_seconds))
        return responses.model(answer.model)

    async def list_models(self, *, timeout_seconds: float | None = None) -> list[Model]:
        """All served models."""
        answer = await _finish(self._stub.ListModels(pb.ListModelsRequest(), timeout=timeout_seconds))
        return [responses.model(model) for model in answer.models]

    async def get_load(self, *, timeout_seconds: float | None = None) -> Load:
        """How loaded the server is; also asked of one that does not serve."""
        probe = _inference(self._probe_channel)
        return responses.load(await _finish(probe.GetLoad(pb.GetLoadRequest(), timeout=timeout_seconds)))

    async def health(self, service: str = SERVICE, *, timeout_seconds: float | None = None) -> HealthStatus:
        """What the server says of its health ("": the process; "quire.live": liveness)."""
        probe: Any = health_pb2_grpc.HealthStub(self._probe_channel)
        try:
            answer = await _finish(probe.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_seconds))
        except QuireClientError as error:
            if error.code == "NOT_FOUND":
                return HealthStatus.SERVICE_UNKNOWN
            raise
        return responses.health(answer)

    async def close(self) -> None:
        """Cancels what is running and closes the connections."""
        for name in ("_channel", "_probe_channel"):
            if name in self.__dict__:
                await getattr(self, name).close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _finish(call: Any) -> Any:
    """The answer of a call under way; whatever interrupts the wait cancels it."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_of(error) from None
    finally:
        call.cancel()


def _inference(channel: grpc.aio.Channel) -> Any:
    """The generated stub, which carries no types."""
    return InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
