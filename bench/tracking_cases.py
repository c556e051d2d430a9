"""What the entropy-tracking benchmark runs: every method, on curves if it seeks a target, in two regimes, on two tasks.

A case is a configuration of the trainer and nothing else; what its name says stands here in full.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import addition_task

from entrocraft.schedules import Schedule, constant, cosine, join, linear, measured, oscillate
from entrocraft.train.warm_start import SUMS, Lessons, write_problems

# Nats between the measured start and the end of a falling curve, as a share of the start.
FALL = 0.55
STEP = 0.3  # nats: the height of the step down and up
WAVE = 0.1  # nats: the amplitude of the oscillation


def level(steps: int) -> Schedule:
    """The measured entropy, throughout."""
    return measured(constant)


def line(steps: int) -> Schedule:
    """From the measured entropy straight down."""
    return measured(lambda entropy: linear(entropy, (1 - FALL) * entropy, steps))


def half_cosine(steps: int) -> Schedule:
    """The same fall along half a cosine."""
    return measured(lambda entropy: cosine(entropy, (1 - FALL) * entropy, steps))


def step_down_up(steps: int) -> Schedule:
    """Level, 0.3 nats lower for the middle third, and back."""
    third = steps // 3
    return measured(
        lambda entropy: join([constant(value) for value in (entropy, entropy - STEP, entropy)], [third, 2 * third])
    )


def wave(steps: int) -> Schedule:
    """Three waves around a straight line that falls half as far."""
    return measured(
        lambda entropy: oscillate(linear(entropy, (1 - FALL / 2) * entropy, steps), amplitude=WAVE, period=steps / 3)
    )


def too_high(steps: int) -> Schedule:
    """A constant half above what the model has: the failure case of arXiv 2604.26326, App. C.5."""
    return measured(lambda entropy: constant(1.5 * entropy))


SCHEDULES = {one.__name__: one for one in (line, half_cosine, step_down_up, wave, level, too_high)}


class Regime(NamedTuple):
    """How a step's rollouts are used. The rollouts themselves, their number and their length, are the same in both."""

    passes: int
    updates: int
    lr: float
    steps: int


REGIMES = {"one_pass": Regime(1, 1, 5e-4, 150), "reused": Regime(2, 4, 1.5e-4, 100)}


class Task(NamedTuple):
    """What is learnt: problems and warm start, the curves asked for, and settings on top of the demo's file."""

    lessons: Lessons
    write_problems: Callable[[Path], tuple[Path, Path]]
    schedules: dict[str, Callable[[int], Schedule]]
    regimes: dict[str, Regime]
    digits: int  # decimals of a tracking error in the tables
    settings: tuple[str, ...] = ()


TASKS = {
    "sums": Task(SUMS, write_problems, SCHEDULES, REGIMES, 3),
    # A tenth of the entropy a token, so the band of the sign rules is a quarter as wide. Four times the tokens a step,
    # hence fewer steps; the learning rates are those that end the uncontrolled policy near the end of the curves.
    "addition": Task(
        addition_task.LESSONS,
        addition_task.write_problems,
        {one.__name__: one for one in (addition_task.line, addition_task.half_cosine)},
        {"one_pass": Regime(1, 1, 1e-4, 80), "reused": Regime(2, 4, 5e-5, 50)},
        4,
        (
            "--reward.name=addition_task:score",
            "--sampling.max_response_tokens=36",
            "--entropy.width=0.005",
        ),
    ),
}

_SIGNED = ("--reward.signed=true",)
_WIDTH = "--entropy.width=0.02"
# A published rule has no guards and nothing that lets go; its first two versions average as their source does.
_NO_GUARDS = (
    *("--entropy.min_kept_fraction=0", "--entropy.min_authority=0", "--entropy.min_groups=0"),
    "--entropy.release=false",
)
_PUBLISHED = (_WIDTH, *_NO_GUARDS)

