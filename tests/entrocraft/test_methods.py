"""Methods: each against its formula written out, its effect on entropy to first order, and what they share."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from acting_methods import STATES
from torch import Tensor

from entrocraft import PPOClip, TokenStats, methods
from entrocraft.losses import token_weights
from entrocraft.methods import Signal, Terms, Tokens, make_objective

V, T = 9, 40
TARGETED = {
    "adaptive_bonus": {},
    "aent": {"low": None, "high": None, "rate": 0.5, "maximum": 1.0},
    "entropic": {"threshold": 0.2},
    "repo_r": {"initial": 0.05},
    "polarity": {},
}


def _stats(logits_TV: Tensor, token_T: Tensor) -> TokenStats:
    logp_TV = logits_TV.log_softmax(1)
    p_TV = logp_TV.exp()
    return TokenStats(
        logprob_T=logp_TV.gather(1, token_T[:, None])[:, 0],
        entropy_T=-(p_TV * logp_TV).sum(1),
        lse_T=logits_TV.logsumexp(1),
        p2_T=p_TV.square().sum(1),
        p2logp_T=(p_TV.square() * logp_TV).sum(1),
    )


def _batch(seed: int, *, moved: float = 0.0, **changes) -> tuple[Tensor, Tensor, Tokens]:
    """Logits that require a gradient, tokens drawn from them, and the update's tokens; fp64."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = 1.5 * torch.randn(T, V, generator=generator, dtype=torch.float64)
    token_T = torch.multinomial(logits_TV.softmax(1), 1, generator=generator)[:, 0]
    old_T = _stats(logits_TV, token_T).logprob_T
    logits_TV = logits_TV + moved * torch.randn(T, V, generator=generator, dtype=torch.float64)
    rollout_T = torch.arange(8).repeat_interleave(T // 8)
    tokens = Tokens(
        stats=_stats(logits_TV, token_T),
        old_logprob_T=old_T,
        advantage_T=torch.tensor([1.0, -1.0, 0.6, -0.4, 0.0, 1.2, -1.4, 0.5])[rollout_T],
        mask_T=torch.rand(T, generator=generator) < 0.8,
        rollout_T=rollout_T,
        group_R=torch.arange(2).repeat_interleave(4),
    )
    return logits_TV.requires_grad_(), token_T, replace(tokens, **changes)


def _loss(method, logits_TV: Tensor, token_T: Tensor, tokens: Tokens, state, aggregation="token_mean", cuts=(0, T)):
    """The objective in fp64 through the logits, in as many pieces as asked."""
    objective = make_objective(method, tokens, state, aggregation=aggregation)
    stats = _stats(logits_TV, token_T)
    pieces = [slice(a, b) for a, b in pairwise(cuts)]
    return torch.stack([objective(stats.logprob_T[rows], stats.entropy_T[rows], rows) for rows in pieces]).sum()


def _entropy_change(method, state, seed: int = 0) -> float:
    """d/dstep of the mean entropy along minus the gradient of the method's loss, in independent logits."""
    logits_TV, token_T, tokens = _batch(seed)
    (gradient,) = torch.autograd.grad(_loss(method, logits_TV, token_T, tokens, state), logits_TV)
    entropy = _stats(logits_TV, token_T).entropy_T[tokens.mask_T].mean()
    (slope,) = torch.autograd.grad(entropy, logits_TV)
    return float(-(slope * gradient).sum())


def _weight(tokens: Tokens) -> Tensor:
    return tokens.mask_T.double() / tokens.mask_T.sum()


def test_the_plain_method_is_the_policy_loss():
    logits_TV, token_T, tokens = _batch(1, moved=0.3)
    got = _loss(methods.build("plain"), logits_TV, token_T, tokens, {})
    loss_T = PPOClip()(tokens.stats.logprob_T, tokens.old_logprob_T, tokens.advantage_T)
    torch.testing.assert_close(got.double(), (_weight(tokens) * loss_T).sum(), rtol=1e-6, atol=0)


def test_a_bonus_pays_for_the_mean_entropy_and_its_gradient_is_that_of_the_entropy():
    logits_TV, token_T, tokens = _batch(2)
    keep_T = tokens.rollout_T % 2 == 0
    tokens = replace(tokens, keep_T=keep_T)
    plain, bonus = (methods.build("plain"), methods.build("entropy_bonus", coefficient=0.7))
    without, paid = (_loss(method, logits_TV, token_T, tokens, {}) for method in (plain, bonus))
    entropy_T = _stats(logits_TV, token_T).entropy_T
    mean = (_weight(tokens) * entropy_T).sum()  # of all counted tokens, rejected ones too
    torch.testing.assert_close(paid - without, -0.7 * mean, rtol=1e-6, atol=1e-8)
    of_bonus, of_mean = (torch.autograd.grad(one, logits_TV)[0] for one in (paid - without, mean))
    torch.testing.assert_close(of_bonus, -0.7 * of_mean, rtol=1e-5, atol=1e-9)


def test_the_adaptive_bonus_moves_by_delta_and_is_paid_below_the_target_only():
    method = methods.build("adaptive_bonus", initial=0.1, delta=0.02, maximum=0.13)
    state: methods.State = {}
    used = []
    for step, entropy in enumerate((0.6, 0.4, 0.3, 0.3, 0.7, 0.7)):
        state = method.observe(state, Signal(step=step, steps=9, entropy=entropy, target=0.5))
        used.append((round(state["coefficient"], 3), round(state["used"], 3)))
    # What the entropy of a step does shows in the next one: 0.6 is above, 0.4 and 0.3 are below the target of 0.5.
    assert used == [(0.1, 0.0), (0.08, 0.0), (0.1, 0.1), (0.12, 0.12), (0.13, 0.13), (0.11, 0.0)]


def test_aent_moves_its_coefficient_against_the_excess_within_its_box():
    method = methods.build("aent", initial=0.1, low=0.2, high=0.5, rate=0.1, minimum=0.01, maximum=0.2)
    state = method.observe({}, Signal(step=0, steps=9, entropy=0.9, clamped_entropy=0.1))
    assert state["coefficient"] == pytest.approx(0.1 - 0.1 * (0.1 - 0.2))
    state = method.observe(state, Signal(step=1, steps=9, entropy=0.7))
    assert state["coefficient"] == pytest.approx(0.11 - 0.1 * (0.7 - 0.5))
    assert method.observe(state, Signal(step=2, steps=9, entropy=0.3)) == state
    state = method.observe(state, Signal(step=3, steps=9, entropy=5.0))
    assert state["coefficient"] == 0.01
    terms = method.terms(_batch(3)[2], state)
    assert (terms.entropy_coefficient, terms.clamped_share) == (0.01, 0.2)


def test_entropic_weighs_likely_tokens_by_a_clamped_pi_controller():
    method = methods.build("entropic", target=0.5, threshold=0.3)
    state = method.observe({}, Signal(step=0, steps=9, entropy=0.9))
    assert dict(state) == pytest.approx({"alpha": 0.4, "integral": 0.4})
    state = method.observe(state, Signal(step=1, steps=9, entropy=0.8))
    assert dict(state) == pytest.approx({"alpha": 0.3 + 0.004, "integral": 0.7})
    wound = method.observe(state, Signal(step=2, steps=9, entropy=2.0))
    assert dict(wound) == pytest.approx({"alpha": 1.0, "integral": 0.7})  # clamped: the integral stands still

    logits_TV, token_T, tokens = _batch(4, moved=0.2)
    plain = _loss(methods.build("plain"), logits_TV, token_T, tokens, {})
    steered = _loss(method, logits_TV, token_T, tokens, state)
    stats = _stats(logits_TV, token_T)
    likely_T = tokens.mask_T & (tokens.stats.logprob_T.exp() > 0.3)
    assert 3 < int(likely_T.sum()) < int(tokens.mask_T.sum())
    ratio_T = (stats.logprob_T - tokens.old_logprob_T).exp()
    term = -state["alpha"] * (ratio_T * tokens.advantage_T.abs())[likely_T].mean()
    torch.testing.assert_close(steered - plain, term, rtol=1e-5, atol=1e-8)
    of_steered, of_term = (torch.autograd.grad(one, logits_TV)[0] for one in (steered - plain, term))
    torch.testing.assert_close(of_steered, of_term, rtol=1e-5, atol=1e-8)


def test_entropic_weighs_its_own_term_by_importance_and_takes_what_is_rejected_out_of_its_sum_alone():
    method, state = methods.build("entropic", target=0.5, threshold=0.3), {"alpha": -0.6}
    logits_TV, token_T, tokens = _batch(4, moved=0.2)
    draw = torch.Generator().manual_seed(1)
    keep_T, importance_T = torch.rand(len(token_T), generator=draw) < 0.6, 2 * torch.rand(len(token_T), generator=draw)
    tokens = replace(tokens, keep_T=keep_T, importance_T=importance_T)
    plain = _loss(methods.build("plain"), logits_TV, token_T, tokens, {})
    steered = _loss(method, logits_TV, token_T, tokens, state)
    ratio_T = (_stats(logits_TV, token_T).logprob_T - tokens.old_logprob_T).exp()
    likely_T = tokens.mask_T & (tokens.stats.logprob_T.exp() > 0.3)
    assert 3 < int((likely_T & keep_T).sum()) < int(likely_T.sum())
    term = 0.6 * (ratio_T * tokens.advantage_T.abs() * importance_T * keep_T)[likely_T].mean()
    torch.testing.assert_close(steered - plain, term, rtol=1e-5, atol=1e-8)
    of_steered, of_term = (torch.autograd.grad(one, logits_TV)[0] for one in (steered - plain, term))
    torch.testing.assert_close(of_steered, of_term, rtol=1e-5, atol=1e-8)


def test_entropic_parity_is_not_clamped_and_leaves_the_present_error_out_of_its_integral():
    method = methods.build("entropic_parity", target=0.5)
    state = method.observe({}, Signal(step=0, steps=9, entropy=2.5))
    assert dict(state) == pytest.approx({"alpha": 2.0, "integral": 0.02})
    state = method.observe(state, Signal(step=1, steps=9, entropy=0.4))
    assert dict(state) == pytest.approx({"alpha": 0.02 - 0.1, "integral": 0.019})
    tokens = _batch(5)[2]
    advantage_T = tokens.advantage_T
    expected_T = advantage_T * torch.where(advantage_T > 0, 1 - 0.08, 1 + 0.08)
    torch.testing.assert_close(method.terms(tokens, state).advantage_T, expected_T)


def test_repo_subtracts_the_centred_log_probability():
    tokens = _batch(6)[2]
    shaped_T = methods.build("repo", beta=0.3).terms(tokens, {}).advantage_T
    expected_T = tokens.advantage_T - 0.3 * (tokens.stats.logprob_T + tokens.stats.entropy_T)
    torch.testing.assert_close(shaped_T, expected_T)
    assert not shaped_T.requires_grad


def test_repo_r_rescales_and_never_turns_a_sign():
    method = methods.build("repo_r", initial=0.05, maximum=0.5)
    tokens = _batch(7)[2]
    logprob_T, advantage_T = tokens.stats.logprob_T, tokens.advantage_T
    shaped_T = method.terms(tokens, {"zeta": 0.4}).advantage_T
    for a, logprob, got in zip(advantage_T.tolist(), logprob_T.tolist(), shaped_T.tolist(), strict=True):
        expected = max(a * (1 - 0.4 * logprob), 0.0) if a > 0 else min(a * (1 + 0.4 * logprob), 0.0)
        assert got == pytest.approx(expected)
    assert bool((shaped_T * advantage_T >= 0).all())
    assert bool(((shaped_T == 0) & (advantage_T < 0)).any())  # 1 + 0.4 log p < 0 for the rarest


def test_zeta_doubles_halves_and_changes_sign_at_its_least_value():
    method = methods.build("repo_r", initial=0.02, minimum=0.01, maximum=0.05)
    state: methods.State = {}
    seen = []
    for step, entropy in enumerate((0.4, 0.4, 0.4, 0.6, 0.6, 0.6, 0.6, 0.5, 0.4)):
        state = method.observe(state, Signal(step=step, steps=9, entropy=entropy, target=0.5))
        seen.append(state["zeta"])
    assert seen == pytest.approx([0.04, 0.05, 0.05, 0.025, 0.0125, -0.01, -0.02, -0.02, -0.01])
    still = methods.build("repo_r", initial=0.02, adaptive=False)
    assert still.observe({}, Signal(step=0, steps=9, entropy=0.1)) == {"zeta": 0.02}


def test_polarity_weighs_by_the_sign_of_each_token_and_the_phase():
    method = methods.build("polarity", target=0.5, strength=0.4)
    state = method.observe({}, Signal(step=0, steps=9, entropy=0.6))
    assert state["phase"] == pytest.approx(-0.2)
    logits_TV, token_T, tokens = _batch(8)
    shaped_T = method.terms(tokens, state).advantage_T
    for t in range(T):  # the sign of each token's own entropy change, by autograd
        row_V = logits_TV[t].detach().clone().requires_grad_()
        logp_V = row_V.log_softmax(0)
        (push,) = torch.autograd.grad(tokens.advantage_T[t] * logp_V[token_T[t]], row_V, retain_graph=True)
        (slope,) = torch.autograd.grad(-(logp_V.exp() * logp_V).sum(), row_V)
        factor = 1 + 0.4 * -0.2 * float(torch.sign((push * slope).sum()))
        assert float(shaped_T[t]) == pytest.approx(float(tokens.advantage_T[t]) * factor)


def test_the_adaptive_clip_opens_below_the_target_and_closes_above():
    method = methods.build("adaptive_clip", target=0.5, factor=1.5, maximum=0.4)
    state: methods.State = {}
    seen = []
    for step, entropy in enumerate((0.4, 0.4, 0.5, 0.6)):
        state = method.observe(state, Signal(step=step, steps=9, entropy=entropy))
        seen.append(state["clip_high"])
    assert seen == pytest.approx([0.3, 0.4, 0.4, 0.4 / 1.5])
    assert method.terms(_batch(9)[2], state).loss_fn == PPOClip(clip_high=state["clip_high"])
    free = methods.build("adaptive_clip")  # no target anywhere: the first entropy
    first = free.observe({}, Signal(step=0, steps=9, entropy=0.7))
    assert free.observe(first, Signal(step=1, steps=9, entropy=0.6))["clip_high"] == pytest.approx(0.22)


@pytest.mark.parametrize(("name", "arguments"), TARGETED.items())
def test_what_seeks_a_target_pushes_entropy_towards_it(name, arguments):
    method = methods.build(name, **arguments)
    changes = {}
    for entropy in (0.3, 1.5):  # below and above the target, for some steps
        state: methods.State = {}
        for step in range(12):
            state = method.observe(state, Signal(step=step, steps=12, entropy=entropy, target=0.9))
        changes[entropy] = sum(_entropy_change(method, state, seed) for seed in range(20)) / 20
    assert changes[0.3] > changes[1.5] + 1e-4, changes


@pytest.mark.parametrize(("name", "arguments"), [("entropy_bonus", {"coefficient": 0.5}), ("repo", {"beta": 0.5})])
def test_what_has_no_target_raises_entropy(name, arguments):
    steered, plain = (
        sum(_entropy_change(method, {}, seed) for seed in range(20)) / 20
        for method in (methods.build(name, **arguments), methods.build("plain"))
    )
    assert steered > plain + 1e-3


@pytest.mark.parametrize("name", ["plain", "entropy_bonus", "repo", *STATES])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_gradients_agree_with_finite_differences_in_any_split(name, aggregation):
    method, state = methods.build(name), STATES.get(name, {})
    logits_TV, token_T, tokens = _batch(11, moved=0.2)
    whole = _loss(method, logits_TV, token_T, tokens, state, aggregation)
    (gradient,) = torch.autograd.grad(whole, logits_TV)
    cut = _loss(method, logits_TV, token_T, tokens, state, aggregation, cuts=(0, 5, 25, 30, T))
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=0)
    (gradient_of_pieces,) = torch.autograd.grad(cut, logits_TV)
    torch.testing.assert_close(gradient_of_pieces, gradient, rtol=1e-9, atol=1e-12)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        direction = torch.randn(T, V, generator=generator, dtype=torch.float64)
        values = [
            float(_loss(method, logits_TV.detach() + h * direction, token_T, tokens, state, aggregation))
            for h in (-1e-6, 1e-6)
        ]
        assert (values[1] - values[0]) / 2e-6 == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


