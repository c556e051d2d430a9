"""The distance between sampler and policy: its numbers on known distributions, and when it is news."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from entrocraft import PPOClip, Rollouts, TokenStats
from entrocraft.methods import Plain
from entrocraft.train.config import Config
from entrocraft.train.config_engine import ImportanceConfig, MismatchConfig
from entrocraft.train.errors import TrainingStopped
from entrocraft.train.metrics import MetricsLog, read_events
from entrocraft.train.mismatch import MismatchWatch, build_importance, mismatch_metrics
from entrocraft.train.step import Learning
from entrocraft.train.step_metrics import watch_mismatch


def batch(sampler_logprob_T, mask_T=None, rollouts=4):
    T = 4 if sampler_logprob_T is None else len(sampler_logprob_T)
    return Rollouts(
        token_T=torch.zeros(T, dtype=torch.int64),
        rollout_T=torch.arange(T) * rollouts // T,
        mask_T=torch.ones(T, dtype=torch.bool) if mask_T is None else mask_T,
        group_R=torch.zeros(rollouts, dtype=torch.int64),
        sample_R=torch.arange(rollouts),
        prompts=((1,),),
        truncated_R=torch.zeros(rollouts, dtype=torch.bool),
        weight_version=0,
        sampler_logprob_T=sampler_logprob_T,
    )


def test_numbers_of_known_differences():
    sampler_T = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    policy_T = sampler_T + torch.tensor([0.1, -0.2, 0.0, 5.0])
    mask_T = torch.tensor([True, True, True, False])
    found = mismatch_metrics(policy_T, batch(sampler_T, mask_T))
    assert found["mismatch_mean"] == pytest.approx(0.1, rel=1e-5)
    assert found["mismatch_max"] == pytest.approx(0.2, rel=1e-5)
    expected = sum(math.exp(d) - 1 - d for d in (0.1, -0.2, 0.0)) / 3
    assert found["mismatch_kl"] == pytest.approx(expected, rel=1e-5)
    assert found["mismatch_ratio_p01"] == pytest.approx(math.exp(-0.2), rel=1e-5)
    assert found["mismatch_ratio_p50"] == pytest.approx(1.0, rel=1e-5)
    assert found["mismatch_ratio_p99"] == pytest.approx(math.exp(0.1), rel=1e-5)


def test_kl_is_that_of_the_two_distributions():
    """Draws from a sampler whose logits are a little off: the estimate is the exact divergence, within its error."""
    logits = torch.randn(50, dtype=torch.float64)
    sampler, policy = (torch.log_softmax(x, 0) for x in (logits, logits + 0.2 * torch.randn(50, dtype=torch.float64)))
    exact = float((sampler.exp() * (sampler - policy)).sum())
    drawn = torch.multinomial(sampler.exp(), 200_000, replacement=True)
    found = mismatch_metrics(policy[drawn], batch(sampler[drawn].float(), rollouts=1))
    assert found["mismatch_kl"] == pytest.approx(exact, rel=0.03)


def test_nothing_to_compare():
    sampler_T = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    no_token = torch.zeros(4, dtype=torch.bool)
    assert mismatch_metrics(sampler_T, batch(sampler_T, no_token)) == {}
    watch = MismatchWatch(MismatchConfig())
    assert watch.observe(1, {}) is None
    assert list(watch.usual) == []


def seen(value):
    return {"mismatch_mean": value, "mismatch_max": 2 * value}


def test_an_alarm_on_a_jump_and_again_until_it_is_usual():
    watch = MismatchWatch(MismatchConfig(alarm_factor=4, alarm_floor=0.001))
    for step in range(10):
        assert watch.observe(step, seen(0.01 + 0.001 * (step % 3))) is None
    told = watch.observe(10, seen(0.2))
    assert told == "sampler and policy differ by 0.2 nats a token on average (at most 0.4); usual is 0.011"
    assert watch.observe(11, seen(0.03)) is None  # below four times the median
    alarms = [watch.observe(step, seen(0.2)) is not None for step in range(12, 40)]
    assert alarms == [True] * 20 + [False] * 8  # after 20 steps it is how things are


def test_small_differences_are_no_news():
    watch = MismatchWatch(MismatchConfig(alarm_floor=0.02))
    for step in range(5):
        assert watch.observe(step, seen(1e-6)) is None
    assert watch.observe(6, seen(0.019)) is None
    assert watch.observe(7, seen(0.021)) is not None


@pytest.mark.parametrize("value", [1.5, math.nan, math.inf])
def test_beyond_all_bounds_the_run_stops(value):
    watch = MismatchWatch(MismatchConfig(stop=1.0))
    with pytest.raises(TrainingStopped, match=r"step 9: .* more than mismatch.stop = 1"):
        watch.observe(9, seen(value))
    MismatchWatch(MismatchConfig(stop=None)).observe(9, seen(value))


def test_an_alarm_is_an_event_and_a_line(tmp_path):
    told: list[str] = []
    row: dict[str, float] = {}
    run: Any = SimpleNamespace(
        step=0, mismatch=MismatchWatch(MismatchConfig()), importance=build_importance(ImportanceConfig())
    )
    sampler_T = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    stats = [TokenStats(logprob_T=sampler_T + d, entropy_T=torch.ones(4), lse_T=torch.zeros(4)) for d in (1e-4, 0.7)]
    with MetricsLog(tmp_path, resume_step=None) as log:
        for step in range(1, 6):
            run.step = step
            row = watch_mismatch(run, batch(sampler_T), stats[step == 5], log, told.append)
            assert row["mismatch_alarm"] == (step == 5)
    assert told == ["step 5: sampler and policy differ by 0.7 nats a token on average (at most 0.7); usual is 0.0001"]
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["step"], event["weight_version"]) == ("mismatch_alarm", 5, 0)
    assert row["importance_outside"] == 1  # a ratio of 2.01, cut to 2
    assert row["importance_mean"] == pytest.approx(math.exp(0.7), rel=1e-5)


def test_a_resumed_watch_says_the_same():
    one, other = (MismatchWatch(MismatchConfig()) for _ in range(2))
    values = [0.01, 0.02, 0.015, 0.3, 0.4, 0.01]
    for step, value in enumerate(values):
        one.observe(step, seen(value))
    other.load_state_dict(one.state_dict())
    for step, value in enumerate([0.5, 0.02, 0.2]):
        assert one.observe(step, seen(value)) == other.observe(step, seen(value))


@pytest.mark.parametrize(
    "options",
    [{"alarm_factor": 1.0}, {"alarm_floor": -1.0}, {"stop": 0.0}],
    ids=lambda options: next(iter(options)),
)
def test_settings_that_make_no_sense(options):
    with pytest.raises(ValueError, match=f"mismatch.{next(iter(options))}"):
        MismatchConfig(**options)


def learning(**options):
    return Learning(
        method=Plain(loss_fn=PPOClip(clip_low=0.2, clip_high=0.2, dual_clip=3.0)),
        state={},
        aggregation="token_mean",
        config=Config(),
        step=1,
        importance=build_importance(ImportanceConfig(**options)),
    )


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [0.5, 1.0, 2.0, 2.0]),  # truncated at 2, by default
        ({"action": "mask", "low": 0.6}, [0.0, 1.0, 2.0, 0.0]),
        ({"correct": False}, [1.0, 1.0, 1.0, 1.0]),
    ],
    ids=["truncate", "mask", "off"],
)
def test_gradients_are_multiplied_by_the_weights(options, weights):
    """Of each token: the gradient with a sampler's log-probabilities over the gradient without, exactly."""
    ratios = torch.tensor([0.5, 1.0, 2.0, 8.0])
    logprob_T = torch.tensor([-1.0, -1.5, -0.5, -2.0])
    stats = TokenStats(logprob_T=logprob_T, entropy_T=torch.ones(4), lse_T=torch.zeros(4))
    advantage_R = torch.tensor([1.0, -1.0, 2.0, 1.0])

    def gradient(sampler_logprob_T):
        rollouts = batch(sampler_logprob_T)
        objective = learning(**options).objective(rollouts, stats, logprob_T, advantage_R, None)
        moving_T = logprob_T.clone().requires_grad_()
        objective(moving_T, stats.entropy_T, slice(0, 4)).backward()
        assert moving_T.grad is not None
        return moving_T.grad

    plain = gradient(None)
    assert plain.tolist() == pytest.approx((-advantage_R / 4).tolist())
    torch.testing.assert_close(gradient(logprob_T - ratios.log()), plain * torch.tensor(weights), rtol=1e-5, atol=1e-7)
