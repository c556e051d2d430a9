"""One random batch for verl's policy losses and ours: packed tokens here, padded rows there."""

import importlib

import torch

from entrocraft import TokenStats
from entrocraft.methods import Tokens, make_objective

core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
configs = importlib.import_module("verl.workers.config.actor")

GROUPS, SAMPLES, LONGEST = 6, 4, 40


def random_tokens(seed, *, spread=0.4, by_token=False):
    """Ragged rollouts with holes in their masks; ratios on both sides of every clip for either sign of advantage."""
    generator = torch.Generator().manual_seed(seed)
    R = GROUPS * SAMPLES
    length_R = torch.randint(1, LONGEST + 1, (R,), generator=generator)
    rollout_T = torch.arange(R).repeat_interleave(length_R)
    T = len(rollout_T)
    mask_T = torch.rand(T, generator=generator) < 0.85
    mask_T[torch.cumsum(length_R, 0) - 1] = True  # no rollout without a token: that difference has its own test
    old_T = -3 * torch.rand(T, generator=generator) ** 2
    logprob_T = old_T + spread * torch.randn(T, generator=generator)
    advantage_T = torch.randn(T if by_token else R, generator=generator)
    return Tokens(
        stats=TokenStats(logprob_T=logprob_T, entropy_T=torch.ones(T), lse_T=torch.zeros(T)),
        old_logprob_T=old_T,
        advantage_T=advantage_T if by_token else advantage_T[rollout_T],
        mask_T=mask_T,
        rollout_T=rollout_T,
        group_R=torch.arange(GROUPS).repeat_interleave(SAMPLES),
        seed=seed,
    )


def ours(method, tokens, aggregation):
    """(loss, gradient of each packed token) of this package."""
    objective = make_objective(method, tokens, {}, aggregation=aggregation)
    logprob_T = tokens.stats.logprob_T.clone().requires_grad_()
    loss = objective(logprob_T, tokens.stats.entropy_T, slice(0, len(logprob_T)))
    return loss.detach(), torch.autograd.grad(loss, logprob_T)[0]


def verls(name, tokens, aggregation, policy_loss=None, **config):
    """(loss, gradient of each packed token, metrics) of verl's function of that name."""
    lengths_R = torch.tensor(tokens.lengths_R)
    column_T = torch.cat([torch.arange(length) for length in tokens.lengths_R])
    where = (tokens.rollout_T, column_T)

    def padded(value_T):
        return torch.zeros(len(lengths_R), int(lengths_R.max()), dtype=value_T.dtype).index_put(where, value_T)

    actor = configs.ActorConfig(
        strategy="fsdp", rollout_n=SAMPLES, use_dynamic_bsz=True,
        policy_loss=configs.PolicyLossConfig(loss_mode=name, **(policy_loss or {})), **config,
    )  # fmt: skip
    logprob_T = tokens.stats.logprob_T.clone().requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(name)(
        padded(tokens.old_logprob_T),
        padded(logprob_T),
        padded(tokens.advantage_T),
        padded(tokens.mask_T.long()),
        aggregation.replace("_", "-"),
        actor,
        None if tokens.importance_T is None else padded(tokens.importance_T),
    )
    return loss.detach(), torch.autograd.grad(loss, logprob_T)[0], metrics


def assert_same(mine, theirs):
    """Each gradient within 1e-6 of itself. The loss is a sum of terms of both signs, measured by what it adds up."""
    (loss, gradient_T), (their_loss, their_gradient_T) = mine[:2], theirs[:2]
    torch.testing.assert_close(gradient_T, their_gradient_T, rtol=1e-6, atol=1e-7 * float(gradient_T.abs().max()))
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=1e-7 * float(gradient_T.abs().sum()))
    assert float(gradient_T.abs().sum()) > 0.1