def test_tokens_without_gradient_stay_in_the_denominator_and_masked_ones_do_not():
    class Halved(methods.Stateless):
        def __init__(self, **changes):
            self.changes = changes

        def terms(self, tokens, state, /):
            terms = Terms(loss_fn=PPOClip(), advantage_T=tokens.advantage_T, mask_T=tokens.mask_T)
            return replace(terms, **self.changes)

    tokens = _batch(12)[2]
    half_T = torch.arange(T) % 2 == 0
    silent, masked = (
        make_objective(Halved(**change), tokens, {}, aggregation="token_mean").weight_T
        for change in ({"gradient_T": half_T}, {"mask_T": tokens.mask_T & half_T})
    )
    counted = tokens.mask_T & half_T
    torch.testing.assert_close(silent, counted.float() / int(tokens.mask_T.sum()))
    torch.testing.assert_close(masked, counted.float() / int(counted.sum()))


def test_importance_weights_scale_the_policy_loss_and_not_the_entropy():
    tokens = _batch(13)[2]
    importance_T = torch.rand(T) + 0.5
    method = methods.build("entropy_bonus")
    objective = make_objective(method, replace(tokens, importance_T=importance_T), {}, aggregation="token_mean")
    weight_T = token_weights(tokens.rollout_T, tokens.mask_T, tokens.group_R, aggregation="token_mean")
    torch.testing.assert_close(objective.weight_T, weight_T * importance_T)
    assert objective.entropy_weight_T is not None
    torch.testing.assert_close(objective.entropy_weight_T, weight_T)


