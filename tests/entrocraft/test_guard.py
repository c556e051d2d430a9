"""The guard's limits, each just met and just missed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from entrocraft import TokenStats
from entrocraft.batch import Batch
from entrocraft.decision import keep_metrics
from entrocraft.guard import Guard
from entrocraft.rules import Verdict


def _batch(advantage: list[float], samples: int) -> Batch:
    """One token a rollout, `samples` rollouts a prompt."""
    size = len(advantage)
    one_T = torch.ones(size)
    return Batch.of(
        TokenStats(logprob_T=-one_T, entropy_T=one_T, lse_T=one_T),
        torch.arange(size),
        torch.arange(size) // samples,
        torch.tensor(advantage),
        reward_R=None,
        mask_T=None,
        sample_R=None,
    )


def _keep(batch: Batch, kept: int) -> Verdict:
    keep_R = np.arange(len(batch.group_R)) < kept
    return Verdict(keep_R=keep_R, advantage_R=batch.advantage_R)


def test_too_few_rollouts() -> None:
    # 2 % of 100 rollouts of one prompt is 2.
    batch = _batch([1.0] * 100, samples=100)
    assert Guard().reason(batch, _keep(batch, 2)) == ""
    assert Guard().reason(batch, _keep(batch, 1)).startswith("starved: 1 of 100 rollouts")
    assert Guard().reason(batch, _keep(batch, 0)).startswith("starved: 0 of 100 rollouts")


def test_nothing_kept_is_starved_however_low_the_limit() -> None:
    batch = _batch([1.0] * 4, samples=4)
    assert Guard(min_kept_fraction=0.0).reason(batch, _keep(batch, 0)).startswith("starved: 0 of 4")


@pytest.mark.parametrize(
    ("prompts", "least"),
    [(1, 1), (4, 1), (8, 2), (16, 4), (32, 8), (64, 8)],  # a quarter of the prompts, at least 1, at most 8
)
def test_too_few_prompts(prompts: int, least: int) -> None:
    batch = _batch([1.0] * (2 * prompts), samples=2)
    assert Guard().reason(batch, _keep(batch, 2 * least)) == ""
    assert Guard().reason(batch, _keep(batch, 2 * (least - 1))) != ""
    if least > 1:
        assert f"from {least - 1} of {prompts} prompts" in Guard().reason(batch, _keep(batch, 2 * (least - 1)))


def test_rollouts_without_advantage_do_not_feed() -> None:
    batch = _batch([0.0] * 50 + [1.0] * 50, samples=100)
    assert Guard().reason(batch, _keep(batch, 51)).startswith("starved: 1 of 100")
    assert Guard().reason(batch, _keep(batch, 52)) == ""


def test_authority() -> None:
    few = _batch([1.0] + [0.0] * 99, samples=10)
    assert Guard().reason(few, _keep(few, 100)).startswith("no authority: 1 of 100 rollouts")
    enough = _batch([1.0, -1.0] + [0.0] * 98, samples=10)
    assert Guard().reason(enough, _keep(enough, 100)) == ""
    nobody = _batch([0.0] * 10, samples=10)
    assert Guard(min_authority=0.0).reason(nobody, _keep(nobody, 10)).startswith("no authority: 0 of 10")


def test_advantages_that_the_rule_sets_count_as_authority() -> None:
    # All-correct groups: no group advantage, but the switch gives each +1.
    batch = _batch([0.0] * 10, samples=10)
    switched = Verdict(keep_R=np.ones(10, dtype=bool), advantage_R=np.ones(10))
    assert Guard().reason(batch, switched) == ""
    silenced = Verdict(keep_R=np.ones(10, dtype=bool), advantage_R=np.zeros(10))
    full = _batch([1.0] * 10, samples=10)
    assert Guard().reason(full, silenced).startswith("starved: 0 of 10")


@pytest.mark.parametrize(("name", "value"), [("min_kept_fraction", -0.1), ("min_authority", 1.5), ("min_groups", -1)])
def test_limits_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        Guard(**{name: value})  # type: ignore[arg-type]


def _token_verdict(batch: Batch, keep: list[bool]) -> Verdict:
    keep_T = np.array(keep)
    return Verdict(keep_R=keep_T, advantage_R=batch.advantage_R, keep_T=keep_T)


def test_tokens_that_move_nothing_do_not_feed() -> None:
    # 100 rollouts of one token, one prompt: three move entropy, the rest are certain, but for rounding.
    batch = _batch([1.0] * 100, samples=100)
    change_T = np.array([1.0, -0.5, 1e-3] + [0.0] * 50 + [1e-8] * 47)
    passing = [False] + [True] * 99
    assert Guard().reason(batch, _token_verdict(batch, passing), change_T) == ""
    starving = [False, False] + [True] * 98
    why = Guard().reason(batch, _token_verdict(batch, starving), change_T)
    assert why.startswith("starved: 1 of 100 rollouts are kept with an advantage other than 0 and a token that moves")
    # Without statistics, or for whole rollouts, all that is kept counts.
    assert Guard().reason(batch, _token_verdict(batch, starving), None) == ""
    assert Guard().reason(batch, Verdict(keep_R=np.array(starving), advantage_R=batch.advantage_R), change_T) == ""


def test_tokens_outside_the_loss_do_not_feed() -> None:
    batch = replace(_batch([1.0] * 100, samples=100), mask_T=np.arange(100) >= 50)
    assert Guard().reason(batch, _token_verdict(batch, [True] * 52 + [False] * 48)) == ""
    assert Guard().reason(batch, _token_verdict(batch, [True] * 51 + [False] * 49)).startswith("starved: 1 of 100")


def test_a_token_verdict_that_rejects_nothing_stands() -> None:
    batch = _batch([1.0] * 10, samples=1)
    assert Guard().reason(batch, _token_verdict(batch, [True] * 10), np.zeros(10)) == ""


def test_switched_off_it_lets_anything_stand_but_nothing_at_all() -> None:
    off = Guard(min_kept_fraction=0.0, min_groups=0, min_authority=0.0)
    batch = _batch([1.0] * 100 + [0.0] * 100, samples=10)
    assert off.reason(batch, _keep(batch, 1)) == ""
    assert off.reason(batch, Verdict(keep_R=np.arange(200) == 150, advantage_R=batch.advantage_R)) == ""
    silenced = Verdict(keep_R=np.ones(200, dtype=bool), advantage_R=np.zeros(200))
    assert off.reason(batch, silenced) == ""
    assert off.reason(batch, _token_verdict(batch, [True] + [False] * 199), np.zeros(200)) == ""
    assert off.reason(batch, _keep(batch, 0)) == "starved: nothing at all is kept"
    assert off.reason(batch, _token_verdict(batch, [False] * 200)) == "starved: nothing at all is kept"
    # One limit above 0 and all of it is on.
    assert Guard(min_kept_fraction=0.0, min_groups=0).reason(batch, silenced).startswith("starved: 0 of 200")


def test_a_weight_of_zero_rejects() -> None:
    batch = _batch([1.0] * 100, samples=100)
    everything = np.ones(100, dtype=bool)

    def weighted(taught: int, **changes: Any) -> Verdict:
        weight_R = np.where(np.arange(100) < taught, 0.25, 0.0)
        return Verdict(**({"keep_R": everything, "advantage_R": batch.advantage_R, "weight_R": weight_R} | changes))

    assert Guard().reason(batch, weighted(100)) == ""
    assert Guard().reason(batch, weighted(2)) == ""
    assert Guard().reason(batch, weighted(1)).startswith("starved: 1 of 100 rollouts")
    # Kept and weighed more than 0, of which there is one: the tokens or rollouts that are kept begin at the second.
    keep_R = np.arange(100) >= 1
    assert Guard().reason(batch, weighted(2, keep_R=keep_R)).startswith("starved: 1 of 100 rollouts")
    assert Guard().reason(batch, weighted(2, keep_R=keep_R, keep_T=keep_R)).startswith("starved: 1 of 100 rollouts")
    assert Guard().reason(batch, weighted(3, keep_R=keep_R, keep_T=keep_R)) == ""
    off = Guard(min_kept_fraction=0.0, min_groups=0, min_authority=0.0)
    assert off.reason(batch, weighted(0)) == "starved: nothing at all is kept"
    assert off.reason(batch, weighted(1)) == ""


def test_prompts_without_weight_do_not_feed() -> None:
    # Eight prompts of two: a quarter of them, two, must be left.
    batch = _batch([1.0, -1.0] * 8, samples=2)
    for weighed, why in ((4, ""), (2, "starved: what is kept comes from 1 of 8 prompts, at least 2 are needed")):
        weight_R = (np.arange(16) < weighed).astype(float)
        verdict = Verdict(keep_R=np.ones(16, dtype=bool), advantage_R=batch.advantage_R, weight_R=weight_R)
        assert Guard().reason(batch, verdict) == why


def test_what_is_counted_as_kept_has_a_weight() -> None:
    batch = _batch([1.0, -1.0, 1.0, 0.0] * 2, samples=4)
    weight_R = np.array([1.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.5, 1.0])
    keep_R = np.array([True, False, True, True, True, True, True, True])
    for keep_T in (None, keep_R):
        verdict = Verdict(keep_R=keep_R, advantage_R=batch.advantage_R, weight_R=weight_R, keep_T=keep_T)
        assert keep_metrics(batch, verdict) == {
            "kept_fraction": 4 / 8,  # rollouts 0, 4, 6, 7
            "acceptance_mean": 4 / 8,
            "kept_token_fraction": 4 / 8,
            "kept_fraction_positive": 3 / 4,
            "kept_fraction_negative": 0.0,
            "kept_groups": 2.0,
            "active_fraction": 3 / 8,
            "active_fraction_negative": 0.0,
            "authority": 6 / 8,
            "weight_min": 0.5,
            "weight_mean": (1.0 + 2.0 + 0.5 + 1.0) / 4,
            "weight_max": 2.0,
            "effective_share": 4.5**2 / (8 * (1.0 + 4.0 + 0.25 + 1.0)),
        }
