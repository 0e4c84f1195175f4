"""The runners' shared half: the same requests for every engine, one command line, figures by one definition."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from loadtest.peers import llamacpp, quire
from loadtest.peers.llamacpp import bench_figures, run_bench, server_command
from loadtest.peers.runner import Job, Settings, document, parse, report, single_figures, stall_figures
from loadtest.peers.works import DEFAULT_BATCH, LONG_PROMPT, WORKLOADS, long_prompt, warm_up_of, works_of
from loadtest.server import running_server
from loadtest.targets import GrpcTarget
from loadtest.timing import StreamTimes
from loadtest.workloads import Work, uniform_works
from service.config import Settings as ServerSettings

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("openvino.py", "convert_gguf.py")
"""Files that run in another engine's environment, and use its packages."""
SHARED = ("runner.py", "works.py", "llamacpp.py", "../workloads.py", "../timing.py", "../ports.py")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 1000}))
    return tmp_path


def defaults(workload: str, batch: int) -> Settings:
    return {"slots": str(batch), "cache": "on"}


def job_of(model: Path, *arguments: str) -> Job:
    return parse("some", defaults, ["--model", str(model), *arguments])


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("name", SHARED)
def test_shared_modules_use_the_standard_library_only(name: str) -> None:
    roots = {module.split(".")[0] for module in imports_of(ROOT / "loadtest" / "peers" / name)}
    assert roots <= {"loadtest", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", [*FOREIGN, *SHARED])
def test_what_runs_elsewhere_imports_nothing_of_ours_but_what_is_shared(name: str) -> None:
    ours = {module for module in imports_of(ROOT / "loadtest" / "peers" / name) if module.startswith("loadtest")}
    shared = {f"loadtest.peers.{name.removesuffix('.py')}" for name in SHARED if not name.startswith("..")}
    assert ours <= shared | {"loadtest.workloads", "loadtest.timing", "loadtest.ports"}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_workload_is_the_same_for_every_engine(workload: str) -> None:
    batch = DEFAULT_BATCH[workload]
    works = works_of(workload, batch, 4096)
    assert works == works_of(workload, batch, 4096)
    assert len(works) == batch
    assert len({work.prompt for work in works}) == batch


def test_workloads_have_the_stated_sizes() -> None:
    sizes = {name: {(len(work.prompt), work.num_new) for work in works_of(name, 1, 4096)} for name in ("W1", "W2")}
    assert sizes == {"W1": {(128, 128)}, "W2": {(64, 64)}}
    mixed = works_of("W3", 64, 4096)
    assert all(16 <= len(work.prompt) <= 512 and 16 <= work.num_new <= 128 for work in mixed)
    assert (len(long_prompt(4096).prompt), long_prompt(4096).num_new) == (LONG_PROMPT, 1)


def test_mixed_lengths_do_not_depend_on_the_vocabulary() -> None:
    small, large = ([(len(work.prompt), work.num_new) for work in works_of("W3", 8, size)] for size in (1_000, 50_000))
    assert small == large


def test_an_unknown_workload_is_refused() -> None:
    with pytest.raises(ValueError, match="W9"):
        works_of("W9", 1, 4096)


def test_warming_up_is_a_little_of_the_same() -> None:
    works = works_of("W3", 64, 4096)
    warm = warm_up_of(works)
    assert len(warm) == 8
    assert all(work.prompt[: len(short.prompt)] == short.prompt for work, short in zip(works, warm, strict=False))


def test_the_command_line_says_what_is_measured(model: Path) -> None:
    job = job_of(model, "--workload", "W3", "--precision", "int8", "--threads", "3", "--set", "cache=off")
    assert (job.precision, job.batch, job.threads, job.repeat) == ("int8", 64, 3, 1)
    assert job.settings == {"slots": "64", "cache": "off"}
    assert job.context() == max(len(work.prompt) + work.num_new for work in job.works())


def test_the_context_has_room_for_the_long_prompt(model: Path) -> None:
    assert job_of(model, "--workload", "W5").context() == LONG_PROMPT + 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--workload", "W4"],
        ["--workload", "W1", "--batch", "2"],
        ["--workload", "W2", "--repeat", "0"],
        ["--workload", "W2", "--set", "speed=high"],
        ["--workload", "W2", "--set", "cache"],
        ["--workload", "W2", "--precision", "int3"],
    ],
)
def test_what_cannot_be_run_is_refused(model: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        job_of(model, *arguments)
    assert end.value.code == 2


def test_a_single_stream_is_timed_from_its_first_token() -> None:
    found = single_figures(num_prompt=100, num_new=11, ttft_seconds=0.5, decode_seconds=1.5)
    assert found == {
        "ms_per_token": pytest.approx(150),
        "prefill_tokens_per_second": pytest.approx(200),
        "output_tokens_per_second": pytest.approx(5.5),
    }


def test_a_stall_is_the_longest_gap_that_overlaps_the_long_prompt() -> None:
    first = StreamTimes(0.0, 4, [(1.0, 1), (1.1, 1), (1.9, 1), (2.0, 1), (9.0, 1)])
    second = StreamTimes(0.0, 4, [(1.0, 1), (1.2, 1), (1.3, 1), (1.8, 1)])
    long = StreamTimes(1.5, 1500, [(1.95, 1)])
    found = stall_figures([first, second], long)
    assert found == {
        "ttft_ms": pytest.approx(450),
        "longest_gap_ms": pytest.approx(800),
        "usual_gap_ms": pytest.approx(100),
    }


def test_a_document_has_the_median_of_each_figure(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_of(model, "--workload", "W2", "--batch", "4")
    runs = [{"output_tokens_per_second": value} for value in (1.0, 9.0, 2.0)]
    report("some", "1.2", job, runs)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document("some", "1.2", job, runs)
    assert document("some", "1.2", job, runs)["figures"] == {"output_tokens_per_second": 2.0}


def test_llama_bench_counts_one_step_more_than_gaps() -> None:
    [found] = bench_figures([2.0], [12.8], Work((1,) * 128, 128))
    assert found["ms_per_token"] == pytest.approx(100)
    assert found["prefill_tokens_per_second"] == pytest.approx(64)


def test_llama_bench_decodes_behind_the_prompt_as_everybody_does(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "gguf").mkdir()
    (model / "gguf" / "bf16.gguf").touch()
    tests = {"-p 128 -n 0": [2e9, 4e9], "-p 0 -n 128 -d 128": [12.8e9, 25.6e9]}
    ran: list[str] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        ran.append(" ".join(command[command.index("-p") :]))
        return SimpleNamespace(stdout=json.dumps([{"samples_ns": tests[ran[-1]]}]))

    monkeypatch.setattr("loadtest.peers.llamacpp.subprocess.run", run)
    arguments = ["--model", str(model), "--workload", "W1", "--repeat", "2"]
    found = run_bench(parse("llamacpp", llamacpp.best_settings, arguments))
    assert ran == list(tests)
    assert [figures["ms_per_token"] for figures in found] == pytest.approx([100, 200])
    assert [figures["prefill_tokens_per_second"] for figures in found] == pytest.approx([64, 32])


def test_the_llama_server_has_a_slot_for_each_request(model: Path) -> None:
    (model / "gguf").mkdir()
    (model / "gguf" / "q8_0.gguf").touch()
    arguments = ["--model", str(model), "--workload", "W5", "--precision", "int8", "--set", "slots=0"]
    command = server_command(parse("llamacpp", llamacpp.best_settings, arguments), 4711)
    assert command[command.index("--parallel") + 1] == "17"
    assert command[command.index("-c") + 1] == str(17 * (LONG_PROMPT + 1 + 16))
    assert command[command.index("-m") + 1].endswith("q8_0.gguf")


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_quires_options_are_settings_with_room_for_all(model: Path, workload: str, precision: str) -> None:
    arguments = ["--model", str(model), "--workload", workload, "--precision", precision]
    job = parse("quire", quire.best_settings, arguments)
    options = quire.options_of(job)
    settings = ServerSettings.model_validate(options)
    assert not settings.prefix_cache
    assert settings.num_blocks is not None
    works = [*job.works(), *([job.long_prompt()] if workload == "W5" else [])]
    assert settings.num_blocks * settings.block_size >= sum(len(work.prompt) + work.num_new for work in works)
    assert "--no-prefix-cache" in quire.as_flags(options)


@pytest.mark.e2e
async def test_a_client_sees_how_long_a_prompt_and_the_streams_beside_it_wait(tmp_path: Path) -> None:
    streams, long = uniform_works(3, 16, 16, 1_000, 4096), uniform_works(4, 1, 600, 1, 4096)[0]
    with running_server(tmp_path / "server.log", ["--no-prefix-cache"]) as server:
        target = GrpcTarget(server.address)
        try:
            found = await quire.measure_client_stall(target, streams, long)
            with pytest.raises(RuntimeError, match="too early"):
                await quire.measure_client_stall(target, uniform_works(3, 2, 16, 4, 4096), long)
        finally:
            await target.close()
    assert found.keys() == {"ttft_ms", "longest_gap_ms", "usual_gap_ms"}
    assert min(found.values()) > 0


def test_quires_eight_bits_are_of_the_weights(model: Path) -> None:
    job = parse("quire", quire.best_settings, ["--model", str(model), "--workload", "W1", "--precision", "int8"])
    assert quire.options_of(job)["quantize"] == "int8"
