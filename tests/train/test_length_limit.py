"""What the trainer makes of responses near the limit and cut off by it: rewards, masks, a step with nothing left."""

import re
from dataclasses import replace

import pytest
import torch

from entrocraft import Rollouts
from entrocraft.advantages import ADVANTAGES, SIGN_ONLY, build
from entrocraft.train.config_reader import load_config
from entrocraft.train.control import build_rule
from entrocraft.train.errors import NonFiniteError
from entrocraft.train.length_limit import at_the_limit
from entrocraft.train.rewards import RewardBatch
from entrocraft.train.step_metrics import check_verdicts

FILES = ("--model.path=model", "--data.train=train.jsonl", "--run_dir=runs/none", "--sampling.max_response_tokens=6")


def _batch() -> tuple[Rollouts, RewardBatch]:
    """Three rollouts to each of two prompts, the first and the last cut off at six tokens."""
    length_R = torch.tensor([6, 5, 2, 3, 4, 6])
    rollouts = Rollouts(
        token_T=torch.arange(int(length_R.sum())), rollout_T=torch.arange(6).repeat_interleave(length_R),
        mask_T=torch.arange(int(length_R.sum())) % 5 != 4, group_R=torch.arange(6) // 3, sample_R=torch.arange(6) % 3,
        prompts=((1,), (2, 3)), truncated_R=torch.tensor([True, False, False, False, False, True]), weight_version=0,
    )  # fmt: skip
    reward_R = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, torch.nan])
    rewards = RewardBatch(
        reward_R=reward_R, right_R=reward_R >= 1, score_R={"own": reward_R}, timeouts=1, errors=0, unscorable=0,
        first_error=None,
    )  # fmt: skip
    return rollouts, rewards


def _applied(*arguments: str) -> tuple[Rollouts, RewardBatch]:
    return at_the_limit(load_config([*FILES, *arguments]), *_batch())


def test_by_default_nothing_changes() -> None:
    (rollouts, rewards), (before, scored) = _applied(), _batch()
    torch.testing.assert_close(rewards.reward_R, scored.reward_R, equal_nan=True, rtol=0.0, atol=0.0)
    assert torch.equal(rollouts.mask_T, before.mask_T)


def test_the_buffer_costs_reward_and_leaves_what_is_right_alone() -> None:
    rollouts, rewards = _applied("--reward.overlong_buffer=3", "--reward.overlong_factor=0.6")
    # The last three tokens: of 6 all three, of 5 two, of 4 one; 0.2 each.
    expected_R = torch.tensor([-0.6, 0.6, 1.0, 0.0, 0.8, torch.nan])
    torch.testing.assert_close(rewards.reward_R, expected_R, equal_nan=True, rtol=1e-6, atol=1e-7)
    assert rewards.right_R.tolist() == [False, True, True, False, True, False]
    torch.testing.assert_close(rewards.score_R["own"], _batch()[1].reward_R, equal_nan=True)
    assert torch.equal(rollouts.mask_T, _batch()[0].mask_T)


def test_what_was_cut_off_is_masked_or_left_without_a_verdict() -> None:
    before, scored = _batch()
    rollouts, rewards = _applied("--reward.truncated=mask")
    assert torch.equal(rollouts.mask_T, before.mask_T & (before.rollout_T != 0) & (before.rollout_T != 5))
    torch.testing.assert_close(rewards.reward_R, scored.reward_R, equal_nan=True)
    rollouts, rewards = _applied("--reward.truncated=no_verdict")
    assert torch.equal(rollouts.mask_T, before.mask_T)
    expected_R = torch.tensor([torch.nan, 1.0, 1.0, 0.0, 1.0, torch.nan])
    torch.testing.assert_close(rewards.reward_R, expected_R, equal_nan=True)


def test_a_batch_of_which_nothing_is_left_is_no_step() -> None:
    rollouts, rewards = _batch()
    check_verdicts(rewards, rollouts)
    with pytest.raises(NonFiniteError, match=r"none of the tokens of 6 rollouts counts; 2 of them were cut off"):
        check_verdicts(rewards, replace(rollouts, mask_T=torch.zeros_like(rollouts.mask_T)))
    silent = replace(rewards, reward_R=torch.full((6,), torch.nan))
    with pytest.raises(NonFiniteError, match=r"none of 6 rollouts has a verdict: .* 2 were cut off"):
        check_verdicts(silent, rollouts)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--reward.overlong_buffer=7",
            r"reward.overlong_buffer = 7: expected at most sampling.max_response_tokens = 6",
        ),
        ("--reward.overlong_buffer=-1", "reward.overlong_buffer = -1: expected 0 or more tokens"),
        ("--reward.overlong_factor=-1", "reward.overlong_factor = -1.0: expected a finite number >= 0"),
        ("--reward.truncated=drop", "truncated"),
        ("--reward.overlong_factor=0.5", "overlong_factor = 0.5: expected nothing where reward.overlong_buffer is 0"),
    ],
)
def test_bad_settings_are_named(argument: str, message: str) -> None:
    with pytest.raises((ValueError, SystemExit), match=message):
        load_config([*FILES, *argument.split()])


@pytest.mark.parametrize(
    ("argument", "beside"),
    [
        ("--entropy.rule=switch", "the rule 'switch'"),
        ("--entropy.rule=entrocraft.rules:switch", "the rule 'switch'"),
        ("--entropy.preset=paper_code", "the rule 'switch'"),
        ("--entropy.rule=group_scale --entropy.rule_options={'rule':'switch'}", "the rule 'switch'"),
        ("--loss.advantage=raft_pp", "loss.advantage = 'raft_pp', which sees of a reward only whether"),
        ("--loss.advantage=entrocraft.advantages:nsr", "loss.advantage = 'entrocraft.advantages:nsr', which sees"),
    ],
)
def test_a_penalty_that_would_not_do_what_it_says_is_refused(argument: str, beside: str) -> None:
    config = load_config([*FILES, *argument.split(), "--reward.overlong_buffer=2"])
    with pytest.raises(ValueError, match=re.escape(f"reward.overlong_buffer = 2: expected 0 beside {beside}")):
        build_rule(config)
    build_rule(load_config([*FILES, *argument.split()]))


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - SIGN_ONLY))
def test_other_advantages_see_a_penalty(name: str) -> None:
    """And those that are refused one do not: a right answer that lost half of its reward is as right as before."""
    group_R, length_R = torch.zeros(4, dtype=torch.int64), torch.tensor([3, 4, 5, 6])
    before_R, after_R = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.5, 0.0])
    build_rule(load_config([*FILES, f"--loss.advantage={name}", "--reward.overlong_buffer=2"]))
    estimate = build(name)
    assert float((estimate(after_R, group_R, length_R) - estimate(before_R, group_R, length_R)).abs().max()) > 0.1
    for other in sorted(SIGN_ONLY):
        estimate = build(other)
        assert torch.equal(estimate(after_R, group_R, length_R), estimate(before_R, group_R, length_R))
