"""What operators can see: every Prometheus metric, defined once, and the endpoint that serves them.

The only user of prometheus_client. All numbers are changed on the event loop and a scrape collects on the event loop,
so each scrape is one consistent snapshot:

    quire_requests_accepted_total = sum(quire_requests_total{outcome=ok|failed|cancelled})
                                    + quire_num_requests_running + quire_num_requests_waiting

A request is accepted once, then waits, runs, and ends with one outcome; what the door refuses counts in
quire_rejections_total instead. TTFT counts from arrival, ITL is every gap between two tokens, TPOT is
(last - first) / (n - 1); a token's time is when the engine drew it. Labels come from closed sets only.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from itertools import accumulate
from math import inf
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from service.engine.messages import Hello, StepStats
from service.errors import QuireError, Reason, StartupError

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
STEP_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
TOKENS = tuple(float(2**power) for power in range(18))
ROWS = tuple(float(2**power) for power in range(11))
SCRAPE_SECONDS = 5.0
"""A scrape fails when the event loop does not answer it for this long."""
CLOSE_SECONDS = 0.1
"""How soon the endpoint notices that it is to end."""

REFUSALS = (
    Reason.INVALID_FIELD,
    Reason.CONTEXT_LENGTH_EXCEEDED,
    Reason.EXCEEDS_KV_CAPACITY,
    Reason.MODEL_NOT_FOUND,
    Reason.FEATURE_DISABLED,
    Reason.QUEUE_FULL,
    Reason.DEADLINE_UNREACHABLE,
    Reason.SERVER_STARTING,
    Reason.SERVER_DRAINING,
)
"""Reasons for which the door refuses a generation."""


class Outcome(StrEnum):
    """How an accepted request ended."""

    OK = "ok"
    FAILED = "failed"
    CANCELLED = "cancelled"


class QuickSeries:
    """One series of a QuickHistogram."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Adds its samples under these values of the family's labels."""
        names = map(floatToGoString, (*self._bounds, inf))
        family.add_metric(labels, list(zip(names, accumulate(self._counts), strict=True)), self._sum)


class QuickHistogram(Collector):
    """A histogram for what happens with every token or step: an observation takes a tenth of the library's time.

    It has no lock, because all numbers are changed and collected on the event loop.
    """

    def __init__(
        self,
        name: str,
        text: str,
        bounds: Sequence[float],
        registry: CollectorRegistry,
        *,
        label: str | None = None,
        values: Sequence[str] = (),
    ) -> None:
        """`bounds` are the upper ends of the buckets, in order; one more takes what is beyond them.

        There is one series, or one for each of the `values` of a label.
        """
        self._family = name, text, [label] if label else []
        keys: list[tuple[str, ...]] = [(value,) for value in values] or [()]
        self._series = {labels: QuickSeries(bounds) for labels in keys}
        registry.register(self)

    def series(self, *labels: str) -> QuickSeries:
        """The one with these labels."""
        return self._series[labels]

    def collect(self) -> Iterable[Metric]:
        name, text, label_names = self._family
        family = HistogramMetricFamily(name, text, labels=label_names)
        for labels, series in self._series.items():
            series.add_to(family, labels)
        return [family]


