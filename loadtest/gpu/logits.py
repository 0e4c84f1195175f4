"""A model's logits on a card against those of the same weights in float32, by torch's operators on the CPU.

    python -m loadtest.gpu.logits --records FILE --model 8B --models DIR

Each prompt's first token is drawn with the log-probabilities of the most likely ones; those that both name are
compared. It does not know how either computes them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from loadtest.gpu.records import PartOptions, parse_part
from loadtest.gpu.shapes import shape_of
from loadtest.gpu.steps import check_backend, prompt_rows
from loadtest.workloads import uniform_works
from model.interface import Admission, Backend, Batch, Dtype, Runner, RunnerOptions, Sampling
from model.runner import load_runner

PROMPTS = (1, 17, 64)
MAX_BATCH_TOKENS = 64
NUM_TOLD = 64
TOLERANCE = 0.2
"""Of a log-probability. On a CPU, bfloat16 costs 0.09 at most in a model of 1B's layers and widths."""

Told = Mapping[int, float]
"""Log-probabilities by token."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares and writes. Returns the exit code."""
    options = parse_part("logits", arguments)
    vocab_size = shape_of(options.model, options.is_dry).vocab_size
    prompts = [uniform_works(seed, 1, length, 1, vocab_size)[0].prompt for seed, length in enumerate(PROMPTS)]
    found = tell(options, prompts, Dtype.BFLOAT16, Backend.AUTO)
    expected = tell(options, prompts, Dtype.FLOAT32, Backend.TORCH)
    for prompt, mine, theirs in zip(prompts, found, expected, strict=True):
        shared = mine.keys() & theirs.keys()
        error = max((abs(mine[token_id] - theirs[token_id]) for token_id in shared), default=float("inf"))
        options.records.write(
            "logits",
            model=options.model,
            tokens=len(prompt),
            shared=len(shared) / NUM_TOLD,
            largest_error=error,
            is_right=len(shared) >= NUM_TOLD // 2 and error <= TOLERANCE,
        )
    return 0


def tell(options: PartOptions, prompts: Sequence[Sequence[int]], dtype: Dtype, backend: Backend) -> list[Told]:
    """What a runner of its own says of each prompt. Raises ValueError where AUTO is not the card."""
    runner, facts = load_runner(
        RunnerOptions(
            model_dir=str(options.models / options.model),
            dtype=dtype,
            backend=backend,
            max_num_seqs=1,
            max_batch_tokens=MAX_BATCH_TOKENS,
            context_length=2 * MAX_BATCH_TOKENS,
        )
    )
    if backend is Backend.AUTO:
        check_backend(facts, options.is_dry)
    return [tell_of(runner, prompt) for prompt in prompts]


def tell_of(runner: Runner, prompt: Sequence[int]) -> Told:
    """The log-probabilities behind one prompt."""
    admission = Admission(prompt, len(prompt), Sampling(temperature=0.0, num_logprobs=NUM_TOLD))
    blocks = range(-(-len(prompt) // runner.shape.block_size))
    (row,) = prompt_rows(0, blocks, admission, MAX_BATCH_TOKENS)
    (told,) = runner.launch(Batch([row], len(prompt))).result().logprobs
    return {} if told is None else dict(zip(told.top_ids, told.top_logprobs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
