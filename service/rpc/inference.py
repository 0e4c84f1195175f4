"""quire.v1.InferenceService: each method is a conversion, a call into the front end, and a conversion back."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc

from service.admission import Admission, TokenRate
from service.config import Settings
from service.engine.messages import StepStats
from service.errors import ReaderStalled
from service.generation import Generation, GenerationRequest
from service.generations import Generations
from service.metrics import RequestMetrics
from service.pb.quire.v1 import inference_pb2 as pb
from service.pb.quire.v1 import inference_pb2_grpc
from service.rpc import answers
from service.rpc.convert import Converter
from service.rpc.model import ServedModel

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class EngineLoad:
    """What the engine reported last."""

    def __init__(self) -> None:
        self.stats = StepStats()
        self.token_rate = TokenRate()

    def on_stats(self, stats: StepStats) -> None:
        self.stats = stats
        self.token_rate.add(stats.num_sampled)


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Answers callers. Raises QuireErrors; the interceptor makes statuses of them."""

    def __init__(
        self,
        *,
        settings: Settings,
        model: ServedModel,
        converter: Converter,
        admission: Admission,
        generations: Generations,
        load: EngineLoad,
        metrics: RequestMetrics,
    ) -> None:
        self._settings = settings
        self._model = model
        self._converter = converter
        self._admission = admission
        self._generations = generations
        self._load = load
        self._metrics = metrics

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        with self._generations.held(await self._accept(request, context)) as generation:
            output = await generation.whole()
        return pb.GenerateResponse(
            started=answers.started(generation), output=answers.delta(output), finished=answers.finished(generation)
        )

    async def StreamGenerate(self, request: pb.StreamGenerateRequest, context: Context) -> None:
        with self._generations.held(await self._accept(request, context)) as generation:
            async with _StreamWriter(context, generation, self._settings.reader_stall_seconds) as writer:
                while (output := await generation.next_delta()) is not None:
                    if writer.num_written == 0:
                        await writer.write(pb.StreamGenerateResponse(started=answers.started(generation)))
                    await writer.write(answers.delta_event(output))
                await writer.write(pb.StreamGenerateResponse(finished=answers.finished(generation)))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        encoded = await self._converter.tokens(request)
        return pb.TokenizeResponse(token_ids=encoded.token_ids, rendered_text=encoded.text)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=await self._converter.text(request))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        self._converter.check_model(request.model)
        return pb.GetModelResponse(model=answers.model(self._model, self._settings))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[answers.model(self._model, self._settings)])

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        load = self._load
        return answers.load(self._model, self._admission, load.stats, load.token_rate.per_second)

    async def _accept(
        self, request: pb.GenerateRequest | pb.StreamGenerateRequest, context: Context
    ) -> GenerationRequest:
        """Refuses what has no place before the work of reading it."""
        arrival = time.monotonic()
        seconds_left: float | None = context.time_remaining()
        with self._metrics.counting_rejections():
            self._admission.check()
            return await self._converter.generation(request, arrival, seconds_left)


class _StreamWriter:
    """Writes the numbered messages of one stream, entered while they go out.

    Leaving it raises ReaderStalled when a write waited longer than the limit. The generation is over by then; its
    status goes out behind what the transport already took (megabytes, at most), once the caller reads again.
    """

    def __init__(self, context: Context, generation: Generation, stall_seconds: float) -> None:
        self._context = context
        self._generation = generation
        self._stall_seconds = stall_seconds
        self._loop = asyncio.get_running_loop()
        self._limit = asyncio.timeout(None)
        self._writing_since: float | None = None
        self.num_written = 0

    async def write(self, message: pb.StreamGenerateResponse) -> None:
        message.sequence_number = self.num_written
        self._writing_since = self._loop.time()
        try:
            await self._context.write(message)
        except grpc.aio.InternalError:  # the connection broke under the write
            self._generation.abandon()
            raise
        self._writing_since = None
        self.num_written += 1

    async def __aenter__(self) -> Self:
        await self._limit.__aenter__()
        self._watch()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError:
            raise ReaderStalled from None

    def _watch(self) -> None:
        """Ends a write that has reached the limit, or comes again when one may have.

        One timer a stream: one a write would cost as much as all else that Python does for a token.
        """
        now = self._loop.time()
        began = now if self._writing_since is None else self._writing_since
        if began + self._stall_seconds <= now:
            self._limit.reschedule(now)
        else:
            self._timer = self._loop.call_at(began + self._stall_seconds, self._watch)
