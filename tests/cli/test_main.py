"""The command line itself: help, refusals, what is imported; serve's flags; health; model info."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from model import info
from model.cards import cards
from model.info import load_info
from service import logs, supervisor
from service.cli.main import COMMANDS, main
from service.config import BUILT_IN_MODEL, Settings
from tests.client.server import FakeServer, running
from tests.model.checkpoints import write_checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(capsys: Capture, name: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: quire {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["nope"], ["--nope"], ["model"], ["model", "show"], ["health", "x"], ["serve", "--prot", "1"], ["serve", "x"]],
)
def test_what_is_unknown_is_refused_in_one_line(capsys: Capture, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    err = capsys.readouterr().err
    assert (caught.value.code, err.count("\n")) == (2, 1)
    assert err.startswith("quire: error: ")


def test_without_a_command_there_is_help_and_no_success(capsys: Capture) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(name in err for name in COMMANDS)


def test_the_version_is_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for version, said in ((lambda name: f"{name} 1.2", "quire quire 1.2\n"), (not_installed, "quire unknown")):
        monkeypatch.setattr("importlib.metadata.version", version)
        with pytest.raises(SystemExit) as caught:
            main(["--version"])
        assert caught.value.code == 0
        assert capsys.readouterr().out.startswith(said)


def not_installed(name: str) -> str:
    raise PackageNotFoundError(name)


HEAVY = ("grpc", "torch", "pydantic", "rich", "jinja2", "tokenizers", "numpy")


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], ()),
        (["serve", "--help"], ("pydantic",)),
        (["health", "--address", "localhost:1"], ("grpc",)),
        (["generate", "p", "--address", "localhost:1"], ("grpc",)),
        (["model", "info", "--json"], ("pydantic",)),
    ],
)
def test_a_command_imports_only_what_it_needs(arguments: list[str], allowed: tuple[str, ...]) -> None:
    script = (
        "import sys; from service.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    imported = done.stderr.splitlines()[-1]
    assert set(json.loads(imported.replace("'", '"'))) <= set(allowed)


class Served:
    """The settings that `quire serve` would have served with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings: Settings | None = None
        for name in [name for name in os.environ if name.startswith("QUIRE_")]:
            monkeypatch.delenv(name)
        monkeypatch.setattr(supervisor, "run", self._run)
        monkeypatch.setattr(logs, "configure", lambda *arguments: None)

    def _run(self, settings: Settings) -> int:
        self.settings = settings
        return 7


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(monkeypatch)


def test_serve_without_flags_takes_the_defaults(served: Served) -> None:
    assert main(["serve"]) == 7
    assert served.settings == Settings()


def test_every_setting_is_a_flag(served: Served, capsys: Capture) -> None:
    """Each is set to something else than its default, by its flag."""
    other = {
        "model": "/m", "model_name": "n", "host": "localhost", "port": 1, "insecure": True, "metrics_host": "localhost",
        "metrics_port": 2, "reflection": False, "dtype": "float32", "quantize": "int8", "backend": "torch",
        "cpu_level": "v3", "threads": 3, "pin_threads": "on", "context_length": 4, "block_size": 32,
        "kv_cache_mib": 6, "num_blocks": 7, "prefix_cache": False, "graphs": False,
        "gpu_attention": "flash-attention-3",
        "max_num_seqs": 8, "max_batch_tokens": 9, "target_itl_ms": 10.5, "max_waiting_requests": 11,
        "max_waiting_tokens": 12, "default_deadline_seconds": 13.0, "max_deadline_seconds": 14.0,
        "reader_stall_seconds": 15.0, "lame_duck_seconds": 16.0, "drain_seconds": 17.0, "engine_timeout_seconds": 18.0,
        "max_engine_restarts": 19, "log_level": "debug", "log_format": "json",
    }  # fmt: skip
    assert set(other) == set(Settings.model_fields), "a new setting is a new flag: add it here"
    flags = []
    for name, value in other.items():
        flag = name.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    assert main(["serve", *flags]) == 7
    assert served.settings == Settings.model_validate(other)
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in Settings.model_fields.values():
        assert field.description
        assert " ".join(field.description.split()) in shown


