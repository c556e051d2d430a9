import io
import math
import re

import pytest
from rich.console import Console

from entrocraft.train.metrics import Progress

VALUES = {"entropy": 0.8312, "target": 0.85, "reward": 0.5, "kept_fraction": 0.75}


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=140, color_system=None)


def written(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def test_plain_lines_come_first_last_and_seldom():
    to = console(terminal=False)
    with Progress(50, console=to, seconds_between_lines=1000.0) as progress:
        for step in range(1, 51):
            progress.update(step, VALUES | {"entropy": step / 100})
    lines = written(to).splitlines()
    assert [re.sub(r"left \S+", "left T", line) for line in lines] == [
        "step 1/50  entropy 0.010  target 0.850  reward 0.500  kept 75%  left T",
        "step 50/50  entropy 0.500  target 0.850  reward 0.500  kept 75%  left T",
    ]
    assert lines[-1].endswith("left 0:00:00")


def test_plain_lines_come_at_every_step_when_time_has_passed():
    to = console(terminal=False)
    with Progress(4, console=to, seconds_between_lines=0.0) as progress:
        for step in range(1, 5):
            progress.update(step, VALUES)
    assert [line.split()[1] for line in written(to).splitlines()] == ["1/4", "2/4", "3/4", "4/4"]


def test_missing_and_infinite_values_are_dashes():
    to = console(terminal=False)
    with Progress(2, console=to) as progress:
        progress.update(1, {"entropy": math.nan, "reward": None, "kept_fraction": math.inf})
    assert "entropy -  target -  reward -  kept -" in written(to)


def test_time_left_counts_the_steps_of_this_process(monkeypatch):
    now = iter([0.0, 0.0, 30.0, 30.0, 30.0])
    monkeypatch.setattr("entrocraft.train.progress.time.monotonic", lambda: next(now))
    to = console(terminal=False)
    with Progress(100, start_step=80, console=to) as progress:
        # Three steps in 30 s, 17 to go.
        progress.update(83, VALUES)
    assert "left 0:02:50" in written(to)


def test_live_line_on_a_terminal_leaves_the_terminal_whole():
    to = console(terminal=True)

    def interrupted() -> None:
        with Progress(10, console=to) as progress:
            progress.update(3, VALUES)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = written(to)
    assert "3/10" in text
    assert "entropy 0.831  target 0.850  reward 0.500  kept 75%" in text
    # The cursor was hidden, and shown again after the exception.
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_print_writes_markup_as_it_stands():
    to = console(terminal=False)
    with Progress(10, console=to) as progress:
        progress.print("saved [bold]runs/x[/bold]")
    assert written(to) == "saved [bold]runs/x[/bold]\n"
