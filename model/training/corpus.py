"""Write the token streams that the default model is trained on: `python -m model.training.corpus DATA`.

It owns the format: DATA/tokenizer.json, and for each stream DATA/<stream>.bin, little-endian uint16 token ids in which
every document is closed by the end token. It decides how much of what is in a stream, and leaves what a document says
to `library`, `snippets` and `dialogue`.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.training.dialogue import Writer
from model.training.library import SourceFile, entries, is_popular, source_files
from model.training.snippets import Snippet, variants
from model.training.tokens import END_OF_TEXT_ID, SPECIAL_TOKENS

VOCABULARY = 4_096
ENCODE_AT_ONCE = 512

POPULAR_WEIGHT = 2
"""How often a popular module stands in the library stream; another stands there once."""
SNIPPET_SPELLINGS, SNIPPET_QUESTIONS = 60, 25
CHAT_ROUNDS, WELL_KNOWN_WEIGHT = 10, 6


def main() -> None:
    """Read the arguments and write the streams."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder to write to")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to encode with; by default one is trained")
    parser.add_argument("--seed", type=int, default=0, help="decides the wording and the order of documents")
    arguments = parser.parse_args()
    arguments.data.mkdir(parents=True, exist_ok=True)

    streams = documents(random.Random(arguments.seed))
    if arguments.tokenizer:
        shutil.copyfile(arguments.tokenizer, arguments.data / "tokenizer.json")
    else:
        train_tokenizer(streams["library"] + streams["chat"]).save(str(arguments.data / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(arguments.data / "tokenizer.json"))
    for stream, texts in streams.items():
        ids = encode(tokenizer, texts)
        ids.tofile(arguments.data / f"{stream}.bin")
        print(f"{stream:10} {len(texts):7,} documents {len(ids):10,} tokens")


def documents(rng: random.Random) -> dict[str, list[str]]:
    """The texts of each stream."""
    files = source_files()
    code = list(variants(rng, SNIPPET_SPELLINGS))
    writer = Writer(entries(files), variants(rng, SNIPPET_QUESTIONS), rng)
    library = [file.text for file in files if not file.held_out for _ in range(library_weight(file))]
    rng.shuffle(library)
    return {
        "library": library,
        "textbook": textbook_pages(code, rng),
        "chat": writer.conversations(CHAT_ROUNDS, WELL_KNOWN_WEIGHT),
        "held_out": [file.text for file in files if file.held_out],
    }


def library_weight(file: SourceFile) -> int:
    """How often a file stands in the library stream."""
    return POPULAR_WEIGHT if is_popular(file.module) else 1


def textbook_pages(code: list[Snippet], rng: random.Random) -> list[str]:
    """Documents of one snippet or a few, with and without their imports, so that a page may open with any of them."""
    rng.shuffle(code)
    pages = []
    while code:
        page = [code.pop() for _ in range(min(len(code), rng.choice((1, 1, 2, 3))))]
        imports = "\n".join(dict.fromkeys(snippet.imports for snippet in page if snippet.imports))
        body = "\n\n\n".join(snippet.code for snippet in page) + "\n"
        pages.append(f"{imports}\n\n\n{body}" if imports and rng.random() < 0.5 else body)
    return pages


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE with every digit on its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Token ids of all documents, each closed by the end token."""
    ids: list[int] = []
    for start in range(0, len(texts), ENCODE_AT_ONCE):
        for encoding in tokenizer.encode_batch(list(texts[start : start + ENCODE_AT_ONCE])):
            ids += encoding.ids
            ids.append(END_OF_TEXT_ID)
    return np.array(ids, dtype=np.dtype("<u2"))


if __name__ == "__main__":
    main()
