"""One live line on a terminal, or one plain line now and then in a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows step, entropy, target, reward, kept fraction and time left. A context manager.

    Args:
        total_steps: step at which the run ends.
        start_step: last step already done (0 for a new run), so that time left counts this process only.
        console: where to write; by default rich's own, on standard output. If it is not a terminal, a plain
            line is printed for the first and the last step and every `seconds_between_lines` in between.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
        *,
        seconds_between_lines: float = 10.0,
    ) -> None:
        self.total_steps = total_steps
        self.start_step = start_step
        self.console = console or Console()
        self.seconds_between_lines = seconds_between_lines
        self._begun = self._last_line = time.monotonic()
        self._first = True
        self._live: RichProgress | None = None

    def __enter__(self) -> Progress:
        self._begun = self._last_line = time.monotonic()
        if self.console.is_terminal:
            self._live = RichProgress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}"),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = self._live.add_task("", total=self.total_steps, completed=self.start_step, line="")
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        # Also on KeyboardInterrupt: it restores the cursor, and the exception goes on to the caller.
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the metrics of a step; keys that are missing or not finite are shown as a dash."""
        line = self._line(step, values)
        if self._live is not None:
            self._live.update(self._task, completed=step, line=line)
            return
        now = time.monotonic()
        if self._first or step >= self.total_steps or now - self._last_line >= self.seconds_between_lines:
            self._first, self._last_line = False, now
            self.console.print(f"step {step}/{self.total_steps}  {line}", markup=False, highlight=False, soft_wrap=True)

    def print(self, text: str) -> None:
        """Print a line above the live one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, step: int, values: Mapping[str, Any]) -> str:
        return "  ".join(
            (
                f"entropy {_number(values.get('entropy'), '.3f')}",
                f"target {_number(values.get('target'), '.3f')}",
                f"reward {_number(values.get('reward'), '.3f')}",
                f"kept {_number(values.get('kept_fraction'), '.0%')}",
                f"left {self._time_left(step)}",
            )
        )

    def _time_left(self, step: int) -> str:
        done = step - self.start_step
        if done <= 0:
            return "-"
        seconds = (time.monotonic() - self._begun) / done * max(0, self.total_steps - step)
        return str(timedelta(seconds=round(seconds)))


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) and math.isfinite(value) else "-"
