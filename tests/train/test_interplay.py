"""Settings that meet: groups filtered out beside several updates, or beside control; waves and steps left out."""

import dataclasses
import json

import pytest
import torch
import yaml

from entrocraft.train import batches
from entrocraft.train.config_reader import load_config
from entrocraft.train.control import build_rule, build_schedule
from entrocraft.train.errors import NonFiniteError
from entrocraft.train.metrics import MetricsLog
from entrocraft.train.rewards import RewardPool
from entrocraft.train.run import Run
from entrocraft.train.spread import SpreadPool
from entrocraft.train.train import train_step

REWARDS = """
def even(completion, answer, prompt):
    return float(len(completion) % 2)

def scarce(completion, answer, prompt):  # one problem of twelve has a signal
    return float(len(completion) % 2) if answer == "3" else 0.0
"""
BASE = ("--config=run.yaml",)


@pytest.fixture
def work(tmp_path, monkeypatch):
    (tmp_path / "met_rewards.py").write_text(REWARDS)
    problems = [{"prompt": f"{i} plus {i} is", "answer": str(i)} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    config = {
        "device": "cpu",
        "model": {"tiny": {"hidden_size": 16, "layers": 1, "heads": 2, "mlp_size": 32, "context": 64}},
        "data": {"train": "train.jsonl"},
        "batch": {"prompts_per_step": 4, "samples_per_prompt": 8, "tokens_per_microbatch": 512},
        "sampling": {"max_response_tokens": 6},
        "reward": {"name": "met_rewards:even", "workers": 0},
        "entropy": {"rule": "none"},
        "optimizer": {"steps": 4, "lr": 0.01},
        "checkpoint": {"every": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def steps(name, *arguments, count=1):
    """The run after so many steps, and their metrics."""
    run, made = Run(load_config([*BASE, f"--run_dir={name}", *arguments])), []
    run.begin(None)
    run.engine.publish(run.step)
    with (
        RewardPool(run.config.reward.name, workers=0, timeout_s=1.0) as pool,
        MetricsLog(run.dir, resume_step=None) as log,
    ):
        for _ in range(count):
            run.step += 1
            made.append(train_step(run, SpreadPool(pool, run.ranks), log, print))
    run.end()
    return run, made


HOW = (("--loss.advantage=dr_grpo", "--loss.aggregation=fixed"), ("--loss.method=repo_r",), ("--loss.method=kl_cov",))


@pytest.mark.parametrize("how", HOW)
def test_fewer_prompts_left_than_updates(work, how):
    filtered = ("--reward.name=met_rewards:scarce", "--refill.zero_variance=filter", "--batch.prompts_per_step=12")
    _, (row,) = steps("filtered", *filtered, "--batch.updates_per_step=4", *how)
    assert row["prompts_learnt"] == 1
    assert (row["updates"], row["updates_empty"]) == (1, 3)
    assert row["grad_norm"] > 0


def test_groups_of_one_cannot_be_filtered_by_their_variance(work):
    with pytest.raises(ValueError, match=r"refill.zero_variance = 'refill': expected 'keep' at batch.samples_p"):
        load_config([*BASE, "--refill.zero_variance=refill", "--batch.samples_per_prompt=1"])


def test_release_is_told_of_the_rewards_of_all_that_was_sampled(work):
    filtered = ("--reward.name=met_rewards:scarce", "--refill.zero_variance=filter", "--batch.prompts_per_step=12")
    _, (row,) = steps("watched", *filtered, "--entropy.rule=budget")
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
    scarce = "--reward.name=met_rewards:scarce"
    run, (row,) = steps("bad", scarce, "--refill.oversample=true", "--refill.max_waves=8", "--refill.max_factor=8")
    assert len(checked) == 2
    record = torch.load(run.dir / "bad_batches" / "step_000001.pt", weights_only=True)
    assert len(record["token_T"]) == sum(checked)
    assert len(record["prompts"]) * 8 == len(record["reward_R"]) == row["samples"] == run.samples
    assert row["steps_skipped"] == 1


def test_the_best_step_is_none_that_was_left_out(work, monkeypatch):
    def fail(stats):
        raise NonFiniteError("a score is nan")

    monkeypatch.setattr(batches, "check_finite", fail)
    run, (row,) = steps("best", "--checkpoint.best=-entropy")
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
