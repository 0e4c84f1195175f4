"""What a scrape shows: one consistent snapshot that equals what callers saw, with names that do not multiply."""

import asyncio
import shutil
import socket
import struct
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service import metrics
from service.engine.messages import StepStats
from service.pb.quire.v1 import inference_pb2 as pb
from tests.rpc.conftest import failure_of, rest_of
from tests.rpc.fake_engine import FakeEngine
from tests.rpc.test_calls import request, stream_request

CODES = ("OK", "CANCELLED", "DEADLINE_EXCEEDED")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(served) -> Samples:
    url = f"http://127.0.0.1:{served.front_end.metrics_port}/metrics"
    raw = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
    families = text_string_to_metric_families(raw)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def assert_reconciled(samples: Samples) -> None:
    ended = sum(value(samples, "quire_requests_total", outcome=o) for o in ("ok", "failed", "cancelled"))
    open_now = value(samples, "quire_num_requests_running") + value(samples, "quire_num_requests_waiting")
    assert value(samples, "quire_requests_accepted_total") == ended + open_now


@pytest.mark.parametrize("phases", [(), ("schedule", "total")])
def test_a_quick_histogram_reads_as_the_librarys_own(phases: tuple[str, ...]):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    label = "phase" if phases else None
    quick = metrics.QuickHistogram("gap_seconds", "Gaps.", metrics.SECONDS, ours, label=label, values=phases)
    full = Histogram("gap_seconds", "Gaps.", ["phase"] if phases else [], buckets=metrics.SECONDS, registry=theirs)
    pairs = [(quick.series(phase), full.labels(phase)) for phase in phases] or [(quick.series(), full)]
    for factor, pair in enumerate(pairs, start=1):
        for seconds in (0.0, 0.0015, *metrics.SECONDS, 0.07, 700.0, 700.0):
            for histogram in pair:
                histogram.observe(factor * seconds)
    without_creation = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == without_creation


async def test_metrics_equal_what_callers_saw(serve):
    served = await serve(FakeEngine(num_cached=1))
    answers = [await served.stub.Generate(request(count)) for count in (1, 4, 7)]
    assert await rest_of(served.stub.StreamGenerate(stream_request(3)))
    await failure_of(served.stub.Generate(request(0)))
    await failure_of(served.stub.Generate(request(1, model="x")))
    await served.idle()
    samples = await scrape(served)
    num_tokens = 1 + 4 + 7 + 3
    num_prompt = 4 * answers[0].started.prompt_tokens
    expected = {
        "quire_requests_accepted_total": 4,
        "quire_generation_tokens_total": num_tokens,
        "quire_prompt_tokens_total": num_prompt,
        "quire_prompt_tokens_cached_total": 4,
        "quire_time_to_first_token_seconds_count": 4,
        "quire_inter_token_latency_seconds_count": num_tokens - 4,
        "quire_time_per_output_token_seconds_count": 3,
        "quire_request_queue_seconds_count": 4,
        "quire_request_prefill_seconds_count": 4,
        "quire_request_decode_seconds_count": 4,
        "quire_request_seconds_count": 4,
        "quire_request_prompt_tokens_sum": num_prompt,
        "quire_request_generation_tokens_sum": num_tokens,
        "quire_num_requests_running": 0,
        "quire_num_requests_waiting": 0,
        "quire_engine_up": 1,
        "quire_draining": 0,
    }
    assert {name: value(samples, name) for name in expected} == expected
    assert value(samples, "quire_requests_total", outcome="ok") == 4
    assert value(samples, "quire_rejections_total", reason="INVALID_FIELD") == 1
    assert value(samples, "quire_rejections_total", reason="MODEL_NOT_FOUND") == 1
    assert value(samples, "quire_deadline_outcomes_total", outcome="met") == 4
    handled = "grpc_server_handled_total"
    assert value(samples, handled, grpc_method="Generate", grpc_code="OK") == 3
    assert value(samples, handled, grpc_method="Generate", grpc_code="INVALID_ARGUMENT") == 1
    assert value(samples, handled, grpc_method="StreamGenerate", grpc_code="OK") == 1
    assert_reconciled(samples)