class RequestMetrics:
    """Requests, from acceptance to their end, and calls of any method."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._accepted = Counter("quire_requests_accepted", "Generations accepted.", registry=registry)
        self._ended = Counter("quire_requests", "Generations ended, by outcome.", ["outcome"], registry=registry)
        self._waiting = Gauge(
            "quire_num_requests_waiting", "Generations accepted and not yet scheduled.", registry=registry
        )
        self._running = Gauge(
            "quire_num_requests_running", "Generations scheduled and not yet ended.", registry=registry
        )
        self._rejections = Counter(
            "quire_rejections", "Generations refused at the door, by reason.", ["reason"], registry=registry
        )
        self._deadlines = Counter(
            "quire_deadline_outcomes",
            "Generations that met their deadline, missed it, or were refused because they would have missed it.",
            ["outcome"],
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "quire_prompt_tokens", "Prompt tokens of scheduled generations.", registry=registry
        )
        self._cached_tokens = Counter(
            "quire_prompt_tokens_cached", "Of the prompt tokens, those found in the prefix cache.", registry=registry
        )
        self._tokens = Counter("quire_generation_tokens", "Tokens generated.", registry=registry)
        self._handled = Counter(
            "grpc_server_handled", "Calls ended, by method and code.", ["grpc_method", "grpc_code"], registry=registry
        )
        self._define_histograms(registry)
        self._name_all_labels()

    def _define_histograms(self, registry: CollectorRegistry) -> None:
        def seconds(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=SECONDS, registry=registry)

        self._ttft = seconds("quire_time_to_first_token_seconds", "From arrival to the first token.")
        self._itl = QuickHistogram(
            "quire_inter_token_latency_seconds", "Every gap between two tokens of a generation.", SECONDS, registry
        ).series()
        self._tpot = seconds("quire_time_per_output_token_seconds", "(last token - first token) / (tokens - 1).")
        self._queue = seconds("quire_request_queue_seconds", "From arrival to being scheduled.")
        self._prefill = seconds("quire_request_prefill_seconds", "From being scheduled to the first token.")
        self._decode = seconds("quire_request_decode_seconds", "From the first token to the last.")
        self._total = seconds("quire_request_seconds", "From arrival to the end, of generations that ended well.")
        self._cancel = seconds("quire_cancel_to_free_seconds", "From a cancel to the engine having freed the blocks.")
        self._prompt_size = Histogram(
            "quire_request_prompt_tokens", "Prompt tokens per scheduled generation.", buckets=TOKENS, registry=registry
        )
        self._output_size = Histogram(
            "quire_request_generation_tokens",
            "Tokens per generation that ended well.",
            buckets=TOKENS,
            registry=registry,
        )

    def _name_all_labels(self) -> None:
        """Rates need a series that begins at zero."""
        for outcome in Outcome:
            self._ended.labels(outcome)
        for reason in REFUSALS:
            self._rejections.labels(reason)
        for fate in ("met", "missed", "refused"):
            self._deadlines.labels(fate)

    @contextmanager
    def counting_rejections(self) -> Iterator[None]:
        """Around everything that may refuse a generation."""
        try:
            yield
        except QuireError as error:
            self._rejections.labels(error.reason).inc()
            if error.reason is Reason.DEADLINE_UNREACHABLE:
                self._deadlines.labels("refused").inc()
            raise

    def on_accepted(self) -> None:
        self._accepted.inc()
        self._waiting.inc()

    def on_scheduled(self, queue_seconds: float, num_prompt: int, num_cached: int) -> None:
        self._waiting.dec()
        self._running.inc()
        self._queue.observe(queue_seconds)
        self._prompt_tokens.inc(num_prompt)
        self._cached_tokens.inc(num_cached)
        self._prompt_size.observe(num_prompt)

    def on_first_token(self, ttft_seconds: float, prefill_seconds: float) -> None:
        self._tokens.inc()
        self._ttft.observe(ttft_seconds)
        self._prefill.observe(prefill_seconds)

    def on_next_token(self, gap_seconds: float) -> None:
        self._tokens.inc()
        self._itl.observe(gap_seconds)

    def on_ended(self, outcome: Outcome, reason: Reason | None, was_scheduled: bool) -> None:
        """`reason` is the error's, None for a good end or a cancel."""
        (self._running if was_scheduled else self._waiting).dec()
        self._ended.labels(outcome).inc()
        if outcome is Outcome.OK:
            self._deadlines.labels("met").inc()
        elif reason is Reason.DEADLINE_EXCEEDED:
            self._deadlines.labels("missed").inc()

    def on_good_end(self, total_seconds: float, decode_seconds: float, num_tokens: int) -> None:
        self._total.observe(total_seconds)
        self._output_size.observe(num_tokens)
        self._decode.observe(decode_seconds)
        if num_tokens > 1:
            self._tpot.observe(decode_seconds / (num_tokens - 1))

    def on_freed(self, seconds: float) -> None:
        self._cancel.observe(seconds)

    def on_handled(self, method: str, code: str) -> None:
        """`method` is the name of one that is served, or "other"."""
        self._handled.labels(method, code).inc()


