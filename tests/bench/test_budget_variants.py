"""The forms of `budget` that were tried: each against its sentence, on random batches."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

from budget_variants import all_or_nothing, by_group, dead_band, fractional, per_token, shuffled  # noqa: E402
from tracking_cases import VARIANTS, Case  # noqa: E402

from entrocraft.batch import per_rollout  # noqa: E402
from entrocraft.predictive import budget  # noqa: E402
from entrocraft.train.config_reader import load_config  # noqa: E402
from entrocraft.train.control import build_controller  # noqa: E402
from entrocraft.verdict import RuleInputs, check_verdict  # noqa: E402

R = 24


def _inputs(seed: int, share: float, direction: int = 1) -> tuple[RuleInputs, np.ndarray]:
    """A batch of which that share of the change of all adverse rollouts is to go; and its D, a rollout each."""
    draw = np.random.default_rng(seed)
    rollout_T = np.repeat(np.arange(R), draw.integers(1, 9, R))
    change_T = draw.standard_normal(len(rollout_T))
    change_R = per_rollout(change_T, rollout_T, R)
    inputs = RuleInputs(
        direction=direction, want=float(change_R.sum() - share * change_R[change_R > 0].sum()), rollout_T=rollout_T,
        mask_T=np.ones(len(rollout_T), dtype=bool), group_R=np.arange(R) // 4, sample_R=np.arange(R) % 4,
        advantage_R=draw.standard_normal(R), reward_R=None, change_T=change_T, change_R=change_R, seed=0, step=0,
    )  # fmt: skip
    return inputs, change_R


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_part_of_the_last_rollout_meets_what_is_wanted(share: float) -> None:
    for seed in range(20):
        inputs, change_R = _inputs(seed, share)
        whole, part = budget()(inputs), fractional()(inputs)
        check_verdict(part, inputs, fractional())
        (last,) = np.flatnonzero(part.keep_R != whole.keep_R)
        assert part.weight_R is not None
        assert 0 <= part.weight_R[last] < 1
        assert np.delete(part.weight_R, last).min() == 1
        assert (change_R * part.weight_R)[part.keep_R].sum() == pytest.approx(inputs.want, abs=1e-9)
    beyond, change_R = _inputs(0, 1.5)  # out of reach: nothing adverse is left, and nothing is kept in part
    assert fractional()(beyond).weight_R is None
    np.testing.assert_array_equal(fractional()(beyond).keep_R, change_R <= 0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_by_change_per_token_as_much_is_rejected_as_is_needed_and_fewer_tokens(share: float) -> None:
    tokens = {"ours": 0, "by rollouts": 0}
    for seed in range(20):
        inputs, change_R = _inputs(seed, share)
        verdict = per_token()(inputs)
        check_verdict(verdict, inputs, per_token())
        density_R = change_R / per_rollout(inputs.mask_T, inputs.rollout_T, R)
        assert density_R[verdict.keep_R].max() < density_R[~verdict.keep_R].min()
        kept, least = change_R[verdict.keep_R].sum(), np.argmin(np.where(verdict.keep_R, np.inf, density_R))
        assert kept <= inputs.want < kept + change_R[least]
        for name, one in (("ours", verdict), ("by rollouts", budget()(inputs))):
            tokens[name] += int((~one.keep_R[inputs.rollout_T]).sum())
    assert tokens["ours"] < tokens["by rollouts"]


def test_inside_the_band_a_dead_band_keeps_everything() -> None:
    (inside, _), (outside, _) = (_inputs(1, 0.5, direction) for direction in (0, 1))
    assert dead_band()(inside).keep_R.all()
    assert dead_band()(inside).keep_T is None
    np.testing.assert_array_equal(dead_band()(outside).keep_T, budget(level="token")(outside).keep_T)


def _by_name(inputs: RuleInputs, keep_T: np.ndarray | None) -> dict[tuple[int, int, int], bool]:
    """Whether a token was kept, by group, sample and position."""
    assert keep_T is not None
    rollout_T = inputs.rollout_T
    position_T = np.arange(len(rollout_T)) - np.searchsorted(rollout_T, rollout_T)
    names = zip(inputs.group_R[rollout_T], inputs.sample_R[rollout_T], position_T, strict=True)
    return dict(zip(names, keep_T, strict=True))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_in_a_drawn_order_as_much_goes_as_is_needed_and_no_kind_of_token_always(share: float) -> None:
    rejected = {"ours": 0, "most adverse first": 0}
    for seed in range(20):
        inputs, _ = _inputs(seed, share)
        assert inputs.change_T is not None
        verdict = shuffled()(inputs)
        check_verdict(verdict, inputs, shuffled())
        assert verdict.keep_T is not None
        assert inputs.change_T[~verdict.keep_T].min() > 0  # the whole batch ends too high
        kept = inputs.change_T[verdict.keep_T].sum()
        assert kept <= inputs.want < kept + inputs.change_T[~verdict.keep_T].max()
        for name, one in (("ours", verdict), ("most adverse first", budget(level="token")(inputs))):
            assert one.keep_T is not None
            rejected[name] += int((~one.keep_T).sum())
        later = shuffled()(replace(inputs, step=1))
        assert (later.keep_T != verdict.keep_T).any()
    assert rejected["ours"] > rejected["most adverse first"]
    # The same tokens go if the rollouts stand in another order.
    inputs, _ = _inputs(0, share)
    assert inputs.change_T is not None
    turned_T = np.concatenate([np.flatnonzero(inputs.rollout_T == r) for r in reversed(range(R))])
    turned = replace(
        inputs, rollout_T=R - 1 - inputs.rollout_T[turned_T], change_T=inputs.change_T[turned_T],
        group_R=inputs.group_R[::-1], sample_R=inputs.sample_R[::-1], advantage_R=inputs.advantage_R[::-1],
    )  # fmt: skip
    assert _by_name(turned, shuffled()(turned).keep_T) == _by_name(inputs, shuffled()(inputs).keep_T)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_prompts_lose_all_that_is_adverse_or_nothing(share: float) -> None:
    for seed in range(20):
        inputs, _ = _inputs(seed, share)
        verdict = by_group()(inputs)
        check_verdict(verdict, inputs, by_group())
        assert verdict.keep_T is not None
        assert inputs.change_T is not None
        adverse_T, group_T = inputs.change_T > 0, inputs.group_R[inputs.rollout_T]
        lost = {g: inputs.change_T[(group_T == g) & ~verdict.keep_T].sum() for g in np.unique(group_T)}
        for group, sum_of_lost in lost.items():
            whole = inputs.change_T[(group_T == group) & adverse_T].sum()
            assert sum_of_lost == 0 or sum_of_lost == pytest.approx(whole, rel=1e-12)
        kept = inputs.change_T[verdict.keep_T].sum()
        assert kept <= inputs.want < kept + max(lost.values())


def test_all_that_is_adverse_goes_or_nothing_whichever_ends_nearer() -> None:
    kinds = set()
    for share in (0.1, 0.5, 0.9, 1.5, 2.5):
        inputs, _ = _inputs(3, share)
        verdict = all_or_nothing()(inputs)
        check_verdict(verdict, inputs, all_or_nothing())
        assert verdict.keep_T is not None
        assert inputs.change_T is not None
        total, least = inputs.change_T.sum(), inputs.change_T[inputs.change_T <= 0].sum()
        nearer = least if abs(least - inputs.want) < abs(total - inputs.want) else total
        assert inputs.change_T[verdict.keep_T].sum() == pytest.approx(nearer, abs=1e-12)
        kinds.add(bool(verdict.keep_T.all()))
    assert kinds == {True, False}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_configuration_that_can_be_built(name: str) -> None:
    files = ("--model.path=model", "--data.train=train.jsonl", "--run_dir=runs/none")
    config = load_config([f"--config={BENCH.parent}/train/configs/demo.yaml", *files,
                          *Case(name, "line", "one_pass", 1).overrides()])  # fmt: skip
    controller, aggregation = build_controller(config, vocab_size=64)
    assert (controller.target(0, entropy=1.0), aggregation) == (1.0, "token_mean")
    assert config.refill.zero_variance == ("refill" if name == "try_refill" else "keep")
