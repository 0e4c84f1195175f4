"""Quire itself on the peers' workloads, prefix cache off: the bare engine, or a server through gRPC.

python -m loadtest.peers.quire --model DIR --precision bf16|int8|fp32 --workload W1|W2|W3|W5 [--set way=grpc]
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

from loadtest.machine import OUT, commit
from loadtest.peers.runner import Figures, Job, output_figures, parse, report, single_figures, stall_figures
from loadtest.peers.runner import Settings as RunnerSettings
from loadtest.peers.works import SETTLED_TOKENS
from loadtest.server import running_server
from loadtest.targets import Answer, EngineTarget, GrpcTarget
from loadtest.timing import StreamTimes, busy_seconds
from loadtest.workloads import Work
from model.interface import CPU_BLOCK_SIZE
from service.config import Settings

NAME = "quire"
PRECISIONS: dict[str, dict[str, str]] = {
    "bf16": {"dtype": "bfloat16"},
    "fp32": {"dtype": "float32"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
}
DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}


POLL_SECONDS = 0.005
UNHURRIED_MS = "1000"
"""No peer shortens prompts' parts for the sake of running streams; where only throughput counts, neither do we."""


def best_settings(workload: str, batch: int) -> RunnerSettings:
    """The way, and what bears on speed: the server's own defaults, but for the inter-token target of W2 and W3."""
    settings = {name: str(DEFAULTS[name]) for name in ("max_batch_tokens", "target_itl_ms", "cpu_level")}
    settings["block_size"] = str(CPU_BLOCK_SIZE)
    if workload in ("W2", "W3"):
        settings["target_itl_ms"] = UNHURRIED_MS
    return {"way": "engine"} | settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one job. Returns the exit code."""
    job = parse(NAME, best_settings, arguments)
    if job.settings["way"] == "engine":
        runs = run_engine(job)
    elif job.settings["way"] == "grpc":
        runs = asyncio.run(run_grpc(job))
    else:
        raise SystemExit("way is engine or grpc")
    report(NAME, commit(), job, runs)
    return 0


def options_of(job: Job) -> dict[str, Any]:
    """The server's settings for a job: its precision, and a key/value pool in which all requests have room."""
    block_size = int(job.settings["block_size"])
    works = [*job.works(), *([job.long_prompt()] if job.workload == "W5" else [])]
    tuned = {name: value for name, value in job.settings.items() if name != "way"}
    return {
        "model": str(job.model),
        "threads": job.threads,
        "max_num_seqs": max(len(works), int(DEFAULTS["max_num_seqs"])),
        "num_blocks": sum(ceil((len(work.prompt) + work.num_new) / block_size) + 1 for work in works),
        "prefix_cache": False,
        **PRECISIONS[job.precision],
        **tuned,
    }


def as_flags(options: dict[str, Any]) -> list[str]:
    """The same settings on the server's command line."""
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def run_engine(job: Job) -> list[Figures]:
    """The engine in this process."""
    target = EngineTarget(Settings.model_validate(options_of(job)))
    asyncio.run(target.run(job.warm_up(), use_cache=False))
    runs = []
    for _ in range(job.repeat):
        if job.workload == "W5":
            runs.append(measure_stall(target, job.works(), job.long_prompt()))
        else:
            runs.append(figures(asyncio.run(target.run(job.works(), use_cache=False))))
    return runs


async def run_grpc(job: Job) -> list[Figures]:
    """A server in its own processes, and a client in this one."""
    with running_server(OUT / "peers-server.log", as_flags(options_of(job))) as server:
        target = GrpcTarget(server.address)
        try:
            await target.run(job.warm_up(), use_cache=False)
            if job.workload == "W5":
                return [await measure_client_stall(target, job.works(), job.long_prompt()) for _ in range(job.repeat)]
            return [figures(await target.run(job.works(), use_cache=False)) for _ in range(job.repeat)]
        finally:
            await target.close()


def figures(answers: Sequence[Answer]) -> Figures:
    """Of requests that began together; more of a single one."""
    streams = [answer.times for answer in answers]
    seconds, num_tokens = busy_seconds(streams), sum(stream.num_tokens for stream in streams)
    if len(streams) > 1:
        return output_figures(num_tokens, seconds)
    ttft_seconds = streams[0].ttft_seconds
    return single_figures(streams[0].num_prompt, num_tokens, ttft_seconds, seconds - ttft_seconds)


def measure_stall(target: EngineTarget, works: Sequence[Work], long_work: Work) -> Figures:
    """W5, in the engine's loop: a long prompt among streams that must outlast it."""
    streams = dict(target.submit(work, use_cache=False) for work in works)
    while any(answer.times.num_tokens < SETTLED_TOKENS for answer in streams.values()):
        target.step(streams)
    long_id, long = target.submit(long_work, use_cache=False)
    everything = {**streams, long_id: long}
    while not long.times.arrivals:
        target.step(everything)
    ended = [
        answer for answer, work in zip(streams.values(), works, strict=True) if answer.times.num_tokens >= work.num_new
    ]
    assert not ended, "a stream ended too early"
    target.cancel(streams)
    return stall_figures([answer.times for answer in streams.values()], long.times)


async def measure_client_stall(target: GrpcTarget, works: Sequence[Work], long_work: Work) -> Figures:
    """W5, at the client: the gaps are between deltas. Raises RuntimeError when a stream ends before it is cancelled."""
    answers = [Answer(StreamTimes(time.monotonic(), len(work.prompt)), []) for work in works]
    tasks = [
        asyncio.create_task(target.read(answer, work, use_cache=False))
        for answer, work in zip(answers, works, strict=True)
    ]

    async def until(holds: Callable[[StreamTimes], bool]) -> None:
        while not all(holds(answer.times) for answer in answers):
            await asyncio.sleep(POLL_SECONDS)
            for task in tasks:
                if task.done():
                    raise RuntimeError("a stream ended too early") from task.exception()

    try:
        await until(is_settled)
        long = await target.answer(long_work, use_cache=False)
        # A delta brings what several steps made: the gap in which the prompt's token came has yet to end.
        await until(lambda times: times.arrivals[-1][0] > long.times.ended_at)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return stall_figures([answer.times for answer in answers], long.times)


def is_settled(times: StreamTimes) -> bool:
    """Whether a stream of W5 has come so far that the long prompt may be sent; it has a gap by then, too."""
    return times.num_tokens >= SETTLED_TOKENS and len(times.arrivals) > 1


if __name__ == "__main__":
    sys.exit(main())
