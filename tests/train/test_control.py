"""From the `entropy` part of a configuration to a controller: what goes together, every curve, and what is refused."""

import dataclasses
import math
import re

import pytest
import torch

from entrocraft import TokenStats
from entrocraft.methods import Signal
from entrocraft.train.config import Config, EntropyConfig, LossConfig, OptimizerConfig, ScheduleConfig
from entrocraft.train.config_reader import load_config, save_config
from entrocraft.train.control import build_controller, build_method, build_schedule

VOCAB = 50


def configuration(*, aggregation=None, steps=10, schedule=None, **entropy):
    return Config(
        loss=LossConfig() if aggregation is None else LossConfig(aggregation=aggregation),
        optimizer=OptimizerConfig(steps=steps),
        entropy=EntropyConfig(schedule=schedule or ScheduleConfig(start=1.0), **entropy),
    )


def decide(controller, step, entropy, advantage=(1.0, -1.0, 0.5, -0.5)):
    """Decide on one token a rollout, all of the same entropy."""
    size = len(advantage)
    entropy_T = torch.full((size,), float(entropy))
    return controller.decide(
        step=step,
        stats=TokenStats(logprob_T=-entropy_T, entropy_T=entropy_T, lse_T=entropy_T),
        rollout_T=torch.arange(size),
        group_R=torch.zeros(size, dtype=torch.int64),
        advantage_R=torch.tensor(advantage),
        reward_R=torch.tensor(advantage).sign(),
    )


@pytest.mark.parametrize(
    ("preset", "aggregation", "kept", "advantage"),
    [
        # Above the band: nearly only, only, or as +1 the positive ones.
        ("paper_v1", "eq5", [True, False, True, False], [1.0, -1.0, 0.5, -0.5]),
        ("paper_v2", "eq5", [True, False, True, False], [1.0, -1.0, 0.5, -0.5]),
        ("paper_code", "token_mean", [True] * 4, [1.0, 0.0, 1.0, 0.0]),
    ],
)
def test_a_preset_brings_its_aggregation(preset, aggregation, kept, advantage):
    controller, found = build_controller(configuration(preset=preset), vocab_size=VOCAB)
    assert found == aggregation
    decision = decide(controller, 0, 2.0)
    assert decision.keep_R.tolist() == kept
    assert decision.advantage_R.tolist() == advantage


def test_without_a_preset_it_is_the_configured_aggregation_and_no_rule_means_none():
    controller, aggregation = build_controller(configuration(aggregation="kept_tokens"), vocab_size=VOCAB)
    assert aggregation == "kept_tokens"
    assert decide(controller, 0, 2.0).keep_R.tolist() == [True] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "budgett"}, "unknown rule 'budgett': did you mean 'budget'"),
        ({"preset": "paper_v3"}, "unknown preset 'paper_v3': did you mean 'paper_v"),
        ({"schedule": ScheduleConfig(kind="cosin")}, "unknown schedule 'cosin': did you mean 'cosine'"),
        ({"schedule": ScheduleConfig(kind="no_such_module:curve")}, "entropy.schedule.kind = 'no_such_module:curve'"),
        ({"schedule": ScheduleConfig(kind="math:no_such")}, "entropy.schedule.kind = 'math:no_such'"),
    ],
)
def test_unknown_names(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_controller(configuration(**options), vocab_size=VOCAB)


@pytest.mark.parametrize("aggregation", ["kept_tokens", "eq5"])
@pytest.mark.parametrize("rule", ["budget", "first_order"])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_prediction_needs_a_denominator_that_stays(rule, level, aggregation):
    with pytest.raises(ValueError, match="does not go with") as caught:
        build_controller(configuration(rule=rule, level=level, aggregation=aggregation), vocab_size=VOCAB)
    for part in (f"entropy.rule = '{rule}'", f"loss.aggregation = '{aggregation}'", "'token_mean'"):
        assert part in str(caught.value)
    assert build_controller(configuration(rule=rule, level=level), vocab_size=VOCAB)[1] == "token_mean"
    assert build_controller(configuration(rule="hard", aggregation=aggregation), vocab_size=VOCAB)[1] == aggregation


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("group_scale", {"rule": "budget"}),
        ("tempered", {"rule": "first_order"}),
        ("group_scale", {"rule": {"name": "group_scale", "rule": {"name": "budget", "level": "token"}}}),
    ],
)
def test_prediction_is_looked_for_inside_the_wrappers(rule, options):
    with pytest.raises(ValueError, match="does not go with") as caught:
        build_controller(configuration(rule=rule, rule_options=options, aggregation="eq5"), vocab_size=VOCAB)
    inner = "first_order" if rule == "tempered" else "budget"
    assert f"entropy.rule = '{rule}', which wraps {inner}(level=" in str(caught.value)
    assert build_controller(configuration(rule=rule, rule_options=options), vocab_size=VOCAB)[1] == "token_mean"
    other = configuration(rule=rule, rule_options={"rule": "soft"}, aggregation="eq5")
    assert build_controller(other, vocab_size=VOCAB)[1] == "eq5"


