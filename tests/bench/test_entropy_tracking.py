"""The entropy-tracking benchmark: its judgement on curves made by hand, its cases, a short real run that resumes."""

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import bench_entropy_tracking  # noqa: E402
from tracking_cases import FREE, SCHEDULES, TARGETED, TASKS, WITH_RLOO, Case, grid  # noqa: E402
from tracking_figures import plot_failure  # noqa: E402
from tracking_runs import derived, judge, read_runs, settling, summarise  # noqa: E402
from tracking_tables import comparison, destroyed, frontier, markdown, paired, repeated, starts, with_rloo  # noqa: E402
from tracking_verdict import any_advantage, method_table  # noqa: E402

from entrocraft.schedules import anchored  # noqa: E402
from entrocraft.train.config_reader import load_config  # noqa: E402
from entrocraft.train.control import build_controller, build_method  # noqa: E402


def _rows(entropy, target):
    rows = [
        {
            "entropy": e, "target": t, "kept_token_fraction": 0.5, "tokens_per_second": 10.0, "seconds": 2.0,
            "bypassed": 0.0, "accuracy": 0.25, "active_fraction_negative": 0.5,
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
    assert derived(found)["whole"] == pytest.approx((8 * 0.2 + 30 * 0.1 + 0.06) / 90)
    assert settling(found) == {"down": (True, 8), "up": (True, None)}
    assert (found["accuracy"], found["distinct"], found["kept"], found["tokens"]) == (0.5, 3.0, 0.5, 90 * 20)
    assert settling(judge(_rows([1.0] * 9, [1.0] * 9))) == {}
    stays = found | {"method": "budget", "regime": "one_pass"}
    late = judge(_rows(entropy[:75] + target[75:], target)) | {"method": "budget", "regime": "one_pass"}
    runs = [one | {"schedule": "step_down_up", "seed": seed} for seed, one in enumerate((late, late, stays))]
    assert settling(late) == {"down": (True, 8), "up": (True, 15)}
    (row,) = summarise(runs).values()
    assert (row["down"], row["up"], row["held"]) == (8.0, 15.0, {"down": 3, "up": 3})
    assert row["happened"] == {"down": 3, "up": 2, "let_go": 0}
    assert "| 8 | 15 (2 of 3) |" in markdown({"": row})
    (row,) = summarise(runs[2:]).values()
    assert "| 8 | never |" in markdown({"": row})


def test_to_be_near_a_level_by_chance_is_not_to_follow():
    target = [1.0] * 30 + [0.7] * 30 + [1.0] * 30
    found = judge(_rows([0.7] * 90, target))
    assert settling(found) == {"down": (False, None), "up": (True, None)}
    runs = [found | {"method": "hard", "regime": "reused", "schedule": "step_down_up", "seed": 1}]
    runs.append(judge(_rows([0.6] * 90, target)) | runs[0] | {"method": "soft", "error": 0.25})
    ours = judge(_rows([1.0] * 30 + [0.7] * 60, target)) | {"schedule": "step_down_up", "regime": "reused", "seed": 1}
    table = summarise([*runs, ours | {"method": "budget"}])
    assert "| not held | never |" in markdown(table)
    assert "step_down_up" not in comparison(table)  # nobody else was there before the jump
    # One of two seeds held its level: it counts.
    other = ours | {"method": "hard", "seed": 2, "error": 0.4}
    assert "| step_down_up, reused | budget |" in comparison(summarise([*runs, other, ours | {"method": "budget"}]))


def test_what_control_let_through_is_told_from_what_it_kept():
    rows = _rows([1.0] * 10, [1.0] * 10)
    for row in rows[6:]:
        row |= {"bypassed": 1.0, "kept_token_fraction": 1.0, "released": 1.0}
    run = judge(rows) | {"method": "budget", "schedule": "line", "regime": "reused", "seed": 1}
    assert derived(run)["kept"] == pytest.approx(0.5)
    assert (run["kept"], run["bypassed"], derived(run)["let_go"]) == (pytest.approx(0.7), pytest.approx(0.4), 6)
    assert "| 0.50 | 0.40 | 6 (1 of 2) |" in markdown(
        summarise([run, judge(_rows([1.0] * 10, [1.0] * 10)) | run | {"seed": 2, "released_at": None}])
    ).replace(" ± 0.00", "")


def test_means_and_spreads_over_seeds():
    runs = []
    for seed, error in ((1, 0.01), (2, 0.03)):
        row = judge(_rows([1.0 + error] * 9, [1.0] * 9))
        runs.append({"method": "budget", "schedule": "line", "regime": "one_pass", "seed": seed, **row})
    (row,) = summarise(runs).values()
    assert row["error"] == pytest.approx(0.02)
    assert row["error_spread"] == pytest.approx(0.02 / 2**0.5)
    assert row["whole_spread"] == pytest.approx(0.02 / 2**0.5)
    assert "| budget | yes | 0.020 ± 0.014 | 0.020 ± 0.014 |" in markdown(summarise(runs))
    assert starts(runs) == {("sums", 1): {1.01}, ("sums", 2): {1.03}}


def _ends(method, *, error, reward, seed=1, schedule="line", distinct=3.0, regime="reused"):
    """A run of forty steps with that error, and that reward on the last four."""
    flat = judge(_rows([1.0] * 40, [1.0] * 40)) | {"schedule": schedule, "regime": regime, "seed": seed}
    curve = [0.1] * 36 + [reward] * 4
    return flat | {"method": method, "name": method, "error": error, "reward": curve, "distinct": distinct}


def test_ours_against_the_tightest_published_and_what_control_destroyed():
    errors = {"none": 0.5, "hard": 0.4, "entropic": 0.3, "first_order": 0.05, "budget": 0.02, "clip_b": 0.01}
    runs = [_ends(method, error=error, reward=0.5) for method, error in errors.items()]
    # Neither this project's other rule nor a method without a target is a published one that claims a target.
    line = "| line, reused | budget | 0.020 | 0.500 | 0.75 | entropic | 0.300 | 0.500 | 0.75 | 15.0 |"
    assert line in comparison(summarise(runs)).splitlines()
    assert "Falling curves, of 4 runs: none." in destroyed(runs)
    assert "Without" not in destroyed(runs)
    harmed = [_ends("hard", error=0.4, reward=0.24) if run["method"] == "hard" else run for run in runs]
    assert "Falling curves, of 4 runs: hard (0.24 for 0.50)." in destroyed(harmed)
    # The uncontrolled run of another seed says nothing; a curve that goes up again is told apart.
    alone = destroyed([run | {"seed": 2} if run["method"] == "none" else run for run in harmed])
    assert "of 0 runs: none. Without an uncontrolled run of their seed: 4." in alone
    apart = destroyed([run | {"schedule": "wave"} if run["method"] == "hard" else run for run in harmed])
    assert "Falling curves, of 3 runs: none." in apart
    assert "Other curves, of 1 runs: hard (0.24 for 0.50)." in apart


def test_the_line_with_rloo_is_set_against_the_same_seeds_with_grpo():
    runs = [_ends("budget", error=error, reward=0.9, seed=seed) for seed, error in ((1, 0.02), (2, 0.04), (3, 0.9))]
    assert with_rloo(runs) == ""
    runs += [_ends("rloo_budget", error=error, reward=0.8, seed=seed) for seed, error in ((1, 0.01), (2, 0.05))]
    assert with_rloo(runs).splitlines()[-1] == "| budget | reused | 0.030 | 0.030 | 0.80 | 0.90 | 2 |"
    assert any_advantage("budget") == "yes"
    assert [name for name in TARGETED if any_advantage(name) == "no"] == ["switch", "entropic_parity"]


def test_the_frontier_has_what_no_other_beats_in_both():
    runs = [
        _ends("none", error=0.5, reward=0.9),
        _ends("budget", error=0.01, reward=0.7),
        _ends("first_order", error=0.02, reward=0.6),  # beaten in both
        _ends("hard", error=0.1, reward=0.85),
        _ends("soft", error=0.2, reward=0.85),  # no better than hard
        _ends("cispo", error=0.001, reward=0.95),  # seeks no target
    ]
    rows = [line for line in frontier(summarise(runs)).splitlines() if line.startswith("| line")]
    assert rows == [
        "| line, reused | budget | 0.010 | 0.700 | 0.75 | 3.0 | 0.00 | 0.200 | 1 |",
        "| line, reused | hard | 0.100 | 0.850 | 0.75 | 3.0 | 0.00 | 0.050 | 1 |",
    ]


def test_pairs_are_of_the_same_curve_regime_and_seed():
    runs = []
    for seed, (mine, other) in enumerate([(0.01, 0.03), (0.02, 0.06)]):
        runs.append(_ends("budget_token", error=mine, reward=0.8, seed=seed))
        runs.append(_ends("hard", error=other, reward=0.9, seed=seed, distinct=4.5))
    runs.append(_ends("hard", error=0.9, reward=0.1, seed=7))  # nothing to set it against
    runs.append(_ends("hard", error=0.9, reward=0.1, seed=0, schedule="wave"))
    text = paired(runs).splitlines()
    # +0.02 and +0.04: mean 0.03, standard error 0.0141 / sqrt 2.
    assert text[-1] == "| sums | hard | +0.030 ± 0.010 | +0.100 ± 0.000 | +1.5 ± 0.0 | 2 |"


def test_methods_that_are_one_and_the_same_run_are_named():
    runs = [_ends(method, error=0.1, reward=0.5, seed=seed) for method in ("none", "cispo", "hard") for seed in (1, 2)]
    runs[-1]["entropy"] = [1.1, *runs[-1]["entropy"][1:]]
    assert "- line, reused: none, cispo\n" in repeated(runs)
    assert "hard" not in repeated(runs)


def _means(method, errors, *, seeds=2, task="sums"):
    """Runs of a method whose mean errors are these, in both regimes; reward and distinct answers the same. A step is
    met in seven steps downwards, and upwards by one seed only."""
    flat = {"entropy": [1.0] * 30, "target": [1.0] * 30}
    target = [1.0] * 10 + [0.7] * 15 + [1.0] * 15
    step = [{"entropy": [1.0] * 17 + [0.7] * 8 + [last] * 15, "target": target} for last in (1.0, 0.8)]
    return [
        {"method": method, "schedule": schedule, "regime": regime, "seed": seed,
         **(step[seed] if schedule == "step_down_up" else flat),
         "error": error + (0.001 if seed else -0.001), "worst": 0.1,
         "reward": [0.1] * 36 + [0.8] * 4, "accuracy": 0.9, "pass_at_8": 1.0, "distinct": 4.25, "entropy_end": 0.5,
         "kept": 1.0, "tokens": 1.0, "task": task}
        for schedule, error in errors.items() for regime in ("one_pass", "reused") for seed in range(seeds)
    ]  # fmt: skip


def test_what_each_method_reaches_and_follows_is_said_of_its_means():
    runs = [
        *_means("none", {"line": 0.3}),
        *_means("hard", {"line": 0.019, "half_cosine": 0.02, "wave": 0.041, "level": 0.041}),
        *_means("switch", {"line": 0.021, "half_cosine": 0.01, "wave": 0.01, "level": 0.01}),
        *_means("budget", {"line": 0.01, "half_cosine": 0.02, "wave": 0.04, "level": 0.039, "step_down_up": 0.2}),
        *_means("soft", {"line": 0.2}),
        *_means("budget", {"line": 0.002}, task="addition", seeds=1),
        *_means("hard", {"too_high": 0.3}, seeds=1),  # not in the table
    ]
    cost, empty, no_step = "0.80 / 0.80 | 4.2 / 4.2", "| | | | |", "| | | |"
    table = method_table(summarise(runs))
    assert table is not None
    assert [" ".join(line.split()) for line in table.splitlines()[2:]] == [
        "| `budget` * | yes | yes | yes | 0.039 / 0.039 | 0.010 / 0.010 | 0.020 / 0.020 | 0.040 / 0.040 | "
        "0.200 / 0.200 | 7 / 7 | 0 (1 of 2) / 0 (1 of 2) | "
        + cost + " | 0.001 / 0.001 | 0.80 / 0.80 |",
        "| `hard` | no | falling ones | yes | 0.041 / 0.041 | 0.019 / 0.019 | 0.020 / 0.020 | 0.041 / 0.041 "
        f"{no_step} {cost} | | |",
        "| `switch` | yes | no | no | 0.010 / 0.010 | 0.021 / 0.021 | 0.010 / 0.010 | 0.010 / 0.010 "
        f"{no_step} {cost} | | |",
        f"| `soft` | not run | no | yes | | 0.200 / 0.200 {empty} | {cost} | | |",
        f"| `none` | no | no | yes | | 0.300 / 0.300 {empty} | {cost} | | |",
        "",
        "Means over 2 seeds, of the second task over 1 seed; one pass / re-used batches.",
    ]  # fmt: skip
    assert method_table(summarise(run for run in runs if run["method"] != "none")) is None


def test_the_readme_shows_the_table_that_was_measured():
    measured = (BENCH / "results/entropy_tracking/methods.md").read_text().rstrip()
    assert measured in (BENCH.parent / "README.md").read_text(), (
        "put bench/results/entropy_tracking/methods.md, which `--report` writes, into README.md"
    )
    runs = read_runs(BENCH / "results/entropy_tracking/runs.jsonl")
    assert method_table(summarise(runs.values())) == measured + "\n"


def test_where_control_let_go_is_recorded_and_drawn(tmp_path):
    rows = _rows([1.0 - 0.01 * s for s in range(40)], [1.5] * 40)
    for row in rows[25:]:
        row["released"] = 1.0
    assert judge(_rows([1.0] * 9, [1.0] * 9))["released_at"] is None
    found = judge(rows) | {"schedule": "too_high", "regime": "one_pass", "seed": 1}
    assert (found["released_at"], found["negatives"], found["reward"]) == (25, [0.5] * 40, [0.25] * 40)
    runs = {method: found | {"method": method} for method in ("hard", "budget")}
    plot_failure(runs, "one_pass", tmp_path / "failure.png")
    assert (tmp_path / "failure.png").stat().st_size > 5000
    plot_failure(runs, "reused", tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_tasks_are_told_apart_and_the_names_of_sums_stay():
    runs = []
    for task, error in ((None, 0.01), ("sums", 0.03), ("addition", 0.0012)):
        row = {"method": "budget", "schedule": "line", "regime": "reused", "seed": 2 if task else 1}
        runs.append(row | judge(_rows([0.1 + error] * 9, [0.1] * 9)) | ({"task": task} if task else {}))
    table = summarise(runs)
    assert list(table) == ["budget-line-reused", "addition-budget-line-reused"]
    assert [row["seeds"] for row in table.values()] == [2, 1]
    assert table["budget-line-reused"]["error"] == pytest.approx(0.02)
    sums, addition = markdown(table).split("### addition: line, reused")
    assert "### line, reused" in sums
    assert "| budget | yes | 0.020 ± 0.014 | 0.020" in sums
    assert "| budget | yes | 0.0012 | 0.0012 | 0.0012 |  |  | 0.250 | 0.50 | 0.75 | 3.0 | 0.100 |" in addition
    names = {task: {case.name for case in grid(["budget"], ["line"], seeds=(3,), task=task)} for task in TASKS}
    assert names["sums"] == {"budget-line-one_pass-seed3", "budget-line-reused-seed3"}
    assert names["addition"] == {"addition-budget-line-one_pass-seed3", "addition-budget-line-reused-seed3"}


def test_a_curve_of_another_task_is_refused(capsys):
    with pytest.raises(ValueError, match=r"schedules \['wave'\]: the task 'addition' has \['half_cosine', 'line'\]"):
        grid(schedules=["line", "wave"], task="addition")
    with pytest.raises(SystemExit):
        bench_entropy_tracking.main(["--out", "nowhere", "--task", "addition", "--schedules", "wave"])
    assert "['wave']" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_every_case_is_a_configuration_that_can_be_built(task):
    cases = grid(seeds=(1,), task=task)
    assert len(cases) == 2 * (len(FREE) + len(TARGETED) * len(TASKS[task].schedules))
    assert len({case.name for case in cases}) == len(cases)
    config_file = BENCH.parent / "train" / "configs" / "demo.yaml"
    for case in [*cases, *(Case(name, "line", "one_pass", 1, task) for name in WITH_RLOO)]:
        if case.regime == "one_pass" and case.schedule == "line":
            config = load_config([f"--config={config_file}", *case.overrides()])
            build_method(config)
            build_controller(config, vocab_size=259)
            assert (config.loss.advantage == "rloo") == ("rloo" in case.method)
            assert config.entropy.width == (0.02 if task == "sums" else 0.005)
    if task == "addition":
        return  # its curves are tested beside it
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


@pytest.mark.slow
def test_a_short_run_of_the_addition_task(tmp_path, capsys):
    where = ["--out", tmp_path / "out", "--scratch", tmp_path / "scratch", "--jobs", 0, "--seeds", 1]
    what = ["--task", "addition", "--schedules", "half_cosine", "--regimes", "one_pass", "--methods", "hard"]
    short = ["--steps", 2, "--warm-start-steps", 5]
    assert bench_entropy_tracking.main([*map(str, [*where, *what, *short])]) == 0
    assert "### addition: half_cosine, one_pass" in capsys.readouterr().out
    row = json.loads((tmp_path / "out" / "runs.jsonl").read_text())
    assert (row["name"], row["task"]) == ("addition-hard-half_cosine-one_pass-seed1", "addition")
    start = row["entropy"][0]
    assert row["target"] == pytest.approx([start * (0.3 + 0.7 / 2), 0.3 * start], rel=1e-3)  # a cosine of two steps
    assert 2 * 256 * 8 < row["tokens"] < 2 * 256 * 36 + 1  # longer than the other task allows, no longer than this one
    assert row["accuracy"] == 0
    assert (tmp_path / "out" / "curves_addition_half_cosine_one_pass.png").stat().st_size > 5000
