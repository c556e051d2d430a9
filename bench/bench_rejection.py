"""What a controller's decision costs, by rule: the statistics of a step in, the tokens to keep out.

    pytest bench/bench_rejection.py

There is no rival: no other trainer predicts what a rollout does to the entropy. Milliseconds here stand beside the
seconds of an update. Checked first, at R = 64: what `none`, `hard`, `first_order` and `budget` keep, against a decision
computed in fp64 by automatic differentiation of the entropy. Of `soft`, which draws, and of the larger step only the
counts are checked.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from suite_contest import CLOCK, Contender, Measured, compete, record

from entrocraft import Decision, EntropyController, TokenStats, schedules

RULES = ("none", "hard", "soft", "first_order", "budget")
GROUP = 8  # rollouts of a prompt
GAIN = 80.0  # with which both steps can reach their target: `budget` has a choice to make
CHECKED = 64  # most rollouts whose decision is computed a second time


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark a rule, at two sizes."""
    cases = [(*size, rule) for size in ((64, 64), (512, 256)) for rule in RULES]
    metafunc.parametrize(("rollouts", "length", "rule"), cases, ids=[f"R{r}-L{n}-{rule}" for r, n, rule in cases])


def make_step(rollouts: int, length: int) -> dict[str, Any]:
    """One step's statistics: entropies of 0 to 0.7 nats, with the collision sums that belong to them."""
    generator = torch.Generator().manual_seed(rollouts)
    length_R = torch.randint(1, 2 * length, (rollouts,), generator=generator)
    T = int(length_R.sum())
    # Two tokens share the mass: p and 1 - p, of which everything follows in closed form.
    p_T = 0.5 + 0.499 * torch.rand(T, generator=generator)
    taken_T = torch.where(torch.rand(T, generator=generator) < p_T, p_T, 1 - p_T)
    pair_2T = torch.stack([p_T, 1 - p_T])
    stats = TokenStats(
        logprob_T=taken_T.log(), lse_T=torch.zeros(T), entropy_T=-(pair_2T * pair_2T.log()).sum(0),
        p2_T=pair_2T.square().sum(0), p2logp_T=(pair_2T.square() * pair_2T.log()).sum(0),
    )  # fmt: skip
    return {
        "step": 1,
        "stats": stats,
        "rollout_T": torch.arange(rollouts).repeat_interleave(length_R),
        "group_R": torch.arange(rollouts) // GROUP,
        "advantage_R": torch.randn(rollouts, generator=generator),
    }


def exact_changes(step: dict[str, Any]) -> torch.Tensor:
    """Entropy change of each rollout for a unit step of plain policy gradient, in fp64, to first order.

    A row has two tokens with logits log p and log(1 - p). A step on -A / T log p_y moves its logits by
    A / T (1[y] - p); the entropy's gradient is automatic differentiation's.
    """
    stats, rollout_T = step["stats"], step["rollout_T"]
    p_T = stats.logprob_T.double().exp()
    logit_T2 = torch.stack([p_T, 1 - p_T], 1).log().requires_grad_()
    logp_T2 = logit_T2.log_softmax(1)
    (slope_T2,) = torch.autograd.grad(-(logp_T2.exp() * logp_T2).sum(), logit_T2)
    moved_T2 = torch.tensor([1.0, 0.0], dtype=torch.float64) - logp_T2.detach().exp()
    advantage_T = step["advantage_R"].double()[rollout_T]
    change_T = advantage_T / len(p_T) * (slope_T2 * moved_T2).sum(1)
    return torch.zeros(len(step["advantage_R"]), dtype=torch.float64).index_add_(0, rollout_T, change_T)


def exact_keep(rule: str, step: dict[str, Any], target: float) -> torch.Tensor | None:
    """What a rule keeps of a step above its band, bool [R], one rollout after the other; None for one that draws."""
    advantage_R, change_R = step["advantage_R"], exact_changes(step)
    keep_R = torch.ones(len(advantage_R), dtype=torch.bool)
    if rule == "soft":
        return None
    if rule == "hard":
        return advantage_R >= 0
    if rule == "first_order":
        return change_R <= 0
    if rule == "budget":  # the entropy is to fall: what raises it most goes first, until the rest falls far enough
        want = (target - float(step["stats"].entropy_T.double().mean())) / GAIN
        for index in change_R.argsort(descending=True).tolist():
            if float(change_R[keep_R].sum()) <= want or change_R[index] <= 0:
                break
            keep_R[index] = False
    return keep_R


@functools.lru_cache(maxsize=1)
def group(rollouts: int, length: int, rounds: int) -> dict[str, Measured | str]:
    """All rules on one step whose entropy lies above the schedule."""
    step = make_step(rollouts, length)
    target = float(step["stats"].entropy_T.mean()) - 0.2

    def decide(rule: str) -> tuple[torch.Tensor, torch.Tensor, Decision]:
        decision = EntropyController(schedules.constant(target), rule, release=None, initial_gain=GAIN).decide(**step)
        return decision.keep_R, decision.keep_T, decision

    def errors(rule: str, made: tuple[torch.Tensor, torch.Tensor, Decision]) -> dict[str, float]:
        keep_R, keep_T, decision = made
        wrong = {"counted": abs(decision.metrics["kept_fraction"] - float(keep_R.double().mean()))}
        wrong["tokens"] = float((keep_T != keep_R[step["rollout_T"]]).double().mean())
        exact_R = exact_keep(rule, step, target) if rollouts <= CHECKED else None
        if exact_R is not None:
            wrong["decision"] = float((keep_R != exact_R).double().mean())
        return wrong

    bounds = {"counted": 1e-6, "tokens": 0.0, "decision": 0.0}
    field = {
        rule: Contender(
            functools.partial(_tensors, decide, rule),
            f"initial_gain {GAIN:g}, no release",
            functools.partial(_checked, decide, errors, rule),
            bounds,
        )
        for rule in RULES
    }
    return compete(field, "cpu", rounds, ours=RULES)


def _tensors(decide: Any, rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    return decide(rule)[:2]


def _checked(decide: Any, errors: Any, rule: str, made: Any) -> dict[str, float]:
    return errors(rule, (*made, decide(rule)[2]))


@pytest.mark.benchmark(timer=CLOCK)
def bench_decision(request: pytest.FixtureRequest, benchmark: Any, rollouts: int, length: int, rule: str) -> None:
    """One decision; the controller lives on the CPU whatever the model lives on."""
    found = group(rollouts, length, 1 if benchmark.disabled else request.config.getoption("bench_rounds"))
    benchmark.group = f"decision R={rollouts} L={length}"
    record(benchmark, found[rule], job="decision", data="two tokens share the mass", rollouts=rollouts, length=length)
