"""How long device work takes: medians over replays of a captured graph, between events, each measured twice.

It does not know what is measured. A call reads one of several sets of inputs, so that what the last cache holds from
the call before is not what the next one reads. On a CPU the same code runs each call once: its times mean nothing.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from loadtest.gpu.card import L2_BYTES

Call = Callable[[], object]

MAX_SETS = 48
REPLAY_SECONDS = 0.002
"""Of one replay, at least, about: what lies between two of them must not count."""
MAX_CALLS = 64
"""Of one graph, unless there are more sets of inputs."""
BUDGET_SECONDS = 0.04
"""Of one measurement, about."""
REPLAYS = 5, 50
"""At least, at most."""
CACHES = 3
"""How many times the size of the last cache the inputs of a measurement are together."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What a call takes."""

    seconds: float
    """The smaller of two medians."""
    noise: float
    """How much larger the other one was, as a share: differences below it are none."""


def open_device(is_dry: bool) -> torch.device:
    """Where a part computes."""
    return torch.device("cpu" if is_dry else "cuda")


def num_programs(device: torch.device, per_multiprocessor: int) -> int:
    """A constant grid for a card."""
    if device.type == "cpu":
        return 2
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count


def num_sets(num_bytes: float, device: torch.device) -> int:
    """Sets of inputs of so many bytes, so that the cache does not hold them all."""
    if device.type == "cpu":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", L2_BYTES)
    return max(1, min(MAX_SETS, math.ceil(CACHES * cache / num_bytes)))


def random_tensor(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Normal numbers: zeros would need less power, and with it less time."""
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=scale)


def unwritten(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Room for results that shows where nothing was written."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64; not a number if anything found is none."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm())


def measure(calls: Sequence[Call], device: torch.device) -> Timing:
    """The time of one of the calls, which do the same work on sets of inputs of their own."""
    once = _timed_once if device.type == "cpu" else _replayed
    first, second = once(calls), once(calls)
    return Timing(min(first, second), abs(first - second) / min(first, second))


def _timed_once(calls: Sequence[Call]) -> float:
    started_at = time.perf_counter()
    calls[0]()
    return time.perf_counter() - started_at


def _replayed(calls: Sequence[Call]) -> float:
    """The median, over replays, of a replay's time by the number of its calls."""
    calls = list(calls) * num_repeats(_warmed_up(calls[0]), len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    fewest, most = REPLAYS
    replays = max(fewest, min(most, int(BUDGET_SECONDS / _between_events(graph.replay))))
    return median(_between_events(graph.replay) for _ in range(replays)) / len(calls)


def num_repeats(seconds: float, num_calls: int) -> int:
    """How often a graph has each of its calls, of which one takes about so long."""
    wanted = min(MAX_CALLS, REPLAY_SECONDS / max(seconds, 1e-6))
    return max(1, math.ceil(wanted / num_calls))


def _warmed_up(call: Call) -> float:
    """Compiles, and lets libraries take their workspaces, on a stream as captures have. Returns a call's seconds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        seconds = _between_events(call)
    torch.cuda.current_stream().wait_stream(stream)
    return seconds


def _between_events(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1_000


def compile_ahead(calls: Sequence[Call], seconds: float) -> None:
    """Runs calls that launch kernels, in as many processes as there are CPUs, so that Triton keeps what it compiles.

    Must be called before this process has touched the card: a fork cannot use it after that. A call that fails says so
    when it is measured.
    """
    assert not torch.cuda.is_initialized()
    fork = multiprocessing.get_context("fork")
    num_processes = min(len(calls), len(os.sched_getaffinity(0)))
    processes = [fork.Process(target=_run_all, args=(calls[i::num_processes],)) for i in range(num_processes)]
    deadline = time.monotonic() + seconds
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        try:
            call()
        except Exception as error:
            print(f"compiling ahead: {type(error).__name__}: {error}", flush=True)