def test_serve_reads_a_file_below_flags(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "quire.toml"
    file.write_text("port = 1\nblock_size = 32\n")
    assert main(["serve", "--config", str(file), "--port", "6"]) == 7
    assert served.settings is not None
    assert (served.settings.port, served.settings.block_size) == (6, 32)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "70000", "--block-size", "0"], ("port", "block_size")),
        (["--port", "x"], ("port",)),
        (["--target-itl-ms", "nan"], ("target_itl_ms",)),
        (["--host", "0.0.0.0"], ("--insecure",)),
        (["--config", "/no/such/file"], ("config file", "No such file")),
    ],
)
def test_serve_names_every_mistake_in_one_line(
    served: Served, capsys: Capture, arguments: list[str], named: tuple[str, ...]
) -> None:
    assert main(["serve", *arguments]) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in named)
    assert (err.count("\n"), served.settings) == (1, None)


def test_health(server: FakeServer, capsys: Capture) -> None:
    assert main(["health"]) == 0
    assert main(["health", "--service", ""]) == 0
    assert main(["health", "--service", "nobody"]) == 1
    server.health.set(2)
    assert main(["health"]) == 1
    assert capsys.readouterr().out.split() == ["SERVING", "SERVING", "SERVICE_UNKNOWN", "NOT_SERVING"]


def test_health_of_nothing(capsys: Capture) -> None:
    with running() as gone:
        address = gone.address
    assert main(["health", "--address", address]) == 1
    assert capsys.readouterr().err.startswith(f"quire: error: no server answers at {address}")


def test_a_server_is_found_at_the_port_that_one_here_takes(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv("QUIRE_ADDRESS")
    monkeypatch.setenv("QUIRE_PORT", str(server.port))
    assert main(["health"]) == 0


def test_model_info_as_json(capsys: Capture) -> None:
    assert (
        main(["model", "info", "--json", "--kv-cache-mib", "1", "--context-length", "100", "--dtype", "float32"]) == 0
    )
    facts = json.loads(capsys.readouterr().out)
    config = json.loads((BUILT_IN_MODEL / "config.json").read_text())
    assert facts["num_layers"] == config["num_hidden_layers"]
    assert facts["num_parameters"] == sum(facts["parameters"].values())
    # The embedding is there twice: as it is, to look tokens up, and packed, for the logits.
    assert facts["weight_bytes"] == 4 * (facts["num_parameters"] + config["vocab_size"] * config["hidden_size"])
    assert facts["cpu_levels"][-1] == "baseline"
    assert facts["cards"] == cards()
    assert facts["backend"].startswith(("gpu, ", "native ", "torch, slowly: "))
    # K and V of each layer and head, 4 bytes each; 100 tokens take 7 blocks of 16.
    per_layer = 2 * config["num_key_value_heads"] * config["head_dim"] * 4
    assert facts["kv_bytes_per_token"] == config["num_hidden_layers"] * per_layer
    assert facts["sequences_that_fit"]["100"] == (2**20 // (16 * facts["kv_bytes_per_token"])) // 7


def test_model_info_tells_why_torch_would_compute(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "cards", list)
    monkeypatch.setenv("COLUMNS", "120")
    directory = str(write_checkpoint(tmp_path, head_dim=20, hidden_size=80))
    assert main(["model", "info", directory, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["backend"]
    assert told.startswith("torch, slowly: ")
    assert main(["model", "info", directory]) == 0
    assert f"backend here     {told}" in capsys.readouterr().out


def test_model_info_as_tables(capsys: Capture) -> None:
    assert main(["model", "info"]) == 0
    out = capsys.readouterr().out
    num_parameters = load_info(BUILT_IN_MODEL).num_parameters
    for said in ("LlamaForCausalLM", "attention", f"{num_parameters:,}", "KiB per token", "sequences in 256.0 MiB"):
        assert said in out


@pytest.mark.parametrize(
    ("arguments", "is_limit"), [([], True), (["--dtype", "float32"], False), (["--quantize", "int8"], False)], ids=str
)
def test_model_info_tells_the_most_that_bfloat16_takes(capsys: Capture, arguments: list[str], is_limit: bool) -> None:
    """Which kernels keep in fewer bits; others take what is told."""
    assert main(["model", "info", *arguments]) == 0
    assert ("at most" in capsys.readouterr().out) == is_limit


@pytest.mark.parametrize(
    "arguments",
    [
        *(["/no/such/directory"], ["--context-length", "100000"], ["{broken}"]),
        *(["--block-size", size] for size in ("8", "24", "272")),
    ],
)
def test_model_info_names_a_mistake_in_one_line(capsys: Capture, tmp_path: Path, arguments: list[str]) -> None:
    shutil.copy(BUILT_IN_MODEL / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 9)
    assert main(["model", "info", *(argument.replace("{broken}", str(tmp_path)) for argument in arguments)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("quire: error: ")


def test_python_dash_m_service_is_quire() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service", "nope"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("quire: error: ")
