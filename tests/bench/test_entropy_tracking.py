"""The entropy-tracking benchmark: its judgement on curves made by hand, its cases, a short real run that resumes."""

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import bench_entropy_tracking  # noqa: E402
from tracking_cases import FREE, SCHEDULES, TARGETED, grid  # noqa: E402
from tracking_report import judge, markdown, summarise  # noqa: E402

from entrocraft.schedules import anchored  # noqa: E402
from entrocraft.train.config_reader import load_config  # noqa: E402
from entrocraft.train.control import build_controller, build_method  # noqa: E402


def _rows(entropy, target):
    rows = [
        {
            "entropy": e, "target": t, "kept_token_fraction": 0.5, "tokens_per_second": 10.0, "seconds": 2.0,
            "bypassed": 0.0, "accuracy": 0.25, "kept_fraction_negative": 0.5,
        }
        for e, t in zip(entropy, target, strict=True)
    ]  # fmt: skip
    rows[-1] |= {"eval_accuracy": 0.5, "eval_pass_at_8": 0.75, "eval_distinct_correct": 3.0, "eval_entropy": 0.1}
    return rows


def test_errors_and_settling_by_hand():
    target = [1.0] * 30 + [0.7] * 30 + [1.0] * 30
    entropy = list(target)
    for s in range(30, 38):
        entropy[s] = 0.9  # eight steps to come down
    for s in range(60, 90):
        entropy[s] = 0.9  # never comes up: 0.1 away
    entropy[50] = 0.76
    found = judge(_rows(entropy, target))
    assert found["error"] == pytest.approx((8 * 0.2 + 30 * 0.1 + 0.06) / 60)
    assert found["worst"] == pytest.approx(0.1)  # the eight steps after the jump are left out
    assert found["settling"] == pytest.approx((8 + 30) / 2)
    assert (found["accuracy"], found["distinct"], found["kept"], found["tokens"]) == (0.5, 3.0, 0.5, 90 * 20)
    assert judge(_rows([1.0] * 9, [1.0] * 9))["settling"] is None


def test_means_and_spreads_over_seeds():
    runs = []
    for seed, error in ((1, 0.01), (2, 0.03)):
        row = judge(_rows([1.0 + error] * 9, [1.0] * 9))
        runs.append({"method": "budget", "schedule": "line", "regime": "one_pass", "seed": seed, **row})
    (row,) = summarise(runs).values()
    assert row["error"] == pytest.approx(0.02)
    assert row["error_spread"] == pytest.approx(0.02 / 2**0.5)
    assert "| budget | yes | 0.020 ± 0.014 |" in markdown(summarise(runs))


def test_every_case_is_a_configuration_that_can_be_built():
    cases = grid(seeds=(1,))
    assert len(cases) == 2 * (len(FREE) + len(TARGETED) * len(SCHEDULES))
    assert len({case.name for case in cases}) == len(cases)
    config_file = BENCH.parent / "train" / "configs" / "demo.yaml"
    for case in cases:
        options = any("options" in argument or "policy" in argument for argument in case.overrides())
        if options and case.regime == "one_pass" and case.schedule == "line":
            config = load_config([f"--config={config_file}", *case.overrides()])
            build_method(config)
            build_controller(config, vocab_size=259)
    for make in SCHEDULES.values():
        schedule = anchored(make(90), 1.1)
        assert schedule(0) == pytest.approx(1.1 if make is not SCHEDULES["too_high"] else 1.65)
        assert 0.3 < schedule(90) < 1.7


@pytest.mark.slow
def test_a_short_run_is_recorded_and_resumed(tmp_path, capsys):
    where = ["--out", tmp_path / "out", "--scratch", tmp_path / "scratch", "--jobs", 0, "--seeds", 1]
    what = ["--schedules", "line", "--regimes", "reused", "--steps", 6, "--warm-start-steps", 20]

    def run(*methods):
        assert bench_entropy_tracking.main([*map(str, where), *map(str, what), "--methods", *methods]) == 0
        return capsys.readouterr().out

    assert "0 of 1 runs are there, 1 to go" in run("budget")
    again = run("budget", "clip_cov")
    assert "1 of 2 runs are there, 1 to go" in again
    assert "| clip_cov | no |" in again
    rows = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["budget", "clip_cov"]
    for row in rows:
        assert len(row["entropy"]) == len(row["target"]) == 6
        assert row["target"][0] == pytest.approx(rows[0]["entropy"][0] * (1 - 0.55 / 6), rel=1e-3)
    assert rows[0]["entropy"][0] == rows[1]["entropy"][0]  # the same model, prompts and draws
    assert (tmp_path / "out" / "curves_line_reused.png").stat().st_size > 5000
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 5000
    assert not list((tmp_path / "scratch").glob("budget*"))
