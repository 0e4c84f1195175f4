"""Shows a person at a terminal how far the weights are loaded. Says nothing to a pipe, or when it is quick."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE_SECONDS = 0.5


class LoadProgress:
    """Called with (bytes done, bytes in total) while weights load; `stop` clears the bar."""

    def __init__(self) -> None:
        self._is_wanted = sys.stderr.isatty()
        self._begun_at = time.monotonic()
        self._bar: Progress | None = None

    def __call__(self, num_done: int, num_total: int) -> None:
        if not self._is_wanted or time.monotonic() - self._begun_at < PATIENCE_SECONDS:
            return
        if self._bar is None:
            columns = (TextColumn("loading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=num_total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=num_done)

    def stop(self) -> None:
        """Clears the bar, if one was shown."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
