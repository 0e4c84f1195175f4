"""Draws on a card: greedy, with a temperature, with filters and penalties, against one reading of the logits.

    python -m loadtest.gpu.sampler --records FILE

Logits are those of a sure model more than of noise: normal with a deviation of 3, in float32 as a step gives them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from loadtest.gpu.limits import rates_of
from loadtest.gpu.measure import Call, compile_ahead, measure, num_sets, open_device, random_tensor
from loadtest.gpu.records import parse_part
from model.gpu.penalties import Changes, apply_penalties
from model.gpu.sampler import DrawParameters, Workspace, draw
from model.interface import Admission, Sampling
from model.sampling import Sampler
from model.transformer import Logits

VOCAB_SIZE = 128_256
DRY_VOCAB_SIZE = 300
BATCHES = (1, 8, 32, 64, 128, 256)
DRY_BATCHES = (2,)
PROMPT = tuple(16 + i % 64 for i in range(1024))
"""Of every slot; the penalties weigh its tokens."""
POSITION = len(PROMPT)
DEVIATION = 3.0
CHECKED_ROWS = 4
MAX_DIFFERENT = 1
"""Rows that may draw otherwise than the CPU: where two quantities differ by less than 1e-5 of themselves."""
COMPILE_SECONDS = 25.0
WAYS = {
    "greedy": Sampling(temperature=0.0),
    "temperature": Sampling(temperature=0.8),
    "top_k": Sampling(temperature=0.8, top_k=50),
    "top_p": Sampling(temperature=0.8, top_p=0.9),
    "top_k and top_p": Sampling(temperature=0.8, top_k=50, top_p=0.9),
    "penalties": Sampling(temperature=0.8, repetition_penalty=1.1, frequency_penalty=0.2),
}
DRY_WAYS = "greedy", "top_k and top_p", "penalties"


class Slots:
    """As many slots as rows, all drawn from in one way, with seeds of their own."""

    def __init__(self, sampling: Sampling, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.samplings = [replace(sampling, seed=seed) for seed in range(num_rows)]
        self._has_penalties = sampling.repetition_penalty != 1.0
        self._parameters = DrawParameters.empty(num_rows, vocab_size, str(device))
        self._workspace = Workspace.empty(num_rows, vocab_size, str(device))
        self._changes = Changes.empty(num_rows, vocab_size, 1, 1, str(device))
        for slot, each in enumerate(self.samplings):
            self._parameters.admit(slot, each)
            self._changes.admit(slot, Admission(PROMPT, len(PROMPT), each))
        self._slots = torch.arange(num_rows, dtype=torch.int32, device=device)
        self._positions = torch.full_like(self._slots, POSITION)
        self.token_ids = torch.full_like(self._slots, -1)
        self._is_finite = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def draw(self, logits_RV: Tensor) -> None:
        """Draws from the logits, which penalties change in place, as in a step."""
        if self._has_penalties:
            apply_penalties(logits_RV, self._slots, self._positions, self._changes)
        out = self.token_ids, self._is_finite
        draw(logits_RV, self._slots, self._positions, self._parameters, self._workspace, *out)

    def num_different(self, logits_RV: Tensor) -> int:
        """Of the first rows, those whose tokens the CPU would not have drawn."""
        expected = drawn_on_cpu(self.samplings[:CHECKED_ROWS], logits_RV[:CHECKED_ROWS].cpu())
        self.draw(logits_RV.clone())
        found = self.token_ids[:CHECKED_ROWS].tolist()
        return sum(ours != theirs for ours, theirs in zip(found, expected, strict=True))


def drawn_on_cpu(samplings: Sequence[Sampling], logits_RV: Tensor) -> list[int]:
    """The tokens that the CPU's sampler, which is the specification, draws."""
    tokens_SP = torch.tensor([[*PROMPT, 0]] * len(samplings), dtype=torch.int32)
    reference = Sampler(len(samplings), logits_RV.shape[1], tokens_SP)
    for slot, sampling in enumerate(samplings):
        reference.admit(slot, Admission(PROMPT, len(PROMPT), sampling))
    rows = list(range(len(samplings)))
    return reference.sample(Logits.of(logits_RV), rows, [POSITION] * len(rows)).token_ids


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes. Returns the exit code."""
    options = parse_part("sampler", arguments)
    if not options.is_dry:
        compile_ahead([partial(compile_way, sampling) for sampling in WAYS.values()], COMPILE_SECONDS)
    device, rates, is_sound = open_device(options.is_dry), rates_of(options), True
    vocab_size = DRY_VOCAB_SIZE if options.is_dry else VOCAB_SIZE
    for batch in DRY_BATCHES if options.is_dry else BATCHES:
        num_bytes = 4 * batch * vocab_size
        shape = num_sets(num_bytes, device), batch, vocab_size
        logits = random_tensor(*shape, device=device, dtype=torch.float32, scale=DEVIATION)
        for name in DRY_WAYS if options.is_dry else WAYS:
            slots = Slots(WAYS[name], batch, vocab_size, device)
            num_different = slots.num_different(logits[0])
            calls: list[Call] = [partial(slots.draw, each) for each in logits]
            timing = measure(calls, device)
            is_sound &= num_different <= MAX_DIFFERENT
            options.records.write(
                "draw",
                way=name,
                batch=batch,
                us=1e6 * timing.seconds,
                share=num_bytes / rates.bytes_read / timing.seconds,
                noise=timing.noise,
                different=num_different,
                is_right=num_different <= MAX_DIFFERENT,
            )
    return 0 if is_sound else 1


def compile_way(sampling: Sampling) -> None:
    """Draws once."""
    device = torch.device("cuda")
    Slots(sampling, 2, VOCAB_SIZE, device).draw(random_tensor(2, VOCAB_SIZE, device=device, dtype=torch.float32))
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
