"""One batch, its objective built once, cut seven ways: the gradient of a shared head stays, under every aggregation.

Whole; rollout by rollout; micro-batches of at most so many tokens; odd sizes; backwards; over more ranks than there
are rollouts, in no order, summed as an all-reduce would; and chunk by chunk through the fused head; for AEnt, whose
entropy no sums of a chunk give, runs of rows that cut sequences instead. All of it in fp64,
with every policy loss and with every method that adds terms or pays for entropy, from a policy that has moved since the
batch was drawn. Weights are fp32 numbers, but the same ones.
"""

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from acting_methods import OPTIONS, STATES
from torch import Tensor

from entrocraft import PolicyObjective, TokenStats, methods, token_weights
from entrocraft.kernels import clamped_entropy, linear_policy_loss
from entrocraft.losses import AGGREGATIONS
from entrocraft.methods import METHODS, Method, State, Tokens, make_objective
from entrocraft.surrogates import LOSSES, build_loss

V, WIDTH, SCALE = 11, 6, 40.0

_DRAW = torch.Generator().manual_seed(31)
LENGTHS = [5, 1, 0, 14, 9, 3, 7, 2, 0, 6, 11, 4, 8]
GROUP_R = torch.tensor([3, 3, 3, 0, 0, 0, 0, 8, 8, 8, 5, 5, 5])
ADVANTAGE_R = torch.tensor([1.0, -1.0, 0.5, 0.0, 1.2, -0.4, -0.8, 2.0, 0.3, -1.0, 0.0, 0.0, 0.7])
R, T = len(LENGTHS), sum(LENGTHS)
ROLLOUT_T = torch.repeat_interleave(torch.arange(R), torch.tensor(LENGTHS))
HIDDEN_TH = torch.randn(T, WIDTH, generator=_DRAW, dtype=torch.float64)
WEIGHT_VH = torch.randn(V, WIDTH, generator=_DRAW, dtype=torch.float64)
TARGET_T = torch.randint(0, V, (T,), generator=_DRAW)
MASK_T = torch.rand(T, generator=_DRAW) < 0.85
# One rollout rejected whole, single tokens of others too.
KEEP_T = (torch.rand(T, generator=_DRAW) < 0.8) & (ROLLOUT_T != 6)
IMPORTANCE_T = torch.rand(T, generator=_DRAW) + 0.5
# Half the rollouts hardly moved, within GSPO's clips; none stands where |log-ratio| has its kink.
DRIFT_T = torch.tensor([1e-4, 0.3], dtype=torch.float64)[ROLLOUT_T % 2] * torch.randn(T, generator=_DRAW)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are not shared out; a second thread would spin beside the first, five times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _cases() -> Iterator[tuple[str, Method, State]]:
    for name in METHODS:
        yield name, methods.build(name, **OPTIONS.get(name, {})), STATES.get(name, {})
    for name in LOSSES:
        yield f"bonus {name}", methods.build("entropy_bonus", coefficient=-0.2, loss_fn=build_loss(name)), {}


def _scored(weight_VH: Tensor, token_N: Tensor) -> TokenStats:
    logp_NV = torch.log_softmax(HIDDEN_TH[token_N] @ weight_VH.T, -1)
    p_NV = logp_NV.exp()
    return TokenStats(
        logprob_T=logp_NV.gather(1, TARGET_T[token_N, None])[:, 0],
        entropy_T=-(p_NV * logp_NV).sum(-1),
        lse_T=torch.logsumexp(HIDDEN_TH[token_N] @ weight_VH.T, -1),
        p2_T=p_NV.detach().square().sum(-1),
        p2logp_T=(p_NV.square() * logp_NV).detach().sum(-1),
    )


STATS = _scored(WEIGHT_VH, torch.arange(T))


def _tokens_of(chosen: list[int]) -> Tensor:
    """Indices of the tokens of these rollouts, in their order."""
    edge = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    return torch.cat([torch.arange(0), *(torch.arange(edge[r], edge[r + 1]) for r in chosen)])


def _batch(chosen: list[int]) -> Tokens:
    """The rollouts in this order, as one batch."""
    token_N = _tokens_of(chosen)
    lengths = torch.tensor([LENGTHS[r] for r in chosen])
    return Tokens(
        stats=STATS.index(token_N),
        old_logprob_T=(STATS.logprob_T - DRIFT_T)[token_N],
        advantage_T=ADVANTAGE_R[ROLLOUT_T[token_N]],
        mask_T=MASK_T[token_N],
        rollout_T=torch.repeat_interleave(torch.arange(len(chosen)), lengths),
        group_R=GROUP_R[chosen],
        keep_T=KEEP_T[token_N],
        importance_T=IMPORTANCE_T[token_N],
        seed=1,
    )


def _objective(method: Method, state: State, chosen: list[int], aggregation: str) -> PolicyObjective:
    return make_objective(
        method, _batch(chosen), state, aggregation=aggregation, advantage_R=ADVANTAGE_R[chosen], scale=SCALE
    )


def _gradient(objective: PolicyObjective, weight_VH: Tensor, token_N: Tensor) -> Tensor:
    """Of the share of these tokens, which are all that the objective knows."""
    stats, entropy_N = _scored(weight_VH, token_N), None
    if objective.clamped_share:
        entropy_N = clamped_entropy(HIDDEN_TH[token_N], weight_VH, share=objective.clamped_share)
    share = objective(stats.logprob_T, stats.entropy_T if entropy_N is None else entropy_N, slice(0, len(token_N)))
    (gradient_VH,) = torch.autograd.grad(share, weight_VH)
    return gradient_VH


