"""Every rule with every advantage and every loss: what is kept, what is predicted, what is learnt.

One ragged batch in fp64, away from the policy that drew it, with an empty rollout, one of which nothing counts, one
without a verdict, a prompt of one rollout and prompts whose rollouts all agree. The policy losses and the rules are
written out a second time below, in NumPy; slopes are central differences in the logits. What a loss takes for a
constant (GSPO's mean, CISPO's weight) stands still in the differences. Methods that add to PPO's loss, or change what
goes into it, are written out in `test_methods.py`; here their gradient is the slope of their own value.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from entrocraft import (
    EntropyController,
    PolicyObjective,
    TokenStats,
    advantages,
    corrections,
    methods,
    rules,
    schedules,
)
from entrocraft.decision import Decision
from entrocraft.methods import METHODS, Plain, State, Tokens, make_objective
from entrocraft.prediction import predicted_entropy_change
from entrocraft.surrogates import LOSSES, build_loss

V, TEMPERATURE, SHIFT, STEP, SEED, GAIN, H = 7, 0.8, 0.2, 5, 3, 10.0, 1e-6

_DRAW = torch.Generator().manual_seed(23)
GROUP_R = torch.tensor([4] * 6 + [0] * 6 + [9] * 5 + [2] + [7] * 4 + [5] * 4)
_NONE = math.nan  # no verdict
REWARD_R = torch.tensor([1.0, -1, -1, 1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, _NONE, -1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1])
R = len(GROUP_R)
SAMPLE_R = torch.cat([torch.arange(n) for n in (6, 6, 5, 1, 4, 4)])
LENGTH_R = torch.randint(1, 8, (R,), generator=_DRAW)
LENGTH_R[8] = 0
ROLLOUT_T = torch.repeat_interleave(torch.arange(R), LENGTH_R)
ROLLOUT, T = ROLLOUT_T.numpy(), len(ROLLOUT_T)
MASK_T = (torch.rand(T, generator=_DRAW) < 0.85) & (ROLLOUT_T != 13)
LOGITS_TV = 1.5 * torch.randn(T, V, generator=_DRAW, dtype=torch.float64)
TOKEN_T = torch.multinomial(LOGITS_TV.softmax(-1), 1, generator=_DRAW)[:, 0]
# A third of the rollouts on policy, a third within GSPO's narrow clips, a third beyond every clip here and there.
_DRIFT_R = torch.tensor([0.0, 2e-4, 0.5], dtype=torch.float64)[torch.arange(R) % 3]
_NOISE_T = torch.randn(T, generator=_DRAW, dtype=torch.float64)

RULES: dict[str, rules.Rule] = {
    "none": rules.none(),
    "soft": rules.soft(gamma=1.5),
    "soft_expected": rules.soft_expected(gamma=1.5),
    "hard": rules.hard(),
    "switch": rules.switch(),
    "first_order": rules.first_order(),
    "first_order token": rules.first_order(level="token"),
    "budget": rules.budget(),
    "budget token": rules.budget(level="token"),
    "group_scale hard": corrections.group_scale(rule="hard", smooth=False),
    "group_scale soft": corrections.group_scale(rule=rules.soft(gamma=1.5), smooth=False),
    "tempered soft": corrections.tempered(rule=rules.soft(gamma=1.5), kappa=0.5, w_max=3.0),
    "tempered soft_expected": corrections.tempered(rule=rules.soft_expected(gamma=1.5), kappa=0.5, w_max=3.0),
}

# In a state in which each acts, with constants by which it finds tokens to act on in so small a batch.
METHOD_STATES: dict[str, State] = {
    "adaptive_bonus": {"used": 0.2},
    "aent": {"coefficient": 0.2},
    "entropic": {"alpha": 0.5},
    "entropic_parity": {"alpha": 0.5},
    "repo_r": {"zeta": 0.03},
    "polarity": {"phase": 0.7},
    "adaptive_clip": {"clip_high": 5e-5},
    "flexible_clip": {"upper_share": 0.0, "lower_share": 1.0},
}
METHOD_OPTIONS: dict[str, dict[str, float]] = {
    "entropy_bonus": {"coefficient": 0.3},
    "entropic": {"threshold": 0.2},
    "clip_cov": {"fraction": 0.1, "lower": 0.05},
    "kl_cov": {"fraction": 0.2},
    "clip_b": {"mu": 0.3},
    "clip_v": {"mu": 1.0, "most": 0.1},
}
PAID_FOR_ENTROPY = ("entropy_bonus", "adaptive_bonus", "aent")
METHOD_NAMES = [name for name in METHODS if name != "plain"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are not shared out; a second thread would spin beside the first, five times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _stats(logits_TV: Tensor) -> TokenStats:
    logp_TV = torch.log_softmax(logits_TV / TEMPERATURE, -1)
    p_TV = logp_TV.exp()
    return TokenStats(
        logprob_T=logp_TV.gather(1, TOKEN_T[:, None])[:, 0],
        entropy_T=-(p_TV * logp_TV).sum(-1),
        lse_T=torch.logsumexp(logits_TV / TEMPERATURE, -1),
        p2_T=p_TV.square().sum(-1).detach(),
        p2logp_T=(p_TV.square() * logp_TV).sum(-1).detach(),
    )


STATS = _stats(LOGITS_TV)
OLD_T = STATS.logprob_T - _DRIFT_R[ROLLOUT_T] * _NOISE_T
BASE, OLD = STATS.logprob_T.numpy(), OLD_T.numpy()


class Estimate(NamedTuple):
    """Advantages of one estimator, and the tokens that it leaves in the batch."""

    advantage_R: Tensor
    mask_T: Tensor

    @property
    def entropy(self) -> float:
        return float(STATS.entropy_T[self.mask_T].mean())


@cache
def _estimate(name: str) -> Estimate:
    estimator: Any = advantages.build(name)
    counted_R = torch.bincount(ROLLOUT_T[MASK_T], minlength=R)
    advantage_R = estimator(REWARD_R, GROUP_R, counted_R)
    member_R = advantages.members(estimator, REWARD_R, GROUP_R)
    return Estimate(advantage_R, MASK_T if member_R is None else MASK_T & member_R[ROLLOUT_T])


def _objective(
    loss: str, advantage_R: Tensor, mask_T: Tensor, keep_T: Tensor | None, aggregation: str = "token_mean"
) -> PolicyObjective:
    tokens = Tokens(
        stats=STATS, old_logprob_T=OLD_T, advantage_T=advantage_R[ROLLOUT_T], mask_T=mask_T, rollout_T=ROLLOUT_T,
        group_R=GROUP_R, keep_T=keep_T,
    )  # fmt: skip
    if loss in LOSSES:
        return make_objective(Plain(loss_fn=build_loss(loss)), tokens, {}, aggregation=aggregation)
    method = methods.build(loss, **METHOD_OPTIONS.get(loss, {}))
    return make_objective(method, tokens, METHOD_STATES.get(loss, {}), aggregation=aggregation)


def _everything(loss: str, estimate: Estimate) -> Callable[[Tensor], Tensor]:
    """The scalar loss of the whole batch with everything kept, as a function of the log-probabilities."""
    objective = _objective(loss, estimate.advantage_R, estimate.mask_T, None)
    return lambda logprob_T: objective(logprob_T, STATS.entropy_T, slice(0, T))


@cache
def _decision(loss: str, advantage: str, rule: str, direction: int) -> Decision:
    estimate = _estimate(advantage)
    schedule = schedules.constant(estimate.entropy - SHIFT * direction)
    controller = EntropyController(
        schedule, RULES[rule], seed=SEED, width=0.02, initial_gain=GAIN,
        min_kept_fraction=0.0, min_groups=0, min_authority=0.0,
    )  # fmt: skip
    decision = controller.decide(
        step=STEP, stats=STATS, rollout_T=ROLLOUT_T, group_R=GROUP_R, advantage_R=estimate.advantage_R,
        reward_R=REWARD_R, mask_T=estimate.mask_T, sample_R=SAMPLE_R, loss_fn=_everything(loss, estimate),
        temperature=TEMPERATURE,
    )  # fmt: skip
    assert decision.direction == direction
    return decision


def _asked() -> Iterator[tuple[str, int]]:
    """Advantage and direction; inside the band, where the sign rules do nothing, with one advantage."""
    for advantage in advantages.ADVANTAGES:
        yield from ((advantage, direction) for direction in (-1, 1))
    yield "grpo", 0


def _combinations(loss: str) -> Iterator[tuple[str, str, int, Decision]]:
    for advantage, direction in _asked():
        for rule in RULES:
            yield advantage, rule, direction, _decision(loss, advantage, rule, direction)


# The losses once more.


def _sequence_mean(value_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    mean_T = np.zeros(T)
    for r in range(R):
        mine_T = np.equal(ROLLOUT, r)
        if (mine_T & mask_T).any():
            mean_T[mine_T] = value_T[mine_T & mask_T].mean()
    return mean_T


def _clipped(ratio: np.ndarray, a_T: np.ndarray, low: Any, high: Any) -> np.ndarray:
    return np.where(a_T > 0, -np.minimum(ratio, high) * a_T, -np.maximum(ratio, low) * a_T)


def _ppo(logp: np.ndarray, a_T: np.ndarray, high: float) -> np.ndarray:
    loss = _clipped(np.exp(logp - OLD), a_T, 0.8, high)
    return np.where(a_T < 0, np.minimum(loss, -3.0 * a_T), loss)


def _gspo(logp: np.ndarray, a_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    ratio = np.exp(_sequence_mean(BASE - OLD, mask_T) + logp - BASE)
    return _clipped(ratio, a_T, 1 - 3e-4, 1 + 4e-4)


def _geo_mean(logp: np.ndarray, a_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    def bounded(value: np.ndarray) -> np.ndarray:
        return np.where(a_T > 0, np.minimum(value - OLD, 0.4), np.maximum(value - OLD, -0.4))

    return -np.exp(_sequence_mean(bounded(BASE), mask_T) + bounded(logp) - bounded(BASE)) * a_T


def _sapo(logp: np.ndarray, a_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    tau_T = np.where(a_T > 0, 1.0, 1.05)
    return -4.0 * a_T / tau_T / (1.0 + np.exp(-tau_T * (np.exp(logp - OLD) - 1.0)))


def _probability_clip(logp: np.ndarray, a_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    p_T = np.exp(OLD)
    return _clipped(np.exp(logp - OLD), a_T, 0.7 / (1.0 - 0.13 * p_T), 1.5 / (1.0 + 0.25 * p_T))


WRITTEN_OUT: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "ppo_clip": lambda logp, a_T, mask_T: _ppo(logp, a_T, 1.2),
    "clip_higher": lambda logp, a_T, mask_T: _ppo(logp, a_T, 1.28),
    "unclipped": lambda logp, a_T, mask_T: -np.exp(logp - OLD) * a_T,
    "gspo": _gspo,
    "cispo": lambda logp, a_T, mask_T: -np.minimum(np.exp(BASE - OLD), 1.2) * a_T * logp,
    "geo_mean": _geo_mean,
    "sapo": _sapo,
    "gpg": lambda logp, a_T, mask_T: -a_T * logp,
    "probability_clip": _probability_clip,
}


def _nudged() -> tuple[np.ndarray, np.ndarray]:
    """Log-probability and entropy of each token, `[2, V, T]`, with one logit of its row H lower and H higher."""
    logits = LOGITS_TV.numpy() + np.array([-H, H])[:, None, None, None] * np.eye(V)[None, :, None, :]
    logits = logits / TEMPERATURE
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logp[..., np.arange(T), TOKEN_T.numpy()], -(np.exp(logp) * logp).sum(-1)


NUDGED_LOGP, NUDGED_ENTROPY = _nudged()


def _slope(value: np.ndarray) -> np.ndarray:
    """`[T, V]`: central difference of each token's value in each logit of its row."""
    return ((value[1] - value[0]) / (2 * H)).T


