"""Group advantages against NumPy, group by group, and the groups that have nothing to compare."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrocraft import advantages


def _expected(name: str, rewards: list[float], groups: list[int]) -> list[float]:
    """One rollout at a time, from the definition; NaN rewards are not in any list of others."""
    out = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        mates = [r for r, g in zip(rewards, groups, strict=True) if g == group and not math.isnan(r)]
        others = [
            r
            for j, (r, g) in enumerate(zip(rewards, groups, strict=True))
            if g == group and j != i and not math.isnan(r)
        ]
        if math.isnan(reward):
            out.append(0.0)
        elif len(mates) == 1:
            out.append(reward)
        elif len(set(mates)) == 1:
            out.append(0.0)
        elif name == "grpo":
            out.append((reward - np.mean(mates)) / (np.std(mates, ddof=1) + 1e-6))
        elif name == "dr_grpo":
            out.append(reward - np.mean(mates))
        else:
            out.append(reward - np.mean(others))
    return out


rewards_and_groups = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.1, math.nan]), st.floats(-5.0, 5.0, width=32)),
        st.integers(0, 4),
    ),
    max_size=30,
)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
@settings(max_examples=100)
@given(pairs=rewards_and_groups)
def test_against_numpy(name: str, pairs: list[tuple[float, int]]) -> None:
    rewards, groups = [r for r, _ in pairs], [g for _, g in pairs]
    got = advantages.build(name)(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups, dtype=torch.int64))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), np.array(_expected(name, rewards, groups)), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("value", [0.1, 0.7, 1.0 / 3.0, -1.0])
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_equal_rewards_give_exactly_nothing(name: str, value: float, size: int) -> None:
    # The rounded mean of three 0.1 is not 0.1; 1e-17 / 1e-6 would be an advantage, and count as one.
    reward_R = torch.full((size,), value, dtype=torch.float64)
    got = advantages.build(name)(reward_R, torch.zeros(size, dtype=torch.int64))
    assert got.tolist() == [0.0] * size


@pytest.mark.parametrize("correct", range(1, 8))
def test_grpo_closed_form_for_binary_rewards(correct: int) -> None:
    # q the success rate: A = sqrt((1-q)/q) and -sqrt(q/(1-q)), times sqrt((G-1)/G) for ddof 1.
    q = correct / 8
    reward_R = torch.tensor([1.0] * correct + [-1.0] * (8 - correct))
    got = advantages.grpo(reward_R, torch.zeros(8, dtype=torch.int64)).double()
    shrink = math.sqrt(7 / 8)
    # The epsilon of 1e-6 beside a spread of at least 0.7 shows in the sixth digit.
    assert got[:correct].tolist() == pytest.approx([math.sqrt((1 - q) / q) * shrink] * correct, rel=3e-6)
    assert got[correct:].tolist() == pytest.approx([-math.sqrt(q / (1 - q)) * shrink] * (8 - correct), rel=3e-6)


def test_no_verdict_neither_counts_nor_moves() -> None:
    reward_R = torch.tensor([1.0, math.nan, 0.0, math.nan, 5.0, math.nan, math.nan])
    group_R = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    without = advantages.grpo(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    got = advantages.grpo(reward_R, group_R)
    assert got.tolist() == [without[0].item(), 0.0, without[1].item(), 0.0, 5.0, 0.0, 0.0]


def test_order_of_rollouts_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    reward_R = torch.randn(40, generator=generator)
    group_R = torch.randint(0, 6, (40,), generator=generator) * 1000
    order_R = torch.randperm(40, generator=generator)
    length_R = torch.randint(0, 9, (40,), generator=generator)
    for name in advantages.ADVANTAGES:
        estimator = advantages.build(name)
        shuffled = estimator(reward_R[order_R], group_R[order_R], length_R[order_R])
        torch.testing.assert_close(estimator(reward_R, group_R, length_R)[order_R], shuffled)


def test_bad_input_is_named() -> None:
    group_R = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"reward_R\[1\] = inf: expected a finite reward"):
        advantages.grpo(torch.tensor([0.0, math.inf]), group_R)
    with pytest.raises(ValueError, match=r"group_R must be int64 of shape \(3,\)"):
        advantages.rloo(torch.zeros(3), group_R)
    with pytest.raises(ValueError, match=r"reward_R must be real numbers \[R\]"):
        advantages.dr_grpo(torch.zeros(2, 1), group_R)
    with pytest.raises(ValueError, match="unknown advantage estimator 'gpro': did you mean 'grpo'"):
        advantages.build("gpro")
