"""The evaluation's pictures hold the numbers they are given."""

import numpy as np
import pytest

from entrocraft.train.eval_figure import plot_over_prompts, plot_pass_at_k
from entrocraft.train.eval_statistics import Outcome, summarise


def summary(*right: int, bootstrap: int = 50):
    values = {"samples": 4, "reward": 0.0, "no_verdict": 0, "tokens": 4, "truncated": 0}
    outcomes = [Outcome(problem=p, right=c, distinct=c, **values) for p, c in enumerate(right)]
    return summarise(outcomes, [1, 2, 4], bootstrap=bootstrap)


def test_pass_at_k_has_a_line_and_a_band_for_each_set(tmp_path):
    summaries = {"one": summary(4, 1, 0), "two": summary(2, 2, bootstrap=0)}
    figure = plot_pass_at_k(summaries, tmp_path / "curve.png", title="model")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert [np.asarray(line.get_xdata()).tolist() for line in axes.lines] == [[1, 2, 4]] * 2
    for line, found in zip(axes.lines, summaries.values(), strict=True):
        assert np.asarray(line.get_ydata()).tolist() == pytest.approx([found[f"pass_at_{k}"] for k in (1, 2, 4)])
    (band,) = axes.collections  # the second set has no intervals
    low = {round(k): y for k, y in np.asarray(band.get_paths()[0].vertices)[1:4]}
    assert low == pytest.approx({k: summaries["one"]["intervals"][f"pass_at_{k}"][0] for k in (1, 2, 4)})
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["one (3)", "two (2)"]
    with pytest.raises(ValueError, match="at least one set"):
        plot_pass_at_k({}, tmp_path / "none.png", title="")


def test_over_prompts_has_a_panel_for_each_set(tmp_path):
    rows = [
        {"set": name, "prompts": prompts, **summary(*right)}
        for prompts, right in ((100, (1, 0)), (200, (4, 2)))
        for name in ("a", "b", "c", "d")
    ]
    figure = plot_over_prompts(rows, tmp_path / "over.png")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == [f"{name}, 2 problems" for name in "abcd"]
    mean, any_right = shown[3].lines
    assert np.asarray(mean.get_xdata()).tolist() == [100, 200]
    assert np.asarray(mean.get_ydata()).tolist() == pytest.approx([1 / 8, 6 / 8])
    assert np.asarray(any_right.get_ydata()).tolist() == pytest.approx([0.5, 1.0])
    with pytest.raises(ValueError, match="at least one row"):
        plot_over_prompts([], tmp_path / "none.png")
