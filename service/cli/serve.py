"""Serve a model over gRPC. Each flag is also a variable (QUIRE_LIKE_THIS) and a key of a TOML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from service.config import BUILT_IN_MODEL, Settings, load_settings

METAVARS = {int: "N", float: "X", str: "TEXT", Path: "DIR"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, and one flag per setting. Values are checked by the settings themselves, all at once."""
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="read settings from a file")
    for name, field in Settings.model_fields.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=_help(field), **_form(field.annotation)
        )


def run(arguments: argparse.Namespace) -> int:
    """Serves until told to stop; returns the exit code."""
    from service import logs, supervisor

    flags = vars(arguments)
    file = flags.pop("config")
    settings = load_settings(flags, file)
    logs.configure(settings.log_level, settings.log_format)
    return supervisor.run(settings)


def _form(annotation: Any) -> dict[str, Any]:
    """How argparse reads a setting of this type."""
    if isinstance(annotation, UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not NoneType)
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    return {"metavar": METAVARS[annotation]}


def _help(field: FieldInfo) -> str:
    """The setting's own description, with its default where that says something."""
    description = (field.description or "").replace("%", "%%")
    if field.default in (None, "", BUILT_IN_MODEL) or isinstance(field.default, bool):
        return description
    return f"{description} [{field.default}]"
