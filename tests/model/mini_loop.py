"""The smallest engine there can be: a transformer, its cache and tables, and whole blocks for each slot."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from model.backend import assemble, choose_kernels, step_by_step
from model.config import FAMILIES, load_config
from model.decoder_native import NativeDecoder
from model.inputs import SlotTables
from model.interface import Admission, Backend, Batch, Quantization, Row, RunnerShape, Sampling
from model.transformer import Logits
from model.weights import load_weights

BLOCK_SIZE = 16


class MiniLoop:
    """Slot s owns the blocks s, s + num_slots, s + 2 num_slots, …: scattered, and no two slots share any."""

    def __init__(
        self,
        model_dir: Path,
        dtype: torch.dtype,
        *,
        num_slots: int = 1,
        context_length: int | None = None,
        backend: Backend = Backend.NATIVE,
        level: str | None = None,
        quantization: Quantization = Quantization.NONE,
        by_operators: bool = False,
    ) -> None:
        """`by_operators` computes operator by operator even where one call could do it."""
        config = load_config(model_dir)
        self.context_length = context_length or config.context_length
        self.num_slots = num_slots
        blocks_per_slot = -(-self.context_length // BLOCK_SIZE)
        num_blocks = blocks_per_slot * num_slots
        tensor_map = import_module(FAMILIES[config.architecture]).tensor_map(config)
        parameters = load_weights(model_dir, tensor_map, dtype).parameters
        kernels = choose_kernels(backend, level, config, dtype, quantization, BLOCK_SIZE)
        shape = RunnerShape(
            num_blocks, BLOCK_SIZE, num_slots, self.context_length, config.vocab_size, num_slots * self.context_length
        )
        model = assemble(config, parameters, shape, dtype, quantization, kernels)
        self.transformer, self.cache = model.transformer, model.cache
        self.is_one_call = not by_operators and isinstance(getattr(model.forward, "__self__", None), NativeDecoder)
        self._forward = step_by_step(model.transformer, model.cache) if by_operators else model.forward
        self.tables = SlotTables(num_slots, self.context_length, num_blocks, BLOCK_SIZE)

    def admit(self, slot: int, token_ids: Sequence[int], num_tokens: int) -> Row:
        """The first row of a sequence: computes `num_tokens` of its tokens, with blocks for a whole context."""
        blocks = range(slot, self.num_slots * -(-self.context_length // BLOCK_SIZE), self.num_slots)
        wants_token = num_tokens == len(token_ids)
        return Row(slot, 0, num_tokens, blocks, wants_token, Admission(token_ids, len(token_ids), Sampling()))

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> Logits:
        """Computes a step; the next one may overwrite what this returns."""
        batch = Batch(rows, sum(row.num_tokens for row in rows))
        self.tables.take_in(batch)
        return self._forward(self.tables, batch)

    def step(self, rows: Sequence[Row]) -> Tensor:
        """Logits of the rows that want a token."""
        return self.forward(rows).values_WV.clone()

    def prefill(self, slot: int, token_ids: Sequence[int], share: int) -> Tensor:
        """Computes a prompt in shares of at most `share` tokens; logits [V] after its last token."""
        num_tokens = len(token_ids)
        logits_WV = self.step([self.admit(slot, token_ids, min(share, num_tokens))])
        for start in range(share, num_tokens, share):
            stop = min(start + share, num_tokens)
            logits_WV = self.step([Row(slot, start, stop - start, wants_token=stop == num_tokens)])
        return logits_WV[0]

    def generate(self, prompts: Sequence[Sequence[int]], num_new: int, share: int = 256) -> list[list[int]]:
        """Greedy continuations of prompts in slots 0, 1, …, which decode together."""
        assert len(prompts) <= self.num_slots
        slots = list(range(len(prompts)))
        lengths = [len(prompt) for prompt in prompts]
        drawn = [int(self.prefill(slot, prompts[slot], share).argmax()) for slot in slots]
        outputs = [[token] for token in drawn]
        for position in range(num_new - 1):
            at = [length + position for length in lengths]
            self.tables.append(slots, at, drawn)
            logits_WV = self.step([Row(slot, at[slot], 1, wants_token=True) for slot in slots])
            drawn = logits_WV.argmax(-1).tolist()
            for output, token in zip(outputs, drawn, strict=True):
                output.append(token)
        return outputs
