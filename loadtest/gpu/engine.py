"""The bare engine on a card: W1 to W5 (loadtest/gpu/works.py), token ids in and out, prefix cache off but in W4.

python -m loadtest.gpu.engine --records FILE --model 8B --models DIR
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from loadtest.gpu.limits import rates_of
from loadtest.gpu.records import PartOptions, parse_part
from loadtest.gpu.shapes import cost_of, shape_of
from loadtest.gpu.steps import PRECISION, check_backend
from loadtest.gpu.summary import OURS
from loadtest.gpu.works import (
    CARD,
    DRY,
    LEAST_SECONDS,
    W2N_TEMPERATURE,
    closed_works,
    long_work,
    sharing_works,
    streams,
    wide_works,
)
from loadtest.peers.quire import figures, measure_stall
from loadtest.roofline import least_figures, least_time
from loadtest.targets import EngineTarget
from loadtest.timing import busy_seconds, percentiles_ms
from loadtest.workloads import Work
from service.config import Settings

REPEATS = 3


def options_of(options: PartOptions) -> dict[str, Any]:
    """The server's settings on a card, defaults but for its size."""
    tuned = {"max_num_seqs": 256, "max_batch_tokens": 8192, "context_length": 40_960}
    if options.is_dry:
        tuned = {"max_num_seqs": 8, "max_batch_tokens": 64, "num_blocks": 64}
    return {"model": str(options.models / options.model), "dtype": "bfloat16", **tuned}


class Workloads:
    """One model's workloads, each written as it is done."""

    def __init__(self, options: PartOptions) -> None:
        self._options = options
        self._sizes = DRY if options.is_dry else CARD
        self._target = EngineTarget(Settings.model_validate(options_of(options)))
        self._vocab_size = self._target.facts.vocab_size
        check_backend(self._target.facts, options.is_dry)

    def closed(self) -> None:
        """W1, W2 and W3."""
        for (workload, batch), works in closed_works(self._sizes, self._vocab_size).items():
            runs = [self._run(works) for _ in range(1 if self._options.is_dry else REPEATS)]
            found = {key: median([run[key] for run in runs]) for key in runs[0]}
            limits = self._limits(workload, works)
            rate = "output_tokens_per_second"
            self._write(workload, batch, **found, share=found[rate] / limits[rate])

    def wide(self) -> None:
        """W2n."""
        works = wide_works(self._sizes, self._vocab_size)
        self._write("W2n", len(works), **self._run(works, W2N_TEMPERATURE))

    def sharing(self) -> None:
        """W4, cold and then warm."""
        works = sharing_works(self._sizes, self._vocab_size)
        for state in ("cold", "warm"):
            answers = asyncio.run(self._target.run(works, use_cache=True))
            ttfts = percentiles_ms([answer.times.ttft_seconds for answer in answers])
            rate = sum(work.num_new for work in works) / busy_seconds([answer.times for answer in answers])
            self._write("W4", len(works), prefix=state, ttft_ms=ttfts, output_tokens_per_second=rate)

    def long(self) -> None:
        """W5, alone and among streams."""
        for num_tokens in self._sizes.long_prompts:
            work = long_work(num_tokens, self._vocab_size)
            alone = [self._ttft_ms(work) for _ in range(1 if self._options.is_dry else REPEATS)]
            stalled = measure_stall(self._target, streams(self._sizes, self._vocab_size), work)
            self._write("W5", self._sizes.num_streams, prompt=num_tokens, alone_ttft_ms=median(alone), **stalled)

    def _ttft_ms(self, work: Work) -> float:
        (answer,) = asyncio.run(self._target.run([work], use_cache=False))
        return 1_000 * answer.times.ttft_seconds

    def _run(self, works: Sequence[Work], temperature: float = 0.0) -> dict[str, float]:
        return figures(asyncio.run(self._target.run(works, use_cache=False, temperature=temperature)))

    def _limits(self, workload: str, works: Sequence[Work]) -> dict[str, float]:
        cost = cost_of(shape_of(self._options.model, self._options.is_dry))
        return least_figures(workload, least_time(cost, rates_of(self._options), PRECISION, works), works)

    def _write(self, workload: str, batch: int, **found: Any) -> None:
        self._options.records.write(
            "workload", engine=OURS, model=self._options.model, workload=workload, batch=batch, **found
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes. Returns the exit code: 1 where the time was too short for all."""
    options = parse_part("engine", arguments)
    workloads = Workloads(options)
    for measure in (workloads.closed, workloads.sharing, workloads.long, workloads.wide):
        if options.left() < LEAST_SECONDS:
            print(f"no time is left for {measure.__name__}")
            return 1
        measure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
