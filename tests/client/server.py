"""A real gRPC server whose generations follow a script: what a client meets, without a model behind it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.pb.quire.v1 import inference_pb2 as pb
from service.pb.quire.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server

Script = Callable[[pb.GenerationSpec, grpc.ServicerContext], Iterator[pb.StreamGenerateResponse]]
WAIT_SECONDS = 20.0
"""How long a test waits for what must happen; nothing takes this long unless it is broken."""

USAGE = pb.Usage(prompt_tokens=3, cached_prompt_tokens=1, completion_tokens=2, preemptions=4)
TIMING = pb.Timing(queue=Duration(nanos=500_000_000), first_token=Duration(seconds=1), total=Duration(seconds=2))


class FakeHealth(health_pb2_grpc.HealthServicer):
    """The health service; grpcio-health-checking's own deadlocks when a watcher leaves (a write under its lock)."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._status = health_pb2.HealthCheckResponse.SERVING

    def set(self, status: int) -> None:
        with self._changed:
            self._status = status
            self._changed.notify_all()

    def Check(self, request: Any, context: grpc.ServicerContext) -> health_pb2.HealthCheckResponse:
        if request.service not in ("", "quire.v1.InferenceService"):
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=self._status)

    def Watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[health_pb2.HealthCheckResponse]:
        context.add_callback(self._wake)
        told = None
        while context.is_active():
            told = self._next_status(told, context)
            yield health_pb2.HealthCheckResponse(status=told)

    def _next_status(self, told: int | None, context: grpc.ServicerContext) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._status != told or not context.is_active())
            return self._status

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class FakeServer(InferenceServiceServicer):
    """Records every spec; each generation takes the next script, the last one stays."""

    def __init__(self) -> None:
        self.scripts: deque[Script] = deque([say("Hello", " there")])
        self.specs: list[pb.GenerationSpec] = []
        self.deadlines: list[float | None] = []
        self.called = threading.Event()
        self.cancelled = threading.Event()
        self.port = 0
        self.health = FakeHealth()

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def play(self, *scripts: Script) -> None:
        """Scripts of the next generations."""
        self.scripts = deque(scripts)
        self.specs.clear()
        self.cancelled.clear()

    def StreamGenerate(self, request: Any, context: grpc.ServicerContext) -> Iterator[pb.StreamGenerateResponse]:
        self.specs.append(request.spec)
        self.called.set()
        self.deadlines.append(context.time_remaining())
        script = self.scripts.popleft() if len(self.scripts) > 1 else self.scripts[0]
        yield from script(request.spec, context)

    def Generate(self, request: Any, context: grpc.ServicerContext) -> pb.GenerateResponse:
        events = list(self.StreamGenerate(request, context))
        deltas = [event.delta for event in events if event.WhichOneof("event") == "delta"]
        output = pb.Delta(text="".join(delta.text for delta in deltas), token_ids=[7, 8], num_tokens=len(deltas))
        output.logprobs.add(chosen=pb.Logprob(token_id=7, logprob=-0.5), top=[pb.Logprob(token_id=9, logprob=-0.25)])
        return pb.GenerateResponse(started=events[0].started, output=output, finished=events[-1].finished)

    def Tokenize(self, request: Any, context: grpc.ServicerContext) -> pb.TokenizeResponse:
        rendered = "|".join(f"{pb.Role.Name(m.role)}:{m.content}" for m in request.chat.messages)
        return pb.TokenizeResponse(token_ids=(request.text or rendered).encode(), rendered_text=rendered)

    def Detokenize(self, request: Any, context: grpc.ServicerContext) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=bytes(request.token_ids).decode())

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> pb.GetModelResponse:
        if request.model not in ("", "tiny"):
            fail(context, grpc.StatusCode.NOT_FOUND, "no such model", "MODEL_NOT_FOUND", model=request.model)
        return pb.GetModelResponse(model=MODEL)

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[MODEL])

    def GetLoad(self, request: Any, context: grpc.ServicerContext) -> pb.GetLoadResponse:
        return pb.GetLoadResponse(running_requests=2, estimated_queue=Duration(nanos=250_000_000), accepting=True)


