"""The names in the frontier's figure: none covers another, and those that matter are there."""

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import tracking_figures
from tracking_cases import FREE, TARGETED, Case


def _row(method: str, regime: str, error: float) -> dict[str, Any]:
    return {
        "task": "sums", "schedule": "line", "regime": regime, "method": method, "error": error, "error_spread": 0.01,
        "final_reward": 0.9, "final_reward_spread": 0.01, "distinct": 4.0, "distinct_spread": 0.1, "bypassed": 0.0,
    }  # fmt: skip


def test_names_do_not_cover_one_another(tmp_path, monkeypatch):
    drawn, savefig = [], Figure.savefig

    def save(figure, *args, **kwargs):
        drawn.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    crowd = sorted(FREE | TARGETED.keys())  # all in one place, but for one
    table = {
        Case(method, "line", regime, 1).name: _row(method, regime, 0.01 if method == "budget" else 0.3)
        for regime in ("one_pass", "reused")
        for method in crowd
    }
    tracking_figures.plot_frontier(table, "sums", tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    for axis in drawn[0].axes:
        names = {text.get_text(): text for text in axis.texts if text.get_visible()}
        assert len(axis.texts) == len(crowd)
        # Five places around the crowd's point; the first five of those that matter most have them.
        first = [name for name in crowd if name in tracking_figures.NAMED and name != "budget"]
        assert {"budget"} < set(names) <= {"budget", *first}
        assert 3 <= len(names) <= 6
        for one, other in combinations(names.values(), 2):
            assert not one.get_window_extent().overlaps(other.get_window_extent())
