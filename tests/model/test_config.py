"""Reading config.json and generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from model.config import GenerationDefaults, Rope, load_config
from model.interface import Dtype
from tests.model.checkpoints import DEFAULT_MODEL

MINIMAL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


def write(directory: Path, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**MINIMAL, **changes}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_default_model() -> None:
    config = load_config(DEFAULT_MODEL)
    stated = json.loads((DEFAULT_MODEL / "config.json").read_text())
    assert config.num_layers == stated["num_hidden_layers"]
    assert config.num_heads == stated["num_attention_heads"]
    assert config.num_kv_heads == stated["num_key_value_heads"]
    assert config.head_dim == stated["head_dim"]
    assert config.eos_token_ids == (0, 2)
    assert config.dtype is Dtype.BFLOAT16
    assert config.rope == Rope(10_000.0)
    assert config.generation == GenerationDefaults(temperature=0.7, top_p=0.95, max_tokens=128)
    assert (
        config.kv_bytes_per_token(Dtype.BFLOAT16) == 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    )


def test_absent_keys_mean_what_hugging_face_means(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    theirs = LlamaConfig(**MINIMAL)
    assert config.head_dim == theirs.head_dim == 16
    assert config.num_kv_heads == theirs.num_key_value_heads == 4
    assert config.context_length == theirs.max_position_embeddings
    assert config.norm_epsilon == theirs.rms_norm_eps
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.tie_embeddings == theirs.tie_word_embeddings
    assert config.dtype is Dtype.FLOAT32
    assert config.eos_token_ids == ()
    assert config.generation == GenerationDefaults()


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
        ({"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 2}}, Rope(2e4, "linear", 2.0)),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, Rope(1e4, "llama3", 8.0, 1.0, 4.0, 512)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 3e4, "factor": 4}}, Rope(3e4, "linear", 4.0)),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            Rope(5e5, "llama3", 8.0, 1.0, 4.0, 512),
        ),
    ],
)
def test_rope_in_both_forms(tmp_path: Path, rope: dict[str, Any], expected: Rope) -> None:
    assert load_config(write(tmp_path, **rope)).rope == expected


def test_config_as_transformers_saves_it(tmp_path: Path) -> None:
    theirs = LlamaConfig(**MINIMAL, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 7e4})
    theirs.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    assert (config.num_kv_heads, config.rope, config.eos_token_ids) == (2, Rope(7e4), (2,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures: expected one of"),
        ({"architectures": None}, "architectures: expected one of"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: expected one of"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: a quantized checkpoint is not supported"),
        ({"sliding_window": 4096}, "sliding_window: sliding window attention is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_type: expected 'default' or 'linear' or 'llama3'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling: type: expected 'default'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor: expected a number"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected an object"),
        ({"rope_parameters": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor: expected"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1"),
        ({"hidden_size": 0}, "hidden_size: expected a positive integer up to 2147483647, found 0"),
        ({"hidden_size": 64.0}, "hidden_size: expected a positive integer"),
        ({"vocab_size": True}, "vocab_size: expected a positive integer"),
        ({"vocab_size": None}, "vocab_size: expected a positive integer up to 2147483647, found None"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers: expected a positive integer"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers: expected a positive integer up to 4096"),
        ({"max_position_embeddings": 2**30}, "max_position_embeddings: expected a positive integer up to"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor"),
        ({"num_attention_heads": 5}, "num_attention_heads: expected a divisor of hidden_size"),
        ({"head_dim": 15}, "head_dim: expected an even number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number"),
        ({"rope_theta": 10**400}, "rope_theta: expected a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ({"torch_dtype": "int8"}, "torch_dtype: expected 'bfloat16'"),
        ({"eos_token_id": 512}, "eos_token_id: expected token ids below"),
        ({"eos_token_id": [2, -1]}, "eos_token_id: expected token ids below"),
        ({"eos_token_id": [*range(65)]}, "eos_token_id: expected at most 64 token ids"),
    ],
)
def test_unsupported_is_refused_by_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: ") as error:
        load_config(write(tmp_path, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'"text"'])
def test_broken_json_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^config\.json: [^\n]+$"):
        load_config(tmp_path)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file or directory"):
        load_config(tmp_path / "absent")


def test_generation_defaults(tmp_path: Path) -> None:
    generation = {"temperature": 0.3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 77}
    config = load_config(write(tmp_path, generation))
    assert config.generation == GenerationDefaults(0.3, 20, 0.9, 1.1, 77)


def test_a_top_k_beyond_the_vocabulary_keeps_all_of_it(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, {"top_k": 50}, vocab_size=32)).generation.top_k == 32


def test_no_sampling_means_greedy(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, {"do_sample": False, "temperature": 0.7}))
    assert config.generation.temperature == 0


def test_generation_overrides_ends(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, {"eos_token_id": [7, 9, 7]}, eos_token_id=2)).eos_token_ids == (7, 9)
    assert load_config(write(tmp_path, {"eos_token_id": None}, eos_token_id=2)).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", 101),
        ("top_p", 0),
        ("top_k", -5),
        ("repetition_penalty", 11),
        ("max_new_tokens", 0),
    ],
)
def test_bad_generation_defaults(tmp_path: Path, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^generation_config\.json: {key}: expected"):
        load_config(write(tmp_path, {key: value}))


def test_float16_is_served_in_bfloat16(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, dtype="float16")).dtype is Dtype.BFLOAT16
