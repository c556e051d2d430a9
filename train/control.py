"""Turns a configuration into a schedule, a controller, and the method that makes the loss."""

import dataclasses
import importlib

from entrocraft import EntropyController, corrections, losses, methods, rules, schedules
from entrocraft.advantages import ADVANTAGES, SIGN_ONLY
from entrocraft.registry import resolve
from entrocraft.release import Release
from entrocraft.train.config import Config, EntropyConfig, LossConfig, ScheduleConfig
from entrocraft.train.step import policy_loss

Schedule = schedules.Schedule

_TAKE_GAMMA = ("soft", "soft_expected")
_TAKE_LEVEL = ("first_order", "budget")


def build_schedule(config: ScheduleConfig, run_steps: int) -> Schedule:
    """The configured curve; `run_steps` stands in for an empty `steps`.

    Raises ValueError for an unknown kind, naming the nearest, and for values the schedule refuses.
    """
    steps = config.steps if config.steps is not None else run_steps
    line = {"start": config.start, "end": config.end, "steps": steps}
    if ":" in config.kind:
        return _imported(config.kind, steps)
    if config.kind == "constant":
        return schedules.build("constant", value=config.start)
    if config.kind == "piecewise":
        return schedules.build("piecewise", points=config.points)
    if config.kind == "oscillate":
        centre = schedules.build("linear", **line)
        return schedules.build("oscillate", around=centre, amplitude=config.amplitude, period=config.period)
    return schedules.build(config.kind, **line)


def _imported(path: str, steps: int) -> Schedule:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)(steps)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"entropy.schedule.kind = {path!r} cannot be imported as package.module:function: {error}"
        ) from None


def build_controller(config: Config, *, vocab_size: int) -> tuple[EntropyController, str]:
    """The controller, and the aggregation of the loss that goes with it.

    The whole schedule is checked against the steps of the run, in the first decision where it starts at the measured
    entropy. Raises ValueError as `build_rule`; for an unknown schedule, naming the nearest; and for a band no policy
    can be in.
    """
    entropy, (rule, aggregation) = config.entropy, build_rule(config)
    release = Release(reward_share=entropy.release_share, patience=entropy.release_patience)
    controller = EntropyController(
        build_schedule(entropy.schedule, config.optimizer.steps),
        rule,
        width=entropy.width,
        seed=config.seed,
        warmup_steps=entropy.warmup_steps,
        min_kept_fraction=entropy.min_kept_fraction,
        min_groups=entropy.min_groups,
        min_authority=entropy.min_authority,
        release=release if entropy.release else None,
        vocab_size=vocab_size,
        last_step=config.optimizer.steps,
    )
    return controller, aggregation


def build_rule(config: Config) -> tuple[rules.Rule, str]:
    """The rule, and the aggregation of the loss that goes with it: a preset's own, otherwise `loss.aggregation`.

    Raises ValueError for an unknown rule or preset, naming the nearest; for settings it does not read; for a rule that
    predicts under an aggregation that makes the prediction wrong; and for a penalty on length where nothing, or not
    what is meant, would become of it.
    """
    entropy = config.entropy
    _check_used(entropy)
    if entropy.preset is not None:
        preset = rules.preset(entropy.preset)
        rule, aggregation = preset.rule, preset.aggregation
    else:
        name = entropy.rule if entropy.rule is not None else "none"
        options: dict[str, object] = {"level": entropy.level} if name in _TAKE_LEVEL else {}
        options |= {} if entropy.gamma is None else {"gamma": entropy.gamma}
        rule = rules.build(name, **options, **entropy.rule_options)
        aggregation = config.loss.aggregation or "token_mean"
        _check_predictable(rule, name, aggregation)
    _check_penalty(config, rule)
    _check_teaches(config, rule)
    return rule, aggregation


def _check_used(entropy: EntropyConfig) -> None:
    """Raise ValueError for a setting of some rules or curves beside one, or a preset, that does not read it."""
    rule = entropy.preset or entropy.rule or "none"
    if entropy.gamma is not None and rule not in _TAKE_GAMMA:
        raise ValueError(
            f"entropy.gamma = {entropy.gamma!r}: {rule!r} does not read it, {' and '.join(_TAKE_GAMMA)} do; leave it "
            "out, or give a rule of your own its arguments by entropy.rule_options"
        )
    if entropy.level != EntropyConfig().level and rule not in _TAKE_LEVEL:
        raise ValueError(
            f"entropy.level = {entropy.level!r}: {rule!r} does not read it, {' and '.join(_TAKE_LEVEL)} do; leave it "
            "out, or give it to the rule that another wraps, by entropy.rule_options"
        )
    if entropy.preset is not None and entropy.rule_options:
        raise ValueError(
            f"entropy.rule_options = {entropy.rule_options!r}: the preset {entropy.preset!r} brings its own; leave "
            "them out, or name the rule (entropy.rule) instead of the preset"
        )
    if entropy.schedule.points and entropy.schedule.kind != "piecewise":
        raise ValueError(
            f"entropy.schedule.points = {entropy.schedule.points!r}: {entropy.schedule.kind!r} does not read them; "
            "leave them out, or set entropy.schedule.kind to 'piecewise'"
        )


