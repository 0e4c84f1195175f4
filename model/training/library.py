"""The interpreter's own standard library as training material: its source files, and its documented public names.

Nothing is downloaded; both come from the interpreter that runs this. It knows nothing of tokens or of dialogue.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

LISTS = Path(__file__).parent / "lists"


def read_list(name: str) -> list[str]:
    """The lines of one of the lists beside this module."""
    return (LISTS / f"{name}.txt").read_text("utf-8").splitlines()


POPULAR = frozenset(read_list("popular_modules"))
"""Top-level modules that people ask about."""

IMPORTED = {
    "builtins": "builtins",
    "math": "math",
    "cmath": "cmath",
    "itertools": "itertools",
    "time": "time",
    "sys": "sys",
    "gc": "gc",
    "zlib": "zlib",
    "binascii": "binascii",
    "array": "array",
    "select": "select",
    "unicodedata": "unicodedata",
    "_collections": "collections",
    "_functools": "functools",
    "_operator": "operator",
    "_struct": "struct",
    "_csv": "csv",
    "random": "random",
    "posix": "os",
}
"""Modules whose names only importing reveals (most are written in C), and what each is called in public."""

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "lib2to3", "turtledemo", "pydoc_data", "__phello__", "site-packages"}
)
UNDOCUMENTED_PACKAGES = frozenset({"idlelib", "encodings", "ensurepip", "msilib"})
MIN_SUMMARY, MAX_SUMMARY = 12, 700
MAX_CHARMAP_BYTES = 9_000
HELD_OUT_EVERY, HELD_OUT_AT = 40, 7


@dataclass(frozen=True)
class SourceFile:
    """One module of the library."""

    module: str
    text: str
    held_out: bool
    """Kept out of training, names and docstrings included, to measure the loss on unseen code."""


@dataclass(frozen=True)
class Entry:
    """One documented public name."""

    module: str
    name: str
    """Qualified by its module, except for builtins: `os.path.join`, `len`."""
    kind: str
    """`module`, `class`, `method` or `function`."""
    summary: str
    """The first paragraph of prose in its docstring, on one line."""
    signature: str | None = None
    source: str | None = None


def is_popular(module: str) -> bool:
    """Whether people ask about this module or its package."""
    return module.split(".")[0] in POPULAR


def source_files() -> list[SourceFile]:
    """Every readable module of the library except tests and tables, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        text = _readable_text(path)
        if text is not None:
            found.append((_module_name(path.relative_to(root)), text))
    return [
        SourceFile(module, text, held_out=index % HELD_OUT_EVERY == HELD_OUT_AT)
        for index, (module, text) in enumerate(found)
    ]


def _readable_text(path: Path) -> str | None:
    if SKIPPED_FOLDERS.intersection(path.parts) or "config-3" in str(path):
        return None
    if "encodings" in path.parts and path.stat().st_size > MAX_CHARMAP_BYTES:
        return None
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        return None
    return text if 200 <= len(text) <= 400_000 else None


def _module_name(relative: Path) -> str:
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return "os.path" if parts == ["posixpath"] else ".".join(parts)


def entries(files: list[SourceFile]) -> list[Entry]:
    """The documented public names of the files that are not held out, and of the modules that are imported."""
    found: dict[str, Entry] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in files:
            if not file.held_out:
                found |= {entry.name: entry for entry in _file_entries(file)}
        for name, shown in IMPORTED.items():
            module = importlib.import_module(name)
            found = {entry.name: entry for entry in _imported_entries(module, shown)} | found
    return [entry for entry in found.values() if MIN_SUMMARY < len(entry.summary) < MAX_SUMMARY]


def summary_of(docstring: str, name: str) -> str:
    """The first paragraph of prose; a paragraph that only repeats the signature is passed over."""
    short = name.rpartition(".")[2]
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        lines = [line for line in paragraph.splitlines() if not re.match(rf"([\w.]+\.)?{re.escape(short)}\(", line)]
        prose = " ".join(" ".join(lines).split())
        if len(prose) > MIN_SUMMARY and prose[0].isalpha():
            return prose if prose[-1] in ".!?:" else prose + "."
    return ""


def _file_entries(file: SourceFile) -> Iterator[Entry]:
    parts = file.module.split(".")
    if any(part.startswith("_") for part in parts) or parts[0] in UNDOCUMENTED_PACKAGES:
        return
    try:
        tree = ast.parse(file.text)
    except SyntaxError:
        return
    if docstring := ast.get_docstring(tree):
        yield Entry(file.module, file.module, "module", summary_of(docstring, file.module))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _node_entries(file, node, file.module, "function")


def _node_entries(
    file: SourceFile, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, owner: str, kind: str
) -> Iterator[Entry]:
    if node.name.startswith("_"):
        return
    name = f"{owner}.{node.name}"
    is_class = isinstance(node, ast.ClassDef)
    if docstring := ast.get_docstring(node):
        signature = f"class {node.name}" if isinstance(node, ast.ClassDef) else f"{node.name}({ast.unparse(node.args)})"
        source = textwrap.dedent(ast.get_source_segment(file.text, node, padded=True) or "")
        summary = summary_of(docstring, name)
        yield Entry(file.module, name, "class" if is_class else kind, summary, signature, source)
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _node_entries(file, child, name, "method")


def _imported_entries(module: ModuleType, shown: str) -> Iterator[Entry]:
    for key, value in sorted(vars(module).items()):
        docstring = None if key.startswith("_") or not callable(value) else inspect.getdoc(value)
        if not docstring:
            continue
        name = key if shown == "builtins" else f"{shown}.{key}"
        yield Entry(shown, name, "class" if inspect.isclass(value) else "function", summary_of(docstring, name))
        if inspect.isclass(value) and not issubclass(value, BaseException):
            for method_name, method in sorted(vars(value).items()):
                method_doc = inspect.getdoc(method) if callable(method) and not method_name.startswith("_") else None
                if method_doc:
                    qualified = f"{name}.{method_name}"
                    yield Entry(shown, qualified, "method", summary_of(method_doc, qualified))
