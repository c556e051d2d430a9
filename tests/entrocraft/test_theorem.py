"""The theorems' condition against full softmaxes in fp64, by the definition of the output-space baseline."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from entrocraft import TokenStats
from entrocraft.theorem import theorem_condition

VECTOR = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)


def _brute(logits_V: Tensor, token: int) -> tuple[float, float]:
    """(LL - OSB, dp_k) from dp_i = p_i (dz_i - sum p dz) with dz = e_k - p, all V terms written out."""
    logp_V = torch.log_softmax(logits_V, -1)
    p_V = logp_V.exp()
    dz_V = -p_V
    dz_V[token] += 1.0
    dp_V = p_V * (dz_V - (p_V * dz_V).sum())
    others = torch.arange(len(p_V)) != token
    baseline = -((dp_V / dp_V[token])[others] * logp_V[others]).sum()
    return float(logp_V[token] - baseline), float(dp_V[token])


def test_the_vector_by_hand(stats_of: Callable[..., TokenStats]) -> None:
    stats = stats_of(VECTOR.expand(4, 4), torch.arange(4))
    found = theorem_condition(stats, torch.arange(4), None, torch.ones(4))
    # S - Sbar and p (1 - 2 p + Q2) with p, Q2 to ten digits.
    score = [0.1578706782, -0.2855184288, -0.2988936664, -0.2487284259]
    p = [0.6439142599, 0.2368828181, 0.0871443187, 0.0320586033]
    denominator = [x * (1 - 2 * x + 0.4793609299) for x in p]
    assert found.score_T.tolist() == pytest.approx(score, abs=1e-10)
    assert found.denominator_T.tolist() == pytest.approx(denominator, abs=1e-10)
    assert found.margin_T.tolist() == pytest.approx([s / d for s, d in zip(score, denominator, strict=True)], rel=1e-8)
    assert found.holds_T.tolist() == [True, False, False, False]
    assert found.share_tokens == 0.25


@pytest.mark.parametrize("sharpness", [0.3, 2.0, 6.0])
def test_tokens_and_sequences_against_full_softmaxes(sharpness: float, stats_of: Callable[..., TokenStats]) -> None:
    generator = torch.Generator().manual_seed(3)
    T, V = 41, 19
    logits_TV = sharpness * torch.randn(T, V, generator=generator, dtype=torch.float64)
    token_T = torch.multinomial(logits_TV.softmax(-1), 1, generator=generator)[:, 0]
    rollout_T = torch.sort(torch.randint(0, 6, (T,), generator=generator)).values
    mask_T = torch.rand(T, generator=generator) < 0.8
    advantage_R = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 1.0])
    found = theorem_condition(stats_of(logits_TV, token_T), rollout_T, mask_T, advantage_R)
    brute = [_brute(logits_TV[t], int(token_T[t])) for t in range(T)]
    for t in range(T):
        if mask_T[t]:
            assert float(found.margin_T[t]) == pytest.approx(brute[t][0], rel=1e-6, abs=1e-6)
            assert float(found.denominator_T[t]) == pytest.approx(brute[t][1], rel=1e-9)
            assert bool(found.holds_T[t]) == (brute[t][0] > 0)
        else:
            assert not found.holds_T[t]
    for r in range(6):
        tokens = [t for t in range(T) if rollout_T[t] == r and mask_T[t]]
        # Theorem 2: dH of the sequence, and LL - OSB averaged with weights dp.
        change = sum(brute[t][1] * brute[t][0] for t in tokens)
        assert float(found.score_R[r]) == pytest.approx(change / len(tokens), rel=1e-8)
        assert float(found.margin_R[r]) == pytest.approx(change / sum(brute[t][1] for t in tokens), rel=1e-6)
        assert bool(found.holds_R[r]) == (change > 0)
    logp_T = torch.log_softmax(logits_TV, -1).gather(1, token_T[:, None])[:, 0]
    positive_T = mask_T & (advantage_R[rollout_T] > 0)
    assert found.logprob_positive == pytest.approx(float(logp_T[positive_T].mean()))
    negative_T = mask_T & (advantage_R[rollout_T] < 0)
    assert found.logprob_negative == pytest.approx(float(logp_T[negative_T].mean()))
    assert found.share_tokens == pytest.approx(float(found.holds_T.sum()) / int(mask_T.sum()))
    assert found.share_sequences == pytest.approx(float(found.holds_R.double().mean()))


def test_the_sign_is_that_of_the_realised_change(stats_of: Callable[..., TokenStats]) -> None:
    # A step of +1e-5 on log p_k: entropy falls exactly where the condition holds.
    generator = torch.Generator().manual_seed(5)
    logits_TV = 3.0 * torch.randn(60, 13, generator=generator, dtype=torch.float64)
    token_T = torch.multinomial(logits_TV.softmax(-1), 1, generator=generator)[:, 0]
    found = theorem_condition(stats_of(logits_TV, token_T), torch.arange(60), None, torch.ones(60))
    gradient_TV = torch.nn.functional.one_hot(token_T, 13) - logits_TV.softmax(-1)

    def entropy(z_TV: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=z_TV).entropy()

    moved_T = entropy(logits_TV + 1e-5 * gradient_TV) - entropy(logits_TV)
    assert 5 < int(found.holds_T.sum()) < 55
    assert ((moved_T < 0) == found.holds_T).all()


@pytest.mark.parametrize(("gap", "known"), [(2.0, True), (4.0, True), (9.0, False), (40.0, False)])
def test_fp32_quotients_are_given_only_where_rounding_allows(
    gap: float, known: bool, stats_of: Callable[..., TokenStats]
) -> None:
    logits_TV = torch.zeros(1, 8)
    logits_TV[0, 0] = gap
    found = theorem_condition(stats_of(logits_TV, torch.tensor([0])), torch.tensor([0]), None, torch.ones(1))
    exact, _ = _brute(logits_TV[0].double(), 0)
    assert bool(found.margin_T.isfinite()) == bool(found.margin_R.isfinite()) == known
    if known:
        assert float(found.margin_T) == pytest.approx(exact, rel=1e-2)


def test_nothing_counted_and_an_impossible_token() -> None:
    one = torch.ones(2)
    stats = TokenStats(
        logprob_T=torch.tensor([-math.inf, -0.5]), entropy_T=0.5 * one, lse_T=one, p2_T=0.6 * one, p2logp_T=-0.2 * one
    )
    found = theorem_condition(stats, torch.tensor([0, 1]), torch.tensor([True, False]), torch.ones(2))
    assert found.score_T.tolist() == pytest.approx([0.2 - 0.3, 0.0])
    assert found.margin_T.isnan().all()
    assert found.score_R.isnan().tolist() == [False, True]
    assert found.holds_R.tolist() == [False, False]
    empty = theorem_condition(stats, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool), torch.ones(2))
    assert math.isnan(empty.share_tokens)
    assert math.isnan(empty.logprob_positive)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage_R": torch.tensor([1.0, math.nan])}, "must be \\[R\\] and finite"),
        ({"rollout_T": torch.tensor([0, 1, 1])}, "stats holds 2 tokens and rollout_T 3"),
        ({"mask_T": torch.ones(3, dtype=torch.bool)}, "mask_T must be bool of shape"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str, stats_of: Callable[..., TokenStats]) -> None:
    stats = stats_of(VECTOR.expand(2, 4), torch.tensor([0, 1]))
    arguments: dict[str, Any] = {"rollout_T": torch.tensor([0, 1]), "mask_T": None, "advantage_R": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        theorem_condition(stats, **(arguments | changes))
    plain = TokenStats(logprob_T=stats.logprob_T, entropy_T=stats.entropy_T, lse_T=stats.lse_T)
    with pytest.raises(ValueError, match="collision=True"):
        theorem_condition(plain, **arguments)