async def test_a_tokens_time_is_when_it_was_drawn(serve):
    """Reports of them can be held."""
    served = await serve(FakeEngine(token_seconds=5.0))
    answer = await served.stub.Generate(request(4))
    timing = answer.finished.timing
    assert timing.first_token.ToNanoseconds() - timing.queue.ToNanoseconds() == pytest.approx(5e9, rel=1e-6)
    samples = await scrape(served)
    assert value(samples, "quire_inter_token_latency_seconds_sum") == pytest.approx(15.0)
    assert value(samples, "quire_request_prefill_seconds_sum") == pytest.approx(5.0)
    assert value(samples, "quire_time_per_output_token_seconds_sum") == pytest.approx(5.0)


async def test_every_end_counts_once_and_every_scrape_adds_up(serve):
    served = await serve(FakeEngine(max_started=8, pause_at=2), default_deadline_seconds=0.3)
    finished, cancelled, late = [], [], []
    for index in range(12):
        kind = (finished, cancelled, late)[index % 3]
        timeout = None if kind is late else 60  # the late ones get the server's default, which it alone enforces
        kind.append(served.stub.StreamGenerate(stream_request(3), timeout=timeout))
        assert_reconciled(await scrape(served))
    await served.until(lambda: served.front_end.generations.num_open == 8)  # the late ones are gone
    for call in cancelled:
        call.cancel()
        assert_reconciled(await scrape(served))
    await served.until(lambda: served.front_end.generations.num_open == 4)
    served.engine.resume()
    for call in finished:
        assert (await rest_of(call))[-1].finished.usage.completion_tokens == 3
        assert_reconciled(await scrape(served))
    await served.idle()
    samples = await scrape(served)
    outcomes = {o: value(samples, "quire_requests_total", outcome=o) for o in ("ok", "failed", "cancelled")}
    assert outcomes == {"ok": 4, "failed": 4, "cancelled": 4}
    assert value(samples, "quire_deadline_outcomes_total", outcome="missed") == 4
    assert value(samples, "quire_cancel_to_free_seconds_count") == 8
    codes = {c: value(samples, "grpc_server_handled_total", grpc_method="StreamGenerate", grpc_code=c) for c in CODES}
    assert codes == {"OK": 4, "CANCELLED": 4, "DEADLINE_EXCEEDED": 4}


async def test_a_cancel_in_the_queue_leaves_the_queue(serve):
    """Both gauges, not only their sum: the request never ran."""
    served = await serve(FakeEngine(max_started=1, pause_at=1))
    running = served.stub.StreamGenerate(stream_request(3))
    await running.read()
    queued = served.stub.StreamGenerate(stream_request(3))
    await served.until(lambda: len(served.engine.sequences) == 2)
    queued.cancel()
    await served.until(lambda: served.front_end.generations.num_open == 1)
    names = ("quire_num_requests_running", "quire_num_requests_waiting")
    samples = await scrape(served)
    assert [value(samples, name) for name in names] == [1, 0]
    running.cancel()
    await served.idle()
    samples = await scrape(served)
    assert [value(samples, name) for name in names] == [0, 0]


async def test_who_leaves_the_queue_never_ran(serve):
    served = await serve(FakeEngine(max_started=0), default_deadline_seconds=0.2)
    cancelled = served.stub.Generate(request(1), timeout=60)
    await served.until(lambda: len(served.engine.sequences) == 1)
    cancelled.cancel()
    assert (await failure_of(served.stub.Generate(request(1)))).reason == "DEADLINE_EXCEEDED"
    await served.idle()
    samples = await scrape(served)
    assert value(samples, "quire_requests_accepted_total") == 2
    assert value(samples, "quire_num_requests_waiting") == 0
    assert value(samples, "quire_num_requests_running") == 0


