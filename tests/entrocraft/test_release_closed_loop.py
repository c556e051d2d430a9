"""The release in a closed loop: policies that control would destroy, and one that it leads along a falling curve."""

from collections.abc import Callable

import pytest
import torch

from entrocraft import (
    EntropyController,
    EntropyScheduleWarning,
    TokenStats,
    advantages,
    rules,
    schedules,
    token_weights,
)
from entrocraft.release import Release
from entrocraft.rules import Rule
from entrocraft.schedules import Schedule

# One right answer a prompt, a chain of eight tokens that must all be right: a wrong one makes pushing down the right
# ones beside it look like a cheap way to raise entropy, and it is a way to lose the policy.
PROMPTS, SAMPLES, LENGTH, VOCAB, STEPS, STEP_SIZE = 8, 8, 8, 6, 90, 80.0
GROUP_R = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
ROLLOUT_T = torch.arange(len(GROUP_R)).repeat_interleave(LENGTH)
ROW_T = GROUP_R[ROLLOUT_T] * LENGTH + torch.arange(LENGTH).repeat(len(GROUP_R))
MASK_T = torch.ones(len(ROLLOUT_T), dtype=torch.bool)


def _loop(
    rule: Rule,
    schedule: Callable[[float], Schedule],
    release: Release | None,
    *,
    wrong: float = 0.0,
    steps: int = STEPS,
) -> tuple[float, list[float]]:
    """Train a tabular policy; the chance of a right answer at the end, and at each step whether control had let go."""
    generator = torch.Generator().manual_seed(0)
    logits = 0.7 * torch.randn(PROMPTS * LENGTH, VOCAB, generator=generator, dtype=torch.float64)
    logits[:, 0] += 3.5  # token 0 is the right one
    controller = EntropyController(schedules.measured(schedule), rule, width=0.02, release=release)
    released = []
    for step in range(steps):
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
        right_R = (token_T.view(-1, LENGTH) == 0).all(-1)
        reward_R = torch.where(right_R, 1.0, wrong).double()
        advantage_R = advantages.grpo(right_R.double(), GROUP_R)
        decision = controller.decide(
            step=step, stats=stats, rollout_T=ROLLOUT_T, group_R=GROUP_R, advantage_R=advantage_R, reward_R=reward_R
        )
        released.append(decision.metrics["released"])
        weight_T = token_weights(ROLLOUT_T, MASK_T, GROUP_R, aggregation="token_mean", keep_T=decision.keep_T)
        push_T = weight_T.double() * decision.advantage_R[ROLLOUT_T]
        score_TV = torch.nn.functional.one_hot(token_T, VOCAB) - p_TV
        logits = logits.index_add(0, ROW_T, STEP_SIZE * push_T[:, None] * score_TV)
    right = torch.log_softmax(logits, -1)[:, 0].view(PROMPTS, LENGTH).sum(-1).exp()
    return float(right.mean()), released


def _double(entropy: float) -> Schedule:
    return schedules.constant(2.0 * entropy)


def _falling(entropy: float) -> Schedule:
    return schedules.linear(entropy, 0.3 * entropy, STEPS)


def _too_high_for_a_while(entropy: float) -> Schedule:
    return schedules.join([schedules.constant(2.0 * entropy), schedules.constant(0.3 * entropy)], [60])


@pytest.fixture(scope="module")
def uncontrolled() -> float:
    return _loop(rules.none(), _falling, Release())[0]


@pytest.mark.filterwarnings(f"ignore::{EntropyScheduleWarning.__module__}.{EntropyScheduleWarning.__name__}")
@pytest.mark.parametrize("level", rules.LEVELS)
def test_asked_for_twice_the_entropy_only_the_release_saves_the_policy(level: str, uncontrolled: float) -> None:
    assert uncontrolled > 0.9
    lost, never = _loop(rules.budget(level=level), _double, None)
    assert lost < 0.1
    assert sum(never) == 0
    saved, released = _loop(rules.budget(level=level), _double, Release())
    assert saved > 0.75 * uncontrolled
    first = released.index(1.0)
    assert released == [0.0] * first + [1.0] * (STEPS - first)  # the demand stays, and so it stays let go
    # Rewards of -1 and +1 make no difference.
    if level == "token":
        assert _loop(rules.budget(level=level), _double, Release(), wrong=-1.0, steps=30)[1] == released[:30]


@pytest.mark.filterwarnings(f"ignore::{EntropyScheduleWarning.__module__}.{EntropyScheduleWarning.__name__}")
def test_control_holds_again_once_less_is_asked_for(uncontrolled: float) -> None:
    saved, released = _loop(rules.budget(), _too_high_for_a_while, Release())
    first = released.index(1.0)
    again = released.index(0.0, first)
    assert again >= 59  # the aim of step 59 is the schedule at 60
    assert released[again:] == [0.0] * (STEPS - again)
    assert saved > 0.75 * uncontrolled


@pytest.mark.parametrize("level", rules.LEVELS)
def test_a_curve_that_comes_down_is_followed_to_its_end(level: str) -> None:
    right, released = _loop(rules.budget(level=level), _falling, Release())
    assert sum(released) == 0
    assert right > 0.6
