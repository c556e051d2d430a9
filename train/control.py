"""Turns the `entropy` part of a configuration into a schedule and a controller."""

import importlib

from entrocraft import EntropyController, rules, schedules
from entrocraft.train.config import Config, ScheduleConfig

Schedule = schedules.Schedule


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

    A preset brings its own aggregation; otherwise it is `loss.aggregation`. Raises ValueError for an unknown rule,
    preset or schedule, naming the nearest.
    """
    entropy = config.entropy
    if entropy.preset is not None:
        preset = rules.preset(entropy.preset)
        rule, aggregation = preset.rule, preset.aggregation
    else:
        options: dict[str, dict[str, object]] = {
            "soft": {"gamma": entropy.gamma},
            "first_order": {"level": entropy.level},
            "budget": {"level": entropy.level},
        }
        name = entropy.rule if entropy.rule is not None else "none"
        rule, aggregation = rules.build(name, **options.get(name, {})), config.loss.aggregation
    controller = EntropyController(
        build_schedule(entropy.schedule, config.optimizer.steps),
        rule,
        width=entropy.width,
        seed=config.seed,
        warmup_steps=entropy.warmup_steps,
        min_kept_fraction=entropy.min_kept_fraction,
        min_groups=entropy.min_groups,
        vocab_size=vocab_size,
    )
    return controller, aggregation
