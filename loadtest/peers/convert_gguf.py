"""A model of loadtest.models as GGUF in bfloat16, for llama.cpp. Needs numpy and the package gguf.

    python -m loadtest.peers.convert_gguf MODEL_DIR

Writes MODEL_DIR/gguf/bf16.gguf. It reads the tensors as they are: through memory maps, without torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Words = np.ndarray[Any, np.dtype[np.uint16]]

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def main() -> int:
    """Converts the directory that the command line names. Returns the exit code."""
    if len(sys.argv) != 2:
        print("usage: python -m loadtest.peers.convert_gguf MODEL_DIR", file=sys.stderr)
        return 2
    model_dir = Path(sys.argv[1])
    target = model_dir / "gguf" / "bf16.gguf"
    target.parent.mkdir(exist_ok=True)
    convert(model_dir, target)
    print(target)
    return 0


def convert(model_dir: Path, target: Path) -> None:
    """Writes the whole file."""
    config = json.loads((model_dir / "config.json").read_text())
    writer = gguf.GGUFWriter(str(target), "llama")
    add_config(writer, config)
    add_tokenizer(writer, json.loads((model_dir / "tokenizer.json").read_text()))
    for name, words in read_tensors(model_dir / "model.safetensors"):
        add_tensor(writer, gguf_name(name), words, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Sizes and options."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any]) -> None:
    """The byte-level vocabulary, in the order of its ids."""
    vocab = tokenizer["model"]["vocab"]
    special = {added["id"] for added in tokenizer["added_tokens"]}
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([kinds[index in special] for index in range(len(vocab))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_add_bos_token(False)


def read_tensors(path: Path) -> Iterator[tuple[str, Words]]:
    """Names and bfloat16 words of a safetensors file."""
    data = np.memmap(path, np.uint8, "r")
    header_size = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + header_size].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = (8 + header_size + offset for offset in entry["data_offsets"])
        yield name, data[begin:end].view(np.uint16).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor. Raises KeyError for one that the family does not have."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def add_tensor(writer: gguf.GGUFWriter, name: str, words: Words, config: dict[str, Any]) -> None:
    """One tensor; norms in float32, as llama.cpp wants them."""
    if words.ndim == 1:
        writer.add_tensor(name, (words.astype(np.uint32) << 16).view(np.float32))
        return
    heads = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}
    if count := heads.get(name.split(".", 2)[-1]):
        words = interleave(words, config[count])
    writer.add_tensor(name, np.ascontiguousarray(words).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)


def interleave(words: Words, num_heads: int) -> Words:
    """Rows of each head in the order of GGUF's rotary pairs: neighbours, where Hugging Face has halves."""
    num_rows, num_columns = words.shape
    halves = words.reshape(num_heads, 2, num_rows // num_heads // 2, num_columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(num_rows, num_columns)


if __name__ == "__main__":
    sys.exit(main())