def test_options_of_a_wrapped_rule_come_from_the_command_line_and_are_saved(tmp_path):
    options = {"rule": {"name": "soft", "gamma": 5.0}, "c_max": 2.0}
    config = load_config(["--entropy.rule=group_scale", f"--entropy.rule_options={options}"])
    assert config.entropy.rule_options == options
    save_config(config, tmp_path / "saved.yaml")
    assert load_config([f"--config={tmp_path / 'saved.yaml'}"]) == config
    direct = configuration(rule="group_scale", rule_options=options)
    for one in (config, direct):
        controller, _ = build_controller(one, vocab_size=VOCAB)
        assert "group_scale(rule=soft(gamma=5.0), c_max=2.0" in decide(controller, 0, 2.0).reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "hard", "gamma": 3.0}, "entropy.gamma = 3.0: 'hard' does not read it, soft and soft_expected do"),
        ({"gamma": 3.0}, "entropy.gamma = 3.0: 'none' does not read it"),
        (
            {"rule": "hard", "level": "token"},
            "entropy.level = 'token': 'hard' does not read it, first_order",
        ),
        ({"rule": "entrocraft.rules:budget", "level": "token"}, "entropy.level = 'token': 'entrocraft.rules:budget'"),
        ({"rule": "group_scale", "rule_options": {"rule": "budget"}, "level": "token"}, "'group_scale' does not read"),
    ],
)
def test_a_setting_that_would_not_be_read_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_controller(configuration(**settings), vocab_size=VOCAB)


@pytest.mark.parametrize("rule", ["soft", "soft_expected"])
def test_gamma_is_how_steep_the_soft_rules_are(rule):
    for gamma, expected in ((None, 10.0), (3.0, 3.0)):
        controller, _ = build_controller(configuration(rule=rule, gamma=gamma), vocab_size=VOCAB)
        assert f"{rule}(gamma={expected})" in decide(controller, 0, 2.0).reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"policy": "gspo", "clip_high": 0.28},
            "loss.clip_high = 0.28: it is a clip of ppo_clip, and loss.policy",
        ),
        (
            {"method": "kl_cov", "clip_low": 0.1},
            "loss.clip_low = 0.1: it is a clip of ppo_clip, and loss.method",
        ),
        ({"method": "kl_cov", "dual_clip": None}, "loss.dual_clip = None: it is a clip of ppo_clip"),
        ({"method": "adaptive_clip", "policy": "gspo"}, "AdaptiveClip moves the upper clip of a PPOClip"),
        ({"method": "adaptive_clip", "policy": "sapo"}, "AdaptiveClip moves the upper clip of a PPOClip"),
    ],
)
def test_a_clip_that_would_not_be_read_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_method(Config(loss=LossConfig(**settings)))


def test_the_adaptive_clip_starts_at_the_configured_one():
    method = build_method(Config(loss=LossConfig(method="adaptive_clip", clip_high=0.28)))
    state = method.observe({}, Signal(step=0, steps=9, entropy=0.5, target=0.5))
    assert state["clip_high"] == 0.28


LINE = [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleConfig(kind="constant", start=0.7), [0.7] * 6),
        (ScheduleConfig(kind="linear", start=1.0, end=0.5), LINE),
        (ScheduleConfig(kind="linear", start=1.0, end=0.5, steps=2), [1.0, 0.75] + [0.5] * 4),
        (
            ScheduleConfig(kind="cosine", start=1.0, end=0.5),
            [0.75 + 0.25 * math.cos(math.pi * min(s / 4, 1)) for s in range(6)],
        ),
        (ScheduleConfig(kind="exponential", start=1.0, end=0.5), [0.5 ** min(s / 4, 1) for s in range(6)]),
        (ScheduleConfig(kind="piecewise", points=[(0, 1.0), (2, 0.4)]), [1.0, 0.7] + [0.4] * 4),
        (
            ScheduleConfig(kind="oscillate", start=1.0, end=0.5, amplitude=0.1, period=4),
            [value + wave for value, wave in zip(LINE, [0, 0.1, 0, -0.1, 0, 0.1], strict=True)],
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, ScheduleConfig) else "",
)
def test_every_kind_of_schedule(schedule, expected):
    curve = build_schedule(schedule, 4)
    assert [curve(step) for step in range(6)] == pytest.approx(expected, rel=1e-12)
    controller, _ = build_controller(configuration(schedule=schedule, steps=4), vocab_size=VOCAB)
    for step in range(4):
        assert decide(controller, step, 1.0).metrics["target"] == pytest.approx(expected[step], rel=1e-12)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "exponential", "oscillate"])
