"""Log lines: one per ended request, machine-readable, without a word of any prompt; the banner."""

import io
import json
import logging
import sys

import pytest

from service import banner, logs
from service.config import Settings
from tests.rpc.conftest import failure_of
from tests.rpc.fake_engine import FakeEngine, hello
from tests.rpc.test_calls import request


@pytest.fixture
def log_lines():
    """Everything logged meanwhile, as JSON lines; the root logger is put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:] = handlers
    root.setLevel(level)


async def test_one_line_per_ended_request_and_never_the_prompt(serve, log_lines):
    served = await serve(FakeEngine(num_cached=1))
    answer = await served.stub.Generate(request(3, text="a secret prompt", client_request_id="order 7"))
    await failure_of(served.stub.Generate(request(3, text="", client_request_id="x")))
    await served.idle()
    (line,) = [line for line in log_lines() if line["message"] == "request ended"]
    assert line["generation_id"] == answer.started.generation_id
    assert line["client_request_id"] == "order 7"
    assert (line["outcome"], line["code"], line["reason"]) == ("ok", "OK", "max_tokens")
    assert (line["cached_tokens"], line["completion_tokens"]) == (1, 3)
    assert line["prompt_tokens"] == answer.started.prompt_tokens
    assert 0 <= line["queue_seconds"] <= line["ttft_seconds"] <= line["total_seconds"]
    assert "secret" not in json.dumps(log_lines())


async def test_failures_and_cancels_are_told_apart(serve, log_lines):
    served = await serve(FakeEngine(pause_at=0), default_deadline_seconds=0.1)
    await failure_of(served.stub.Generate(request(3)))
    call = served.stub.Generate(request(3))
    await served.until(lambda: len(served.engine.submitted) == 2)
    call.cancel()
    await served.idle()
    lines = [line for line in log_lines() if line["message"] == "request ended"]
    assert [(line["outcome"], line["code"], line.get("reason")) for line in lines] == [
        ("failed", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
        ("cancelled", "CANCELLED", None),
    ]


def test_json_lines_hold_tracebacks_and_hostile_text_on_one_line():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    try:
        raise ValueError("a\nb")
    except ValueError:
        record = logging.getLogger("t").makeRecord(
            "t",
            logging.ERROR,
            "f",
            1,
            "two\nlines",
            (),
            sys.exc_info(),
            extra=dict(logs.with_fields(a="x\ny")),
        )
    handler.emit(record)
    (line,) = stream.getvalue().splitlines()
    parsed = json.loads(line)
    assert (parsed["message"], parsed["a"], parsed["level"]) == ("two\nlines", "x\ny", "error")
    assert "ValueError" in parsed["traceback"]


def test_text_lines_quote_what_could_be_taken_for_more():
    record = logging.getLogger("t").makeRecord(
        "t", logging.INFO, "f", 1, "ended", (), None, extra=dict(logs.with_fields(id="a b=c", n=3, none=None))
    )
    line = logs.TextFormatter().format(record)
    assert line.endswith('info    ended id="a b=c" n=3')


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({}, "native v3, 2 threads"),
        ({"num_threads": 3, "has_tied_threads": True}, "native v3, 3 threads, tied to CPUs"),
        ({"backend": "torch", "cpu_level": ""}, "torch, 2 threads"),
        ({"backend": "gpu", "cpu_level": "", "card": "NVIDIA H200"}, "gpu, NVIDIA H200"),
        (
            {"backend": "gpu", "cpu_level": "", "card": "NVIDIA H200", "attention": "flash-attention-3"},
            "gpu, NVIDIA H200, flash-attention-3",
        ),
    ],
)
def test_the_banner_says_what_computes(facts: dict[str, object], told: str) -> None:
    made = banner.make(Settings(), hello(**facts), address="h:1", metrics_address="h:2", has_chat=False)  # type: ignore[arg-type]
    assert dict(made.facts)["backend"] == told


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("127.0.0.1:50051", ""),
        ("localhost:50051", ""),
        ("127.0.0.1:9999", " --address 127.0.0.1:9999"),
        ("0.0.0.0:50051", ""),
        ("10.1.2.3:50051", " --address 10.1.2.3:50051"),
        ("[::]:9999", " --address 127.0.0.1:9999"),
    ],
)
def test_the_banners_commands_find_the_server(address, where):
    made = banner.make(Settings(), hello(), address=address, metrics_address="127.0.0.1:9464", has_chat=True)
    generate, chat = made.commands
    assert generate.endswith(f" generate{where} 'def binary_search('")
    assert chat.endswith(f" chat{where}")
    without = banner.make(Settings(), hello(), address=address, metrics_address="127.0.0.1:9464", has_chat=False)
    assert without.commands == (generate,)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_the_banner_tells_what_is_served_and_breaks_no_command(stream):
    made = banner.make(Settings(), hello(), address="127.0.0.1:1", metrics_address="127.0.0.1:9464", has_chat=True)
    made.show(stream)
    shown = stream.getvalue()
    for fact in ("quire-default", "LlamaForCausalLM", "2.4 M", "bfloat16", "native", "1,024", "127.0.0.1:9464/metrics"):
        assert fact in shown
    for command in made.commands:
        assert any(line.strip() == command for line in shown.splitlines())
