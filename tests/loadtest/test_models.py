"""Models to measure with are real ones: Quire reads them, and the same seed gives the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from loadtest.models import (
    CARD_SHAPES,
    POOL_SIZE,
    SHAPES,
    ModelShape,
    RepeatedWeights,
    main,
    tensor_shapes,
    to_bfloat16,
    write_model,
)
from model.config import load_config
from service.config import Settings
from service.engine.process import load_model

TINY = ModelShape(1200, 64, 96, 2, 2, 1, 10_000.0, 256, seed=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(TINY, folder)
    return folder


def test_the_same_seed_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    write_model(TINY, tmp_path)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (tiny / name).read_bytes()


def test_quire_loads_it(tiny: Path) -> None:
    config = load_config(tiny)
    assert (config.vocab_size, config.num_layers, config.head_dim, config.tie_embeddings) == (1200, 2, 32, True)
    _, facts = load_model(Settings(model=tiny, num_blocks=16))
    assert facts.vocab_size == 1200


def test_weights_have_the_scale_of_their_width(tiny: Path) -> None:
    with safe_open(tiny / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensor_shapes(TINY))
        gate = file.get_tensor("model.layers.0.mlp.gate_proj.weight").float()
        norm = file.get_tensor("model.norm.weight").float()
    assert gate.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert norm.tolist() == [1.0] * 64


def test_the_tokenizer_fills_the_vocabulary_and_knows_all_text(tiny: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1200
    for text in ("Hello, quire!", "naïve 😀"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_rounding_is_to_the_nearest_and_ties_to_even() -> None:
    values = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -2.5, 1.0 + 2**-8 + 2**-20], np.float32)
    rounded = (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    assert rounded.tolist() == [1.0, 1.0, 1.0 + 2**-6, -2.5, 1.0 + 2**-7]


@pytest.mark.parametrize(
    ("name", "millions"), [("S", 5.5), ("M", 134.5), ("L", 1038.2), ("1B", 1235.8), ("8B", 8030.3)]
)
def test_the_shapes_have_their_sizes(name: str, millions: float) -> None:
    num_weights = sum(int(np.prod(shape)) for shape in tensor_shapes((SHAPES | CARD_SHAPES)[name]).values())
    assert num_weights / 1e6 == pytest.approx(millions, rel=0.01)


def test_weights_that_repeat_are_a_model_with_other_rows_everywhere(tiny: Path, tmp_path: Path) -> None:
    shape = replace(TINY, repeats=True, is_tied=False)
    for name in ("a", "b"):
        write_model(shape, tmp_path / name)
    files = [tmp_path / name / "model.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with safe_open(files[0], "pt") as file:
        assert set(file.keys()) == set(tensor_shapes(TINY)) | {"lm_head.weight"}
        gate, up = (file.get_tensor(f"model.layers.0.mlp.{name}_proj.weight").float() for name in ("gate", "up"))
        assert file.get_tensor("model.norm.weight").float().tolist() == [1.0] * 64
    assert gate.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert len(gate.unique(dim=0)) == len(gate) and not gate.equal(up)
    _, facts = load_model(Settings(model=tmp_path / "a", num_blocks=16))
    assert facts.vocab_size == 1200


def test_a_pool_goes_on_from_its_beginning() -> None:
    make = RepeatedWeights(np.random.default_rng(1), size=100)
    first, *rest = (piece.tolist() for piece in make("x.weight", (5, 50)))
    assert sum(map(len, [first, *rest])) == 250
    pool = rest[0]
    assert len(pool) == 100 and first == pool[100 - len(first) :] and rest[-1] == pool[: len(rest[-1])]


def test_no_width_of_a_card_is_a_part_of_the_pool() -> None:
    widths = {shape[-1] for name in CARD_SHAPES for shape in tensor_shapes(CARD_SHAPES[name]).values()}
    assert all(POOL_SIZE % width for width in widths)


def test_an_unknown_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), "XL"])
    assert end.value.code == 2