def test_every_kind_that_starts_where_the_model_stands(kind):
    controller, _ = build_controller(configuration(schedule=ScheduleConfig(kind=kind), steps=4), vocab_size=VOCAB)
    metrics = decide(controller, 0, 1.25).metrics
    assert metrics["target"] == metrics["entropy"] == 1.25


def test_a_schedule_of_your_own_is_given_the_steps(tmp_path, monkeypatch):
    (tmp_path / "my_curves.py").write_text("def falling(steps):\n    return lambda step: 1.0 - 0.5 * step / steps\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    curve = build_schedule(ScheduleConfig(kind="my_curves:falling"), 8)
    assert [curve(step) for step in (0, 4, 8)] == [1.0, 0.75, 0.5]


def test_the_whole_schedule_is_checked_before_the_run():
    rising = ScheduleConfig(kind="linear", start=1.0, end=5.0)
    with pytest.raises(ValueError, match=r"at step 8, above log\(vocab_size = 50\)"):  # 1 + 0.4 * 8 > 3.912
        build_controller(configuration(schedule=rising), vocab_size=VOCAB)
    build_controller(configuration(schedule=rising), vocab_size=1000)  # log(1000) = 6.9 is high enough
    # The line falls to 0.5, and a wave of 0.7 around it below 0 on its way.
    wave = ScheduleConfig(kind="oscillate", start=1.0, end=0.5, amplitude=0.7, period=20)
    with pytest.raises(ValueError, match="entropy is never negative"):
        build_controller(configuration(schedule=wave, steps=20), vocab_size=VOCAB)


def test_a_measured_schedule_is_checked_in_the_first_decision():
    wave = ScheduleConfig(kind="oscillate", end=0.5, amplitude=0.7, period=20)
    controller, _ = build_controller(configuration(schedule=wave, steps=20), vocab_size=VOCAB)
    before = controller.state_dict()
    with pytest.raises(ValueError, match="entropy is never negative"):
        decide(controller, 0, 1.0)
    assert controller.state_dict() == before
    assert decide(build_controller(configuration(schedule=wave, steps=5), vocab_size=VOCAB)[0], 0, 1.0).keep_R.all()


def test_options_reach_the_controller():
    config = configuration(rule="hard", width=0.4, warmup_steps=1, min_kept_fraction=0.6)
    controller, _ = build_controller(config, vocab_size=VOCAB)
    first, second = (decide(controller, step, 2.0) for step in (0, 1))
    assert first.metrics["band_high"] - first.metrics["band_low"] == pytest.approx(0.4)
    assert first.reason.startswith("warm-up 1 of 1")
    assert second.bypassed
    assert "at least 60.0% must be" in second.reason
    loose = dataclasses.replace(config.entropy, min_kept_fraction=0.5, warmup_steps=0)
    controller, _ = build_controller(dataclasses.replace(config, entropy=loose), vocab_size=VOCAB)
    assert decide(controller, 0, 2.0).keep_R.tolist() == [True, False, True, False]


def test_when_control_lets_go_is_configured():
    def first_released(**release):
        config = configuration(rule="hard", schedule=ScheduleConfig(kind="constant", start=1.0), **release)
        controller, _ = build_controller(config, vocab_size=VOCAB)
        # Right and wrong in turn for ten steps, then only wrong, below the band throughout.
        rewards = [torch.tensor([1.0, 0.0, 1.0, 0.0] * 100)] * 10 + [torch.zeros(400)] * 20
        released = [
            controller.decide(
                step=step,
                stats=TokenStats(logprob_T=-torch.ones(400), entropy_T=torch.full((400,), 0.9), lse_T=torch.ones(400)),
                rollout_T=torch.arange(400),
                group_R=torch.arange(400) // 4,
                advantage_R=torch.tensor([1.0, -1.0] * 200),
                reward_R=reward_R,
            ).metrics["released"]
            for step, reward_R in enumerate(rewards)
        ]
        return released.index(1.0) if 1.0 in released else None

    # 0.9^n < 0.8 from n = 3, step 12; to 0.5 from n = 7, step 16, and for the errors a step later at most.
    at_once, patient = first_released(release_patience=1), first_released()
    assert at_once in (12, 13)
    assert patient == at_once + 4
    assert first_released(release_share=0.5, release_patience=1) in (16, 17)
    assert first_released(release=False) is None
    assert first_released(release_share=0.0) is None
    with pytest.raises(ValueError, match=re.escape("patience = 0: expected a number of steps > 0")):
        first_released(release_patience=0)