class EngineMetrics:
    """The engine as its reports show it, and the process itself."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, registry=registry)

        self._num_blocks = 0
        self._last = StepStats()
        self._was_up = False
        self._up = Gauge("quire_engine_up", "1 while the engine answers.", registry=registry)
        self._draining = Gauge("quire_draining", "1 once the server was told to end.", registry=registry)
        self._lag = Gauge("quire_event_loop_lag_seconds", "How late the front end's timer ran last.", registry=registry)
        self._restarts = counter("quire_engine_restarts", "Times the engine came back after it was lost.")
        self._info = Gauge(
            "quire_model_info",
            "What is served; always 1.",
            ["model", "digest", "architecture", "dtype", "quantization", "backend", "block_size", "num_blocks"],
            registry=registry,
        )
        # What a step leaves is read when it is asked for: there are many more steps than scrapes.
        usage = Gauge("quire_kv_cache_usage_ratio", "Share of blocks that sequences hold.", registry=registry)
        usage.set_function(lambda: self._held_blocks / self._num_blocks if self._num_blocks else 0.0)
        blocks = Gauge("quire_kv_blocks", "Blocks of the key/value pool, by state.", ["state"], registry=registry)
        blocks.labels("free").set_function(lambda: self._last.free_blocks)
        blocks.labels("cached").set_function(lambda: self._last.cached_blocks)
        blocks.labels("held").set_function(lambda: self._held_blocks)
        batch_tokens = Gauge("quire_batch_tokens", "Tokens computed in the last step.", registry=registry)
        batch_tokens.set_function(lambda: self._last.num_tokens)
        self._preemptions = counter("quire_preemptions", "Sequences that gave up their blocks to be recomputed.")
        self._queries = counter("quire_prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._hits = counter("quire_prefix_cache_hits", "Tokens found in the prefix cache.")
        wasted = Counter(
            "quire_wasted_tokens", "Tokens computed for nothing, by reason.", ["reason"], registry=registry
        )
        self._wasted = {reason: wasted.labels(reason) for reason in ("preempted", "ended")}
        step = QuickHistogram(
            "quire_step_seconds",
            "Time of a step, by phase.",
            STEP_SECONDS,
            registry,
            label="phase",
            values=("schedule", "total"),
        )
        self._schedule_seconds, self._step_seconds = step.series("schedule"), step.series("total")
        self._step_tokens = QuickHistogram("quire_step_tokens", "Tokens per step.", TOKENS, registry).series()
        self._step_rows = QuickHistogram("quire_step_rows", "Rows per step.", ROWS, registry).series()

    @property
    def _held_blocks(self) -> int:
        return self._num_blocks - self._last.free_blocks - self._last.cached_blocks

    def on_up(self, model: str, hello: Hello) -> None:
        self._up.set(1)
        if self._was_up:
            self._restarts.inc()
        self._was_up = True
        facts, shape = hello.facts, hello.shape
        self._num_blocks = shape.num_blocks
        self._last = StepStats(free_blocks=shape.num_blocks)
        self._info.labels(
            model,
            facts.digest,
            facts.architecture,
            facts.dtype,
            facts.quantization,
            " ".join(filter(None, (facts.backend, facts.cpu_level, facts.attention))),
            shape.block_size,
            shape.num_blocks,
        ).set(1)

    def on_down(self) -> None:
        self._up.set(0)

    def on_draining(self) -> None:
        self._draining.set(1)

    def on_loop_lag(self, seconds: float) -> None:
        self._lag.set(seconds)

    def on_step(self, stats: StepStats) -> None:
        self._last = stats
        if stats.num_preemptions:
            self._preemptions.inc(stats.num_preemptions)
            self._wasted["preempted"].inc(stats.recomputed_tokens)
        if stats.prefix_query_tokens:
            self._queries.inc(stats.prefix_query_tokens)
            self._hits.inc(stats.prefix_hit_tokens)
        if stats.dropped_tokens:
            self._wasted["ended"].inc(stats.dropped_tokens)
        if stats.num_rows:
            self._schedule_seconds.observe(stats.schedule_seconds)
            self._step_seconds.observe(stats.step_seconds)
            self._step_tokens.observe(stats.num_tokens)
            self._step_rows.observe(stats.num_rows)


class _Snapshot(Collector):
    """Collects `inner` on the event loop, in one go, for a scrape that runs in a thread."""

    def __init__(self, inner: CollectorRegistry, loop: asyncio.AbstractEventLoop) -> None:
        self._inner = inner
        self._loop = loop

    def collect(self) -> Iterable[Metric]:
        return asyncio.run_coroutine_threadsafe(self._take(), self._loop).result(SCRAPE_SECONDS)

    async def _take(self) -> list[Metric]:
        metrics = list(self._inner.collect())
        for metric in metrics:  # times of creation double the series and tell nothing here
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
        return metrics


class _SilentHandler(WSGIRequestHandler):
    timeout = SCRAPE_SECONDS
    """Whoever sends no request within this gives its thread and its descriptor back."""

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is no news."""


class Endpoint:
    """The HTTP server of /metrics, in threads of its own."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Raises OSError when it cannot listen."""

        class Server(ThreadingWSGIServer):
            address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A scraper that leaves, or says nothing, is no news either."""

        self._server = make_server(host, port, make_wsgi_app(registry), Server, _SilentHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(CLOSE_SECONDS,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_port

    async def close(self) -> None:
        """Ends it while the event loop still turns: a scrape under way needs the loop."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Metrics:
    """All metrics of a front end, and where they are served."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = RequestMetrics(self._registry)
        self.engine = EngineMetrics(self._registry)

    def serve(self, host: str, port: int) -> Endpoint:
        """Serves them, collected on the running event loop; port 0 takes a free one. Raises StartupError."""
        outer = CollectorRegistry()
        outer.register(_Snapshot(self._registry, asyncio.get_running_loop()))
        ProcessCollector(registry=outer)
        try:
            return Endpoint(outer, host.strip("[]"), port)
        except OSError as error:
            hint = "--metrics-port 0 takes a free one"
            raise StartupError(f"metrics: cannot listen on {host}:{port}: {error.strerror} ({hint})") from None
