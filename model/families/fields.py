"""Typed reading of a Hugging Face JSON file: every complaint is one line that names the file and the key.

Standard library only. It does not know what any key means.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 * 2**20
"""No configuration is near this large; a tokenizer's may be, and is not read here."""


class Fields:
    """The keys of one JSON object. A null value counts as absent, as it does in Hugging Face's own files."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str) -> Any:
        """The raw value, or None."""
        return self.values.get(key)

    def fail(self, key: str, expected: str) -> ValueError:
        """The error to raise for a value that cannot be used."""
        return ValueError(f"{self.where}: {key}: expected {expected}, found {reprlib.repr(self.values.get(key))}")

    def count(self, key: str, default: int | None = None, *, maximum: int = 2**31 - 1) -> int:
        """A positive integer up to a maximum. Without a default the key is required."""
        value = default if key not in self else self.values[key]
        if type(value) is not int or not 0 < value <= maximum:
            raise self.fail(key, f"a positive integer up to {maximum}")
        return value

    def number(self, key: str, default: float | None = None, *, minimum: float = 0.0, maximum: float = 1e30) -> float:
        """A number in [minimum, maximum], which excludes NaN and infinity. Without a default the key is required."""
        value: Any = default if key not in self else self.values[key]
        if type(value) not in (int, float) or not minimum <= value <= maximum:
            raise self.fail(key, f"a number from {minimum:g} to {maximum:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = default if key not in self else self.values[key]
        if type(value) is not bool:
            raise self.fail(key, "true or false")
        return value

    def require(self, key: str, *supported: object) -> None:
        """Refuses a present value that is not among the supported ones."""
        if key in self and self.values[key] not in supported:
            raise self.fail(key, f"{' or '.join(repr(value) for value in supported)}: nothing else is supported")

    def refuse(self, key: str, feature: str) -> None:
        """Refuses the key whatever its value: the feature behind it is not supported."""
        if key in self:
            raise ValueError(f"{self.where}: {key}: {feature} is not supported")

    def nested(self, key: str) -> Fields | None:
        """The object under a key, or None when absent."""
        if key not in self:
            return None
        if not isinstance(self.values[key], dict):
            raise self.fail(key, "an object")
        return Fields(self.values[key], f"{self.where}: {key}")


def read_json(file: Path) -> Fields:
    """Reads a JSON file whose top is an object. Raises ValueError in one line; OSError is turned into one too."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{file.name}: larger than {MAX_JSON_BYTES} bytes")
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file.name}: not valid JSON ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file.name}: expected a JSON object")
    return Fields(values, file.name)