def _check_teaches(config: Config, rule: rules.Rule) -> None:
    """Raise ValueError for a rule that leaves nothing of what the advantage estimator leaves in the batch."""
    estimator = resolve(ADVANTAGES, config.loss.advantage, "advantage (loss.advantage)")
    if isinstance(_innermost(rule), rules.switch) and hasattr(estimator, "members"):
        raise ValueError(
            f"loss.advantage = {config.loss.advantage!r}: it takes rollouts of one sign out of the batch, and the rule "
            "'switch' (preset 'paper_code') those of the other on one side of its band, where nothing would be learnt; "
            "expected such as 'reinforce'"
        )


def build_method(config: Config) -> methods.Method:
    """The configured method, on the configured policy loss where it is built on one.

    Raises ValueError for an unknown name, naming the nearest, for arguments it does not take, and for a policy loss
    that is configured and would not be used.
    """
    loss = config.loss
    make = resolve(methods.METHODS, loss.method, "method (loss.method)")
    takes = dataclasses.is_dataclass(make) and "loss_fn" in {field.name for field in dataclasses.fields(make)}
    if not takes and loss.policy != "ppo_clip":
        raise ValueError(
            f"loss.policy = {loss.policy!r}: loss.method = {loss.method!r} has a policy loss of its own; leave "
            "loss.policy alone"
        )
    _check_clips_used(loss, takes=takes)
    given = {"loss_fn": policy_loss(config)} if takes else {}
    return methods.build(loss.method, **given, **loss.method_options)


def _check_clips_used(loss: LossConfig, *, takes: bool) -> None:
    """Raise ValueError for clips of PPO beside a policy loss that has none of them."""
    if takes and loss.policy == "ppo_clip":
        return
    owner = f"loss.policy = {loss.policy!r}" if takes else f"loss.method = {loss.method!r}"
    for name in ("clip_low", "clip_high", "dual_clip"):
        value = getattr(loss, name)
        if value != getattr(LossConfig(), name):
            raise ValueError(
                f"loss.{name} = {value!r}: it is a clip of ppo_clip, and {owner} does not read it; leave it out, or "
                f"set what it has of its own by loss.{'policy' if takes else 'method'}_options"
            )


def _check_predictable(rule: rules.Rule, name: str, aggregation: str) -> None:
    """Raise ValueError where the denominator of the loss would change with what the rule rejects by prediction."""
    inner = _innermost(rule)
    if isinstance(inner, rules.budget | rules.first_order) and aggregation in losses.KEPT_DENOMINATORS:
        described = repr(name) if inner is rule else f"{name!r}, which wraps {inner},"
        raise ValueError(
            f"entropy.rule = {described} does not go with loss.aggregation = {aggregation!r}: it adds up predicted "
            "entropy changes of the loss over all tokens, and this denominator shrinks with every rejection; set "
            "loss.aggregation to 'token_mean'"
        )


def _check_penalty(config: Config, rule: rules.Rule) -> None:
    """Raise ValueError for a penalty on length beside what needs rewards of -1 and +1, or sees only their sign."""
    loss, owner = config.loss, ""
    estimator = resolve(ADVANTAGES, loss.advantage, "advantage (loss.advantage)")
    if isinstance(_innermost(rule), rules.switch):
        owner = "the rule 'switch' (preset 'paper_code'), which needs rewards of -1 and +1"
    elif estimator in [ADVANTAGES[name] for name in SIGN_ONLY]:
        owner = f"loss.advantage = {loss.advantage!r}, which sees of a reward only whether it is above 0"
    if owner and config.reward.overlong_buffer:
        raise ValueError(f"reward.overlong_buffer = {config.reward.overlong_buffer}: expected 0 beside {owner}")


def _innermost(rule: rules.Rule) -> rules.Rule:
    """What is left of a rule without those that wrap it."""
    while isinstance(rule, corrections.group_scale | corrections.tempered):
        rule = corrections.wrapped(rule.rule)
    return rule
