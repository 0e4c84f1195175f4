"""The textbook code, varied: the same algorithm with other names, with and without annotations and docstrings.

A small model learns an algorithm, rather than one spelling of it, from seeing it in many.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "textbook"

SYNONYMS = {
    "items": ("items", "arr", "values", "numbers", "nums", "data", "lst"),
    "target": ("target", "target", "x", "key", "value"),
    "low": ("low", "left", "lo"),
    "high": ("high", "right", "hi"),
    "middle": ("middle", "mid", "mid"),
    "text": ("text", "s", "string"),
    "n": ("n", "n", "number", "num"),
    "numbers": ("numbers", "values", "nums"),
    "path": ("path", "filename", "path"),
    "result": ("result", "result", "output"),
}
"""What a variable may be called instead; repeated where one name is the usual one."""

NAMED_IN_PROSE = frozenset({"target", "n", "low", "high"})
"""Variables that docstrings mention by name and not as English words."""


@dataclass(frozen=True)
class Snippet:
    """One function or class of the textbook, in one spelling."""

    name: str
    purpose: str
    """What it does: the first line of its docstring."""
    imports: str
    """The import statements it needs, or an empty string."""
    code: str

    @property
    def runnable(self) -> str:
        """The code below its imports."""
        return f"{self.imports}\n\n\n{self.code}" if self.imports else self.code


class _Respell(ast.NodeTransformer):
    """Renames variables; drops annotations and docstrings where told to."""

    def __init__(self, names: dict[str, str], annotated: bool, documented: bool) -> None:
        self.names, self.annotated, self.documented = names, annotated, documented

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg = self.names.get(node.arg, node.arg)
        if not self.annotated:
            node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if self.annotated or node.value is None:
            return node
        return ast.copy_location(ast.Assign([node.target], node.value), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        if not self.annotated:
            node.returns = None
        return self._without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        return self._without_docstring(node)

    def _without_docstring(self, node: ast.FunctionDef | ast.ClassDef) -> ast.AST:
        if not self.documented and ast.get_docstring(node) and len(node.body) > 1:
            del node.body[0]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and " " in node.value:
            node.value = " ".join(self._in_prose(word) for word in node.value.split(" "))
        return node

    def _in_prose(self, word: str) -> str:
        return self.names.get(word, word) if word in NAMED_IN_PROSE else word


def variants(rng: random.Random, count: int) -> Iterator[Snippet]:
    """Every snippet of the textbook in `count` spellings each."""
    for path in sorted(FOLDER.glob("*.py")):
        text = path.read_text("utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for _ in range(count):
                    yield _respelled(text, node, rng)


def _respelled(text: str, node: ast.FunctionDef | ast.ClassDef, rng: random.Random) -> Snippet:
    code = ast.get_source_segment(text, node) or ""
    if isinstance(node, ast.ClassDef) and node.decorator_list:
        code = "@" + ast.unparse(node.decorator_list[0]) + "\n" + code
    purpose = (ast.get_docstring(node) or "").split("\n")[0]
    annotated = rng.random() < 0.4 or "@dataclass" in code
    spelling = _Respell(_fresh_names(code, rng), annotated, documented=rng.random() < 0.75)
    module = ast.fix_missing_locations(spelling.visit(ast.parse(code)))
    respelled = _classic_layout(ast.unparse(module))
    return Snippet(node.name, purpose, _imports_for(text, respelled), respelled)


def _fresh_names(code: str, rng: random.Random) -> dict[str, str]:
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    used |= {node.arg for node in ast.walk(ast.parse(code)) if isinstance(node, ast.arg)}
    chosen: dict[str, str] = {}
    for name in sorted(used & SYNONYMS.keys()):
        fresh = rng.choice(SYNONYMS[name])
        if fresh not in used and fresh not in chosen.values():
            chosen[name] = fresh
    return chosen


def _imports_for(text: str, code: str) -> str:
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    lines = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import) and any(alias.name in used for alias in node.names):
            lines.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if alias.name in used]
            if names:
                lines.append(f"from {node.module} import {', '.join(names)}")
    return "\n".join(lines)


def _classic_layout(code: str) -> str:
    """A blank line between the methods of a class, which unparsing leaves out after a docstring."""
    lines: list[str] = []
    for line in code.split("\n"):
        above = lines[-1] if lines else ""
        if line.startswith("    def ") and above.strip() and not above.startswith(("class ", "    @")):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)
