"""OpenVINO GenAI's continuous batching on our workloads. Runs in its own environment; see README.md beside it.

    PYTHON -m loadtest.peers.openvino --model DIR --precision bf16|int8|fp32 --workload W1|W2|W3|W5

The model's directory must hold openvino/fp16 and, for 8 bits (weights alone, asymmetric per channel), openvino/int8.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai

from loadtest.peers.runner import Figures, Job, Settings, output_figures, parse, report, single_figures, stall_figures
from loadtest.peers.works import SETTLED_TOKENS
from loadtest.timing import StreamTimes
from loadtest.workloads import Work

NAME = "openvino"
FOLDERS = {"bf16": "fp16", "fp32": "fp16", "int8": "int8"}


def best_settings(workload: str, batch: int) -> Settings:
    """What was fastest: tokens of a step, the cache's precision, and of the arithmetic (empty: the job's own).

    In W5 steps of 256 tokens halve the streams' wait and leave the long prompt's as it is.
    """
    step_tokens = 256 if workload == "W5" else 512
    return {"step_tokens": str(step_tokens), "kv": "u8", "hint": "", "cache_gb": "4", "split": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one job. Returns the exit code."""
    job = parse(NAME, best_settings, arguments)
    engine = Engine(job)
    engine.answer(job.warm_up())
    if job.workload == "W1":
        engine.answer(job.works())  # its first long decode is slower than those that follow
    runs = [engine.measure_stall(job) if job.workload == "W5" else engine.measure(job) for _ in range(job.repeat)]
    report(NAME, openvino_genai.__version__, job, runs)
    return 0


def scheduler_config(job: Job) -> Any:
    """The scheduler's options, without its prefix cache."""
    config = openvino_genai.SchedulerConfig()
    config.enable_prefix_caching = False
    config.cache_size = int(job.settings["cache_gb"])
    config.max_num_seqs = 256
    config.max_num_batched_tokens = int(job.settings["step_tokens"])
    config.dynamic_split_fuse = job.settings["split"] == "1"
    return config


def device_properties(job: Job) -> dict[str, Any]:
    """The CPU plugin's options."""
    hint = job.settings["hint"] or {"fp32": "f32"}.get(job.precision, "bf16")
    properties = {"INFERENCE_NUM_THREADS": job.threads, "INFERENCE_PRECISION_HINT": hint}
    return properties | ({"KV_CACHE_PRECISION": job.settings["kv"]} if job.settings["kv"] else {})


def generation_config(num_new: int) -> Any:
    """Greedy, and exactly so many tokens."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = num_new
    config.ignore_eos = True
    config.do_sample = False
    return config


class Engine:
    """The pipeline, driven step by step."""

    def __init__(self, job: Job) -> None:
        folder = job.model / "openvino" / FOLDERS[job.precision]
        scheduler, properties = scheduler_config(job), device_properties(job)
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)
        self._num_added = 0

    def answer(self, works: Sequence[Work]) -> list[StreamTimes]:
        """Times of requests that begin together. Raises RuntimeError if one is not as long as was asked for."""
        streams = [Stream(*self._add(work)) for work in works]
        for now in self._steps():
            for stream in streams:
                stream.read(now)
        if [stream.times.num_tokens for stream in streams] != [work.num_new for work in works]:
            raise RuntimeError("not as many tokens as were asked for")
        return [stream.times for stream in streams]

    def measure(self, job: Job) -> Figures:
        """Figures of requests that begin together."""
        works = job.works()
        begun_at = time.monotonic()
        streams = self.answer(works)
        seconds = time.monotonic() - begun_at
        if len(works) > 1:
            return output_figures(sum(work.num_new for work in works), seconds)
        [stream], [work] = streams, works
        return single_figures(len(work.prompt), work.num_new, stream.ttft_seconds, seconds - stream.ttft_seconds)

    def measure_stall(self, job: Job) -> Figures:
        """W5. Raises RuntimeError when the streams ended before the long prompt's token."""
        streams = [Stream(*self._add(work)) for work in job.works()]
        injected: Stream | None = None
        for now in self._steps():
            for stream in streams:
                stream.read(now)
            if injected is None and all(stream.times.num_tokens >= SETTLED_TOKENS for stream in streams):
                injected = Stream(*self._add(job.long_prompt()))
            elif injected is not None and injected.read(now):
                for stream in streams:
                    stream.handle.cancel()
                break
        for _ in self._steps():
            pass  # until the cancelled are gone
        if injected is None or not injected.times.num_tokens:
            raise RuntimeError("the streams ended before the long prompt's token")
        return stall_figures([stream.times for stream in streams], injected.times)

    def _add(self, work: Work) -> tuple[Any, Work]:
        self._num_added += 1
        prompt = openvino.Tensor(np.array([work.prompt], np.int64))
        return self._pipeline.add_request(self._num_added, prompt, generation_config(work.num_new)), work

    def _steps(self) -> Iterator[float]:
        """Steps until nothing is left, as the time after each."""
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            yield time.monotonic()


class Stream:
    """One request's handle and times."""

    def __init__(self, handle: Any, work: Work) -> None:
        self.handle = handle
        self.times = StreamTimes(time.monotonic(), len(work.prompt))

    def read(self, now: float) -> bool:
        """Takes what there is; whether there was something."""
        if not self.handle.can_read():
            return False
        outputs = self.handle.read()
        self.times.arrived(now, sum(len(output.generated_ids) for output in outputs.values()))
        return True


if __name__ == "__main__":
    sys.exit(main())
