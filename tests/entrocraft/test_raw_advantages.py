"""Advantages of the reward itself, and those that count tokens: by hand, on rewards with and without a verdict."""

import math
import statistics

import pytest
import torch

from entrocraft import advantages

NAN = math.nan
REWARD = [1.0, 0.0, 1.0, NAN, 1.0, 1.0, 0.0, 0.0, 1.0]
GROUP = [0, 0, 0, 0, 1, 1, 2, 2, 3]
LENGTH = [3, 5, 1, 4, 2, 2, 6, 0, 7]
SIGNED = [2 * r - 1 for r in REWARD]


def _run(name, rewards, **options):
    estimator = advantages.build(name, **options)
    tensors = torch.tensor(rewards), torch.tensor(GROUP)
    chosen = advantages.members(estimator, *tensors)
    got = estimator(*tensors, torch.tensor(LENGTH))
    assert got.dtype == torch.float32
    return got.tolist(), None if chosen is None else chosen.tolist()


@pytest.mark.parametrize("rewards", [REWARD, SIGNED])
def test_right_and_wrong(rewards):
    right = [1, 0, 1, 0, 1, 1, 0, 0, 1]
    wrong = [0, 1, 0, 0, 0, 0, 1, 1, 0]
    assert _run("raft", rewards) == (right, None)
    assert _run("raft_pp", rewards) == (right, None)
    assert _run("psr", rewards) == (right, [bool(r) for r in right])
    assert _run("nsr", rewards) == ([-w for w in wrong], [bool(w) for w in wrong])
    assert _run("nsr_parity", rewards) == ([-w for w in wrong], None)
    weighed, chosen = _run("w_reinforce", rewards, weight=0.25)
    assert weighed == [0.25 * r - w for r, w in zip(right, wrong, strict=True)]
    assert chosen is None
    assert _run("w_reinforce", rewards)[0][0] == pytest.approx(0.1)


def test_reinforce_and_rejecting_prompts_without_a_contrast():
    known = [0.0 if math.isnan(r) else r for r in SIGNED]
    assert _run("reinforce", SIGNED) == (known, None)
    # Group 0 is mixed; 1 and 2 agree; the one of group 3 is alone.
    assert _run("reinforce_rej", SIGNED)[0] == [1, -1, 1, 0, 0, 0, 0, 0, 1]


def test_whitening_counts_each_rollout_as_often_as_it_has_tokens():
    tokens = [r for r, n in zip(REWARD, LENGTH, strict=True) for _ in range(n) if not math.isnan(r)]
    mean, deviation = statistics.fmean(tokens), statistics.stdev(tokens)
    for r, n, got in zip(REWARD, LENGTH, _run("reinforce_pp", REWARD)[0], strict=True):
        expected = 0.0 if math.isnan(r) or n == 0 else (r - mean) / deviation
        assert got == pytest.approx(expected, rel=1e-6)


def test_the_baseline_variant_centres_each_prompt_first():
    means = {0: 2 / 3, 1: 1.0, 2: 0.0, 3: 0.0}
    centred = [NAN if math.isnan(r) else r - means[g] for r, g in zip(REWARD, GROUP, strict=True)]
    tokens = [c for c, n in zip(centred, LENGTH, strict=True) for _ in range(n) if not math.isnan(c)]
    mean, deviation = statistics.fmean(tokens), statistics.stdev(tokens)
    for c, n, got in zip(centred, LENGTH, _run("reinforce_pp_baseline", REWARD)[0], strict=True):
        expected = 0.0 if math.isnan(c) or n == 0 else (c - mean) / deviation
        assert got == pytest.approx(expected, rel=1e-6)


def test_opo_weighs_the_baseline_by_length():
    baseline = (3 * 1 + 5 * 0 + 1 * 1) / (3 + 5 + 1)
    expected = [1 - baseline, -baseline, 1 - baseline, 0, 0, 0, 0, 0, 1]
    assert _run("opo", REWARD)[0] == pytest.approx(expected, rel=1e-6)


def test_too_few_tokens_to_whiten_give_no_advantage():
    alone = advantages.build("reinforce_pp")(torch.tensor([1.0]), torch.tensor([0]), torch.tensor([1]))
    assert alone.tolist() == [0.0]


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline", "opo"])
@pytest.mark.parametrize("value", [0.1, 0.7, 1.0 / 3.0, -1.0])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 5, 7], [2, 0, 9], [0, 0, 0]])
def test_equal_rewards_give_exactly_nothing(name, value, lengths):
    # Their rounded mean is not the value itself, and what counts as having an advantage is whether it is 0.
    reward_R, group_R = torch.full((3,), value, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    assert advantages.build(name)(reward_R, group_R, torch.tensor(lengths)).tolist() == [0.0] * 3


def test_bad_input_is_named():
    reward_R, group_R = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    for name in ("opo", "reinforce_pp", "reinforce_pp_baseline"):
        with pytest.raises(ValueError, match=f"{name} needs length_R, the counted tokens of each rollout"):
            advantages.build(name)(reward_R, group_R)
    with pytest.raises(ValueError, match=r"length_R is torch\.int64 \(3,\); expected \(2,\)"):
        advantages.build("opo")(reward_R, group_R, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="weight = -1"):
        advantages.build("w_reinforce", weight=-1)
    with pytest.raises(ValueError, match=r"'grpo' was given \['epsilon'\]: it takes no options"):
        advantages.build("grpo", epsilon=1e-8)
    with pytest.raises(ValueError, match=r"reward_R\[0\] = inf"):
        advantages.build("reinforce")(torch.tensor([math.inf, 0.0]), group_R)