ENTROPY_SLOPE_TV = _slope(NUDGED_ENTROPY)


def _loss_slope(loss: str, advantage_R: Tensor, mask_T: Tensor, keep_T: Tensor) -> np.ndarray:
    """Of the token mean of the loss written out, `[T, V]`."""
    a_T, counted = advantage_R.double().numpy()[ROLLOUT], mask_T.numpy()
    weight_T = counted * keep_T.numpy() / counted.sum()
    return weight_T[:, None] * _slope(WRITTEN_OUT[loss](NUDGED_LOGP, a_T, counted))


# The rules once more.


class Case(NamedTuple):
    """What a rule is asked, as it is needed to answer by hand; NumPy, A and D as in `rules`."""

    m: int
    a_R: np.ndarray
    change_T: np.ndarray
    change_R: np.ndarray
    want: float
    counted_T: np.ndarray

    def chance_R(self, gamma: float) -> np.ndarray:
        return np.exp(np.maximum(np.minimum(gamma * self.m * self.a_R, 0.0), -50.0))

    def drawn_R(self, gamma: float) -> np.ndarray:
        names = zip(GROUP_R.tolist(), SAMPLE_R.tolist(), self.chance_R(gamma).tolist(), strict=True)
        return np.array([chance == 1.0 or rules.uniform(SEED, STEP, g, s) <= chance for g, s, chance in names])

    def fewest(self, change_N: np.ndarray, order: list[tuple[int, ...]]) -> np.ndarray:
        """Drop the worst, one at a time, until what is left meets the want or nothing of the wrong sign is left."""
        total = math.fsum(self.change_R)
        up = 1.0 if total < self.want else -1.0
        harm = (-up * change_N).tolist()
        keep = np.ones(len(harm), dtype=bool)
        for k in sorted(range(len(harm)), key=lambda k: (-harm[k], order[k])):
            if up * total >= up * self.want or harm[k] <= 0:
                break
            keep[k] = False
            total += up * harm[k]
        return keep

    def scale_R(self, passes_R: np.ndarray) -> np.ndarray:
        """c_x of every rollout, unsmoothed and at most 4; 1 where a prompt has no advantage, 0 where none passes."""
        scale_R = np.ones(R)
        for group in GROUP_R.unique().tolist():
            mine_R = GROUP_R.numpy() == group
            full, passed = (self.a_R**2)[mine_R].sum(), (passes_R * self.a_R**2)[mine_R].sum()
            if full > 0:
                scale_R[mine_R] = min(4.0, full / passed) if passed > 0 else 0.0
        return scale_R


