"""Mistakes at the start: one clear line, exit code 2, no traceback."""

import json
import shutil
import socket
from pathlib import Path

import pytest

from service.config import BUILT_IN_MODEL
from tests.e2e.server import free_port, run_cli


def refused(*flags: str) -> str:
    """The one line that `quire serve` ends with."""
    done = run_cli("serve", "--port", str(free_port()), "--metrics-port", str(free_port()), *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("usage:", " "))]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return lines[0]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the built-in model, to be damaged."""
    return Path(shutil.copytree(BUILT_IN_MODEL, tmp_path / "model"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--block-size", "zero"], "block_size"),
        (["--max-num-seqs", "-3"], "max_num_seqs"),
        (["--dtype", "int3"], "dtype"),
        (["--host", "0.0.0.0"], "insecure"),
        (["--model", "/no/such/directory"], "/no/such/directory"),
        (["--config", "/no/such/file.toml"], "/no/such/file.toml"),
        (["--context-length", "1000000"], "context_length"),
    ],
)
def test_bad_settings_are_named(flags: list[str], named: str) -> None:
    assert named in refused(*flags)


def test_a_busy_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        assert port in refused("--port", port)
        assert port in refused("--metrics-port", port)


def test_a_truncated_checkpoint(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused("--model", str(copy))


def test_weights_that_do_not_match_the_config(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))
    assert f"layers.{config['num_hidden_layers']}" in refused("--model", str(copy))


def test_a_broken_config_and_a_broken_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in refused("--model", str(copy))
    (copy / "config.json").write_text("{")
    assert "config.json" in refused("--model", str(copy)) or "tokenizer.json" in refused("--model", str(copy))


def test_a_toml_file_with_a_mistake(tmp_path: Path) -> None:
    file = tmp_path / "quire.toml"
    file.write_text("prot = 1\n")
    assert "prot" in refused("--config", str(file))
