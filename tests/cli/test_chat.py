"""quire chat: the history that is sent, its commands, what happens when it no longer fits, and Ctrl-C."""

import io
import os
import pty
import signal
import subprocess

import grpc
import pytest

from service.cli.main import main
from service.pb.quire.v1 import inference_pb2 as pb
from tests.cli.conftest import Start
from tests.client.server import MODEL, WAIT_SECONDS, FakeServer, refuse, say, say_then_wait

Capture = pytest.CaptureFixture[str]
TOO_LONG = refuse(grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", limit="64")


def talk(monkeypatch: pytest.MonkeyPatch, said: str, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
    return main(["chat", *arguments])


def sent(server: FakeServer) -> list[list[str]]:
    """Contents of each request's messages."""
    return [[message.content for message in spec.chat.messages] for spec in server.specs]


def test_the_history_is_kept_and_sent(server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    server.play(say("A"), say("B"))
    assert talk(monkeypatch, "one\n\ntwo\n", "--system", "be brief", "--seed", "3") == 0
    assert capsys.readouterr().out == "A\nB\n"
    assert sent(server) == [["be brief", "one"], ["be brief", "one", "A", "two"]]
    assert [message.role for message in server.specs[1].chat.messages] == [1, 2, 3, 2]
    assert server.specs[1].sampling.seed == 3


def test_commands(server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert talk(monkeypatch, "one\n/reset\ntwo\n/help\n/nonsense\n/path is text\n/exit\nnever\n", "--system", "s") == 0
    assert sent(server) == [["s", "one"], ["s", "two"], ["s", "two", "Hello there", "/path is text"]]
    err = capsys.readouterr().err
    assert "no such command: /nonsense" in err
    assert "/reset" in err


def test_a_command_with_other_words_is_no_message(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert talk(monkeypatch, "one\n/reset all\n/exit\tnow\ntwo\n") == 0
    assert sent(server) == [["one"], ["one", "Hello there", "two"]]
    err = capsys.readouterr().err
    assert "/reset stands alone" in err
    assert "/exit stands alone" in err


def test_the_oldest_exchange_is_dropped_when_it_no_longer_fits(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    server.play(say("A"), say("B"), TOO_LONG, say("C"))
    assert talk(monkeypatch, "one\ntwo\nthree\n", "--system", "s") == 0
    assert sent(server)[2:] == [["s", "one", "A", "two", "B", "three"], ["s", "two", "B", "three"]]
    out, err = capsys.readouterr()
    assert out == "A\nB\nC\n"
    assert "no longer fits" in err


def test_a_message_that_can_never_fit_is_told(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    server.play(TOO_LONG)
    assert talk(monkeypatch, "very long\n") == 1
    assert "CONTEXT_LENGTH_EXCEEDED" in capsys.readouterr().err
    assert len(server.specs) == 1


def test_an_answer_cut_by_the_context_is_told(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    server.play(say("A", reason=pb.FINISH_REASON_CONTEXT_LENGTH, stop=None))
    assert talk(monkeypatch, "one\n") == 0
    assert capsys.readouterr().err == "[stopped after 2 tokens: the context is full]\n"


def test_an_answer_cut_by_max_tokens_is_told(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    server.play(say("A", reason=pb.FINISH_REASON_MAX_TOKENS, stop=None))
    assert talk(monkeypatch, "one\n") == 0
    assert capsys.readouterr() == ("A\n", "[stopped after 2 tokens: --max-tokens]\n")


def test_an_answer_cut_by_the_timeout_is_told(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    server.play(say_then_wait(server.cancelled, "A"))
    assert talk(monkeypatch, "one\n", "--timeout", "0.5") == 1
    out, err = capsys.readouterr()
    assert out == "A\n"
    assert "cut by the timeout after 1 token;" in err


def test_a_refused_flag_ends_the_conversation(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    violation = ("spec.sampling.top_p", "must be in (0, 1]")
    server.play(refuse(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", violations=[violation]))
    assert talk(monkeypatch, "one\ntwo\n", "--top-p", "2") == 2
    assert capsys.readouterr().err == "quire: error: --top-p: must be in (0, 1]\n"
    assert len(server.specs) == 1


def test_a_model_without_template_is_told(server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    without = pb.Model()
    without.CopyFrom(MODEL)
    without.has_chat_template = False
    monkeypatch.setattr("tests.client.server.MODEL", without)
    assert talk(monkeypatch, "one\n") == 1
    assert capsys.readouterr().err == "quire: error: tiny has no chat template; use quire generate\n"


@pytest.mark.e2e
def test_ctrl_c_stops_the_answer_only_and_ctrl_d_leaves(server: FakeServer, start: Start) -> None:
    server.play(say_then_wait(server.cancelled, "begun"), say("again"))
    terminal, line = pty.openpty()
    process = start("chat", stdin=line, stdout=line, stderr=subprocess.DEVNULL)
    os.close(line)
    read_until(terminal, b"> ")
    os.write(terminal, b"one\n")
    read_until(terminal, b"begun")
    process.send_signal(signal.SIGINT)
    assert server.cancelled.wait(WAIT_SECONDS)
    read_until(terminal, b"> ")
    os.write(terminal, b"two\n")
    read_until(terminal, b"again")
    read_until(terminal, b"> ")
    os.write(terminal, b"\x04")
    assert process.wait(WAIT_SECONDS) == 0
    assert sent(server) == [["one"], ["one", "begun", "two"]]
    os.close(terminal)


def read_until(terminal: int, wanted: bytes) -> None:
    """Reads byte by byte, so that nothing after it is taken; pytest's timeout ends a wait in vain."""
    seen = b""
    while not seen.endswith(wanted):
        seen += os.read(terminal, 1)
