"""Models to measure with: seeded random weights in the shapes S, M and L, as Hugging Face directories.

    python -m loadtest.models DIR [S M L 1B 8B]

Speed does not depend on what weights say, so nothing has to be downloaded. The tokenizer knows bytes and pairs of
letters; the rest of the vocabulary are fillers that no text encodes to.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

END = "<|endoftext|>"
SPECIAL_TOKENS = (END, "<|im_start|>", "<|im_end|>")

Shape = tuple[int, ...]
Words = np.ndarray[Any, np.dtype[np.uint16]]
MakeWeights = Callable[[str, Shape], Iterable[Words]]
"""The weights of a tensor, in pieces: values that keep activations near one, norms of ones."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder of the Llama family, and the seed of its weights."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    context_length: int
    seed: int
    is_tied: bool = True
    """Whether the embeddings are the last matrix, too."""
    repeats: bool = False
    """Whether weights repeat a pool of random ones: written as fast as memory goes, for sizes of gigabytes."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads


SHAPES = {
    "S": ModelShape(4096, 256, 704, 6, 4, 2, 10_000.0, 4096, seed=11),
    "M": ModelShape(49_152, 576, 1536, 30, 9, 3, 100_000.0, 8192, seed=22),
    "L": ModelShape(32_000, 2048, 8192, 16, 32, 8, 500_000.0, 8192, seed=33),
}
"""S is the built-in model's size, M is SmolLM2-135M's, L is Llama-3.2-1B's with a smaller vocabulary."""

CARD_SHAPES = {
    "1B": ModelShape(128_256, 2048, 8192, 16, 32, 8, 500_000.0, 131_072, seed=44, repeats=True),
    "8B": ModelShape(128_256, 4096, 14_336, 32, 32, 8, 500_000.0, 131_072, seed=55, is_tied=False, repeats=True),
}
"""For a card: Llama-3.2-1B's, Llama-3.1-8B's."""

POOL_SIZE = 2**23 + 9
"""Weights of the pool. No matrix's width is a part of it, so that rows differ."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the models that were asked for. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.models", description=(__doc__ or "").splitlines()[0])
    known = SHAPES | CARD_SHAPES
    parser.add_argument("folder", type=Path, help="where the models' directories go")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {' '.join(known)} (default: {' '.join(SHAPES)})")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(known):
        parser.error(f"no such shape: {' '.join(sorted(unknown))}")
    for name in given.names or SHAPES:
        write_model(known[name], given.folder / name)
        print(given.folder / name, flush=True)
    return 0


def write_model(shape: ModelShape, folder: Path) -> None:
    """Writes one Hugging Face directory."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(shape.seed)
    make = RepeatedWeights(generator) if shape.repeats else FreshWeights(generator)
    write_safetensors(folder / "model.safetensors", tensor_shapes(shape), make)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    write_json(folder / "config.json", config(shape) | ends)
    write_json(folder / "generation_config.json", {"do_sample": False} | ends)
    write_json(folder / "tokenizer.json", tokenizer(shape.vocab_size))
    names = {f"{role}_token": END for role in ("bos", "eos", "unk", "pad")}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.context_length} | names,
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """One JSON file."""
    path.write_text(json.dumps(value, indent=1))


def config(shape: ModelShape) -> dict[str, Any]:
    """The config.json of a shape, but for its special tokens."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context_length,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.is_tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
    }


def tensor_shapes(shape: ModelShape) -> dict[str, Shape]:
    """Every tensor of the checkpoint, in the order in which it is written."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    found: dict[str, Shape] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_layers):
        parts: dict[str, Shape] = {
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found |= {f"model.layers.{layer}.{part}.weight": size for part, size in parts.items()}
    found["model.norm.weight"] = (hidden,)
    return found if shape.is_tied else found | {"lm_head.weight": (shape.vocab_size, hidden)}


def write_safetensors(path: Path, shapes: dict[str, Shape], make: MakeWeights) -> None:
    """Writes bfloat16 tensors one after the other: numpy knows no bfloat16, and the format is a header and bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for words in make(name, shape):
                file.write(words.data)


class FreshWeights:
    """Every weight drawn anew."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def __call__(self, name: str, shape: Shape) -> Iterator[Words]:
        """See MakeWeights."""
        if len(shape) == 1:
            yield to_bfloat16(np.ones(shape, np.float32))
        else:
            normal = self._generator.standard_normal(shape, np.float32)
            yield to_bfloat16(normal * np.float32(scale_of(name, shape)))


class RepeatedWeights:
    """Runs of a pool of weights, each tensor's from a place of its own on."""

    def __init__(self, generator: np.random.Generator, size: int = POOL_SIZE) -> None:
        self._generator = generator
        self._normal = generator.standard_normal(size, np.float32)
        self._pools: dict[float, Words] = {}

    def __call__(self, name: str, shape: Shape) -> Iterator[Words]:
        """See MakeWeights."""
        if len(shape) == 1:
            yield to_bfloat16(np.ones(shape, np.float32))
            return
        scale = scale_of(name, shape)
        if scale not in self._pools:
            self._pools[scale] = to_bfloat16(self._normal * np.float32(scale))
        pool, left = self._pools[scale], int(np.prod(shape))
        begin = int(self._generator.integers(len(pool)))
        while left:
            run = pool[begin : begin + left]
            yield run
            left, begin = left - len(run), 0


def scale_of(name: str, shape: Shape) -> float:
    """The deviation of a matrix's weights that keeps activations near one."""
    scale: float = 0.05 if "embed" in name else shape[1] ** -0.5
    return scale / 2 if name.endswith(("o_proj.weight", "down_proj.weight")) else scale  # what layers add to the stream


def to_bfloat16(values: np.ndarray[Any, np.dtype[np.float32]]) -> Words:
    """The upper half of each float's bits, rounded to the nearest, ties to even."""
    bits = values.view(np.uint32)
    rounding = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return ((bits + rounding) >> 16).astype(np.uint16)


def tokenizer(vocab_size: int) -> dict[str, Any]:
    """A tokenizer.json of byte-level BPE that fills the vocabulary."""
    merges = [[first, second] for first in ascii_lowercase for second in ascii_lowercase]
    tokens = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), *(first + second for first, second in merges)]
    tokens.extend(f"<filler {number}>" for number in range(vocab_size - len(tokens)))
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": list(added_tokens()),
        "pre_tokenizer": levels,
        "decoder": levels,
        "model": {"type": "BPE", "vocab": {token: index for index, token in enumerate(tokens)}, "merges": merges},
    }


def added_tokens() -> Iterator[dict[str, Any]]:
    """The special tokens, as tokenizer.json lists them."""
    switches = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for index, token in enumerate(SPECIAL_TOKENS):
        yield {"id": index, "content": token} | switches


if __name__ == "__main__":
    sys.exit(main())