# Methods that seek a target: run on every curve. The published ones have the constants of their sources, most of them
# set for large models; `_wide` is one with the box of its coefficient, or its rate, opened for this small one.
TARGETED: dict[str, tuple[str, ...]] = {
    "soft": ("--entropy.rule=null", "--entropy.preset=paper_v1", *_PUBLISHED),
    "soft_expected": ("--entropy.rule=soft_expected", *_PUBLISHED),
    "hard": ("--entropy.rule=null", "--entropy.preset=paper_v2", *_PUBLISHED),
    "switch": ("--entropy.rule=switch", *_PUBLISHED, *_SIGNED),
    "first_order": ("--entropy.rule=first_order", _WIDTH),
    "first_order_token": ("--entropy.rule=first_order", "--entropy.level=token", _WIDTH),
    "budget": ("--entropy.rule=budget",),
    "budget_token": ("--entropy.rule=budget", "--entropy.level=token"),
    "budget_weighed": ("--entropy.rule=budget", "--entropy.level=token", "--entropy.rule_options={max_weight: 4}"),
    "entropic": ("--loss.method=entropic",),
    "entropic_parity": ("--loss.method=entropic_parity", "--loss.advantage=reinforce", *_SIGNED),
    "adaptive_bonus": ("--loss.method=adaptive_bonus",),
    "adaptive_bonus_wide": ("--loss.method=adaptive_bonus", "--loss.method_options={delta: 0.04}"),
    "aent": ("--loss.method=aent", "--loss.method_options={low: null, high: null}"),
    "aent_wide": (
        "--loss.method=aent",
        "--loss.method_options={low: null, high: null, rate: 0.05, minimum: 0, maximum: 1}",
    ),
    "repo_r": ("--loss.method=repo_r",),
    "repo_r_wide": ("--loss.method=repo_r", "--loss.method_options={maximum: 2}"),
    "polarity": ("--loss.method=polarity",),
    "adaptive_clip": ("--loss.method=adaptive_clip",),
    "adaptive_clip_wide": ("--loss.method=adaptive_clip", "--loss.method_options={minimum: 0.01, maximum: 5}"),
}
# Of these, this project's; the others are published.
OWN = ("soft_expected", "first_order", "first_order_token", "budget", "budget_token", "budget_weighed")
# Published in outline: the form of the one and the constants of both are this project's, as their docstrings say.
OWN_FORM = ("polarity", "adaptive_clip", "adaptive_clip_wide")
# Forms of this project's rules that were tried on falling curves, run where they are asked for by name.
VARIANTS: dict[str, tuple[str, ...]] = {
    "try_per_token": ("--entropy.rule=budget_variants:per_token",),
    "try_fractional": ("--entropy.rule=budget_variants:fractional",),
    "try_dead_band": ("--entropy.rule=budget_variants:dead_band", "--entropy.width=0.01"),
    "try_shuffled": ("--entropy.rule=budget_variants:shuffled",),
    "try_by_group": ("--entropy.rule=budget_variants:by_group",),
    "try_all_or_nothing": ("--entropy.rule=budget_variants:all_or_nothing",),
    "try_narrow": ("--entropy.rule=first_order", "--entropy.level=token", "--entropy.width=0.01"),
    "try_group_scale": ("--entropy.rule=group_scale", "--entropy.rule_options={rule: {name: budget, level: token}}"),
    "try_refill": ("--entropy.rule=budget", "--entropy.level=token", "--refill.zero_variance=refill"),
}
# The targeted ones that leave the advantage to the user, with another than the demo's GRPO; as the variants, by name.
WITH_RLOO: dict[str, tuple[str, ...]] = {
    f"rloo_{name}": (*settings, "--loss.advantage=rloo")
    for name, settings in TARGETED.items()
    if not any(setting.startswith(("--loss.advantage=", "--reward.signed=")) for setting in settings)
}
# Methods without a target: run once a regime and seed, and shown against the falling line that they do not see.
FREE: dict[str, tuple[str, ...]] = {
    "none": (),
    "dr_grpo": ("--loss.advantage=dr_grpo", "--loss.aggregation=fixed"),
    "rloo": ("--loss.advantage=rloo",),
    "opo": ("--loss.advantage=opo",),
    "reinforce": ("--loss.advantage=reinforce", *_SIGNED),
    "reinforce_pp": ("--loss.advantage=reinforce_pp",),
    "reinforce_pp_baseline": ("--loss.advantage=reinforce_pp_baseline",),
    "raft": ("--loss.advantage=raft", "--loss.policy=gpg"),
    "raft_pp": ("--loss.advantage=raft_pp",),
    "reinforce_rej": ("--loss.advantage=reinforce_rej", *_SIGNED),
    "psr": ("--loss.advantage=psr",),
    "nsr": ("--loss.advantage=nsr",),
    "nsr_parity": ("--loss.advantage=nsr_parity",),
    "w_reinforce": ("--loss.advantage=w_reinforce",),
    "entropy_bonus": ("--loss.method=entropy_bonus",),
    "unclipped": ("--loss.policy=unclipped",),
    "clip_higher": ("--loss.clip_high=0.28",),
    "gspo": ("--loss.policy=gspo", "--loss.aggregation=seq_mean_token_mean"),
    "cispo": ("--loss.policy=cispo",),
    "geo_mean": ("--loss.policy=geo_mean", "--loss.aggregation=seq_mean_token_mean"),
    "sapo": ("--loss.policy=sapo", "--loss.aggregation=seq_mean_token_mean"),
    "clip_cov": ("--loss.method=clip_cov", "--loss.clip_low=1.0", "--loss.clip_high=1.0", "--loss.dual_clip=10.0"),
    "kl_cov": ("--loss.method=kl_cov",),
    "clip_b": ("--loss.method=clip_b",),
    "clip_v": ("--loss.method=clip_v",),
    "repo": ("--loss.method=repo",),
    "probability_clip": ("--loss.policy=probability_clip",),
    "flexible_id": ("--loss.method=flexible_clip", "--loss.method_options={schedule: id}"),
    "flexible_did": ("--loss.method=flexible_clip", "--loss.method_options={schedule: did}"),
    "flexible_od": ("--loss.method=flexible_clip", "--loss.method_options={schedule: od}"),
}


