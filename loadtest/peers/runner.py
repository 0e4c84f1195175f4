"""What all runners share: the command line, the figures of a run, and the JSON line at the end. Standard library only.

A runner answers the requests of one workload with one engine. Its `--set KEY=VALUE` are the engine's own settings; the
defaults are the best that were found for the workload.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from loadtest.peers.works import DEFAULT_BATCH, WORKLOADS, long_prompt, warm_up_of, works_of
from loadtest.timing import StreamTimes
from loadtest.workloads import Work

PRECISIONS = ("bf16", "int8", "fp32")
WORK = Path(os.environ.get("PEERS") or Path(__file__).parent / "work")
"""Where install.sh puts the peers, and models lie."""

Figures = dict[str, float]
Settings = dict[str, str]


@dataclass(frozen=True, slots=True)
class Job:
    """One measurement by one engine."""

    model: Path
    precision: str
    workload: str
    batch: int
    threads: int
    repeat: int
    settings: Settings

    @property
    def vocab_size(self) -> int:
        """Of the model, from its config.json."""
        size: int = json.loads((self.model / "config.json").read_text())["vocab_size"]
        return size

    def works(self) -> list[Work]:
        """The requests that begin together."""
        return works_of(self.workload, self.batch, self.vocab_size)

    def warm_up(self) -> list[Work]:
        """Requests to run before the clock does."""
        return warm_up_of(self.works())

    def long_prompt(self) -> Work:
        """What W5 sends among the streams."""
        return long_prompt(self.vocab_size)

    def context(self) -> int:
        """Positions that the longest request takes."""
        works = [*self.works(), *([self.long_prompt()] if self.workload == "W5" else [])]
        return max(len(work.prompt) + work.num_new for work in works)


def parse(peer: str, defaults: Callable[[str, int], Settings], arguments: Sequence[str] | None = None) -> Job:
    """Reads a command line. `defaults` gives the settings of a workload and batch. Exits with 2 for mistakes."""
    parser = argparse.ArgumentParser(prog=f"python -m loadtest.peers.{peer}")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of the model")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the weights (default: %(default)s)")
    parser.add_argument("--workload", choices=WORKLOADS, required=True, help="see loadtest/peers/works.py")
    parser.add_argument("--batch", type=int, help="requests at once; W1 has one (default: 8 in W2, 64 in W3, 16 in W5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=1, help="measurements after warming up (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the engine")
    given = parser.parse_args(arguments)
    batch = given.batch or DEFAULT_BATCH[given.workload]
    if min(batch, given.threads, given.repeat) < 1 or (given.workload == "W1" and batch != 1):
        parser.error("batch, threads and repeat must be at least 1, and the batch of W1 is 1")
    settings = defaults(given.workload, batch)
    for pair in given.set:
        key, equals, value = pair.partition("=")
        if not equals or key not in settings:
            parser.error(f"--set {pair}: not one of {', '.join(f'{known}=...' for known in settings)}")
        settings[key] = value
    return Job(given.model, given.precision, given.workload, batch, given.threads, given.repeat, settings)


def output_figures(num_tokens: int, seconds: float) -> Figures:
    """Of requests that began together: from the first request to the last token."""
    return {"output_tokens_per_second": num_tokens / seconds}


def single_figures(num_prompt: int, num_new: int, ttft_seconds: float, decode_seconds: float) -> Figures:
    """Of W1; decoding is from the first token to the last."""
    return {
        "ms_per_token": 1_000 * decode_seconds / (num_new - 1),
        "prefill_tokens_per_second": num_prompt / ttft_seconds,
    } | output_figures(num_new, ttft_seconds + decode_seconds)


def stall_figures(streams: Sequence[StreamTimes], long: StreamTimes) -> Figures:
    """Of W5: the long prompt's TTFT, and the longest gap of any stream that overlaps it, beside the usual one."""
    begin, end = long.sent_at, long.arrivals[0][0]
    during: list[float] = []
    before: list[float] = []
    for stream in streams:
        times = [when for when, _ in stream.arrivals]
        for left, right in pairwise(times):
            if right <= begin:
                before.append(right - left)
            elif left < end:
                during.append(right - left)
    return {
        "ttft_ms": 1_000 * long.ttft_seconds,
        "longest_gap_ms": 1_000 * max(during),
        "usual_gap_ms": 1_000 * median(before),
    }


def document(peer: str, version: str, job: Job, runs: Sequence[Figures]) -> dict[str, object]:
    """What a runner found: each figure's median over its runs."""
    return {
        "peer": peer,
        "version": version,
        "model": job.model.resolve().name,
        "precision": job.precision,
        "workload": job.workload,
        "batch": job.batch,
        "threads": job.threads,
        "settings": dict(job.settings),
        "figures": {key: round(median([run[key] for run in runs]), 4) for key in runs[0]},
    }


def report(peer: str, version: str, job: Job, runs: Sequence[Figures]) -> None:
    """Prints the document as the last line."""
    print(json.dumps(document(peer, version, job, runs)), flush=True)
