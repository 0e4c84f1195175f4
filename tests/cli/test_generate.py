"""quire generate: prompts, output, and one line for everything that goes wrong."""

import io
import json
import signal
from types import SimpleNamespace

import grpc
import pytest

from service.cli.main import main
from service.cli.options import named_by_flag
from service.pb.quire.v1 import inference_pb2 as pb
from tests.cli.conftest import Start
from tests.client.server import WAIT_SECONDS, FakeServer, Script, refuse, running, say, say_then_wait

Capture = pytest.CaptureFixture[str]


def test_streams_text_and_ends_the_line(server: FakeServer, capsys: Capture) -> None:
    assert main(["generate", "p"]) == 0
    assert capsys.readouterr().out == "Hello there\n"
    server.play(say("line\n"))
    assert main(["generate", "p"]) == 0
    assert capsys.readouterr() == ("line\n", "")


def test_every_flag_reaches_its_field(server: FakeServer) -> None:
    flags = (
        "--max-tokens 10 --min-tokens 0 --temperature 0 --top-k 5 --top-p 0.5 --min-p 0.25 --repetition-penalty 1.5 "
        "--presence-penalty -0.5 --frequency-penalty 0.5 --seed 0 --priority -2 --model tiny --stop a --stop=-b "
        "--stop-token-id 1 --stop-token-id 2 --logit-bias 5=-1 --logit-bias 6=2 --ignore-eos --include-stop-string "
        "--keep-special-tokens"
    )
    assert main(["generate", "p", *flags.split()]) == 0
    sampling = pb.SamplingParams(
        temperature=0,
        top_k=5,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        seed=0,
        logit_bias=[pb.LogitBias(token_id=5, bias=-1), pb.LogitBias(token_id=6, bias=2)],
    )
    stop = pb.StopParams(
        max_tokens=10,
        min_tokens=0,
        stop_strings=["a", "-b"],
        stop_token_ids=[1, 2],
        ignore_eos=True,
        include_stop_string=True,
    )
    output = pb.OutputOptions(keep_special_tokens=True)
    expected = pb.GenerationSpec(model="tiny", text="p", priority=-2, sampling=sampling, stop=stop, output=output)
    assert server.specs == [expected]


def test_without_flags_everything_is_the_servers_default(server: FakeServer) -> None:
    assert main(["generate", "p"]) == 0
    assert server.specs == [pb.GenerationSpec(text="p")]


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_a_prompt_from_standard_input_is_untouched(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(" é\n\n".encode())))
    assert main(["generate", *arguments]) == 0
    assert server.specs[0].text == " é\n\n"


def test_chat_sends_messages(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))
    assert main(["generate", "--chat"]) == 0
    assert main(["generate", "--system", "be brief", "hi"]) == 0
    system = pb.ChatMessage(role=pb.ROLE_SYSTEM, content="be brief")
    user = pb.ChatMessage(role=pb.ROLE_USER, content="hi")
    assert [list(spec.chat.messages) for spec in server.specs] == [[user], [system, user]]


def test_json_is_one_document(server: FakeServer, capsys: Capture) -> None:
    assert main(["generate", "p", "--json", "--top-logprobs", "0"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "text": "Hello there",
        "token_ids": [],
        "finish_reason": "stop",
        "stop_match": "\n",
        "seed": 42,
        "model": "tiny",
        "generation_id": "g1",
        "usage": {"prompt_tokens": 3, "cached_prompt_tokens": 1, "completion_tokens": 2, "preemptions": 4},
        "timing": {"queue_seconds": 0.5, "first_token_seconds": 1.0, "total_seconds": 2.0},
    }
    assert server.specs[0].output == pb.OutputOptions(return_token_ids=True, top_logprobs=0)


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        (
            refuse(
                grpc.StatusCode.INVALID_ARGUMENT,
                "INVALID_FIELD",
                violations=[
                    ("spec.sampling.top_p", "bad"),
                    ("spec.sampling.logit_bias[1].bias", "too"),
                    ("spec.b", "x"),
                ],
            ),
            2,
            "--top-p: bad; --logit-bias[1].bias: too; spec.b: x",
        ),
        (
            refuse(grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", limit="64"),
            2,
            "CONTEXT_LENGTH_EXCEEDED: refused (limit=64); shorten the prompt or ask for fewer tokens (--max-tokens)",
        ),
        (
            refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", pushback_ms=-1, retry_ms=500),
            1,
            "QUEUE_FULL: refused; try again in 0.5 s",
        ),
    ],
)
def test_a_refusal_is_one_line(server: FakeServer, capsys: Capture, script: Script, code: int, said: str) -> None:
    server.play(script)
    assert main(["generate", "p"]) == code
    assert capsys.readouterr() == ("", f"quire: error: {said}\n")


@pytest.mark.parametrize(
    ("field", "known_as"),
    [
        ("spec.stop.max_tokens", "--max-tokens"),
        ("spec.stop.stop_strings[0]", "--stop[0]"),
        ("spec.stop.stop_token_ids", "--stop-token-id"),
        ("spec.output.top_logprobs", "--top-logprobs"),
        ("spec.priority", "--priority"),
        ("top_k", "--top-k"),
        ("spec.text", "PROMPT"),
        ("spec.chat.messages", "spec.chat.messages"),
        ("spec.token_ids.ids", "spec.token_ids.ids"),
        ("spec", "spec"),
    ],
)
def test_a_field_is_known_by_its_flag(field: str, known_as: str) -> None:
    assert named_by_flag(f"{field}: must not be text") == f"{known_as}: must not be text"


