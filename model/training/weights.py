"""Weights on disk in the format that Hugging Face and Quire load: bf16 safetensors beside three configuration files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model.training.network import NORM_EPSILON, ROPE_THETA, Network, Shape
from model.training.tokens import CHAT_TEMPLATE, END, END_OF_TEXT, END_OF_TEXT_ID, PAD, PAD_ID, STOP_IDS

ENDS = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": list(STOP_IDS), "pad_token_id": PAD_ID}
READABLE_BY_ALL = 0o644
"""Mode of the weights file; the writer of safetensors makes it private, and a server may run as another user."""

MAX_POSITIONS = 1_024
"""Declared length of a sequence. Training rows are shorter; rotary positions carry a little beyond them."""


def save(network: Network, shape: Shape, tokenizer: Path, folder: Path) -> None:
    """Write everything a server needs. The weights come last and at once, so a folder that has them is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _configurations(shape).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    tensors = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in network.state_dict().items()}
    unfinished = folder / "model.safetensors.unfinished"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.chmod(READABLE_BY_ALL)
    os.replace(unfinished, folder / "model.safetensors")


def load(folder: Path) -> Network:
    """The network of a folder, in float32."""
    network = Network(Shape.of_config(json.loads((folder / "config.json").read_text("utf-8"))))
    network.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return network


def _configurations(shape: Shape) -> dict[str, dict[str, Any]]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_width,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROPE_THETA,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        **ENDS,
        "torch_dtype": "bfloat16",
    }
    generation = {**ENDS, "do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 128}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "bos_token": END_OF_TEXT,
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": tokenizer}
