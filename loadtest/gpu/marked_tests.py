"""The tests marked `gpu`, each one's outcome a record as it comes.

    python -m loadtest.gpu.marked_tests --records FILE

A dry run collects them only. Tests of other machines' packages are not looked at: the marked ones lie in tests/gpu.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest

from loadtest.gpu.records import Records, parse_part

FOLDER = "tests/gpu"
ARGUMENTS = ("-m", "gpu", "-q", "--continue-on-collection-errors", "-p", "no:cacheprovider")
WHY_CHARACTERS = 400
"""Of a failure's end that a record keeps."""


class Recorder:
    """A plugin that writes what becomes of each test."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A call, or what kept a test from being called."""
        if report.when == "call" or report.outcome != "passed":
            why = report.longreprtext[-WHY_CHARACTERS:] if report.failed else ""
            self._records.write("test", name=report.nodeid, outcome=report.outcome, seconds=report.duration, why=why)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that could not be read, or was left out."""
        if report.outcome != "passed":
            why = str(report.longrepr)[-WHY_CHARACTERS:]
            self._records.write("test", name=report.nodeid, outcome=report.outcome, seconds=0.0, why=why)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Tests that need no card."""
        print(f"{len(items)} tests are not marked")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs them. Returns pytest's exit code."""
    options = parse_part("marked_tests", arguments)
    words = [*ARGUMENTS, *(["--collect-only"] if options.is_dry else []), FOLDER]
    return int(pytest.main(words, plugins=[Recorder(options.records)]))


if __name__ == "__main__":
    sys.exit(main())
