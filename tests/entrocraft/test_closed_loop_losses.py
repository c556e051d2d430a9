"""Closed loops with other losses and advantages: GSPO and RLOO beside GRPO, one pass and clipped batches used again.

The policy is a softmax over a linear function of features: a row of its own for every prompt and position, and four
directions that all rows share, so that a mini-batch moves the rows of the others and what is used again is off policy.
One controller steers by the loss that is trained. Nothing is asked of the sign rules.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from entrocraft import Decision, EntropyController, TokenStats, advantages, rules, schedules
from entrocraft.methods import Plain, Tokens, make_objective
from entrocraft.objective import PolicyObjective
from entrocraft.surrogates import build_loss

PROMPTS, SAMPLES, LONGEST, VOCAB, RIGHT, SHARED = 16, 8, 4, 12, 4, 4
STEPS, FALL, STEP_SIZE = 45, 0.3, 40.0

GROUP_R = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
R = len(GROUP_R)
LENGTH_R = (torch.arange(R) % 3) + LONGEST - 2  # rollouts of 2, 3 and 4 tokens
ROLLOUT_T = torch.arange(R).repeat_interleave(LENGTH_R)
ROW_T = GROUP_R[ROLLOUT_T] * LONGEST + torch.cat([torch.arange(length) for length in LENGTH_R.tolist()])
ROWS = PROMPTS * LONGEST


class Recipe(NamedTuple):
    """How rewards become a loss."""

    advantage: str
    loss: str
    aggregation: str


class Regime(NamedTuple):
    """How often a batch is used, in how many mini-batches, and the share of the step size that each update takes."""

    passes: int
    updates: int
    share: float


RECIPES = {
    "grpo": Recipe("grpo", "ppo_clip", "token_mean"),
    "gspo": Recipe("grpo", "gspo", "seq_mean_token_mean"),
    "rloo": Recipe("rloo", "ppo_clip", "token_mean"),
}
REGIMES = {"one pass": Regime(1, 1, 1.0), "reused": Regime(2, 4, 0.25)}


class Run(NamedTuple):
    """Mean, largest and last distance from the target after the first third, nats; share of tokens clipped."""

    mean: float
    worst: float
    last: float
    clipped: float


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are not shared out; a second thread would spin beside the first, five times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Policy:
    """logits = features @ weight, both fp64; `batch` draws a token for each row of the batch."""

    def __init__(self, generator: torch.Generator) -> None:
        shared = 0.3 * torch.randn(ROWS, SHARED, generator=generator, dtype=torch.float64)
        self.feature_TF = torch.cat((torch.eye(ROWS, dtype=torch.float64), shared), 1)[ROW_T]
        own = 0.3 * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
        self.weight_FV = torch.cat((own, torch.zeros(SHARED, VOCAB))).requires_grad_()

    def draw(self, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            return torch.multinomial((self.feature_TF @ self.weight_FV).softmax(-1), 1, generator=generator)[:, 0]

    def score(self, token_T: Tensor, chosen_T: Tensor) -> TokenStats:
        logp_NV = torch.log_softmax(self.feature_TF[chosen_T] @ self.weight_FV, -1)
        p_NV = logp_NV.exp()
        return TokenStats(
            logprob_T=logp_NV.gather(1, token_T[chosen_T, None])[:, 0],
            entropy_T=-(p_NV * logp_NV).sum(-1),
            lse_T=torch.zeros(len(p_NV), dtype=torch.float64),
            p2_T=p_NV.detach().square().sum(-1),
            p2logp_T=(p_NV.square() * logp_NV).detach().sum(-1),
        )

    def descend(self, loss: Tensor, step_size: float) -> None:
        (gradient_FV,) = torch.autograd.grad(loss, self.weight_FV)
        with torch.no_grad():
            self.weight_FV -= step_size * gradient_FV


def _objective(
    recipe: Recipe, stats: TokenStats, advantage_R: Tensor, chosen_R: Tensor, keep_T: Tensor | None
) -> PolicyObjective:
    """The loss of some of the rollouts, drawn under `stats`, as one update."""
    chosen_T = chosen_R[ROLLOUT_T]
    part = stats.index(chosen_T)
    tokens = Tokens(
        stats=part,
        old_logprob_T=part.logprob_T,
        advantage_T=advantage_R[ROLLOUT_T][chosen_T],
        mask_T=torch.ones(len(part), dtype=torch.bool),
        rollout_T=torch.arange(int(chosen_R.sum())).repeat_interleave(LENGTH_R[chosen_R]),
        group_R=GROUP_R[chosen_R],
        keep_T=None if keep_T is None else keep_T[chosen_T],
    )
    return make_objective(Plain(loss_fn=build_loss(recipe.loss)), tokens, {}, aggregation=recipe.aggregation)


def _update(
    policy: Policy, recipe: Recipe, regime: Regime, token_T: Tensor, stats: TokenStats, decision: Decision
) -> float:
    """Descends; returns the share of the kept tokens whose gradient a clip removed."""
    clipped, kept = 0, 0
    for _ in range(regime.passes):
        for groups in torch.arange(PROMPTS).tensor_split(regime.updates):
            chosen_R = torch.isin(GROUP_R, groups)
            objective = _objective(recipe, stats, decision.advantage_R, chosen_R, decision.keep_T)
            now = policy.score(token_T, chosen_R[ROLLOUT_T])
            loss = objective(now.logprob_T, now.entropy_T, slice(0, len(now)))
            clipped += sum(int(flag_N.sum()) for flag_N in objective.clipped(now.logprob_T.detach()).values())
            kept += int((objective.weight_T != 0).sum())
            policy.descend(loss, STEP_SIZE * regime.share)
    return clipped / kept


def _run(name: str, regime: str, rule: rules.Rule, seed: int = 0) -> Run:
    """What a loop comes to after its first third."""
    recipe, generator = RECIPES[name], torch.Generator().manual_seed(seed)
    right = torch.rand(ROWS, VOCAB, generator=generator).argsort(-1) < RIGHT
    policy, estimate = Policy(generator), advantages.build(recipe.advantage)
    falling = schedules.measured(lambda entropy: schedules.linear(entropy, (1.0 - FALL) * entropy, STEPS))
    controller = EntropyController(falling, rule, width=0.02)
    everyone_R, errors, clipped = torch.ones(R, dtype=torch.bool), [], []
    for step in range(STEPS):
        token_T = policy.draw(generator)
        stats = policy.score(token_T, everyone_R[ROLLOUT_T]).detach()
        misses_R = torch.zeros(R).index_add(0, ROLLOUT_T, (~right[ROW_T, token_T]).float())
        advantage_R = estimate(torch.where(misses_R <= 1, 1.0, -1.0), GROUP_R)
        whole = _objective(recipe, stats, advantage_R, everyone_R, None)
        decision = controller.decide(
            step=step,
            stats=stats,
            rollout_T=ROLLOUT_T,
            group_R=GROUP_R,
            advantage_R=advantage_R,
            loss_fn=lambda logprob_T, whole=whole, stats=stats: whole(logprob_T, stats.entropy_T, slice(0, len(stats))),
        )
        errors.append(decision.metrics["error"])
        clipped.append(_update(policy, recipe, REGIMES[regime], token_T, stats, decision))
    settled = errors[STEPS // 3 :]
    sizes = [abs(error) for error in settled]
    return Run(sum(sizes) / len(sizes), max(sizes), settled[-1], sum(clipped) / STEPS)


LOOPS = [(name, regime) for name in RECIPES for regime in REGIMES]


@pytest.mark.parametrize(("name", "regime"), LOOPS)
def test_without_control_the_entropy_falls_far_below_the_curve(name: str, regime: str) -> None:
    run = _run(name, regime, rules.none())
    assert run.mean > 0.15
    assert run.last < -0.2
    # One pass is on policy and has nothing to clip; what is used again has, if less than GSPO, whose clips are narrow.
    if regime == "one pass":
        assert run.clipped == 0.0
    else:
        assert run.clipped > (0.2 if name == "gspo" else 0.01)


@pytest.mark.parametrize("level", rules.LEVELS)
@pytest.mark.parametrize(("name", "regime"), LOOPS)
def test_budget_follows_the_falling_curve(name: str, regime: str, level: str) -> None:
    run = _run(name, regime, rules.budget(level=level))
    assert run.mean < 0.02
    assert run.worst < 0.06


@pytest.mark.parametrize("level", rules.LEVELS)
@pytest.mark.parametrize(("name", "regime"), LOOPS)
def test_first_order_follows_the_falling_curve(name: str, regime: str, level: str) -> None:
    run = _run(name, regime, rules.first_order(level=level))
    assert run.mean < 0.08
    assert run.worst < 0.2
