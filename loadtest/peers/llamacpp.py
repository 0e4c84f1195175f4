"""llama.cpp on our workloads: its server over HTTP, or llama-bench for W1. LLAMA_BIN names the folder of its binaries.

    LLAMA_BIN=... python -m loadtest.peers.llamacpp --model DIR --precision bf16|int8|fp32 --workload W1|W2|W3|W5

The model's directory must hold gguf/bf16.gguf (loadtest.peers.convert_gguf); 8 bits are Q8_0, quantised on demand.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from loadtest.peers.runner import (
    WORK,
    Figures,
    Job,
    Settings,
    output_figures,
    parse,
    report,
    single_figures,
    stall_figures,
)
from loadtest.peers.works import SETTLED_TOKENS
from loadtest.ports import free_ports
from loadtest.timing import StreamTimes
from loadtest.workloads import Work

NAME = "llamacpp"
TYPES = {"bf16": "bf16", "int8": "q8_0", "fp32": "f32"}
START_SECONDS = 120.0


def best_settings(workload: str, batch: int) -> Settings:
    """What was fastest: llama-bench or the server, its slots (0: one for each request), steps, and cache.

    All prompts of W2 in one step are best; in W5 the streams wait for each step, so that they have to be small. More
    slots than 16 make W3 slower.
    """
    tool = "bench" if workload == "W1" else "server"  # which has no use for slots and unified
    slots = 16 if workload == "W3" else 0
    step, part = {"W2": (2048, 2048), "W5": (256, 256)}.get(workload, (2048, 512))
    steps = {"batch": str(step), "ubatch": str(part)}
    return {"tool": tool, "slots": str(slots), "flash": "on", "kv": "f16", "unified": "0"} | steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one job. Returns the exit code."""
    job = parse(NAME, best_settings, arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # takes the server with it
    runs = run_bench(job) if job.settings["tool"] == "bench" else run_server(job)
    report(NAME, version(), job, runs)
    return 0


def binary(name: str) -> str:
    """The path of one of llama.cpp's programs."""
    return str(Path(os.environ.get("LLAMA_BIN", WORK / "llama.cpp" / "bin")) / name)


def version() -> str:
    """What the server says of itself."""
    done = subprocess.run([binary("llama-server"), "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version")]
    return lines[0].partition(":")[2].strip() if lines else "unknown"


def weights(job: Job) -> str:
    """The GGUF file of the job's precision, quantised from the bfloat16 one where it is not there."""
    kind = TYPES[job.precision]
    path = job.model / "gguf" / f"{kind}.gguf"
    if not path.exists():
        source = job.model / "gguf" / "bf16.gguf"
        command = [binary("llama-quantize"), str(source), str(path), kind.upper()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return str(path)


def run_bench(job: Job) -> list[Figures]:
    """W1 by llama-bench, which has no server's cost. Raises ValueError for another workload."""
    if job.workload != "W1":
        raise ValueError("llama-bench runs W1 only")
    [work] = job.works()
    return bench_figures(*(bench_samples(command) for command in bench_commands(job, work)), work)


def bench_commands(job: Job, work: Work) -> tuple[list[str], list[str]]:
    """Command lines for the prompt, and for decoding behind it: without `-d` llama-bench decodes behind nothing."""
    num_prompt = str(len(work.prompt))
    common = [binary("llama-bench"), "-m", weights(job), "-t", str(job.threads), "-r", str(job.repeat), "-o", "json"]
    common += ["-fa", "1" if job.settings["flash"] == "on" else "0"]
    common += ["-b", job.settings["batch"], "-ub", job.settings["ubatch"]]
    common += ["-ctk", job.settings["kv"], "-ctv", job.settings["kv"]]
    prefill = [*common, "-p", num_prompt, "-n", "0"]
    decode = [*common, "-p", "0", "-n", str(work.num_new), "-d", num_prompt]
    return prefill, decode


def bench_samples(command: Sequence[str]) -> list[float]:
    """Seconds that the only test of a llama-bench took, each time."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    [test] = json.loads(done.stdout)
    return [nanoseconds / 1e9 for nanoseconds in test["samples_ns"]]


def bench_figures(prefill: Sequence[float], decode: Sequence[float], work: Work) -> list[Figures]:
    """Figures of llama-bench's two tests. It times one step of decoding more than there are gaps between tokens."""
    share = (work.num_new - 1) / work.num_new
    return [
        single_figures(len(work.prompt), work.num_new, first, share * rest)
        for first, rest in zip(prefill, decode, strict=True)
    ]


def run_server(job: Job) -> list[Figures]:
    """Any workload by the server."""
    works = job.works()
    with running_server(job) as port:
        answer_together(port, job.warm_up())
        if job.workload == "W5":
            return [measure_stall(port, works, job.long_prompt()) for _ in range(job.repeat)]
        return [measure(port, works) for _ in range(job.repeat)]


def server_command(job: Job, port: int) -> list[str]:
    """The server's command line."""
    settings = job.settings
    num_requests = job.batch + (job.workload == "W5")
    slots = int(settings["slots"]) or num_requests
    threads = str(job.threads)
    return [
        *(binary("llama-server"), "--host", "127.0.0.1", "--port", str(port), "-m", weights(job)),
        *("-t", threads, "-tb", threads, "--threads-http", str(num_requests + 8)),
        *("--parallel", str(slots), "-c", str(slots * (job.context() + 16)), "-cb"),
        *("-b", settings["batch"], "-ub", settings["ubatch"], "-fa", settings["flash"]),
        *("-ctk", settings["kv"], "-ctv", settings["kv"], "--cache-ram", "0"),
        "--kv-unified" if settings["unified"] == "1" else "--no-kv-unified",
    ]


@contextmanager
def running_server(job: Job) -> Iterator[int]:
    """A server, as its port. Raises RuntimeError with the end of its log if it does not start."""
    [port] = free_ports(1)
    with TemporaryFile() as log:
        process = subprocess.Popen(server_command(job, port), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not is_healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError("llama-server did not start: " + log.read().decode(errors="replace")[-1_000:])
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait()


def is_healthy(port: int) -> bool:
    """Whether the server answers that it is ready."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False


def body(work: Work, stream: bool) -> str:
    """The request for exactly so many tokens, greedy."""
    options = {"ignore_eos": True, "temperature": 0, "top_k": 1, "samplers": ["top_k"], "cache_prompt": False}
    return json.dumps({"prompt": work.prompt, "n_predict": work.num_new, "stream": stream, **options})


def answer(port: int, work: Work) -> dict[str, Any]:
    """One whole answer. Raises RuntimeError if it is not as long as was asked for."""
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("POST", "/completion", body(work, stream=False), {"Content-Type": "application/json"})
        found: dict[str, Any] = json.loads(connection.getresponse().read())
    if found.get("tokens_predicted") != work.num_new:
        raise RuntimeError(f"asked for {work.num_new} tokens: {json.dumps(found)[:500]}")
    return found


def answer_together(port: int, works: Sequence[Work]) -> list[dict[str, Any]]:
    """The answers of requests that begin together. Raises RuntimeError if one failed."""
    found: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda work=work: found.append(answer(port, work))) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) != len(works):
        raise RuntimeError(f"{len(works) - len(found)} of {len(works)} requests failed")
    return found


def measure(port: int, works: Sequence[Work]) -> Figures:
    """Times requests that begin together; of a single one, the server itself tells prefill and decoding."""
    begun_at = time.monotonic()
    answers = answer_together(port, works)
    seconds = time.monotonic() - begun_at
    if len(works) > 1:
        return output_figures(sum(work.num_new for work in works), seconds)
    timings, [work] = answers[0]["timings"], works
    return single_figures(len(work.prompt), work.num_new, timings["prompt_ms"] / 1_000, timings["predicted_ms"] / 1_000)


class Reader:
    """A stream that is read by a thread of its own until it ends or `stop` is set."""

    def __init__(self, port: int, work: Work, stop: threading.Event) -> None:
        self.times = StreamTimes(time.monotonic(), len(work.prompt))
        self._port, self._work, self._stop = port, work, stop
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port)) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/completion", body(self._work, stream=True), headers)
            for line in connection.getresponse():
                if self._stop.is_set():
                    return
                if line.startswith(b"data: "):
                    self.times.arrived(time.monotonic(), len(json.loads(line[6:]).get("tokens", ())))

    @property
    def is_reading(self) -> bool:
        """Whether the stream goes on."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Waits for the end."""
        self._thread.join()


def measure_stall(port: int, works: Sequence[Work], long: Work) -> Figures:
    """W5. Raises RuntimeError when the streams ended before the long prompt's token."""
    stop = threading.Event()
    readers = [Reader(port, work, stop) for work in works]
    try:
        while any(reader.times.num_tokens < SETTLED_TOKENS and reader.is_reading for reader in readers):
            time.sleep(0.01)
        injected = Reader(port, long, threading.Event())
        injected.join()
        is_valid = all(reader.is_reading for reader in readers)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    if not is_valid:
        raise RuntimeError("the streams ended before the long prompt's token")
    return stall_figures([reader.times for reader in readers], injected.times)


if __name__ == "__main__":
    sys.exit(main())
