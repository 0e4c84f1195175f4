"""What a runner tells of itself: the sizes that an engine plans with, and what callers may know about the model.

Every backend's loading ends here. It does not know tensors.
"""

from __future__ import annotations

from model.config import ModelConfig
from model.interface import Backend, ModelFacts, RunnerOptions, RunnerShape


def plan_shape(config: ModelConfig, options: RunnerOptions, *, num_blocks: int, block_size: int) -> RunnerShape:
    """The sizes that the options ask for, with this pool. Raises ValueError for a context longer than the model's."""
    context_length = options.context_length or config.context_length
    if context_length > config.context_length:
        raise ValueError(f"context_length: the model's own is {config.context_length}, {context_length} is longer")
    return RunnerShape(
        num_blocks=num_blocks,
        block_size=block_size,
        num_slots=options.max_num_seqs,
        context_length=context_length,
        vocab_size=config.vocab_size,
        max_batch_tokens=options.max_batch_tokens,
    )


def facts_of(
    config: ModelConfig,
    options: RunnerOptions,
    *,
    digest: str,
    num_parameters: int,
    weight_bytes: int,
    backend: Backend,
    num_threads: int,
    has_tied_threads: bool = False,
    cpu_level: str = "",
    card: str = "",
    attention: str = "",
) -> ModelFacts:
    """What is known once the model is loaded."""
    defaults = config.generation
    return ModelFacts(
        architecture=config.architecture,
        digest=digest,
        dtype=options.dtype.value,
        context_length=options.context_length or config.context_length,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=config.kv_bytes_per_token(options.dtype),
        quantization=options.quantization.value,
        backend=backend.value,
        cpu_level=cpu_level,
        num_threads=num_threads,
        has_tied_threads=has_tied_threads,
        card=card,
        attention=attention,
        default_temperature=defaults.temperature,
        default_top_k=defaults.top_k,
        default_top_p=defaults.top_p,
        default_repetition_penalty=defaults.repetition_penalty,
        default_max_tokens=defaults.max_tokens,
    )
