"""Groups without a signal kept, filtered and refilled; constant effective batches; whole runs of a few steps."""

import dataclasses
import math
import sys

import pytest
import torch
from small_runs import lay_out, run_steps

from entrocraft import EntropyController, Rollouts
from entrocraft.entropy_bonus import AEnt
from entrocraft.train import batches, train
from entrocraft.train.batches import Graded
from entrocraft.train.config_reader import load_config
from entrocraft.train.length_limit import at_the_limit
from entrocraft.train.metrics import depends_on_the_clock
from entrocraft.train.problems import Problem
from entrocraft.train.rewards import RewardBatch
from entrocraft.train.run import Run

REWARDS = """
def half(completion, answer, prompt):  # every second problem has one reward for all
    return 1.0 if int(answer) % 2 else float(len(completion) % 2)

def same(completion, answer, prompt):
    return 0.0

def scarce(completion, answer, prompt):  # one problem of twelve has a signal
    return float(len(completion) % 2) if answer == "3" else 0.0
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    curve = {"rule": "budget", "schedule": {"start": "measured", "end": 5.0, "steps": 4}}
    lay_out(tmp_path, REWARDS, name="half", entropy=curve, steps=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    return tmp_path


def rows(name, *arguments, steps=2):
    """Metrics of a run of so many further steps, without times."""
    _, made = run_steps(name, *arguments, steps=steps)
    return [{k: v for k, v in row.items() if not depends_on_the_clock(k)} for row in made]


MORE = ("--refill.max_waves=8", "--refill.max_factor=8")


def test_groups_without_a_signal_are_kept_filtered_or_refilled(work):
    kept = rows("kept")
    filtered = rows("filtered", "--refill.zero_variance=filter")
    refilled = rows("refilled", "--refill.zero_variance=refill", *MORE)
    for row in kept:
        assert "prompts_learnt" not in row
    for row in filtered:
        assert row["prompts_sampled"] == 4
        assert row["prompts_learnt"] == 4 - row["zero_variance_groups"] < 4
    for row in refilled:
        assert row["prompts_learnt"] == 4 < row["prompts_sampled"] <= 32
        assert row["kept_groups"] <= 4
    # The first step samples the same, and reports the same of it; only the learnt part differs.
    assert kept[0]["reward"] == filtered[0]["reward"]
    assert filtered[0]["authority"] > kept[0]["authority"]


def test_responses_at_the_limit_cost_reward_or_leave_the_batch(work):
    long = ("--sampling.max_response_tokens=140", "--model.tiny.context=192")  # an end mark is one of 260 tokens
    kept, cost, masked, silent = (
        rows(name, *long, *arguments, steps=1)[0]
        for name, arguments in (
            ("kept", ()),
            ("cost", ("--reward.overlong_buffer=1", "--reward.overlong_factor=0.5")),
            ("masked", ("--reward.truncated=mask",)),
            ("silent", ("--reward.truncated=no_verdict",)),
        )
    )
    share = kept["truncated_fraction"]
    assert 0.4 < share < 0.9
    assert cost["reward"] == pytest.approx(kept["reward"] - 0.5 * share)  # of 140 tokens, and of no fewer
    assert masked["reward"] == kept["reward"]
    assert masked["entropy"] != kept["entropy"] == cost["entropy"] == silent["entropy"]
    assert silent["reward"] != kept["reward"]
    assert silent["active_fraction"] <= 1.0 - share
    assert min(row["updates"] for row in (kept, cost, masked, silent)) == 1


def test_nothing_to_learn_from_is_a_step_without_an_update(work):
    for row in rows("none", "--reward.name=own_rewards:same", "--refill.zero_variance=refill"):
        assert row["updates"] == 0
        assert (row["prompts_sampled"], row["prompts_learnt"]) == (12, 4)  # three waves of four, and no more than one
        assert row["reward"] == 0


def test_oversampling_keeps_the_same_number_every_step_and_resumes_exactly(work, monkeypatch):
    oversample, shares = ("--refill.oversample=true", *MORE), []
    scale = EntropyController.scale_prediction
    monkeypatch.setattr(EntropyController, "scale_prediction", lambda self, s: shares.append(s) or scale(self, s))
    whole = rows("whole", *oversample)
    # The gain is learnt from the part of the prediction that was used.
    assert shares == [32 / row["kept_before_subsampling"] for row in whole if row["kept_before_subsampling"] > 32]
    assert shares
    realised, predicted = whole[1]["realised_change"], whole[0]["predicted_change_kept"]
    assert whole[1]["gain"] == pytest.approx(realised / predicted if realised * predicted > 0 else 0.9 * 10.0)
    assert [row["effective_samples"] for row in whole] == [32, 32]
    assert all(32 <= row["kept_before_subsampling"] <= row["generated"] <= 256 for row in whole)
    assert len({row["generated"] for row in whole}) > 1
    assert [row["prompts"] for row in whole] == [whole[0]["generated"] / 8, sum(row["generated"] for row in whole) / 8]
    assert rows("cut", *oversample, steps=1) + rows("cut", *oversample, steps=1) == whole


def test_oversampling_counts_what_teaches_and_takes_a_wave_that_was_cut_off(work, monkeypatch):
    """All of the 32 rollouts have tokens in the loss; a second wave, cut off as a whole, adds none and does no harm."""
    long = ("--sampling.max_response_tokens=140", "--model.tiny.context=192", "--reward.truncated=mask")
    taught, waves, learn = [], [], train.update

    def updated(policy, optimizer, rollouts, stats, decision, learning):
        own_T = decision.keep_T & rollouts.mask_T & (decision.advantage_R != 0)[rollouts.rollout_T]
        taught.append(len(rollouts.rollout_T[own_T].unique()))
        return learn(policy, optimizer, rollouts, stats, decision, learning)

    def limited(config, rollouts, rewards):
        waves.append(rollouts.R)
        if len(waves) == 2:
            rollouts = dataclasses.replace(rollouts, truncated_R=torch.ones_like(rollouts.truncated_R))
        return at_the_limit(config, rollouts, rewards)

    monkeypatch.setattr(train, "update", updated)
    monkeypatch.setattr(batches, "at_the_limit", limited)
    oversample = ("--refill.oversample=true", "--refill.max_waves=8", "--refill.max_factor=16")
    (row,) = rows("cut_off", *long, *oversample, "--entropy.rule=none", steps=1)
    assert row["updates"] == 1
    assert 2 < len(waves) == row["waves"]
    assert taught == [32] == [row["effective_samples"]]


def test_an_evaluation_is_due_by_the_prompts_that_were_sampled(work):
    """Of 12, 4 and 20 in three steps; by the configured four a step, ten were reached in the third."""
    options = ["--data.eval=train.jsonl", "--evaluation.at_prompts=[10,30]", "--optimizer.steps=9"]
    run = Run(load_config(["--config=run.yaml", "--run_dir=due", *options]))
    run.begin(None)
    due = []
    for prompts in (12, 4, 20):
        run.step += 1
        run.count(8 * prompts)
        due.append((run.prompts_drawn, run.evaluation_due()))
    assert due == [(12, True), (16, False), (36, True)]
    run.end()


def test_aent_steers_by_the_entropy_without_the_least_likely_tokens(work):
    options = ("--loss.method=aent", "--loss.method_options={low: 6.0, high: 6.5, rate: 0.01, maximum: 1.0}")
    seen, observe = [], AEnt.observe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AEnt, "observe", lambda self, state, signal: seen.append(signal) or observe(self, state, signal))
        first, second = rows("clamped", *options)
    for row, signal in zip((first, second), seen, strict=True):
        # The tiny model of 16 dimensions is nearly uniform over its V tokens: H ~ log V, clamped H ~ log 0.8 V.
        assert row["entropy"] == pytest.approx(signal.entropy)
        assert signal.entropy - signal.clamped_entropy == pytest.approx(-math.log(0.8), abs=0.05)
    moved = second["method_coefficient"] - first["method_coefficient"]
    assert moved == pytest.approx(0.01 * (6.0 - seen[1].clamped_entropy))


def test_where_the_budget_ends_early_the_loss_is_scaled_down(work):
    scarce = ("--reward.name=own_rewards:scarce", "--refill.oversample=true", "--entropy.rule=none")
    for aggregation, scaled in (("kept_tokens", True), ("token_mean", False)):
        for row in rows(aggregation, *scarce, f"--loss.aggregation={aggregation}", steps=1):
            assert row["generated"] == 128
            assert 0 < row["effective_samples"] < 32
            assert row["loss_factor"] == (row["effective_samples"] / 32 if scaled else 1)


def test_groups_are_taken_out_whole_and_renumbered():
    rollouts = Rollouts(
        token_T=torch.arange(9),
        rollout_T=torch.tensor([0, 0, 1, 2, 3, 3, 4, 5, 5]),
        mask_T=torch.ones(9, dtype=torch.bool),
        group_R=torch.tensor([0, 0, 1, 1, 2, 2]),
        sample_R=torch.tensor([0, 1, 0, 1, 0, 1]),
        prompts=((1,), (2,), (3,)),
        truncated_R=torch.zeros(6, dtype=torch.bool),
        weight_version=0,
    )
    nan = float("nan")
    reward_R = torch.tensor([0.0, 1.0, 1.0, nan, nan, nan])
    rewards = RewardBatch(
        reward_R=reward_R,
        right_R=reward_R >= 1,
        score_R={"one": reward_R, "other": -reward_R},
        timeouts=1,
        errors=2,
        unscorable=0,
        first_error="x",
    )
    problems = tuple(Problem(index=i, prompt=name, answer="answer") for i, name in enumerate("abc"))
    graded = Graded(rollouts=rollouts, rewards=rewards, problems=problems, age=1)
    assert graded.varied_P().tolist() == [True, False, False]
    part = graded.groups(torch.tensor([True, False, True]))
    assert part.rollouts.token_T.tolist() == [0, 1, 2, 6, 7, 8]
    assert part.rollouts.group_R.tolist() == [0, 0, 1, 1]
    assert part.rollouts.prompts == ((1,), (3,))
    assert part.rewards.reward_R[:2].tolist() == [0.0, 1.0]
    assert part.rewards.right_R.tolist() == [False, True, False, False]
    assert part.rewards.score_R["other"][:2].tolist() == [0.0, -1.0]
    assert ([problem.prompt for problem in part.problems], part.age) == (["a", "c"], 1)
    joined = Graded.join([graded, dataclasses.replace(part, age=0)])
    assert joined.rollouts.group_R.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [problem.prompt for problem in joined.problems] == ["a", "b", "c", "a", "c"]
    assert (joined.age, joined.rewards.timeouts) == (1, 2)
    assert (part.rewards.timeouts, part.rewards.errors, part.rewards.first_error) == (1, 2, "x")
    joined = Graded.join([part, graded])
    assert joined.rollouts.group_R.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert joined.rewards.timeouts == 2


def test_settings_that_contradict(work):
    with pytest.raises(ValueError, match=r"refill.zero_variance = 'refill': expected 'keep' or 'filter' beside"):
        load_config(["--config=run.yaml", "--refill.oversample=true", "--refill.zero_variance=refill"])
