"""Writes random-weight Hugging Face directories of any Llama shape, for tests that need no trained model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

DEFAULT_MODEL = Path(__file__).resolve().parents[2] / "model" / "default"
DEFAULT_VOCAB_SIZE = 4096


def write_checkpoint(
    directory: Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    intermediate_size: int = 96,
    vocab_size: int = 512,
    tie: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    sharded: bool = False,
    context_length: int = 2048,
    bias: bool = False,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes config, weights and, where the vocabulary is the default model's, its tokenizer. Returns the directory.

    `config` overrides keys of config.json. Matrices have a standard deviation of 1 / sqrt(inputs), so that activations
    keep their size over the layers and the most likely token is clear.
    """
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": context_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tie,
        "attention_bias": bias,
        "mlp_bias": bias,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": dtype,
        **(config or {}),
    }
    (directory / "config.json").write_text(json.dumps(content, indent=2))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "do_sample": False}))
    if vocab_size == DEFAULT_VOCAB_SIZE:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEFAULT_MODEL / name, directory / name)
    _save(directory, _random_tensors(content, torch.Generator().manual_seed(seed)), dtype, sharded)
    return directory


def _random_tensors(config: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }

    def matrix(num_rows: int, num_columns: int) -> Tensor:
        return torch.randn(num_rows, num_columns, generator=generator) * num_columns**-0.5

    tensors = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, generator=generator) * 0.2,
        "model.norm.weight": 1 + 0.2 * torch.randn(hidden, generator=generator),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = 1 + 0.2 * torch.randn(hidden, generator=generator)
        for name, shape in shapes.items():
            tensors[f"{prefix}{name}.weight"] = matrix(*shape)
            if config["attention_bias" if name.startswith("self_attn") else "mlp_bias"]:
                tensors[f"{prefix}{name}.bias"] = 0.2 * torch.randn(shape[0], generator=generator)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden) * 2
    return tensors


def _save(directory: Path, tensors: dict[str, Tensor], dtype: str, sharded: bool) -> None:
    """One file, or two with an index."""
    tensors = {name: value.to(getattr(torch, dtype)).contiguous() for name, value in tensors.items()}
    if not sharded:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
