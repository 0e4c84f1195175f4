"""What serving takes beside its speed: time to the first answer, memory, and what it loses beside another process.

    python -m loadtest.footprint [--model DIR] [--precisions bf16 int8] [--streams 64] [--pool-mib 16] [--rounds 3]
        [--skip first-answer memory neighbour]

`first-answer`: seconds from the command `serve` to the first token that a client has, built-in model, a fresh process
each time. `memory`: resident memory of the engine and the front end beyond the weights and what streams have held of
the key/value pool at a time, once they have ended; the supervisor's and the engine's peak apart. `neighbour`: speed
beside a process that keeps one core busy, as a ratio of the speed alone, by turns: one stream, a prompt, eight streams.
Figures are medians over the rounds, with the least and the largest. The last line of output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

from loadtest.machine import OUT, ROOT, describe
from loadtest.peers.quire import PRECISIONS, as_flags
from loadtest.server import RunningServer, running_server
from loadtest.targets import GrpcTarget
from loadtest.timing import median_and_spread
from loadtest.workloads import uniform_works
from service.client.blocking import BlockingClient
from service.config import BUILT_IN_MODEL, Settings
from service.engine.process import load_model
from service.supervisor import ENGINE, FRONT_END

MIB = 2**20
PARTS = ("first-answer", "memory", "neighbour")
BUSY = "while True: pass"
WORKS = (("W1", 1), ("W2", 8))
SETTLE_SECONDS = 1.0
"""After the last stream has ended, before memory is read."""
PROMPT_TOKENS, NEW_TOKENS = 64, 192
"""Of each stream: long enough for the moment in which the pool is full to be seen on a fast machine."""
LOOK_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run measures."""

    model: Path
    precisions: tuple[str, ...]
    num_streams: int
    pool_mib: int
    rounds: int
    parts: tuple[str, ...]
    out: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints. Returns the exit code."""
    plan = parse(arguments)
    found: dict[str, object] = {"bench": "footprint", "machine": describe(), "model": plan.model.name}
    if "first-answer" in plan.parts:
        seconds = [first_answer_seconds(plan) for _ in range(plan.rounds)]
        found["first_answer_seconds"] = tell("first answer, built-in model, s", seconds)
    for precision in plan.precisions:
        if "memory" in plan.parts:
            found[f"memory_mib/{precision}"] = memory = measure_memory(plan, precision)
            print(f"memory, {precision}: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in memory.items()))
        if "neighbour" in plan.parts:
            for name, ratios in measure_neighbour(plan, precision).items():
                found[f"beside_another/{precision}/{name}"] = tell(
                    f"beside another process, {precision}, {name}", ratios
                )
    print(json.dumps(found))
    return 0


def parse(arguments: Sequence[str] | None) -> Plan:
    """The command line. Exits with 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.footprint", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUILT_IN_MODEL, help="of all but the first answer [built-in]")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["bf16"], help="default: bf16")
    parser.add_argument("--streams", type=int, default=64, help="that fill the pool (default: %(default)s)")
    parser.add_argument("--pool-mib", type=int, default=16, help="key/value pool (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="parts that are not measured")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the servers' logs")
    given = parser.parse_args(arguments)
    if min(given.streams, given.pool_mib, given.rounds) < 1:
        parser.error("streams, pool and rounds must be at least 1")
    parts = tuple(part for part in PARTS if part not in given.skip)
    return Plan(given.model, tuple(given.precisions), given.streams, given.pool_mib, given.rounds, parts, given.out)


def first_answer_seconds(plan: Plan) -> float:
    """From the start of the command to a client's first token."""
    started_at = time.monotonic()
    with running_server(plan.out / "footprint-server.log") as server, BlockingClient(server.address) as client:
        client.generate("Once upon a time", max_tokens=1)
        return time.monotonic() - started_at


def measure_memory(plan: Plan, precision: str) -> dict[str, float]:
    """MiB by what takes them, once streams have filled the pool."""
    options = {
        "model": str(plan.model),
        "kv_cache_mib": plan.pool_mib,
        "max_num_seqs": plan.num_streams,
        **PRECISIONS[precision],
    }
    with running_server(plan.out / "footprint-server.log", as_flags({**options, "prefix_cache": False})) as server:
        pool = plan.pool_mib * asyncio.run(fill_pool(plan, server))
        time.sleep(SETTLE_SECONDS)
        engine, front_end = find_child(server, ENGINE), find_child(server, FRONT_END)
        resident = {name: one.memory_info().rss / MIB for name, one in (("engine", engine), ("front end", front_end))}
        supervisor, peak = psutil.Process(server.pid).memory_info().rss / MIB, peak_mib(engine)
    facts = load_model(Settings.model_validate(options))[1]
    weights = facts.weight_bytes / MIB
    beyond = sum(resident.values()) - weights - pool
    return {
        **resident,
        "weights": weights,
        "pool": pool,
        "beyond": beyond,
        "supervisor": supervisor,
        "engine's peak": peak,
    }


async def fill_pool(plan: Plan, server: RunningServer) -> float:
    """Runs the streams to their ends. Returns the largest share of the pool that they held at a time.

    Raises RuntimeError where that is far from all of it.
    """
    vocab_size = json.loads((plan.model / "config.json").read_text())["vocab_size"]
    target, fullest = GrpcTarget(server.address), 0.0
    try:
        running = asyncio.ensure_future(
            target.run(uniform_works(1, plan.num_streams, PROMPT_TOKENS, NEW_TOKENS, vocab_size), use_cache=False)
        )
        while not running.done():
            fullest = max(fullest, await asyncio.to_thread(lambda: server.metrics()["quire_kv_cache_usage_ratio"]))
            await asyncio.wait([running], timeout=LOOK_SECONDS)
        await running
    finally:
        await target.close()
    if fullest < 0.9:
        raise RuntimeError(f"the streams filled {fullest:.0%} of the pool: take more of them, or a smaller one")
    return fullest


def find_child(server: RunningServer, module: str) -> psutil.Process:
    """The server's process that runs this module."""
    return next(one for one in psutil.Process(server.pid).children(recursive=True) if module in one.cmdline())


def peak_mib(process: psutil.Process) -> float:
    """The most that was resident at a time."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure_neighbour(plan: Plan, precision: str) -> dict[str, list[float]]:
    """Speed beside a busy process over speed alone, a ratio for each round, by figure."""
    ratios: dict[str, list[float]] = {}
    for _ in range(plan.rounds):
        for workload, batch in WORKS:
            alone = run_work(plan, precision, workload, batch)
            with busy_process():
                beside = run_work(plan, precision, workload, batch)
            for name, figure in alone.items():
                ratio = figure / beside[name] if name.startswith("ms_") else beside[name] / figure
                ratios.setdefault(f"{workload} at {batch}, {name}", []).append(ratio)
    return ratios


def run_work(plan: Plan, precision: str, workload: str, batch: int) -> dict[str, float]:
    """The bare engine's figures, in a process of its own."""
    job = ["--model", str(plan.model), "--precision", precision, "--workload", workload, "--batch", str(batch)]
    command = [sys.executable, "-m", "loadtest.peers.quire", *job, "--repeat", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["figures"]
    return figures


@contextmanager
def busy_process() -> Iterator[None]:
    """One process that wants a core for itself."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def tell(what: str, values: Sequence[float]) -> dict[str, float]:
    """Prints a line, and gives the figures for the document."""
    print(f"{what}: {median(values):.2f} ({min(values):.2f} to {max(values):.2f})", flush=True)
    return median_and_spread(values)


if __name__ == "__main__":
    sys.exit(main())
