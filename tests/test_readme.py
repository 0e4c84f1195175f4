"""The README tells the truth: its tables are the code's, its links lead somewhere, its commands work."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import json_format

from loadtest.server import RunningServer, running_server
from service.pb.quire.v1 import inference_pb2
from tests.readme import README, with_tables

ROOT = README.parent
TEXT = README.read_text()
BIN = Path(sys.executable).parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_tables_are_those_of_the_code() -> None:
    assert with_tables(TEXT) == TEXT, "run python -m tests.readme"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_that_are_there(page: str) -> None:
    targets = [link for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()) if "://" not in link]
    assert targets or page == "CHANGELOG.md"
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("page", PAGES[:2])
def test_every_make_target_exists(page: str) -> None:
    named = set(re.findall(r"(?:^|`)make (?:-k )?([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"serve", "test"} & named
    assert named <= targets


def test_the_grpcurl_request_is_one_that_the_proto_knows() -> None:
    (command,) = [shlex.split(block.replace("\\\n", "")) for block in blocks("sh") if block.startswith("grpcurl")]
    request = json_format.Parse(command[command.index("-d") + 1], inference_pb2.StreamGenerateRequest())
    assert request.spec.text == "import os"
    service, method = command[-1].split("/")
    described = inference_pb2.DESCRIPTOR.services_by_name[service.rpartition(".")[2]]
    assert described.full_name == service
    assert described.methods_by_name[method].input_type is inference_pb2.StreamGenerateRequest.DESCRIPTOR


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> RunningServer:
    with running_server(tmp_path_factory.mktemp("readme") / "server.log") as running:
        yield running


def localised(text: str, server: RunningServer) -> str:
    """The text with the test server's addresses in place of the default ones."""
    metrics = server.metrics_url.removeprefix("http://").removesuffix("/metrics")
    return text.replace("localhost:50051", server.address).replace("localhost:9464", metrics)


@pytest.mark.e2e
def test_the_tour_works(server: RunningServer) -> None:
    (tour,) = [block for block in blocks("sh") if "source .venv/bin/activate" in block]
    commands = localised(tour, server).splitlines()[1:]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "QUIRE_ADDRESS": server.address}
    said = [
        subprocess.run(
            command, shell=True, env=environment, capture_output=True, text=True, check=True, timeout=60
        ).stdout
        for command in commands
    ]
    assert len(said) == 6
    assert "SERVING" in said[0]
    assert said[1].strip()
    assert said[2].strip()
    assert json.loads(said[3])
    assert "LlamaForCausalLM" in said[4]
    assert said[5].count("quire_num_requests") >= 2


@pytest.mark.e2e
def test_the_python_example_works(server: RunningServer) -> None:
    (example,) = blocks("python")
    command = [sys.executable, "-c", localised(example, server)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
