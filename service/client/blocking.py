"""The blocking client. Owns its channels; safe to share between threads, not across a fork."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class Stream(Iterator[Event]):
    """The events of one generation: Started, Deltas, Finished. Leaving it early cancels the generation.

    Best used in a `with` statement, which cancels however it is left; a stream that is dropped is cancelled, too.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._reader = responses.StreamReader()
        self._is_closed = False

    def __next__(self) -> Event:
        """The next event. Raises QuireClientError when the call fails or the stream is not whole."""
        try:
            while not self._is_closed:
                event = self._reader.read(next(self._call))
                if event is not None:
                    return event
        except StopIteration:
            self._is_closed = True
            self._reader.close()
        except grpc.RpcError as error:
            self._is_closed = True
            raise error_of(error) from None  # type: ignore[arg-type]
        except BaseException:  # a gap in the stream, or Ctrl-C: nobody will read on
            self.close()
            raise
        raise StopIteration

    def close(self) -> None:
        """Cancels the generation if it is still running."""
        self._is_closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class BlockingClient:
    """Calls a Quire server at `address`: host:port, [v6]:port, unix:path or dns:///host:port.

    Every call takes a deadline, None leaves it to the server, and raises QuireClientError when it fails. Raises
    ValueError for an address or an option that cannot be sent.
    """

    def __init__(self, address: str) -> None:
        self.address = target(address)
        self._channel = grpc.insecure_channel(self.address, channel_options())
        self._probe_channel = grpc.insecure_channel(self.address, probe_options())
        self._stub = _inference(self._channel)
        self._probe = _inference(self._probe_channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._probe_channel)

    def generate(
        self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Unpack[Options]
    ) -> Generation:
        """Generates and returns the whole result."""
        request = pb.GenerateRequest(spec=build_spec(prompt, options))
        return responses.generation(_finish(self._stub.Generate.future(request, timeout=timeout_seconds)))

    def stream(self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Unpack[Options]) -> Stream:
        """Generates and returns the events as they come: `with client.stream(…) as events: for event in events: …`."""
        request = pb.StreamGenerateRequest(spec=build_spec(prompt, options))
        return Stream(self._stub.StreamGenerate(request, timeout=timeout_seconds))

    def tokenize(
        self, given: str | Sequence[Message], *, model: str = "", timeout_seconds: float | None = None
    ) -> Tokenized:
        """Token ids of a text, or of a conversation through the chat template."""
        request = build_tokenize(given, model)
        answer = _finish(self._stub.Tokenize.future(request, timeout=timeout_seconds))
        return Tokenized(tuple(answer.token_ids), answer.rendered_text)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        keep_special_tokens: bool = False,
        timeout_seconds: float | None = None,
    ) -> str:
        """Text of token ids."""
        request = build_detokenize(token_ids, model, keep_special_tokens)
        return str(_finish(self._stub.Detokenize.future(request, timeout=timeout_seconds)).text)

    def get_model(self, name: str = "", *, timeout_seconds: float | None = None) -> Model:
        """A served model and the server's limits."""
        request = pb.GetModelRequest(model=name)
        return responses.model(_finish(self._stub.GetModel.future(request, timeout=timeout_seconds)).model)

    def list_models(self, *, timeout_seconds: float | None = None) -> list[Model]:
        """All served models."""
        answer = _finish(self._stub.ListModels.future(pb.ListModelsRequest(), timeout=timeout_seconds))
        return [responses.model(model) for model in answer.models]

    def get_load(self, *, timeout_seconds: float | None = None) -> Load:
        """How loaded the server is; also asked of one that does not serve."""
        return responses.load(_finish(self._probe.GetLoad.future(pb.GetLoadRequest(), timeout=timeout_seconds)))

    def health(self, service: str = SERVICE, *, timeout_seconds: float | None = None) -> HealthStatus:
        """What the server says of its health ("": the process; "quire.live": liveness)."""
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            return responses.health(_finish(self._health.Check.future(request, timeout=timeout_seconds)))
        except QuireClientError as error:
            if error.code == "NOT_FOUND":
                return HealthStatus.SERVICE_UNKNOWN
            raise

    def close(self) -> None:
        """Cancels what is running and closes the connections."""
        self._channel.close()
        self._probe_channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _finish(call: Any) -> Any:
    """The answer of a call under way; whatever interrupts the wait cancels it."""
    try:
        return call.result()
    except grpc.RpcError as error:
        raise error_of(error) from None  # type: ignore[arg-type]
    finally:
        call.cancel()


def _inference(channel: grpc.Channel) -> Any:
    """The generated stub, which carries no types."""
    return InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
