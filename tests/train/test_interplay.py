"""Settings that meet: groups filtered out beside several updates, or beside control; waves and steps left out."""

import dataclasses
import sys

import pytest
import torch
from small_runs import lay_out, run_steps

from entrocraft.train import batches
from entrocraft.train.config_reader import load_config
from entrocraft.train.control import build_rule, build_schedule
from entrocraft.train.errors import NonFiniteError

REWARDS = """
def even(completion, answer, prompt):
    return float(len(completion) % 2)

def scarce(completion, answer, prompt):  # one problem of twelve has a signal
    return float(len(completion) % 2) if answer == "3" else 0.0
"""
BASE = ("--config=run.yaml",)


@pytest.fixture
def work(tmp_path, monkeypatch):
    lay_out(tmp_path, REWARDS, name="even", entropy={"rule": "none"}, steps=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    return tmp_path


HOW = (("--loss.advantage=dr_grpo", "--loss.aggregation=fixed"), ("--loss.method=repo_r",), ("--loss.method=kl_cov",))


@pytest.mark.parametrize("how", HOW)
def test_fewer_prompts_left_than_updates(work, how):
    filtered = ("--reward.name=own_rewards:scarce", "--refill.zero_variance=filter", "--batch.prompts_per_step=12")
    _, (row,) = run_steps("filtered", *filtered, "--batch.updates_per_step=4", *how, steps=1)
    assert row["prompts_learnt"] == 1
    assert (row["updates"], row["updates_empty"]) == (1, 3)
    assert row["grad_norm"] > 0


def test_groups_of_one_cannot_be_filtered_by_their_variance(work):
    with pytest.raises(ValueError, match=r"refill.zero_variance = 'refill': expected 'keep' at batch.samples_p"):
        load_config([*BASE, "--refill.zero_variance=refill", "--batch.samples_per_prompt=1"])


def test_release_is_told_of_the_rewards_of_all_that_was_sampled(work):
    filtered = ("--reward.name=own_rewards:scarce", "--refill.zero_variance=filter", "--batch.prompts_per_step=12")
    _, (row,) = run_steps("watched", *filtered, "--entropy.rule=budget", steps=1)
    assert row["prompts_learnt"] == 1
    assert row["reward_mean"] == pytest.approx(row["reward"])  # of twelve prompts, of which one has any


def test_a_later_wave_that_cannot_be_scored_is_in_the_record(work, monkeypatch):
    checked, check = [], batches.check_finite

    def second_is_bad(stats):
        checked.append(len(stats))
        if len(checked) == 2:
            raise NonFiniteError("a score is nan")
        check(stats)

    monkeypatch.setattr(batches, "check_finite", second_is_bad)
    scarce = "--reward.name=own_rewards:scarce"
    run, (row,) = run_steps(
        "bad", scarce, "--refill.oversample=true", "--refill.max_waves=8", "--refill.max_factor=8", steps=1
    )
    assert len(checked) == 2
    record = torch.load(run.dir / "bad_batches" / "step_000001.pt", weights_only=True)
    assert len(record["token_T"]) == sum(checked)
    assert len(record["prompts"]) * 8 == len(record["reward_R"]) == row["samples"] == run.samples
    assert row["steps_skipped"] == 1


def test_the_best_step_is_none_that_was_left_out(work, monkeypatch):
    def fail(stats):
        raise NonFiniteError("a score is nan")

    monkeypatch.setattr(batches, "check_finite", fail)
    run, (row,) = run_steps("best", "--checkpoint.best=-entropy", steps=1)
    assert "entropy" not in row
    assert run.value(row) is None
    run.config = dataclasses.replace(run.config, checkpoint=dataclasses.replace(run.config.checkpoint, best="reward"))
    assert run.value(row) == row["reward"]
    run.bad_in_a_row = 0
    run.config = dataclasses.replace(run.config, checkpoint=dataclasses.replace(run.config.checkpoint, best="entropi"))
    with pytest.raises(ValueError, match=r"checkpoint.best = 'entropi': a step has no such metric"):
        run.value(row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loss.advantage=psr --entropy.rule=switch", r"loss.advantage = 'psr': it takes rollouts of one sign out"),
        ("--loss.advantage=nsr --entropy.rule=null --entropy.preset=paper_code", "loss.advantage = 'nsr': it takes"),
        (
            "--entropy.rule=null --entropy.preset=paper_v1 --entropy.rule_options={'gamma':3}",
            r"entropy.rule_options = \{'gamma': 3.0\}: the preset 'paper_v1' brings its own",
        ),
        ("--entropy.schedule.points=[[0,1.0]]", r"entropy.schedule.points = .*: 'linear' does not read them"),
    ],
)
def test_settings_that_would_not_be_read_or_teach_nothing(work, arguments, message):
    config = load_config([*BASE, *arguments.split()])
    with pytest.raises(ValueError, match=message):
        build_rule(config)
    build_rule(load_config(BASE))
    piecewise = load_config([*BASE, "--entropy.schedule.kind=piecewise", "--entropy.schedule.points=[[0,1.0],[4,0.5]]"])
    build_rule(piecewise)
    assert build_schedule(piecewise.entropy.schedule, 4)(2) == 0.75
