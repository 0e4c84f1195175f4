"""Log lines of every process: text for people, JSON for machines. Owns the root logger's one handler.

One line per record. Callers of the service never see any of it; a bug's traceback is found here by the errorId that its
caller got. Prompts and answers are not logged.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import TextIO

FIELDS = "fields"
"""Name under which `extra` brings a record's structured fields."""


def configure(level: str, form: str, stream: TextIO | None = None) -> None:
    """Sends all records of at least `level` to `stream` (standard error), as "json" or "text".

    "auto" is text on a terminal, else JSON. Replaces what was configured before.
    """
    target = sys.stderr if stream is None else stream
    if form == "auto":
        form = "text" if target.isatty() else "json"
    handler = logging.StreamHandler(target)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def with_fields(**fields: object) -> Mapping[str, object]:
    """For a logging call's `extra`; fields that are None are left out."""
    return {FIELDS: {name: value for name, value in fields.items() if value is not None}}


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **record.__dict__.get(FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, message, then the fields as name=value; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] = record.__dict__.get(FIELDS, {})
        pairs = "".join(f" {name}={_shown(value)}" for name, value in fields.items())
        line = f"{_utc(record.created)} {record.levelname.lower():7} {record.getMessage()}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


def _shown(value: object) -> str:
    """A value without blanks stands as it is; anything else is quoted, so that a line can be taken apart."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if text and text.isprintable() and " " not in text and '"' not in text else json.dumps(text)
