"""Importance weights: each level and action by plain loops over rollouts, the mean after normalising, metrics."""

import itertools
import math

import pytest
import torch

from entrocraft.importance import ImportanceWeights

LENGTHS = [3, 1, 4, 2, 0]
MASK = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 0, 0]).bool()


def _batch(seed=0, spread=0.6):
    generator = torch.Generator().manual_seed(seed)
    rollout_T = torch.arange(5).repeat_interleave(torch.tensor(LENGTHS))
    logprob_T = -2 * torch.rand(10, generator=generator)
    return logprob_T, logprob_T - spread * torch.randn(10, generator=generator), rollout_T


@pytest.mark.parametrize(
    ("level", "action", "normalise"),
    list(itertools.product(("token", "sequence", "geometric"), ("truncate", "mask", "reject"), (False, True))),
)
def test_every_level_and_action_by_hand(level, action, normalise):
    logprob_T, sampler_T, rollout_T = _batch()
    low = 0.0 if action == "truncate" else 0.7
    made = ImportanceWeights(level=level, action=action, low=low, high=1.3, normalise=normalise)
    got, metrics = made(logprob_T, sampler_T, rollout_T, MASK, 5)
    log = (logprob_T - sampler_T).tolist()
    of = {r: [t for t in range(10) if rollout_T[t] == r and MASK[t]] for r in range(5)}
    expected, ratios = [0.0] * 10, {}
    for tokens in of.values():
        for t in tokens:
            total = sum(log[s] for s in tokens)
            ratio = {"token": log[t], "sequence": total, "geometric": total / max(len(tokens), 1)}[level]
            ratios[t] = math.exp(ratio)
            inside = low <= ratios[t] <= 1.3
            expected[t] = {
                "truncate": min(ratios[t], 1.3), "mask": ratios[t] * inside, "reject": float(inside)
            }[action]  # fmt: skip
    if normalise:
        heads = [t for tokens in of.values() for t in (tokens if level == "token" else tokens[:1])]
        mean = sum(expected[t] for t in heads) / len(heads)
        expected = [w / mean if mean > 0 else w for w in expected]
    assert got.tolist() == pytest.approx(expected, rel=1e-5)
    assert got.dtype == torch.float32
    outside = sum(not low <= ratio <= 1.3 for ratio in ratios.values()) / len(ratios)
    weights = [expected[t] for t in ratios]
    ess = sum(weights) ** 2 / len(weights) / max(sum(w * w for w in weights), 1e-30)
    assert metrics == pytest.approx(
        {
            "importance_mean": sum(ratios.values()) / len(ratios),
            "importance_max": max(ratios.values()),
            "importance_outside": outside,
            "importance_ess": ess,
        },
        rel=1e-5,
    )


def test_equal_probabilities_weigh_one():
    logprob_T, _, rollout_T = _batch()
    for level, action in itertools.product(("token", "sequence", "geometric"), ("truncate", "mask", "reject")):
        weight_T, metrics = ImportanceWeights(level=level, action=action)(logprob_T, logprob_T, rollout_T, MASK, 5)
        assert torch.equal(weight_T, MASK.float())
        assert metrics["importance_ess"] == pytest.approx(1.0)


def test_what_stands_outside_the_mask_may_be_anything_and_inside_must_be_finite():
    logprob_T, sampler_T, rollout_T = _batch()
    sampler_T[2] = math.nan
    assert bool(torch.isfinite(ImportanceWeights()(logprob_T, sampler_T, rollout_T, MASK, 5).weight_T).all())
    sampler_T[3] = -math.inf
    with pytest.raises(ValueError, match="the log-probabilities of token 3 differ by inf"):
        ImportanceWeights()(logprob_T, sampler_T, rollout_T, MASK, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "batch"}, "level = 'batch'"),
        ({"action": "drop"}, "action = 'drop'"),
        ({"high": 0.0}, "low, high = 0.0, 0.0"),
        ({"low": 0.5}, "low = 0.5: action 'truncate' has an upper bound alone"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImportanceWeights(**arguments)


def test_shapes_that_do_not_fit_are_named():
    logprob_T, sampler_T, rollout_T = _batch()
    with pytest.raises(ValueError, match=r"sampler_logprob_T \(9,\): expected \(10,\) like rollout_T"):
        ImportanceWeights()(logprob_T, sampler_T[:9], rollout_T, MASK, 5)
