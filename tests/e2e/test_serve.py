"""What a person does first: complete code, ask a question, look at the server."""

import json
import shlex
import subprocess

import pytest

from service.client.blocking import BlockingClient
from service.client.errors import QuireClientError
from service.client.types import Delta, Finished, FinishReason, Message, Started
from tests.e2e.server import ROOT, Server, run_cli


def test_completes_code_as_a_stream(server: Server) -> None:
    with BlockingClient(server.address) as client:
        events = list(client.stream("def binary_search(", temperature=0.0, max_tokens=120, bypass_cache=True))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    deltas = events[1:-1]
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert len(deltas) > 1, "tokens come as they are drawn, not all at the end"
    text = "".join(delta.text for delta in deltas if isinstance(delta, Delta))
    assert "):\n" in text and "return" in text.lower()


def test_answers_a_question_through_the_chat_template(server: Server) -> None:
    with BlockingClient(server.address) as client:
        answer = client.generate([Message("user", "What does os.path.join do?")], temperature=0.0, max_tokens=120)
    assert "os.path" in answer.text
    assert answer.finished.reason is FinishReason.STOP
    assert "<|im_end|>" not in answer.text


def test_unary_and_stream_agree(server: Server) -> None:
    with BlockingClient(server.address) as client:
        options = {"temperature": 0.8, "seed": 7, "max_tokens": 32, "return_token_ids": True}
        whole = client.generate("import os\n", **options)
        parts = [event for event in client.stream("import os\n", **options) if isinstance(event, Delta)]
    assert "".join(part.text for part in parts) == whole.text
    assert tuple(token for part in parts for token in part.token_ids) == whole.token_ids
    assert whole.started.seed == 7


def test_command_line_talks_to_it(server: Server) -> None:
    done = run_cli(
        "generate", "--address", server.address, "--temperature", "0", "--max-tokens", "8", "--json", "def f("
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    piped = run_cli("generate", "--address", server.address, "--temperature", "0", "--max-tokens", "8", stdin="def f(")
    assert piped.returncode == 0 and piped.stdout
    assert run_cli("health", "--address", server.address).returncode == 0


def test_chat_keeps_the_history(server: Server) -> None:
    done = run_cli("chat", "--address", server.address, stdin="Hello\nWhat does os.path.join do?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_banner_holds_a_command_that_works(server: Server) -> None:
    banner = server.log.read_text()
    assert f"127.0.0.1:{server.port}" in banner
    (line,) = [line.strip() for line in banner.splitlines() if " generate " in line]
    command = shlex.split(line)
    done = subprocess.run([*command, "--max-tokens", "4"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("prompt", ["", "x" * 10_000_000, [0] * 2000, [4096], []])
def test_prompts_that_cannot_be_served_are_told_so(server: Server, prompt: str | list[int]) -> None:
    with BlockingClient(server.address) as client, pytest.raises(QuireClientError) as caught:
        client.generate(prompt, max_tokens=1)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caught.value.reason in ("INVALID_FIELD", "CONTEXT_LENGTH_EXCEEDED")
