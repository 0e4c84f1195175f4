"""Text that the built-in model was not trained on: source files of installed packages, as windows of token ids.

Training reads the standard library and the project's own texts, nothing else (model/default/RECIPE.md). torch, NumPy
and pydantic are Python of the same kind, are there wherever Quire is, and belong to neither. The standard library's own
held-out files would not do: which they are is counted off along the files of one Python release.

The choice is deterministic: files in the order of their paths' hashes, and of each the lines from its middle on, so
that licences and imports do not prevail. Other versions of the packages are other text; `digest` tells it apart.
Nothing here knows how the windows are measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer

PACKAGES = ("torch", "numpy", "pydantic")
MOST_CHARACTERS_PER_TOKEN = 16
"""No more of a file than this times the window is encoded."""

Window = tuple[int, ...]


def windows(tokenizer: Tokenizer, num_windows: int, num_tokens: int) -> list[Window]:
    """Windows of exactly `num_tokens` token ids, each of another file.

    Raises ValueError when the packages do not hold so many.
    """
    found: list[Window] = []
    for text in texts():
        if len(found) == num_windows:
            break
        ids = tokenizer.encode(text[: MOST_CHARACTERS_PER_TOKEN * num_tokens], add_special_tokens=False).ids
        if len(ids) >= num_tokens:
            found.append(tuple(ids[:num_tokens]))
    if len(found) < num_windows:
        raise ValueError(f"only {len(found)} files hold {num_tokens} tokens, {num_windows} are wanted")
    return found


def texts() -> Iterator[str]:
    """The second half of each source file, in the order of the paths' hashes."""
    files = {
        path.relative_to(folder.parent).as_posix(): path
        for folder in map(folder_of, PACKAGES)
        for path in folder.rglob("*.py")
    }
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield second_half(files[name].read_text("utf-8", errors="replace"))


def second_half(text: str) -> str:
    """What follows the first line break behind the middle."""
    return text[text.find("\n", len(text) // 2) + 1 :]


def folder_of(package: str) -> Path:
    """Where a package's sources are; it is not imported. Raises ValueError where it is not installed."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {package} is not installed: its sources are the held-out text")
    return Path(next(iter(spec.submodule_search_locations)))


def digest(chosen: Sequence[Window]) -> str:
    """Names the windows: equal for equal token ids."""
    return hashlib.sha256(repr(list(chosen)).encode()).hexdigest()[:16]
