"""Collects what is wrong with a request, so that its caller hears of everything at once. It knows no field."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from service.errors import FieldViolation, InvalidField

MAX_VIOLATIONS = 32
MAX_PER_LIST = 3
"""Violations told of one repeated field. A status travels in headers, which are bounded."""


@dataclass(frozen=True, slots=True)
class Range:
    """[low, high], or (low, high]. No NaN is in any range."""

    low: float
    high: float
    is_open: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.is_open else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.is_open else '['}{self.low:g}, {self.high:g}]"


class Violations:
    """All violations of one request."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []
        self._per_list: Counter[str] = Counter()

    def require(self, holds: bool, field: str, must: str) -> bool:
        """Notes a violation of `field` unless it holds; gives back whether it does."""
        if not holds and len(self._found) < MAX_VIOLATIONS:
            self._found.append(FieldViolation(field, must))
        return holds

    def require_entry(self, holds: bool, field: str, index: int, must: str, part: str = "") -> bool:
        """As `require`, for entry `index` of a repeated field (its field `part`); the first few of a list are told."""
        if not holds:
            self._per_list[field] += 1
        if self._per_list[field] > MAX_PER_LIST:
            return holds
        return self.require(holds, f"{field}[{index}]{part}", must)

    def raise_any(self) -> None:
        """Raises InvalidField with all of them if there is one."""
        if self._found:
            raise InvalidField(violations=self._found)