MODEL = pb.Model(
    name="tiny",
    digest="sha256:0",
    architecture="LlamaForCausalLM",
    dtype="float32",
    context_length=64,
    vocab_size=256,
    eos_token_ids=[0, 2],
    has_chat_template=True,
    defaults=pb.GenerationDefaults(temperature=0.5, top_p=1.0, repetition_penalty=1.0),
    limits=pb.ServerLimits(max_sequence_tokens=64, max_deadline=Duration(seconds=60)),
)


def say(*texts: str, reason: int = pb.FINISH_REASON_STOP, stop: str | int | None = "\n") -> Script:
    """A generation that says these deltas and finishes."""

    def script(spec: pb.GenerationSpec, context: grpc.ServicerContext) -> Iterator[pb.StreamGenerateResponse]:
        started = pb.Started(generation_id="g1", model="tiny", prompt_tokens=3, cached_prompt_tokens=1, seed=42)
        yield pb.StreamGenerateResponse(sequence_number=0, started=started)
        for number, text in enumerate(texts, start=1):
            yield pb.StreamGenerateResponse(sequence_number=number, delta=pb.Delta(text=text, num_tokens=1))
        match = pb.StopMatch(stop_string=stop) if isinstance(stop, str) else pb.StopMatch(token_id=stop)
        finished = pb.Finished(
            reason=reason, usage=USAGE, timing=TIMING, stop_match=match if stop is not None else None
        )
        yield pb.StreamGenerateResponse(sequence_number=len(texts) + 1, finished=finished)

    return script


def say_then_wait(cancelled: threading.Event, *texts: str) -> Script:
    """A generation that says these deltas and goes on silently until it is cancelled, which sets the event."""

    def script(spec: pb.GenerationSpec, context: grpc.ServicerContext) -> Iterator[pb.StreamGenerateResponse]:
        *events, _ = say(*texts)(spec, context)
        try:
            yield from events
        except GeneratorExit:  # cancelled while a delta was on its way: gRPC drops the generator
            cancelled.set()
            raise
        ended = threading.Event()
        if not context.add_callback(ended.set) or ended.wait(2 * WAIT_SECONDS):
            cancelled.set()

    return script


def refuse(code: grpc.StatusCode, reason: str, *, texts: Sequence[str] = (), **facts: Any) -> Script:
    """A generation that fails, after saying some deltas."""

    def script(spec: pb.GenerationSpec, context: grpc.ServicerContext) -> Iterator[pb.StreamGenerateResponse]:
        if texts:
            *events, _ = say(*texts)(spec, context)
            yield from events
        fail(context, code, "refused", reason, **facts)

    return script


def fail(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    message: str,
    reason: str,
    *,
    pushback_ms: int | None = None,
    retry_ms: int | None = None,
    violations: Sequence[tuple[str, str]] = (),
    **metadata: str,
) -> None:
    """Ends a call as Quire does: one ErrorInfo, and the details that belong to it."""
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=reason, domain="quire", metadata=metadata)]
    if violations:
        bad = error_details_pb2.BadRequest()
        for field, description in violations:
            bad.field_violations.add(field=field, description=description)
        details.append(bad)
    if retry_ms is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=Duration(nanos=retry_ms * 1_000_000)))
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().CopyFrom(_packed(detail))
    trailing: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", status.SerializeToString())]
    if pushback_ms is not None:
        trailing.append(("grpc-retry-pushback-ms", str(pushback_ms)))
    context.set_trailing_metadata(tuple(trailing))
    context.abort(code, message)


def _packed(detail: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


@contextmanager
def running() -> Iterator[FakeServer]:
    """A server on a free port, healthy."""
    fake = FakeServer()
    server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    add_InferenceServiceServicer_to_server(fake, server)
    health_pb2_grpc.add_HealthServicer_to_server(fake.health, server)
    fake.port = server.add_insecure_port("localhost:0")
    server.start()
    try:
        yield fake
    finally:
        server.stop(grace=None).wait(WAIT_SECONDS)
