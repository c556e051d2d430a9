"""Rules: acceptance tables, budget against brute force over all subsets, and every rule's own law."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entrocraft import advantages, rules
from entrocraft.rules import RuleInputs


def _inputs(**changes: Any) -> RuleInputs:
    """Rollouts of one token each, all in one group, unless told otherwise."""
    fields: dict[str, Any] = {"direction": 0, "want": 0.0, "reward_R": None, "seed": 0, "step": 0} | changes
    size = len(next(fields[name] for name in ("advantage_R", "change_R", "reward_R") if fields.get(name) is not None))
    fields.setdefault("advantage_R", np.ones(size))
    fields.setdefault("rollout_T", np.arange(size))
    fields.setdefault("mask_T", np.ones(len(fields["rollout_T"]), dtype=bool))
    fields.setdefault("group_R", np.zeros(size, dtype=np.int64))
    fields.setdefault("sample_R", np.arange(size))
    fields.setdefault("change_R", None)
    fields.setdefault("change_T", None)
    return RuleInputs(**fields)


def _grpo_of(correct: int, samples: int = 8) -> np.ndarray:
    reward_R = torch.tensor([1.0] * correct + [-1.0] * (samples - correct))
    return advantages.grpo(reward_R, torch.zeros(samples, dtype=torch.int64)).double().numpy()


@pytest.mark.parametrize("correct", range(1, 8))
def test_soft_acceptance_table(correct: int) -> None:
    # gamma 10, eight rollouts, q the share of correct ones: A = sqrt((1-q)/q 7/8) or -sqrt(q/(1-q) 7/8).
    q = correct / 8
    correct_down = math.exp(-10 * math.sqrt((1 - q) / q * 7 / 8))
    wrong_up = math.exp(-10 * math.sqrt(q / (1 - q) * 7 / 8))
    rule, advantage_R = rules.soft(gamma=10.0), _grpo_of(correct)
    below, above = rule.acceptance(-1, advantage_R), rule.acceptance(1, advantage_R)
    # The exponent goes up to 25, and A is fp32 with an epsilon of 1e-6: relative error near 1e-4.
    assert below[:correct].tolist() == pytest.approx([correct_down] * correct, rel=1e-4)
    assert below[correct:].tolist() == [1.0] * (8 - correct)
    assert above[correct:].tolist() == pytest.approx([wrong_up] * (8 - correct), rel=1e-4)
    assert above[:correct].tolist() == [1.0] * correct
    assert rule.acceptance(0, advantage_R).tolist() == [1.0] * 8


def test_soft_acceptance_to_the_published_digits() -> None:
    rule = rules.soft()
    assert rule.acceptance(-1, _grpo_of(7))[0] == pytest.approx(2.91e-2, rel=2e-3)
    assert rule.acceptance(-1, _grpo_of(4))[0] == pytest.approx(8.66e-5, rel=2e-3)
    # The exponent stops at -50 rather than underflow.
    assert rule.acceptance(1, np.array([-1e6])).tolist() == [math.exp(-50.0)]


def test_soft_accepts_as_often_as_it_says() -> None:
    # 20,000 draws at four probabilities, five standard deviations.
    advantage_R = np.repeat([-0.3, -0.1, -0.05, 0.2], 5000)
    names = np.arange(20000)
    verdict = rules.soft()(
        _inputs(direction=1, advantage_R=advantage_R, group_R=names // 8, sample_R=names % 8, seed=5, step=9)
    )
    for k, p in enumerate([math.exp(-3.0), math.exp(-1.0), math.exp(-0.5), 1.0]):
        share = verdict.keep_R[5000 * k : 5000 * (k + 1)].mean()
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / 5000)


def test_uniforms_belong_to_their_rollout() -> None:
    names = list(itertools.product((0, 1), (0, 3), (0, 7), (0, 1)))
    drawn = {name: rules.uniform(*name) for name in names}
    assert len(set(drawn.values())) == len(names)
    assert all(0.0 <= u < 1.0 for u in drawn.values())
    assert {name: rules.uniform(*name) for name in reversed(names)} == drawn
    # Written down so that a run resumed under a later version still draws the same.
    assert rules.uniform(1, 2, 3, 4) == 0.8306885913456695


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        (1, [True, True, True, False, False]),
        (-1, [False, False, True, True, True]),
        (0, [True, True, True, True, True]),
    ],
)
def test_hard(direction: int, expected: list[bool]) -> None:
    advantage_R = np.array([2.0, 1e-9, 0.0, -1e-9, -2.0])
    verdict = rules.hard()(_inputs(direction=direction, advantage_R=advantage_R))
    assert verdict.keep_R.tolist() == expected
    assert verdict.advantage_R.tolist() == advantage_R.tolist()


@pytest.mark.parametrize(
    ("direction", "expected"),
    [(1, [1.0, 0.0, 1.0, 0.0]), (-1, [0.0, -1.0, 0.0, 0.0]), (0, [0.3, -0.4, 0.0, 0.0])],
)
def test_switch_replaces_advantages_by_parts_of_the_reward(direction: int, expected: list[float]) -> None:
    # The third rollout is of an all-correct group: no advantage, yet +1 above the band. The fourth has no verdict.
    verdict = rules.switch()(
        _inputs(
            direction=direction,
            advantage_R=np.array([0.3, -0.4, 0.0, 0.0]),
            reward_R=np.array([1.0, -1.0, 1.0, math.nan]),
        )
    )
    assert verdict.keep_R.tolist() == [True] * 4
    assert verdict.advantage_R.tolist() == expected


@pytest.mark.parametrize("direction", [1, 0, -1])
def test_switch_refuses_rewards_of_zero_and_one(direction: int) -> None:
    inputs = _inputs(direction=direction, advantage_R=np.ones(3), reward_R=np.array([1.0, -1.0, 0.0]))
    with pytest.raises(ValueError, match=r"reward_R\[2\] = 0.0: rule 'switch' needs rewards of -1 and \+1"):
        rules.switch()(inputs)
    with pytest.raises(ValueError, match="needs reward_R"):
        rules.switch()(_inputs(direction=direction, advantage_R=np.ones(3)))


@pytest.mark.parametrize(
    ("direction", "expected"), [(1, [True, True, False]), (-1, [False, True, True]), (0, [True, True, True])]
)
def test_first_order_sequence(direction: int, expected: list[bool]) -> None:
    verdict = rules.first_order()(_inputs(direction=direction, change_R=np.array([-0.2, 0.0, 0.1])))
    assert verdict.keep_R.tolist() == expected
    assert verdict.keep_T is None


def test_first_order_token_judges_each_token() -> None:
    # Rollout 0 loses one token of two, rollout 1 its only counted one, rollout 2 has none that count.
    verdict = rules.first_order(level="token")(
        _inputs(
            direction=1,
            rollout_T=np.array([0, 0, 1, 1, 2]),
            mask_T=np.array([True, True, True, False, False]),
            change_T=np.array([-0.3, 0.2, 0.1, 0.0, 0.0]),
            change_R=np.array([-0.1, 0.1, 0.0]),
        )
    )
    assert verdict.keep_T is not None
    assert verdict.keep_T.tolist() == [True, False, False, True, True]
    assert verdict.keep_R.tolist() == [True, False, True]


# Small integers make every sum exact, so that "reached" has no rounding to hide in, and ties are common.
changes = st.lists(st.integers(-6, 6), min_size=1, max_size=9)


def _fewest_by_brute_force(change: list[int], want: float) -> int:
    """Fewest rejections after which the sum of the kept has reached `want` from its side; -1 if none does."""
    up = sum(change) < want
    for count in range(len(change) + 1):
        for rejected in itertools.combinations(range(len(change)), count):
            kept = sum(c for i, c in enumerate(change) if i not in rejected)
            if kept == want or (kept > want) == up:
                return count
    return -1


@pytest.mark.parametrize("level", rules.LEVELS)
@given(change=changes, want=st.integers(-30, 30))
def test_budget_rejects_the_fewest_in_the_order_of_harm(level: str, change: list[int], want: int) -> None:
    change_N = np.array(change, dtype=np.float64)
    verdict = rules.budget(level=level)(_inputs(want=float(want), change_R=change_N, change_T=change_N))
    keep = (verdict.keep_R if level == "sequence" else verdict.keep_T).tolist()  # type: ignore[union-attr]
    rejected = [i for i, k in enumerate(keep) if not k]
    sign = 1 if sum(change) < want else -1
    adverse = sorted(sign * c for c in change if sign * c < 0)
    fewest = _fewest_by_brute_force(change, want)
    if sum(change) == want:
        assert rejected == []
    elif fewest >= 0:
        assert len(rejected) == fewest
    else:
        assert len(rejected) == len(adverse)
    # In the order of D, and among equals in the order of their names.
    assert sorted(sign * change[i] for i in rejected) == adverse[: len(rejected)]
    worst_first = sorted(range(len(change)), key=lambda i: (sign * change[i], i))
    assert rejected == sorted(worst_first[: len(rejected)])


def test_budget_worked_by_hand() -> None:
    # Sum -0.4. To reach -0.05: reject -0.3, then -0.2 (sum 0.1). One is not enough, three would be too many.
    change_R = np.array([-0.2, 0.15, -0.05, -0.3, 0.0])
    assert rules.budget()(_inputs(want=-0.05, change_R=change_R)).keep_R.tolist() == [False, True, True, False, True]
    # To reach -0.5 from above: reject 0.15.
    assert rules.budget()(_inputs(want=-0.5, change_R=change_R)).keep_R.tolist() == [True, False, True, True, True]
    # Out of reach in both directions: everything adverse goes, what is neutral or helps stays.
    assert rules.budget()(_inputs(want=9.0, change_R=change_R)).keep_R.tolist() == [False, True, False, False, True]
    assert rules.budget()(_inputs(want=-9.0, change_R=change_R)).keep_R.tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("level", rules.LEVELS)
def test_budget_weighs_what_is_left_where_it_falls_short(level: str) -> None:
    # Two of four are adverse; the others change entropy by 0.03 together and hold 3 of the batch's |A| of 8.
    change_N = np.array([-0.05, 0.01, 0.02, -0.01])

    def weights(want: float, sign: float = 1.0, max_weight: float = 4.0) -> list[float] | None:
        verdict = rules.budget(level=level, max_weight=max_weight)(
            _inputs(
                want=sign * want,
                advantage_R=np.array([-4.0, 2.0, -1.0, 1.0]),
                change_R=sign * change_N,
                change_T=sign * change_N,
            )
        )
        assert verdict.keep_R[1:3].tolist() == [True, True]
        return None if verdict.weight_R is None else verdict.weight_R.tolist()

    for sign in (1.0, -1.0):
        assert weights(0.045, sign) == pytest.approx([1.5] * 4)  # 0.03 times 1.5 is there
        assert weights(9.0, sign) == pytest.approx([8 / 3] * 4)  # no more than the whole batch would have done
        assert weights(9.0, sign, max_weight=2.0) == pytest.approx([2.0] * 4)
        assert weights(9.0, sign, max_weight=1.0) is None
        assert weights(0.029, sign) is None  # in reach
        assert weights(0.0, sign) is None
        assert weights(-0.02, sign) is None
    # What is kept points the wrong way, or nowhere: nothing to weigh.
    for change in (-0.01, 0.0):
        lone = np.array([change, -0.02])
        verdict = rules.budget(level=level, max_weight=4.0)(_inputs(want=0.01, change_R=lone, change_T=lone))
        assert verdict.weight_R is None
    # What is kept has a predicted change and no advantage, as under REPO: a weight on A would do nothing.
    shaped, advantage_R = np.array([-0.05, 0.01]), np.array([-1.0, 0.0])
    verdict = rules.budget(level=level, max_weight=4.0)(
        _inputs(want=0.04, advantage_R=advantage_R, change_R=shaped, change_T=shaped)
    )
    assert (verdict.keep_R.tolist(), verdict.weight_R) == ([False, True], None)


def test_budget_breaks_ties_by_name_not_by_place() -> None:
    # Four equal rollouts, two must go: (0, 0) and (0, 1), wherever they stand.
    verdict = rules.budget()(
        _inputs(
            want=-2.0,
            change_R=np.full(4, -1.0),
            group_R=np.array([1, 0, 1, 0]),
            sample_R=np.array([0, 1, 1, 0]),
        )
    )
    assert verdict.keep_R.tolist() == [True, False, True, False]


def test_budget_token_ties_go_by_rollout_name_then_position() -> None:
    verdict = rules.budget(level="token")(
        _inputs(
            want=-3.0,
            rollout_T=np.array([0, 0, 0, 1, 1, 1]),
            change_T=np.full(6, -1.0),
            change_R=np.full(2, -3.0),
            group_R=np.array([5, 2]),
            sample_R=np.array([0, 0]),
        )
    )
    assert verdict.keep_T is not None
    assert verdict.keep_T.tolist() == [True, True, True, False, False, False]


batches = st.integers(1, 12).flatmap(
    lambda size: st.tuples(
        st.sampled_from([-1, 0, 1]),
        st.lists(st.floats(-3.0, 3.0), min_size=size, max_size=size),
        st.lists(st.floats(-1.0, 1.0), min_size=size, max_size=size),
    )
)


@pytest.mark.parametrize("name", ["none", "soft", "hard", "switch", "first_order"])
@given(batch=batches)
def test_inside_the_band_all_is_kept_and_signs_decide_outside(
    name: str, batch: tuple[int, list[float], list[float]]
) -> None:
    direction, advantage, change = batch
    advantage_R, change_R = np.array(advantage), np.array(change)
    verdict = rules.build(name)(
        _inputs(
            direction=direction,
            advantage_R=advantage_R,
            change_R=change_R,
            reward_R=np.where(advantage_R > 0, 1.0, -1.0),
        )
    )
    assert verdict.keep_R.shape == advantage_R.shape
    assert verdict.keep_R.dtype == np.bool_
    if direction == 0 or name in ("none", "switch"):
        assert verdict.keep_R.all()
    if direction == 0 or name != "switch":
        assert verdict.advantage_R.tolist() == advantage
    harmless_R = direction * (change_R if name == "first_order" else -advantage_R) <= 0
    assert verdict.keep_R[harmless_R].all()
    if name in ("hard", "first_order"):
        assert not verdict.keep_R[~harmless_R].any()


def test_rules_that_predict_say_what_is_missing() -> None:
    for rule in (rules.first_order(), rules.budget(), rules.budget(level="token")):
        with pytest.raises(ValueError, match="collision=True"):
            rule(_inputs(advantage_R=np.ones(2)))


def test_presets() -> None:
    expected = {
        "paper_v1": (rules.soft(gamma=10.0), "eq5"),
        "paper_v2": (rules.hard(), "eq5"),
        "paper_code": (rules.switch(), "token_mean"),
    }
    assert {name: (p.rule, p.aggregation) for name, p in rules.PRESETS.items()} == expected
    assert rules.preset("paper_v2").rule == rules.hard()


def test_unknown_names_and_bad_arguments() -> None:
    with pytest.raises(ValueError, match="unknown rule 'bugdet': did you mean 'budget'"):
        rules.build("bugdet")
    with pytest.raises(ValueError, match="unknown rule 'xyzzy': known are budget, first_order"):
        rules.build("xyzzy")
    with pytest.raises(ValueError, match="unknown preset 'paper_v3': did you mean 'paper_v"):
        rules.preset("paper_v3")
    with pytest.raises(ValueError, match=r"rule 'hard' was given \['gamma'\]"):
        rules.build("hard", gamma=3.0)
    with pytest.raises(ValueError, match=r"gamma = -1.0: expected finite and >= 0"):
        rules.soft(gamma=-1.0)
    with pytest.raises(ValueError, match="level = 'tokens': expected one of 'sequence', 'token'"):
        rules.budget(level="tokens")
    for wrong in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"max_weight = {wrong}: expected finite and >= 1"):
            rules.budget(max_weight=wrong)
    with pytest.raises(ValueError, match="level = 'group'"):
        rules.first_order(level="group")