def _micro_batches(most: int) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    for r in range(R):
        if sum(LENGTHS[k] for k in batches[-1]) + LENGTHS[r] > most:
            batches.append([])
        batches[-1].append(r)
    return batches


def _cuts() -> dict[str, list[list[int]]]:
    order = torch.randperm(R, generator=torch.Generator().manual_seed(2)).tolist()
    return {
        "whole": [list(range(R))],
        "single": [[r] for r in range(R)],
        "micro-batches": _micro_batches(most=16),
        "odd": [[0], [1, 2, 3], [4, 5, 6, 7, 8], [9, 10, 11], [12]],
        "backwards": [list(range(r, max(r - 3, -1), -1)) for r in range(R - 1, -1, -3)],
        "ranks": [order[rank::15] for rank in range(15)],
    }


CUTS = _cuts()
ALL = list(range(R))


def _seven_ways(objective: PolicyObjective) -> Iterator[tuple[str, Tensor]]:
    weight_VH = WEIGHT_VH.clone().requires_grad_()
    for cut, pieces in CUTS.items():
        assert sorted(chain(*pieces)) == ALL
        total_VH = torch.zeros_like(WEIGHT_VH)
        for piece in pieces:
            token_N = _tokens_of(piece)
            share = objective.take(token_N, [LENGTHS[r] for r in piece])
            total_VH += _gradient(share, weight_VH, token_N)
        yield cut, total_VH
    if objective.clamped_share:
        rows = torch.arange(T).split(8)
        yield "rows", torch.stack([_gradient(objective.take(row_N), weight_VH, row_N) for row_N in rows]).sum(0)
        return
    # Three chunks of whole rollouts.
    loss, _ = linear_policy_loss(HIDDEN_TH, weight_VH, TARGET_T, loss=objective, lengths_R=LENGTHS, buffer_bytes=8192)
    yield "fused", torch.autograd.grad(loss, weight_VH)[0]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_is_the_same_seven_ways(aggregation: str) -> None:
    for name, method, state in _cases():
        ways = dict(_seven_ways(_objective(method, state, ALL, aggregation)))
        assert len(ways) == 7
        size = float(ways["whole"].abs().max())
        assert size > 1e-3, name
        for way, gradient_VH in ways.items():
            worst = float((gradient_VH - ways["whole"]).abs().max())
            assert worst <= 1e-12 * size, (name, way, worst / size)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_batch_gathered_in_another_order_has_the_same_objective(aggregation: str) -> None:
    # Not clip_cov, which draws among the tokens by their place.
    weight_VH = WEIGHT_VH.clone().requires_grad_()
    order = torch.randperm(R, generator=torch.Generator().manual_seed(4)).tolist()
    for name, method, state in _cases():
        if name == "clip_cov":
            continue
        gradients = []
        for chosen in (ALL, order, ALL[::-1]):
            objective = _objective(method, state, chosen, aggregation)
            gradients.append(_gradient(objective, weight_VH, _tokens_of(chosen)))
        size = float(gradients[0].abs().max())
        for gradient_VH in gradients[1:]:
            assert float((gradient_VH - gradients[0]).abs().max()) <= 1e-12 * size, name


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_of_a_batch_in_another_order_are_bit_for_bit_those_of_the_batch(aggregation: str) -> None:
    def weights(chosen: list[int]) -> Tensor:
        batch = _batch(chosen)
        return token_weights(
            batch.rollout_T, batch.mask_T, batch.group_R,
            aggregation=aggregation, keep_T=batch.keep_T, advantage_R=ADVANTAGE_R[chosen], scale=SCALE,
        )  # fmt: skip

    whole_T = weights(ALL)
    assert int((whole_T > 0).sum()) > T // 3
    for chosen in CUTS["ranks"], CUTS["backwards"]:
        order = list(chain(*chosen))
        assert order != ALL
        assert torch.equal(weights(order), whole_T[_tokens_of(order)])


@pytest.mark.parametrize("aggregation", [name for name in AGGREGATIONS if name != "fixed"])
def test_weights_of_every_micro_batch_by_itself_would_be_another_gradient(aggregation: str) -> None:
    # What the tests above would not survive: a constant alone needs to know nothing of the batch.
    weight_VH = WEIGHT_VH.clone().requires_grad_()
    plain = methods.build("plain")
    whole_VH = _gradient(_objective(plain, {}, ALL, aggregation), weight_VH, _tokens_of(ALL))
    pieces = [piece for piece in CUTS["micro-batches"] if any(LENGTHS[r] for r in piece)]
    apart_VH = torch.stack(
        [_gradient(_objective(plain, {}, piece, aggregation), weight_VH, _tokens_of(piece)) for piece in pieces]
    ).mean(0)
    assert float((apart_VH - whole_VH).abs().max()) > 1e-2 * float(whole_VH.abs().max())


def test_the_cases_hold_what_they_are_meant_to() -> None:
    # An entropy bonus, terms of their own, terms of the mean, silenced tokens; an empty rank, an empty rollout.
    objectives = {name: _objective(method, state, ALL, "token_mean") for name, method, state in _cases()}
    plain = objectives["plain"]
    for name in ("entropy_bonus", "adaptive_bonus", "aent", "bonus gspo"):
        assert objectives[name].entropy_coefficient != 0, name
    for name in ("entropic", "kl_cov"):
        (term,) = objectives[name].extra
        assert 2 < int((term.weight_T != 0).sum()) < T // 2, name
    for name in ("clip_cov", "clip_b", "clip_v"):
        assert int((objectives[name].weight_T != 0).sum()) < int((plain.weight_T != 0).sum()), name
    assert [] in CUTS["ranks"]
    assert objectives["plain"].lengths_R == LENGTHS
