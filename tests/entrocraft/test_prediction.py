"""Predicted entropy change against finite differences of real logits in fp64, and the gain by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from entrocraft import PPOClip, TokenStats, entropy_discriminator, predicted_entropy_change
from entrocraft.prediction import Gain

T, V, R = 23, 17, 5
ETA = 1e-6

_GENERATOR = torch.Generator().manual_seed(7)
ROLLOUT_T = torch.sort(torch.randint(0, R, (T,), generator=_GENERATOR)).values
MASK_T = torch.rand(T, generator=_GENERATOR) < 0.8
ADVANTAGE_T = torch.randn(R, generator=_GENERATOR, dtype=torch.float64)[ROLLOUT_T]
OFF_POLICY_T = 0.4 * torch.randn(T, generator=_GENERATOR, dtype=torch.float64)


def _policy_gradient(logprob_T: Tensor) -> Tensor:
    return -(MASK_T * ADVANTAGE_T * logprob_T).sum() / MASK_T.sum()


def _ppo(logprob_T: Tensor) -> Tensor:
    # Fixed old log-probabilities near those of the seeded policy, so that ratios land on both sides of the clips.
    return (PPOClip()(logprob_T, OLD_T, ADVANTAGE_T) * MASK_T).mean()


def _sequence_ratio(logprob_T: Tensor) -> Tensor:
    """GSPO without clip: one ratio a rollout, the geometric mean over its tokens, so tokens share one loss term."""
    length_R = torch.bincount(ROLLOUT_T, minlength=R).double()
    log_ratio_R = torch.zeros(R, dtype=torch.float64).index_add(0, ROLLOUT_T, logprob_T - OLD_T) / length_R
    advantage_R = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.25], dtype=torch.float64)
    return -(log_ratio_R.exp() * advantage_R).mean()


LOSSES = {"policy gradient": _policy_gradient, "ppo": _ppo, "sequence ratio": _sequence_ratio}
LOGITS_TV = 2.0 * torch.randn(T, V, generator=_GENERATOR, dtype=torch.float64)
TOKEN_T = torch.randint(0, V, (T,), generator=_GENERATOR)
OLD_T = torch.log_softmax(LOGITS_TV, -1).gather(1, TOKEN_T[:, None])[:, 0] + OFF_POLICY_T


def _entropy(logits_TV: Tensor, temperature: float | Tensor) -> Tensor:
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    logp_TV = torch.log_softmax(logits_TV / scale, -1)
    return -(logp_TV.exp() * logp_TV).sum(-1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7, torch.linspace(0.5, 2.0, T, dtype=torch.float64)])
def test_against_a_gradient_step_on_the_logits(
    loss: str, temperature: float | Tensor, stats_of: Callable[..., TokenStats]
) -> None:
    loss_fn = LOSSES[loss]
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    logits_TV = LOGITS_TV.clone().requires_grad_()
    logprob_T = torch.log_softmax(logits_TV / scale, -1).gather(1, TOKEN_T[:, None])[:, 0]
    (gradient_TV,) = torch.autograd.grad(loss_fn(logprob_T), logits_TV)
    moved_T = _entropy(LOGITS_TV - ETA * gradient_TV, temperature) - _entropy(LOGITS_TV, temperature)
    change_T = predicted_entropy_change(stats_of(LOGITS_TV, TOKEN_T, temperature), loss_fn, temperature=temperature)
    assert change_T.dtype == torch.float64
    assert not change_T.requires_grad
    scale_of_change = float(change_T.abs().max())
    assert scale_of_change > 1e-4
    # Second order: eta times squares of gradients of order one.
    torch.testing.assert_close(moved_T / ETA, change_T, rtol=1e-3, atol=1e-5 * scale_of_change)
    assert float(moved_T.sum() / ETA) == pytest.approx(float(change_T.sum()), rel=1e-3)


def test_discriminator_of_a_row_by_hand(stats_of: Callable[..., TokenStats]) -> None:
    # z = (2, 1, 0, -1): p = (0.6439, 0.2369, 0.0871, 0.0321), H = 0.94754; -(S - Sbar) worked out to ten digits.
    logits_TV = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64).expand(4, 4)
    s_T, sbar_T = entropy_discriminator(stats_of(logits_TV, torch.arange(4)))
    assert s_T.tolist() == pytest.approx([0.3266881389, -0.1167009681, -0.1300762057, -0.0799109651], abs=1e-10)
    assert sbar_T.tolist() == pytest.approx([0.1688174607] * 4, abs=1e-10)
    expected = [-0.1578706782, 0.2855184288, 0.2988936664, 0.2487284259]
    assert (sbar_T - s_T).tolist() == pytest.approx(expected, abs=1e-10)


@given(logits=st.lists(st.floats(-30.0, 30.0), min_size=2, max_size=40))
def test_mean_under_the_policy_is_zero(logits: list[float]) -> None:
    logp_V = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)
    p_V = logp_V.exp()
    n = len(logits)
    stats = TokenStats(
        logprob_T=logp_V,
        entropy_T=-(p_V * logp_V).sum().expand(n),
        lse_T=torch.zeros(n, dtype=torch.float64),
        p2_T=p_V.square().sum().expand(n),
        p2logp_T=(p_V.square() * logp_V).sum().expand(n),
    )
    s_V, sbar_V = entropy_discriminator(stats)
    assert abs(float((p_V * (s_V - sbar_V)).sum())) < 1e-14 * (1.0 + n)


def test_constant_advantage_moves_nothing_in_expectation(stats_of: Callable[..., TokenStats]) -> None:
    # Every token of the vocabulary once, weighted by its probability, all with the same advantage.
    row_V = torch.tensor([1.5, -0.3, 0.8, 0.0, -2.0], dtype=torch.float64)
    stats = stats_of(row_V.expand(5, 5), torch.arange(5))
    p_V = row_V.softmax(-1)
    change_T = predicted_entropy_change(stats, lambda logprob_T: -(p_V * 1.7 * logprob_T).sum())
    assert float(change_T.abs().max()) > 1e-2
    assert abs(float(change_T.sum())) < 1e-15


def test_clipped_tokens_predict_exactly_nothing(stats_of: Callable[..., TokenStats]) -> None:
    stats = stats_of(LOGITS_TV, TOKEN_T)
    flags = PPOClip().clipped(stats.logprob_T, OLD_T, ADVANTAGE_T)
    clipped_T = flags["high"] | flags["low"] | flags["dual"]
    change_T = predicted_entropy_change(stats, lambda x: PPOClip()(x, OLD_T, ADVANTAGE_T).mean())
    assert 3 <= int(clipped_T.sum()) <= T - 3
    assert change_T[clipped_T].tolist() == [0.0] * int(clipped_T.sum())
    assert bool((change_T[~clipped_T] != 0).all())


def test_signs_of_the_four_regions(stats_of: Callable[..., TokenStats]) -> None:
    # Likely token rewarded: down; unlikely rewarded: up; and the other way round when punished.
    logits_TV = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64).expand(4, 4)
    stats = stats_of(logits_TV, torch.tensor([0, 3, 0, 3]))
    advantage_T = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    change_T = predicted_entropy_change(stats, lambda x: -(advantage_T * x).sum())
    assert change_T.sign().tolist() == [-1.0, 1.0, 1.0, -1.0]


def test_an_impossible_token_has_no_discriminator() -> None:
    one = torch.ones(1)
    stats = TokenStats(
        logprob_T=torch.tensor([-math.inf]), entropy_T=0.5 * one, lse_T=one, p2_T=0.6 * one, p2logp_T=-0.2 * one
    )
    s_T, sbar_T = entropy_discriminator(stats)
    assert s_T.tolist() == [0.0]
    assert sbar_T.tolist() == pytest.approx([-0.2 + 0.5 * 0.6])


def test_works_where_gradients_are_switched_off(stats_of: Callable[..., TokenStats]) -> None:
    stats = stats_of(LOGITS_TV, TOKEN_T)
    expected_T = predicted_entropy_change(stats, _ppo)
    with torch.no_grad():
        torch.testing.assert_close(predicted_entropy_change(stats, _ppo), expected_T, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, torch.tensor([1.0] * (T - 1) + [0.0])])
def test_temperature_must_be_positive(temperature: float | Tensor, stats_of: Callable[..., TokenStats]) -> None:
    with pytest.raises(ValueError, match="expected > 0 and finite"):
        predicted_entropy_change(stats_of(LOGITS_TV, TOKEN_T), _ppo, temperature=temperature)


def test_bad_input_is_named(stats_of: Callable[..., TokenStats]) -> None:
    stats = stats_of(LOGITS_TV, TOKEN_T)
    with pytest.raises(ValueError, match=r"temperature has shape \(3,\)"):
        predicted_entropy_change(stats, _ppo, temperature=torch.ones(3))
    with pytest.raises(ValueError, match=r"loss_fn returned shape \(23,\): expected one scalar"):
        predicted_entropy_change(stats, lambda x: x)
    with pytest.raises(ValueError, match="does not depend on the logprob_T"):
        predicted_entropy_change(stats, lambda x: x.detach().sum())
    with pytest.raises(ValueError, match="does not depend on the logprob_T"):
        predicted_entropy_change(stats, lambda x: torch.ones((), requires_grad=True))
    without = TokenStats(logprob_T=stats.logprob_T, entropy_T=stats.entropy_T, lse_T=stats.lse_T)
    with pytest.raises(ValueError, match="collision=True"):
        predicted_entropy_change(without, _ppo)


def test_gain_by_hand() -> None:
    gain = Gain(value=10.0, ema=0.9)
    # First: 0.1 * 0.04 * 0.02 over 0.1 * 0.02^2 is realised / predicted = 2.
    gain = gain.updated(0.04, 0.02)
    assert gain.value == pytest.approx(2.0)
    # Second: (0.9 * 8e-5 + 0.1 * 0.03 * 0.01) / (0.9 * 4e-5 + 0.1 * 0.01^2).
    gain = gain.updated(0.03, 0.01)
    assert gain.value == pytest.approx((0.9 * 8e-5 + 0.1 * 3e-4) / (0.9 * 4e-5 + 0.1 * 1e-4))
    assert gain.numerator == pytest.approx(0.9 * 8e-5 + 0.1 * 3e-4)


def test_gain_fades_while_the_numerator_is_not_positive() -> None:
    gain = Gain(value=10.0, ema=0.5).updated(-0.2, 0.1)
    assert gain.value == 5.0
    assert (gain.numerator, gain.denominator) == pytest.approx((-0.01, 0.005))
    gain = gain.updated(0.1, 0.1)  # numerator -0.005 + 0.005 = 0: still
    assert gain.value == 2.5
    gain = gain.updated(0.1, 0.1)
    # Numerator 0 / 2 + 0.005; denominator 0.005, then 0.0025 + 0.005, then 0.00375 + 0.005.
    assert gain.value == pytest.approx(0.005 / 0.00875)


def test_gain_has_a_floor_and_a_threshold() -> None:
    assert Gain().updated(1e-9, 1.0).value == 1e-3
    assert Gain().updated(1.0, 1e-9) == Gain()
    assert Gain().updated(math.nan, 1.0) == Gain()
    assert Gain().updated(1.0, 2e-9).value == pytest.approx(5e8)


@pytest.mark.parametrize(
    ("name", "value"), [("initial_gain", 0.0), ("initial_gain", math.nan), ("ema", 1.0), ("ema", -0.1)]
)
def test_gain_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        Gain(**{"value" if name == "initial_gain" else name: value})


@given(seed=st.integers(0, 10_000), vocab=st.integers(2, 30), sharpness=st.floats(0.2, 4.0))
def test_first_order_for_any_row(seed: int, vocab: int, sharpness: float) -> None:
    # Central differences along the gradient of log p_y: third order in eta, so fp64 rounding (1e-16 / eta) decides.
    generator = torch.Generator().manual_seed(seed)
    logits_TV = sharpness * torch.randn(1, vocab, generator=generator, dtype=torch.float64)
    token_T = torch.multinomial(logits_TV.softmax(-1), 1, generator=generator)[:, 0]
    step_TV = torch.nn.functional.one_hot(token_T, vocab) - logits_TV.softmax(-1)
    moved_T = _entropy(logits_TV + ETA * step_TV, 1.0) - _entropy(logits_TV - ETA * step_TV, 1.0)
    logp_TV = torch.log_softmax(logits_TV, -1)
    p_TV = logp_TV.exp()
    stats = TokenStats(
        logprob_T=logp_TV.gather(1, token_T[:, None])[:, 0],
        entropy_T=_entropy(logits_TV, 1.0),
        lse_T=torch.logsumexp(logits_TV, -1),
        p2_T=p_TV.square().sum(-1),
        p2logp_T=(p_TV.square() * logp_TV).sum(-1),
    )
    change = float(predicted_entropy_change(stats, lambda x: -x.sum()))
    assert float(moved_T) / (2 * ETA) == pytest.approx(change, rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("advantage", [1.0, -0.7])
def test_a_step_of_the_head_moves_its_row_by_the_square_of_the_hidden_state(
    advantage: float, stats_of: Callable[..., TokenStats]
) -> None:
    # z = W h and W -= eta dL/dW move z by -eta |h|^2 dL/dz: the entropy of a batch of one row changes by |h|^2 D.
    generator = torch.Generator().manual_seed(11)
    weight_VH = torch.randn(V, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    for token in range(V):
        hidden_TH = torch.randn(1, 6, generator=generator, dtype=torch.float64)
        logits_TV = hidden_TH @ weight_VH.T
        loss = -advantage * torch.log_softmax(logits_TV, -1)[0, token]
        (gradient_VH,) = torch.autograd.grad(loss, weight_VH)
        with torch.no_grad():
            moved_TV = hidden_TH @ (weight_VH - ETA * gradient_VH).T
            realised = float(_entropy(moved_TV, 1.0) - _entropy(logits_TV, 1.0)) / ETA
        stats = stats_of(logits_TV.detach(), torch.tensor([token]))
        change = float(predicted_entropy_change(stats, lambda x: -advantage * x.sum()))
        # Relative to |h|^2, as single changes may be near 0; second order is eta |h|^4.
        assert realised == pytest.approx(float(hidden_TH.square().sum()) * change, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_a_constant_advantage_moves_nothing_in_expectation(
    sharpness: float, stats_of: Callable[..., TokenStats]
) -> None:
    # Every token of every row once, weighed by its probability: E_p[S - Sbar] = 0, of whatever sign the advantage.
    generator = torch.Generator().manual_seed(13)
    rows_RV = sharpness * torch.randn(9, V, generator=generator, dtype=torch.float64)
    logits_TV, token_T = rows_RV.repeat_interleave(V, 0), torch.arange(V).repeat(9)
    p_T = rows_RV.softmax(-1).flatten()
    for advantage in (1.0, -1.0):
        change_T = predicted_entropy_change(stats_of(logits_TV, token_T), lambda x, a=advantage: -(a * p_T * x).sum())
        assert float(change_T.abs().max()) > 1e-4
        assert change_T.reshape(9, V).sum(-1).tolist() == pytest.approx([0.0] * 9, abs=1e-14)