def test_a_failure_in_the_middle_leaves_the_text(server: FakeServer, capsys: Capture) -> None:
    server.play(refuse(grpc.StatusCode.UNAVAILABLE, "ENGINE_LOST", texts=["begun"]))
    assert main(["generate", "p"]) == 1
    assert capsys.readouterr() == ("begun\n", "quire: error: ENGINE_LOST: refused\n")


def test_no_server_is_one_line(capsys: Capture) -> None:
    with running() as gone:
        address = gone.address
    assert main(["generate", "p", "--address", address]) == 1
    assert capsys.readouterr().err == (
        f"quire: error: no server answers at {address}; start one with `quire serve`, or name another with --address\n"
    )


def test_a_server_that_does_not_serve_is_one_line(server: FakeServer, capsys: Capture) -> None:
    server.health.set(2)
    assert main(["generate", "p"]) == 1
    assert "takes no requests now (NOT_SERVING)" in capsys.readouterr().err


def test_a_timeout_is_one_line(server: FakeServer, capsys: Capture) -> None:
    server.play(say_then_wait(server.cancelled))
    assert main(["generate", "p", "--timeout", "0.2"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "within the timeout" in err
    assert server.cancelled.wait(WAIT_SECONDS)


@pytest.mark.parametrize("is_servers", [False, True])
@pytest.mark.parametrize(("flags", "printed"), [((), "ab\n"), (("--json",), "")])
def test_a_timeout_tells_how_much_came(
    server: FakeServer, capsys: Capture, flags: tuple[str, ...], printed: str, is_servers: bool
) -> None:
    servers = refuse(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", texts=["a", "b"], generatedTokens="3")
    server.play(servers if is_servers else say_then_wait(server.cancelled, "a", "b"))
    assert main(["generate", "p", "--timeout", "0.5", *flags]) == 1
    cut = "the answer was cut by the timeout after 2 tokens"
    assert capsys.readouterr() == (
        printed, f"quire: error: {cut}; allow more time with --timeout, or ask for fewer tokens\n"
    )  # fmt: skip


LIMIT = say("1\n", "2", reason=pb.FINISH_REASON_MAX_TOKENS, stop=None)


def test_a_terminal_shows_the_prompt_and_why_the_text_ends(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    server.play(LIMIT)
    assert main(["generate", "f(", "--max-tokens", "2"]) == 0
    assert capsys.readouterr() == ("1\n2\n", "")
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    assert main(["generate", "f(", "--max-tokens", "2"]) == 0
    dimmed = "\x1b[2m{}\x1b[22m"
    assert capsys.readouterr() == (
        dimmed.format("f(") + "1\n2\n", dimmed.format("[stopped after 2 tokens: --max-tokens]") + "\n"
    )  # fmt: skip
    assert main(["generate", "--chat", "f("]) == 0
    assert capsys.readouterr().out == "1\n2\n"
    server.play(say("1"))
    assert main(["generate", "f("]) == 0
    assert capsys.readouterr() == (dimmed.format("f(") + "1\n", "")
    assert main(["generate", "f(", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "1"
    server.play(refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"))
    assert main(["generate", "f("]) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["p", "--address", "localhost"],
        ["p", "--address", "http://x:1"],
        ["p", "--seed", "-1"],
        ["p", "--top-k", "99999999999"],
        ["p", "--stop-token-id", "-5"],
        ["p", "--top-logprobs", "1"],
        ["\udcff"],
        ["--chat", "\udcff"],
    ],
)
def test_a_value_that_cannot_be_sent_is_one_line(server: FakeServer, capsys: Capture, arguments: list[str]) -> None:
    assert main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("quire: error: ")
    assert server.specs == []


def test_a_value_that_cannot_be_sent_is_named_by_its_flag(server: FakeServer, capsys: Capture) -> None:
    assert main(["generate", "p", "--top-k", "99999999999"]) == 2
    assert capsys.readouterr().err.startswith("quire: error: --top-k: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["p", "q"],
        ["p", "--temprature", "1"],
        ["p", "--max-tok", "1"],
        ["p", "--temperature", "warm"],
        ["p", "--max-tokens", "1.5"],
        ["p", "--timeout", "0"],
        ["p", "--timeout", "nan"],
        ["p", "--timeout", "-1"],
        ["p", "--timeout", "1e30"],
        ["p", "--logit-bias", "5"],
        ["p", "--logit-bias", "a=b"],
        ["p", "--stop"],
    ],
)
def test_hostile_flags_are_refused_in_one_line(capsys: Capture, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", *arguments])
    err = capsys.readouterr().err
    assert (caught.value.code, err.count("\n")) == (2, 1)
    assert err.startswith("quire: error: ")


def test_bytes_that_are_no_text_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(b"\xff"), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["generate"]) == 2
    assert capsys.readouterr().err == "quire: error: standard input is not UTF-8 text\n"


@pytest.mark.e2e
def test_ctrl_c_cancels_and_exits_with_130(server: FakeServer, start: Start) -> None:
    server.play(say_then_wait(server.cancelled, "a"))
    process = start("generate", "p")
    assert process.stdout is not None
    assert process.stdout.read(1) == b"a"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert server.cancelled.wait(WAIT_SECONDS)


@pytest.mark.e2e
def test_a_reader_that_leaves_is_no_error(server: FakeServer, start: Start) -> None:
    server.play(say(*["x" * 1_000] * 500))
    process = start("generate", "p")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(WAIT_SECONDS) == 141
