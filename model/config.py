"""What a model is: sizes and options from a Hugging Face directory's config.json and generation_config.json.

Standard library only. It does not know tensors; what differs between architectures is read by model/families.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from model.families.fields import Fields, read_json
from model.interface import MAX_EOS_TOKEN_IDS, Dtype

FAMILIES = {"LlamaForCausalLM": "model.families.llama"}
"""The module that reads each architecture and names its tensors."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al., 2021) and how its frequencies are scaled for longer contexts."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 0


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the checkpoint's author suggests for callers that say nothing. temperature 0 is greedy, top_k 0 is off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer: sizes and options."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm_epsilon: float
    rope: Rope
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: Dtype
    """The checkpoint's own precision; bfloat16 where it says float16."""
    eos_token_ids: tuple[int, ...] = ()
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    def kv_bytes_per_token(self, dtype: Dtype) -> int:
        """Bytes of cache that one position takes over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes(dtype)


def dtype_bytes(dtype: Dtype) -> int:
    """Bytes of one element."""
    return 2 if dtype is Dtype.BFLOAT16 else 4


def load_config(model_dir: Path) -> ModelConfig:
    """Reads a Hugging Face directory. Raises ValueError, in one line naming file and key, for what is unsupported."""
    fields = read_json(model_dir / "config.json")
    architectures = fields.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise fields.fail("architectures", f"one of {list(FAMILIES)}")
    config: ModelConfig = importlib.import_module(FAMILIES[architecture]).read_config(fields)
    generation_file = model_dir / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else Fields({}, generation_file.name)
    ends_source = generation if "eos_token_id" in generation else fields
    return replace(
        config,
        eos_token_ids=_read_eos_token_ids(ends_source, config.vocab_size),
        generation=_read_generation(generation, config.vocab_size),
    )


def _read_generation(fields: Fields, vocab_size: int) -> GenerationDefaults:
    """`do_sample: false` means greedy, whatever temperature stands beside it.

    What is accepted here must be accepted of a caller, too: requests that leave a field unset take these values.
    """
    is_greedy = not fields.flag("do_sample", True)
    return GenerationDefaults(
        temperature=0.0 if is_greedy else fields.number("temperature", 1.0, maximum=100.0),
        top_k=0 if fields.get("top_k") in (None, 0, -1) else min(fields.count("top_k"), vocab_size),
        top_p=fields.number("top_p", 1.0, minimum=1e-6, maximum=1.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, minimum=1e-6, maximum=10.0),
        max_tokens=fields.count("max_new_tokens") if "max_new_tokens" in fields else None,
    )


def _read_eos_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """One id, a list of ids, or none."""
    value = fields.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and 0 <= token_id < vocab_size for token_id in ids):
        raise fields.fail("eos_token_id", f"token ids below the vocabulary's {vocab_size}")
    distinct = tuple(dict.fromkeys(ids))
    if len(distinct) > MAX_EOS_TOKEN_IDS:
        raise fields.fail("eos_token_id", f"at most {MAX_EOS_TOKEN_IDS} token ids")
    return distinct