class Case(NamedTuple):
    """One run."""

    method: str
    schedule: str
    regime: str
    seed: int
    task: str = "sums"

    @property
    def name(self) -> str:
        """The run's folder, and its key in the results."""
        task = "" if self.task == "sums" else f"{self.task}-"
        return f"{task}{self.method}-{self.schedule}-{self.regime}-seed{self.seed}"

    def overrides(self, steps: int | None = None) -> list[str]:
        """Settings on top of the demo's file; `steps` in place of the regime's."""
        task = TASKS[self.task]
        regime, schedule = task.regimes[self.regime], task.schedules[self.schedule]
        arguments = (FREE | TARGETED | VARIANTS | WITH_RLOO)[self.method]
        rule = [] if any(a.startswith("--entropy.rule=") for a in arguments) else ["--entropy.rule=none"]
        return [
            f"--seed={self.seed}",
            f"--optimizer.steps={steps or regime.steps}",
            f"--optimizer.lr={regime.lr}",
            f"--batch.updates_per_step={regime.updates}",
            f"--loss.passes={regime.passes}",
            f"--entropy.schedule.kind={schedule.__module__}:{self.schedule}",
            "--evaluation.every=0",
            "--checkpoint.every=100000",
            "--logging.report=false",
            *rule,
            *arguments,
            *task.settings,
        ]


def grid(
    methods: list[str] | None = None,
    schedules: list[str] | None = None,
    regimes: list[str] | None = None,
    seeds: tuple[int, ...] = (1, 2, 3),
    task: str = "sums",
) -> list[Case]:
    """All cases of a task, those first that say most: a seed is whole before the next, and a curve before the next.

    Raises ValueError for a schedule or regime the task does not have.
    """
    for what, asked, there in (
        ("schedules", schedules, TASKS[task].schedules),
        ("regimes", regimes, TASKS[task].regimes),
    ):
        if unknown := [name for name in asked or [] if name not in there]:
            raise ValueError(f"{what} {unknown}: the task {task!r} has {sorted(there)}; leave the others out")
    wanted = methods or [*FREE, *TARGETED]
    cases = []
    for seed in seeds:
        for schedule in schedules or list(TASKS[task].schedules):
            for regime in regimes or list(TASKS[task].regimes):
                for method in wanted:
                    if method not in FREE or schedule == "line":
                        cases.append(Case(method, schedule, regime, seed, task))
    return cases
