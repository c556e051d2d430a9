"""A small closed loop: tabular softmax policies, policy gradient on fresh rollouts, one controller.

Every prompt and position has its own row of logits, so the predicted change is exact to first order and what is
left to the controller is the gain. The step is so large that the entropy of the uncontrolled policy falls three
times as far as the schedule. Nothing is asked of the sign rules: on policy and unclipped, positive-only and
negative-only updates have the same expected direction, and they need not control anything.
"""

import pytest
import torch
from torch import Tensor

from entrocraft import EntropyController, TokenStats, advantages, rules, schedules, token_weights
from entrocraft.rules import Rule

PROMPTS, SAMPLES, LENGTH, VOCAB, RIGHT = 16, 8, 3, 12, 4
STEPS, STEP_SIZE = 60, 40.0

GROUP_R = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
ROLLOUT_T = torch.arange(len(GROUP_R)).repeat_interleave(LENGTH)
ROW_T = GROUP_R[ROLLOUT_T] * LENGTH + torch.arange(LENGTH).repeat(len(GROUP_R))
MASK_T = torch.ones(len(ROLLOUT_T), dtype=torch.bool)


def _score(logits: Tensor, generator: torch.Generator) -> tuple[TokenStats, Tensor, Tensor]:
    """Sample a token for each row of the batch; the statistics, the tokens, and the probabilities behind them."""
    logp_TV = torch.log_softmax(logits, -1)[ROW_T]
    p_TV = logp_TV.exp()
    token_T = torch.multinomial(p_TV, 1, generator=generator).squeeze(-1)
    stats = TokenStats(
        logprob_T=logp_TV.gather(1, token_T[:, None]).squeeze(-1),
        entropy_T=-(p_TV * logp_TV).sum(-1),
        lse_T=torch.logsumexp(logits, -1)[ROW_T],
        p2_T=p_TV.square().sum(-1),
        p2logp_T=(p_TV.square() * logp_TV).sum(-1),
    )
    return stats, token_T, p_TV


def _errors(rule: Rule, seed: int, *, end: float = 0.7) -> list[float]:
    """Entropy minus target, nats, at each step after the first third."""
    generator = torch.Generator().manual_seed(seed)
    rows = PROMPTS * LENGTH
    right = torch.rand(rows, VOCAB, generator=generator).argsort(-1) < RIGHT
    logits = 0.3 * torch.randn(rows, VOCAB, generator=generator, dtype=torch.float64)
    schedule = schedules.measured(lambda entropy: schedules.linear(entropy, end * entropy, STEPS))
    controller = EntropyController(schedule, rule, width=0.02)
    errors = []
    for step in range(STEPS):
        stats, token_T, p_TV = _score(logits, generator)
        hits_R = right[ROW_T, token_T].view(-1, LENGTH).sum(-1)
        advantage_R = advantages.grpo(torch.where(hits_R >= LENGTH - 1, 1.0, -1.0), GROUP_R)
        decision = controller.decide(
            step=step, stats=stats, rollout_T=ROLLOUT_T, group_R=GROUP_R, advantage_R=advantage_R
        )
        errors.append(decision.metrics["error"])
        weight_T = token_weights(ROLLOUT_T, MASK_T, GROUP_R, aggregation="token_mean", keep_T=decision.keep_T)
        push_T = weight_T.double() * decision.advantage_R[ROLLOUT_T]
        score_TV = torch.nn.functional.one_hot(token_T, VOCAB) - p_TV
        logits = logits.index_add(0, ROW_T, STEP_SIZE * push_T[:, None] * score_TV)
    return errors[STEPS // 3 :]


def _mean_size(errors: list[float]) -> float:
    return sum(abs(error) for error in errors) / len(errors)


@pytest.mark.parametrize("level", rules.LEVELS)
def test_budget_follows_the_schedule(level: str) -> None:
    errors = _errors(rules.budget(level=level), seed=0)
    assert _mean_size(errors) < 0.005
    assert max(abs(error) for error in errors) < 0.02


@pytest.mark.parametrize("seed", range(8))
def test_budget_holds_a_constant_whatever_the_first_step_taught(seed: int) -> None:
    """The first prediction is next to nothing there, so the first gain is noise, up to a hundred times too large."""
    assert _mean_size(_errors(rules.budget(level="token"), seed, end=1.0)) < 0.005


@pytest.mark.parametrize("level", rules.LEVELS)
def test_first_order_follows_the_schedule(level: str) -> None:
    assert _mean_size(_errors(rules.first_order(level=level), seed=0)) < 0.05


def test_without_control_the_entropy_leaves_the_schedule() -> None:
    errors = _errors(rules.none(), seed=0)
    assert _mean_size(errors) > 0.4
    assert errors[-1] < -0.4