async def test_scrapers_that_say_nothing_or_leave_are_let_go_in_silence(serve, monkeypatch, capfd):
    monkeypatch.setattr(metrics._SilentHandler, "timeout", 0.1)
    served = await serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.front_end.metrics_port)
    writer.write(b"GET /met")
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    with socket.create_connection(("127.0.0.1", served.front_end.metrics_port)) as leaver:
        leaver.sendall(b"GET /metrics HTTP/1.1\r\n")
        leaver.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
    await scrape(served)
    assert "Traceback" not in capfd.readouterr().err


async def test_hostile_names_make_no_series(serve):
    served = await serve()
    await served.stub.Generate(request(1))
    await failure_of(served.stub.Generate(request(1, model="warm up")))
    await failure_of(served.channel.unary_unary("/a/b")(b""))
    before = set(await scrape(served))
    for index in range(20):
        await failure_of(served.channel.unary_unary(f"/evil.Service{index}/Method{index}")(b""))
        await failure_of(served.stub.Generate(request(1, model=f"model-{index}")))
        await served.stub.Generate(request(1, client_request_id=f"label-{index}"))
    samples = await scrape(served)
    assert set(samples) == before
    assert value(samples, "grpc_server_handled_total", grpc_method="other", grpc_code="UNIMPLEMENTED") == 21


async def test_the_engines_reports_show(serve):
    served = await serve()
    served.engine.on_stats(
        StepStats(
            free_blocks=500,
            cached_blocks=124,
            num_rows=3,
            num_tokens=20,
            step_seconds=0.01,
            schedule_seconds=0.001,
            num_preemptions=2,
            recomputed_tokens=30,
            dropped_tokens=4,
            prefix_query_tokens=100,
            prefix_hit_tokens=60,
        )
    )
    samples = await scrape(served)
    blocks = {state: value(samples, "quire_kv_blocks", state=state) for state in ("free", "cached", "held")}
    assert blocks == {"free": 500, "cached": 124, "held": 400}
    assert value(samples, "quire_kv_cache_usage_ratio") == pytest.approx(400 / 1024)
    assert value(samples, "quire_batch_tokens") == 20
    assert value(samples, "quire_preemptions_total") == 2
    assert value(samples, "quire_wasted_tokens_total", reason="preempted") == 30
    assert value(samples, "quire_wasted_tokens_total", reason="ended") == 4
    assert value(samples, "quire_prefix_cache_queries_total") == 100
    assert value(samples, "quire_prefix_cache_hits_total") == 60
    assert value(samples, "quire_step_seconds_sum", phase="total") == pytest.approx(0.01)
    assert value(samples, "quire_step_rows_sum") == 3
    served.engine.die(is_recoverable=True)
    assert value(await scrape(served), "quire_engine_up") == 0
    served.engine.up()
    assert value(await scrape(served), "quire_engine_restarts_total") == 1


async def test_a_refusal_for_the_deadline_counts_as_such(serve):
    served = await serve(FakeEngine(max_started=0), max_num_seqs=1)
    admission = served.front_end._admission
    admission.on_stats(StepStats(num_waiting=1))
    admission._gaps.append(100.0)
    served.stub.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(text="a")))
    await served.until(lambda: len(served.engine.sequences) == 1)
    failure = await failure_of(served.stub.Generate(request(1), timeout=20))
    assert failure.reason == "DEADLINE_UNREACHABLE"
    assert failure.metadata == {"estimatedWaitMs": "100000"}
    assert failure.pushback_ms == 30_000
    samples = await scrape(served)
    assert value(samples, "quire_deadline_outcomes_total", outcome="refused") == 1
    assert value(samples, "quire_rejections_total", reason="DEADLINE_UNREACHABLE") == 1


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Prometheus) is not installed")
async def test_promtool_finds_nothing_to_complain_about(serve):
    served = await serve()
    await served.stub.Generate(request(3))
    url = f"http://127.0.0.1:{served.front_end.metrics_port}/metrics"
    raw = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read())
    process = await asyncio.create_subprocess_exec(
        "promtool", "check", "metrics", stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, complaints = await process.communicate(raw)
    assert (process.returncode, complaints) == (0, b"")
