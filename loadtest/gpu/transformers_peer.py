"""Hugging Face's continuous batching on the same work and card: the peer that is in every image.

    python -m loadtest.gpu.transformers_peer --records FILE --model 8B --models DIR

It gets what it chooses itself (attention, graphs, its cache's size); its prefix cache is off. Answers are greedy, ends
ignored.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from loadtest.gpu.measure import open_device
from loadtest.gpu.records import PartOptions, parse_part
from loadtest.gpu.summary import PEER
from loadtest.gpu.works import CARD, DRY, LEAST_SECONDS, closed_works
from loadtest.peers.transformers import NO_END, answer_all
from loadtest.workloads import Work

CONFIG = ContinuousBatchingConfig(allow_block_sharing=False)
DRY_CONFIG = ContinuousBatchingConfig(allow_block_sharing=False, num_blocks=16, max_batch_tokens=64)
"""On a CPU it would take most of the memory."""
WARM_UP_TOKENS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes. Returns the exit code: 1 where the time was too short for all."""
    options = parse_part("transformers_peer", arguments)
    model = load(options)
    works = closed_works(DRY if options.is_dry else CARD, model.config.vocab_size)
    most = max(work.num_new for requests in works.values() for work in requests)
    settings = {
        "generation_config": GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=NO_END),
        "continuous_batching_config": DRY_CONFIG if options.is_dry else CONFIG,
    }
    with torch.no_grad(), model.continuous_batching_context_manager(**settings) as manager:
        # The largest batches first: they tell most, should the time be short.
        for (workload, batch), requests in sorted(works.items(), key=lambda entry: -entry[0][1]):
            if options.left() < LEAST_SECONDS:
                print(f"no time is left for {workload} at {batch}")
                return 1
            options.records.write(
                "workload",
                engine=PEER,
                version=transformers.__version__,
                model=options.model,
                workload=workload,
                batch=batch,
                output_tokens_per_second=tokens_per_second(manager, requests),
            )
    return 0


def load(options: PartOptions) -> Any:
    """The model on the device."""
    folder = options.models / options.model
    started_at = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.to(open_device(options.is_dry)).eval()
    options.records.write("loaded", engine=PEER, model=options.model, seconds=time.monotonic() - started_at)
    return model


def tokens_per_second(manager: Any, works: Sequence[Work]) -> float:
    """Output from the first request to the last answer, after a short round that captures. Raises NoAnswer."""
    answer_all(manager, [Work(work.prompt, min(work.num_new, WARM_UP_TOKENS)) for work in works])
    started_at = time.perf_counter()
    num_tokens = answer_all(manager, works)
    return num_tokens / (time.perf_counter() - started_at)


if __name__ == "__main__":
    sys.exit(main())
