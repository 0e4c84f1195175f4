"""Hugging Face transformers on our workloads: static batches by `generate`, or its continuous batching.

    python -m loadtest.peers.transformers --model DIR --precision bf16|fp32 --workload W1|W2|W3 [--set way=continuous]

Runs in Quire's development environment. It has no 8 bits for a CPU. W5 is left out: a static batch takes no further
prompt. The check of a card (loadtest/gpu/transformers_peer.py) uses `answer_all`, too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from loadtest.peers.runner import Figures, Job, Settings, output_figures, parse, report, single_figures
from loadtest.timing import StreamTimes
from loadtest.workloads import Work

NAME = "transformers"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PADDING = 0
NO_END = -1
"""No token has this id. Continuous batching takes a missing end for the model's own."""
RESULT_SECONDS = 600.0
"""How long to wait for the next answer of continuous batching before giving up."""


class NoAnswer(Exception):
    """The engine ended, went silent, or gave another number of tokens than was asked for."""


def best_settings(workload: str, batch: int) -> Settings:
    """What was fastest: the way, how many requests a static batch has (0: all), the tokens of a continuous step.

    Continuous batching has 0.4 (S) to 0.6 (M) of the rate of `generate` in W2 at 8, and a quarter in W3 (S). Static
    batches of 8 and 16 are equally fast in W3; more requests wait longer for the longest answer.
    """
    return {"way": "generate", "slots": "16" if workload == "W3" else "0", "step_tokens": "512"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one job. Returns the exit code."""
    job = parse(NAME, best_settings, arguments)
    if job.precision not in DTYPES or job.workload == "W5":
        raise SystemExit("transformers runs W1, W2 and W3, in bf16 and fp32")
    torch.set_num_threads(job.threads)
    if job.settings["way"] == "generate":
        runs = run_generate(job)
    elif job.settings["way"] == "continuous" and job.workload != "W1":
        runs = run_continuous(job)
    else:
        raise SystemExit("way is generate, or continuous for W2 and W3")
    report(NAME, f"{transformers.__version__}, torch {torch.__version__}", job, runs)
    return 0


def load(job: Job) -> Any:
    """The model, which no token ends."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=DTYPES[job.precision], attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    return model.eval()


def run_generate(job: Job) -> list[Figures]:
    """Static batches, one after the other."""
    model, works = load(job), job.works()
    generate(model, job.warm_up())
    if job.workload == "W1":
        return [measure_single(model, works[0]) for _ in range(job.repeat)]
    parts = static_batches(works, int(job.settings["slots"]) or len(works))
    return [measure_batches(model, parts) for _ in range(job.repeat)]


def static_batches(works: Sequence[Work], slots: int) -> list[Sequence[Work]]:
    """So many requests each, sorted: a batch takes as long as its longest answer."""
    ordered = sorted(works, key=lambda work: work.num_new)
    return [ordered[first : first + slots] for first in range(0, len(ordered), slots)]


def measure_batches(model: Any, parts: Sequence[Sequence[Work]]) -> Figures:
    """Times batches; only tokens that were asked for count."""
    begun_at = time.monotonic()
    num_tokens = sum(len(token_ids) for works in parts for token_ids in generate(model, works))
    return output_figures(num_tokens, time.monotonic() - begun_at)


def measure_single(model: Any, work: Work) -> Figures:
    """Times one request, token by token."""
    clock = Clock(work)
    generate(model, [work], clock)
    ttft_seconds = clock.times.ttft_seconds
    return single_figures(len(work.prompt), work.num_new, ttft_seconds, clock.times.e2e_seconds - ttft_seconds)


class Clock:
    """A streamer for `generate`: notes when the tokens of a single request come."""

    def __init__(self, work: Work) -> None:
        self.times = StreamTimes(time.monotonic(), len(work.prompt))

    def put(self, token_ids: torch.Tensor) -> None:
        """The prompt, [1, T], before the first step; the new token, [1], after each."""
        if token_ids.ndim == 1:
            self.times.arrived(time.monotonic(), 1)

    def end(self) -> None:
        """After the last token."""
        self.times.ended_at = time.monotonic()


def generate(model: Any, works: Sequence[Work], streamer: Clock | None = None) -> list[list[int]]:
    """Token ids of the answers of one batch, padded on the left. Raises NoAnswer if they are too short."""
    num_prompt, num_new = max(len(work.prompt) for work in works), max(work.num_new for work in works)
    num_padding = [num_prompt - len(work.prompt) for work in works]
    found = model.generate(
        torch.tensor([[PADDING] * count + [*work.prompt] for work, count in zip(works, num_padding, strict=True)]),
        attention_mask=torch.tensor([[0] * count + [1] * (num_prompt - count) for count in num_padding]),
        do_sample=False,
        max_new_tokens=num_new,
        pad_token_id=PADDING,
        streamer=streamer,
    )
    if found.shape[1] != num_prompt + num_new:
        raise NoAnswer(f"{found.shape[1] - num_prompt} tokens came; {num_new} were asked for")
    return [row[num_prompt : num_prompt + work.num_new] for row, work in zip(found.tolist(), works, strict=True)]


def run_continuous(job: Job) -> list[Figures]:
    """Continuous batching, without its prefix cache; pages for all requests at once."""
    model, works = load(job), job.works()
    page_size = ContinuousBatchingConfig.page_size
    settings = {
        "generation_config": GenerationConfig(do_sample=False, eos_token_id=NO_END, pad_token_id=PADDING),
        "continuous_batching_config": ContinuousBatchingConfig(
            allow_block_sharing=False,
            num_blocks=sum((len(work.prompt) + work.num_new) // page_size + 1 for work in works),
            max_batch_tokens=int(job.settings["step_tokens"]),
        ),
    }
    with model.continuous_batching_context_manager(**settings) as manager:
        answer_all(manager, job.warm_up())
        return [measure_continuous(manager, works) for _ in range(job.repeat)]


def measure_continuous(manager: Any, works: Sequence[Work]) -> Figures:
    """Times requests that begin together."""
    begun_at = time.monotonic()
    num_tokens = answer_all(manager, works)
    return output_figures(num_tokens, time.monotonic() - begun_at)


def answer_all(manager: Any, works: Sequence[Work]) -> int:
    """Answers requests that begin together. Returns how many tokens came; raises NoAnswer."""
    for work in works:
        manager.add_request(list(work.prompt), max_new_tokens=work.num_new, eos_token_id=NO_END)
    num_tokens = 0
    for _ in works:
        answer = manager.get_result(timeout=RESULT_SECONDS)
        if answer is None:
            raise NoAnswer("no answer came: the engine has ended, or takes too long")
        if answer.error is not None:
            raise NoAnswer(str(answer.error))
        num_tokens += len(answer.generated_tokens)
    if num_tokens != sum(work.num_new for work in works):
        raise NoAnswer(f"{num_tokens} tokens came; {sum(work.num_new for work in works)} were asked for")
    return num_tokens


if __name__ == "__main__":
    sys.exit(main())