def test_under_eq5_the_entropy_is_that_of_every_rollout():
    tokens = _batch(13)[2]
    advantage_R = torch.zeros(len(tokens.group_R))
    advantage_R[0] = 1.0  # one rollout teaches; all have an entropy
    objective = make_objective(methods.build("entropy_bonus"), tokens, {}, aggregation="eq5", advantage_R=advantage_R)
    counted_R = torch.bincount(tokens.rollout_T[tokens.mask_T], minlength=len(tokens.group_R)) > 0
    groups = tokens.group_R[counted_R].tolist()
    share_R = [1 / (groups.count(g) * len(set(groups))) for g in tokens.group_R.tolist()]
    assert objective.entropy_weight_T is not None
    torch.testing.assert_close(objective.entropy_weight_T, torch.tensor(share_R)[tokens.rollout_T] * tokens.mask_T)
    assert set(tokens.rollout_T[objective.weight_T > 0].tolist()) == {0}


def test_a_method_of_ones_own_by_import_path():
    assert methods.build("entrocraft.methods:Plain") == methods.build("plain")
    with pytest.raises(ValueError, match=r"method 'entrocraft\.methods:Missing' cannot be imported"):
        methods.build("entrocraft.methods:Missing")
    with pytest.raises(ValueError, match="unknown method 'entropc': did you mean 'entropic'"):
        methods.build("entropc")
    with pytest.raises(ValueError, match=r"method 'repo' was given \['betta'\]"):
        methods.build("repo", betta=1.0)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("entropic", {"target": -0.1}, "target = -0.1"),
        ("entropic", {"threshold": 1.0}, "threshold = 1.0"),
        ("entropic_parity", {"ki": -1.0}, "ki = -1.0"),
        ("entropy_bonus", {"coefficient": float("nan")}, "coefficient = nan"),
        ("adaptive_bonus", {"initial": 2.0}, "minimum, initial, maximum = 0.0, 2.0, 1.0"),
        ("adaptive_bonus", {"delta": 0.0}, "delta = 0.0"),
        ("aent", {"share": 0.0}, "share = 0.0"),
        ("aent", {"low": None}, "low, high = None, 0.5"),
        ("aent", {"rate": 0.0}, "rate = 0.0"),
        ("repo", {"beta": float("inf")}, "beta = inf"),
        ("repo_r", {"initial": 1.0}, "minimum, initial, maximum"),
        ("polarity", {"strength": 0.6}, "strength = 0.6"),
        ("adaptive_clip", {"factor": 1.0}, "factor = 1.0"),
        ("adaptive_clip", {"initial": 0.01}, "minimum, initial, maximum"),
    ],
)
def test_bad_arguments_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        methods.build(name, **arguments)


def test_a_target_that_is_nowhere_is_an_error_with_a_way_out():
    for name in ("entropic", "entropic_parity", "adaptive_bonus", "repo_r", "polarity"):
        with pytest.raises(ValueError, match=r"needs a target and there is no schedule; give it target = \.\.\., nats"):
            methods.build(name).observe({}, Signal(step=0, steps=9, entropy=0.5))