def _verdict(rule: str, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """By the rule's definition: what is kept, a flag for each token or for each rollout, and the advantages."""
    m, a_R, everything_R, agrees_R = case.m, case.a_R, np.ones(R, dtype=bool), case.m * case.a_R >= 0
    names = list(zip(GROUP_R.tolist(), SAMPLE_R.tolist(), strict=True))
    raw_R, chance_R = REWARD_R.nan_to_num(0.0).double().numpy(), case.chance_R(1.5)
    tempered_R = np.minimum(chance_R**-0.5, 3.0)
    definitions: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "none": lambda: (everything_R, a_R),
        "soft": lambda: (case.drawn_R(1.5), a_R),
        "soft_expected": lambda: (everything_R, a_R * chance_R),
        "hard": lambda: (agrees_R, a_R),
        "switch": lambda: (everything_R, np.where(m * raw_R > 0, raw_R, 0.0) if m else a_R),
        "first_order": lambda: (m * case.change_R <= 0, a_R),
        "first_order token": lambda: (m * case.change_T <= 0, a_R),
        "budget": lambda: (case.fewest(case.change_R, names), a_R),
        "budget token": lambda: (case.fewest(case.change_T, [(*names[r], t) for t, r in enumerate(ROLLOUT)]), a_R),
        "group_scale hard": lambda: (agrees_R, a_R * case.scale_R(agrees_R)),
        "group_scale soft": lambda: (case.drawn_R(1.5), a_R * case.scale_R(chance_R)),
        "tempered soft": lambda: ((keep_R := case.drawn_R(1.5)), a_R * keep_R * tempered_R),
        "tempered soft_expected": lambda: (everything_R, a_R * chance_R * tempered_R),
    }
    return definitions[rule]()


