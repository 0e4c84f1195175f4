"""The README's tables, made from the code: `python -m tests.readme` rewrites them, tests/test_readme.py compares."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry
from pydantic.fields import FieldInfo

from service import errors
from service.config import BUILT_IN_MODEL, Settings
from service.metrics import EngineMetrics, RequestMetrics

README = Path(__file__).resolve().parents[1] / "README.md"


def settings_table() -> str:
    """One row per setting, in the order of the code."""
    rows = [
        f"| `{name.replace('_', '-')}` | {kind_of(field)} | {default_of(field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| setting | values | default | meaning |", "|---|---|---|---|", *rows])


def kind_of(field: FieldInfo) -> str:
    """What a setting takes: its choices, or its type and bounds."""
    options = [option for option in typing.get_args(field.annotation) if option is not types.NoneType]
    if typing.get_origin(field.annotation) is typing.Literal:
        return ", ".join(f"`{option}`" for option in options)
    kind = options[0] if options else field.annotation
    names = {bool: "switch", int: "integer", float: "number", str: "text", Path: "path"}
    bounds = [f"{sign} {value}" for limit in field.metadata for sign, value in bounds_of(limit)]
    return " ".join([names[kind], ", ".join(bounds)]).strip()


def bounds_of(limit: object) -> Iterator[tuple[str, object]]:
    """The bounds that a piece of a field's metadata states."""
    for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
        if hasattr(limit, attribute):
            yield sign, getattr(limit, attribute)


def default_of(field: FieldInfo) -> str:
    """A default as it would be written; empty where the meaning says what stands in for it."""
    default = field.default
    if default in (None, "", BUILT_IN_MODEL):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def errors_table() -> str:
    """One row per error that a call can end with, in the order of the code."""
    rows = [
        f"| `{error.reason}` | `{error.code}` | {error.message} | {metadata_of(error)} |"
        for error in errors.QuireError.__subclasses__()
    ]
    return "\n".join(["| reason | code | when | metadata |", "|---|---|---|---|", *rows])


def metadata_of(error: type[errors.QuireError]) -> str:
    """The metadata keys that the error's docstring names."""
    found = re.search(r"metadata: ([\w, ]+)", error.__doc__ or "")
    keys = found[1].split(", ") if found else []
    return ", ".join(f"`{key}`" for key in keys if " " not in key)


def metrics_table() -> str:
    """One row per metric, in the order of their definition."""
    registry = CollectorRegistry()
    RequestMetrics(registry)
    EngineMetrics(registry)
    rows = []
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(["| metric | type | meaning |", "|---|---|---|", *rows])


def with_tables(text: str) -> str:
    """The README's text with its tables as they should be. Raises ValueError when a table's place is missing."""
    for name, table in (("settings", settings_table()), ("errors", errors_table()), ("metrics", metrics_table())):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the README needs one place for the table of {name}")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
