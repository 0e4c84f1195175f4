"""The Llama family (Touvron et al., 2023): how its config reads and what its tensors are called.

Standard library only. Parameters, as model/transformer.py knows them, and the tensors that fill them:

    embedding           model.embed_tokens.weight
    layers.N.norm1      model.layers.N.input_layernorm.weight
    layers.N.qkv        model.layers.N.self_attn.{q,k,v}_proj.weight     stacked by rows
    layers.N.o          model.layers.N.self_attn.o_proj.weight
    layers.N.norm2      model.layers.N.post_attention_layernorm.weight
    layers.N.gate_up    model.layers.N.mlp.{gate,up}_proj.weight         stacked by rows
    layers.N.down       model.layers.N.mlp.down_proj.weight
    norm                model.norm.weight
    unembedding         lm_head.weight                                   absent when tied to the embedding

A bias has its matrix's name and ".bias".
"""

from __future__ import annotations

from model.config import ModelConfig
from model.families.base import MatrixKind, Placement, TensorMap
from model.families.fields import Fields
from model.families.rope import read_rope
from model.interface import Dtype

MAX_LAYERS = 4096
MAX_CONTEXT_LENGTH = 2**24
"""Far above any model: no weight's size vouches for these two, so a broken config must not make them exhaust memory."""

_DTYPES = {"bfloat16": Dtype.BFLOAT16, "float16": Dtype.BFLOAT16, "float32": Dtype.FLOAT32}


def read_config(fields: Fields) -> ModelConfig:
    """Reads config.json. Raises ValueError for options that this program does not compute."""
    fields.require("hidden_act", "silu")
    fields.refuse("quantization_config", "a quantized checkpoint")
    fields.refuse("sliding_window", "sliding window attention")
    hidden_size = fields.count("hidden_size")
    num_heads = fields.count("num_attention_heads")
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.fail("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    if "head_dim" not in fields and hidden_size % num_heads:
        raise fields.fail("num_attention_heads", f"a divisor of hidden_size ({hidden_size}), as head_dim is not given")
    head_dim = fields.count("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise fields.fail("head_dim", "an even number")
    context_length = fields.count("max_position_embeddings", 2048, maximum=MAX_CONTEXT_LENGTH)
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=fields.count("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        context_length=context_length,
        norm_epsilon=fields.number("rms_norm_eps", 1e-6, maximum=1.0),
        rope=read_rope(fields, context_length),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        dtype=_read_dtype(fields),
    )


def _read_dtype(fields: Fields) -> Dtype:
    key = "dtype" if "dtype" in fields else "torch_dtype"
    fields.require(key, *_DTYPES)
    return _DTYPES[fields.get(key) or "float32"]


def tensor_map(config: ModelConfig) -> TensorMap:
    """Names every tensor of a checkpoint with this config."""
    vocab, hidden = config.vocab_size, config.hidden_size
    placements = {
        "model.embed_tokens.weight": Placement("embedding", (vocab, hidden), MatrixKind.EMBEDDING),
        "model.norm.weight": Placement("norm", (hidden,), MatrixKind.NORM),
    }
    for layer in range(config.num_layers):
        placements |= _layer(config, f"model.layers.{layer}.", f"layers.{layer}.")
    duplicates = {}
    if config.tie_embeddings:
        duplicates["lm_head.weight"] = "model.embed_tokens.weight"
    else:
        placements["lm_head.weight"] = Placement("unembedding", (vocab, hidden), MatrixKind.UNEMBEDDING)
    return TensorMap(placements, duplicates, (".rotary_emb.inv_freq",))


def _layer(config: ModelConfig, source: str, target: str) -> dict[str, Placement]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention, mlp = MatrixKind.ATTENTION, MatrixKind.MLP
    matrices = (
        (
            attention,
            "qkv",
            hidden,
            {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size, "self_attn.v_proj": kv_size},
        ),
        (attention, "o", q_size, {"self_attn.o_proj": hidden}),
        (mlp, "gate_up", hidden, {"mlp.gate_proj": intermediate, "mlp.up_proj": intermediate}),
        (mlp, "down", intermediate, {"mlp.down_proj": hidden}),
    )
    placements = {
        f"{source}input_layernorm.weight": Placement(f"{target}norm1", (hidden,), MatrixKind.NORM),
        f"{source}post_attention_layernorm.weight": Placement(f"{target}norm2", (hidden,), MatrixKind.NORM),
    }
    for kind, name, num_columns, parts in matrices:
        has_bias = config.attention_bias if kind is attention else config.mlp_bias
        first_row = 0
        for part, num_rows in parts.items():
            weight = Placement(f"{target}{name}", (num_rows, num_columns), kind, first_row)
            placements[f"{source}{part}.weight"] = weight
            if has_bias:
                placements[f"{source}{part}.bias"] = Placement(f"{target}{name}.bias", (num_rows,), kind, first_row)
            first_row += num_rows
    return placements
