import math

import numpy as np
import pytest
from matplotlib.image import imread

from entrocraft.train.arms_figure import arm_colours, plot_arms
from entrocraft.train.figures import column, moving_average, plot_run


def test_column_leaves_out_what_is_not_a_finite_number():
    rows = [
        {"step": 1, "x": 1.5, "reason": "a"},
        {"step": 2, "x": None},
        {"step": 3},
        {"step": 4, "x": math.nan},
        {"step": 5, "x": 2},
        {"step": 6, "x": "high"},
    ]
    steps, values = column(rows, "x")
    assert steps.tolist() == [1, 5]
    assert values.tolist() == [1.5, 2]
    assert [part.tolist() for part in column(rows, "y")] == [[], []]


# 1 and 0 change nothing; 2 is even; 50 is longer than the data.
@pytest.mark.parametrize("window", [0, 1, 2, 3, 5, 50])
def test_moving_average_is_the_mean_of_the_values_around(window):
    values = np.random.default_rng(0).normal(size=17)
    half, other = window // 2, (window + 1) // 2
    expected = [values[max(0, i - half) : i + max(1, other)].mean() for i in range(17)]
    np.testing.assert_allclose(moving_average(values, window), expected, rtol=0, atol=1e-12)


def pixels(path) -> np.ndarray:
    return (imread(path)[..., :3] * 255).round().astype(int)


def count(image: np.ndarray, colour: str) -> int:
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return int((np.abs(image - wanted).max(axis=-1) <= 2).sum())


def rows_of(entropy_end: float, steps: int = 40) -> list[dict]:
    return [
        {
            "step": step,
            "samples": 256 * step,
            "entropy": 1.0 + (entropy_end - 1.0) * step / steps,
            "target": 1.0 - 0.5 * step / steps,
            "accuracy": 0.9 * step / steps,
            "kept_fraction": 0.8,
        }
        | ({"eval_distinct_correct": 4.0} if step % 10 == 0 else {})
        for step in range(1, steps + 1)
    ]


def test_every_arm_is_drawn_in_its_colour(tmp_path):
    arms = {"none": rows_of(0.2), "soft": rows_of(0.35), "budget": rows_of(0.5)}
    colours = arm_colours(list(arms))
    assert len(set(colours.values())) == 3
    plot_arms(arms, tmp_path / "arms.png", "Three arms")
    image = pixels(tmp_path / "arms.png")
    assert image.shape == (980, 1800, 3)
    drawn = {name: count(image, colours[name]) for name in arms}
    assert min(drawn.values()) > 2000, drawn
    plot_arms({"none": arms["none"]}, tmp_path / "one.png", "One arm")
    assert count(pixels(tmp_path / "one.png"), colours["budget"]) == 0


def test_arms_of_different_lengths_targets_and_metrics_are_drawn(tmp_path):
    other = [{"step": step, "entropy": 0.5, "target": 0.9, "reward": 0.1} for step in (1, 2, 3)]
    bare = [{"step": 1}]
    plot_arms({"a": rows_of(0.2), "b": other, "c": bare}, tmp_path / "arms.png", "x")
    assert count(pixels(tmp_path / "arms.png"), arm_colours(["a"])["a"]) > 500


def test_arms_without_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="arms is empty"):
        plot_arms({}, tmp_path / "arms.png", "x")
    with pytest.raises(ValueError, match=r"arms \['soft'\] have no rows"):
        plot_arms({"none": rows_of(0.2), "soft": []}, tmp_path / "arms.png", "x")


# One step has no line to draw and no second axis; a run that stopped at once still deserves its picture.
@pytest.mark.parametrize("rows", [rows_of(0.2), rows_of(0.2)[:1], [{"step": 1}], [{"step": 1, "entropy": None}]])
def test_a_run_of_any_length_is_drawn(tmp_path, rows):
    plot_run(rows, tmp_path / "curves.png")
    image = pixels(tmp_path / "curves.png")
    assert image.shape[1] == 1540
    panels = sum(any(name in row for row in rows) for name in ("accuracy", "kept_fraction", "eval_distinct_correct"))
    # A panel more for each pair of metrics; the height grows by a row of panels.
    assert image.shape[0] == round(140 * (2.2 + 0.55 + 0.95 + math.ceil(panels / 2) * (1.45 + 0.95)))
    blue = count(image, "#0072B2")
    assert (blue > 500) if len(rows) > 1 else (blue > 20 or "accuracy" not in rows[0])