def _case(loss: str, advantage: str, direction: int) -> Case:
    estimate = _estimate(advantage)
    change_T = predicted_entropy_change(STATS, _everything(loss, estimate), temperature=TEMPERATURE).numpy()
    return Case(
        m=direction,
        a_R=estimate.advantage_R.double().numpy(),
        change_T=change_T,
        change_R=np.array([math.fsum(change_T[np.equal(ROLLOUT, r)]) for r in range(R)]),
        want=-SHIFT * direction / GAIN,
        counted_T=estimate.mask_T.numpy(),
    )


def test_nothing_is_left_out() -> None:
    assert {name.split()[0] for name in RULES} == set(rules.RULES)
    assert set(WRITTEN_OUT) == set(LOSSES)
    assert not set(LOSSES) & set(METHODS)
    assert {*METHOD_STATES, *METHOD_OPTIONS, *PAID_FOR_ENTROPY} <= set(METHOD_NAMES)
    assert not MASK_T[torch.isin(ROLLOUT_T, torch.tensor([8, 13]))].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_prediction_is_that_of_the_loss(loss: str) -> None:
    for advantage in advantages.ADVANTAGES:
        estimate = _estimate(advantage)
        slope_TV = _loss_slope(loss, estimate.advantage_R, estimate.mask_T, torch.ones(T, dtype=torch.bool))
        expected_T = -(slope_TV * ENTROPY_SLOPE_TV).sum(-1)
        change_T = predicted_entropy_change(STATS, _everything(loss, estimate), temperature=TEMPERATURE).numpy()
        size = np.abs(change_T).max()
        assert np.isfinite(change_T).all()
        assert size > 1e-4, advantage
        np.testing.assert_allclose(change_T, expected_T, rtol=1e-5, atol=1e-7 * size, err_msg=advantage)
        sure_T = np.abs(expected_T) > 1e-6 * size
        assert (np.sign(change_T) == np.sign(expected_T))[sure_T].all(), advantage
        assert not change_T[~estimate.mask_T.numpy()].any(), advantage


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_prediction_is_that_of_the_method(method: str) -> None:
    # One logit of a row, times its slope of entropy, is one log-probability: a token's is moved by what its V logits
    # together would, all tokens at once with a number c of their own, and the loss must move by sum of c D.
    moves_T = (_slope(NUDGED_LOGP) * ENTROPY_SLOPE_TV).sum(-1)
    base, nothing = torch.from_numpy(BASE), 0
    for advantage in advantages.ADVANTAGES:
        loss_fn = _everything(method, _estimate(advantage))
        change_T = predicted_entropy_change(STATS, loss_fn, temperature=TEMPERATURE).numpy()
        size, plain = np.abs(change_T).sum(), _case("ppo_clip", advantage, 1).change_T
        assert np.isfinite(change_T).all()
        assert size > 1e-3, advantage
        assert not change_T[~_estimate(advantage).mask_T.numpy()].any(), advantage
        nothing += np.array_equal(change_T, plain)
        for seed in range(3):
            c_T = np.random.default_rng(seed).standard_normal(T)
            step_T = torch.from_numpy(H * c_T * moves_T)
            slope = float(loss_fn(base + step_T) - loss_fn(base - step_T)) / (2 * H)
            assert -slope == pytest.approx(float((c_T * change_T).sum()), rel=1e-5, abs=1e-7 * size), advantage
    # Those that pay for entropy, and they alone, leave what log-probabilities are worth as it is in PPO's loss.
    assert (nothing == len(advantages.ADVANTAGES)) == (method in PAID_FOR_ENTROPY)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_gradient_is_the_slope_of_its_method(method: str) -> None:
    line_TV = torch.randn(T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits_TV = LOGITS_TV.clone().requires_grad_()
    here, before, after = (
        _stats(moved_TV) for moved_TV in (logits_TV, LOGITS_TV - H * line_TV, LOGITS_TV + H * line_TV)
    )
    rejected = 0
    for advantage, rule, direction, decision in _combinations(method):
        mask_T, what = _estimate(advantage).mask_T, (advantage, rule, direction)
        objective = _objective(method, decision.advantage_R, mask_T, decision.keep_T)
        value, low, high = (objective(stats.logprob_T, stats.entropy_T, slice(0, T)) for stats in (here, before, after))
        of_policy_T, of_entropy_T = torch.autograd.grad(
            value, (here.logprob_T, here.entropy_T), retain_graph=True, allow_unused=True
        )
        assert not of_policy_T[~(decision.keep_T & mask_T)].any(), what
        # A rejected token teaches nothing, but the mean entropy that is paid for has it in it.
        if method in PAID_FOR_ENTROPY:
            assert bool((of_entropy_T[mask_T] != 0).all()), what
        else:
            assert of_entropy_T is None or not of_entropy_T.any(), what
        rejected += int((~decision.keep_T & mask_T).sum())
        (gradient_TV,) = torch.autograd.grad(value, logits_TV, retain_graph=True)
        expected = float((gradient_TV * line_TV).sum())
        assert float(high - low) / (2 * H) == pytest.approx(expected, rel=1e-5, abs=1e-8), what
    assert rejected > 10 * T


@pytest.mark.parametrize("loss", [*LOSSES, *METHOD_NAMES])
def test_every_decision_is_the_definition_of_its_rule(loss: str) -> None:
    partial = dict.fromkeys(RULES, 0)
    for advantage, direction in _asked():
        case = _case(loss, advantage, direction)
        for rule in RULES:
            decision, what = _decision(loss, advantage, rule, direction), f"{advantage} {rule} {direction}"
            keep, a_R = _verdict(rule, case)
            keep_T = keep if "token" in rule else keep[ROLLOUT]
            useful = bool((keep & case.counted_T).any() if "token" in rule else keep.any())
            assert decision.bypassed is not useful, what
            if decision.bypassed:
                keep_T, a_R = np.ones(T, dtype=bool), case.a_R
            partial[rule] += int(0 < keep_T.sum() < T)
            np.testing.assert_array_equal(decision.keep_T.numpy(), keep_T, err_msg=what)
            np.testing.assert_allclose(decision.advantage_R.numpy(), a_R, rtol=1e-6, atol=1e-9, err_msg=what)
    choosy = [rule for rule in RULES if rule.split()[0] in ("soft", "hard", "first_order", "budget")]
    assert min(partial[rule] for rule in choosy) >= 8, partial


@pytest.mark.parametrize("loss", LOSSES)
def test_every_gradient_is_that_of_the_loss_written_out(loss: str) -> None:
    logits_TV = LOGITS_TV.clone().requires_grad_()
    stats, rejected = _stats(logits_TV), 0
    for advantage, rule, direction, decision in _combinations(loss):
        mask_T, what = _estimate(advantage).mask_T, f"{advantage} {rule} {direction}"
        value = _objective(loss, decision.advantage_R, mask_T, decision.keep_T)(
            stats.logprob_T, stats.entropy_T, slice(0, T)
        )
        (gradient_TV,) = torch.autograd.grad(value, logits_TV, retain_graph=True)
        out_T = ~(decision.keep_T & mask_T)
        rejected += int((~decision.keep_T & mask_T).sum())
        assert not gradient_TV[out_T].any(), what
        expected_TV = _loss_slope(loss, decision.advantage_R, mask_T, decision.keep_T)
        np.testing.assert_allclose(gradient_TV.numpy(), expected_TV, rtol=1e-5, atol=1e-7 / T, err_msg=what)
    assert rejected > 10 * T


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "cispo"])
def test_whole_rollouts_under_the_mean_of_sequences_have_the_gradient_of_their_value(loss: str) -> None:
    # Nothing stands still here, so what the losses of a sequence take for constants must cancel; CISPO's value is none.
    line_TV = torch.randn(T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits_TV = LOGITS_TV.clone().requires_grad_()
    here, before, after = (
        _stats(moved_TV) for moved_TV in (logits_TV, LOGITS_TV - H * line_TV, LOGITS_TV + H * line_TV)
    )
    for advantage, rule, direction, decision in _combinations(loss):
        if "token" in rule:
            continue
        mask_T = _estimate(advantage).mask_T
        objective = _objective(loss, decision.advantage_R, mask_T, decision.keep_T, "seq_mean_token_mean")
        value, low, high = (objective(stats.logprob_T, stats.entropy_T, slice(0, T)) for stats in (here, before, after))
        (gradient_TV,) = torch.autograd.grad(value, logits_TV, retain_graph=True)
        slope, expected = float(high - low) / (2 * H), float((gradient_TV * line_TV).sum())
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-8), (advantage, rule, direction)


def test_what_rejects_for_certain_has_no_chance_to_divide_by() -> None:
    tempered = corrections.tempered(rule="hard", kappa=0.5)
    with pytest.raises(ValueError, match="gives no chance of being kept"):
        EntropyController(schedules.constant(1.0), tempered).decide(
            step=0, stats=STATS, rollout_T=ROLLOUT_T, group_R=GROUP_R, advantage_R=_estimate("grpo").advantage_R
        )
