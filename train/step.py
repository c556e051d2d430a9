"""One training step's update: rollouts and a decision in, a better policy out.

The share of each optimizer update is fixed before anything is dropped, and so are the weights of its tokens; a rollout
whose weight or advantage is zero adds nothing to the loss, so it is never run through the model.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entrocraft import Decision, Rollouts, TokenStats
from entrocraft.losses import PPOClip, token_weights
from entrocraft.train.config import Config
from entrocraft.train.errors import NonFiniteError
from entrocraft.train.packing import pack
from entrocraft.train.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one optimizer update sees: some prompts' rollouts, with everything the loss needs of them."""

    rollouts: Rollouts
    weight_T: Tensor
    """fp32: the loss is sum_T weight_T loss_T."""
    old_logprob_T: Tensor
    advantage_T: Tensor

    @property
    def active(self) -> list[int]:
        """Rollouts with a gradient."""
        signal_T = (self.weight_T != 0) & (self.advantage_T != 0)
        return torch.unique(self.rollouts.rollout_T[signal_T]).tolist()


def policy_loss(config: Config) -> PPOClip:
    """The configured loss of one token."""
    return PPOClip(clip_low=config.loss.clip_low, clip_high=config.loss.clip_high, dual_clip=config.loss.dual_clip)


def loss_scale(aggregation: str, config: Config, rollouts: int) -> float | None:
    """Constant denominator of the aggregations that have one, tokens; None for those that count tokens themselves."""
    longest = float(config.sampling.max_response_tokens)
    return {"fixed": rollouts * longest, "seq_mean_token_sum_norm": longest}.get(aggregation)


def make_share(
    rollouts: Rollouts, stats: TokenStats, decision: Decision, chosen_R: Tensor, config: Config, aggregation: str
) -> Share:
    """The rollouts where the bool `chosen_R` is True, weighed as one optimizer update."""
    chosen_T = chosen_R[rollouts.rollout_T]
    part = rollouts.select(chosen_R)
    advantage_R = decision.advantage_R[chosen_R]
    weight_T = token_weights(
        part.rollout_T,
        part.mask_T,
        part.group_R,
        aggregation=aggregation,
        keep_T=decision.keep_T[chosen_T],
        advantage_R=advantage_R,
        scale=loss_scale(aggregation, config, part.R),
    )
    return Share(
        rollouts=part,
        weight_T=weight_T,
        old_logprob_T=stats.logprob_T[chosen_T],
        advantage_T=advantage_R[part.rollout_T],
    )


def accumulate(policy: Policy, share: Share, loss: PPOClip, tokens_per_microbatch: int) -> dict[str, float]:
    """Adds the gradient of the share's loss to the parameters; returns sums over its running tokens, for the metrics.

    The result does not depend on `tokens_per_microbatch` beyond rounding. Raises NonFiniteError for a NaN or infinite
    loss.
    """
    sums = {"loss": 0.0, "tokens": 0.0, "low": 0.0, "high": 0.0, "dual": 0.0, "kl": 0.0}
    for batch in pack(share.rollouts, share.active, tokens_per_microbatch):
        weight_N, old_N = share.weight_T[batch.token_N], share.old_logprob_T[batch.token_N]
        advantage_N = share.advantage_T[batch.token_N]
        weight_N, old_N, advantage_N = (x.to(policy.device) for x in (weight_N, old_N, advantage_N))
        logprob_N = policy.token_stats(batch, share.rollouts.token_T).logprob_T
        total = (weight_N * loss(logprob_N, old_N, advantage_N)).sum()
        if not torch.isfinite(total):
            raise NonFiniteError(f"the loss of {len(weight_N)} tokens is {total.item()}")
        total.backward()
        counted_N = weight_N != 0
        for name, clipped_N in loss.clipped(logprob_N.detach(), old_N, advantage_N).items():
            sums[name] += (clipped_N & counted_N).sum().item()
        # k3 estimator of KL(old || new), Schulman 2020: non-negative for every token.
        log_ratio_N = (logprob_N.detach() - old_N)[counted_N]
        sums["kl"] += (log_ratio_N.exp() - 1 - log_ratio_N).sum().item()
        sums["loss"] += total.item()
        sums["tokens"] += counted_N.sum().item()
    return sums


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    stats: TokenStats,
    decision: Decision,
    config: Config,
    aggregation: str,
) -> dict[str, float]:
    """Makes `loss.passes` x `batch.updates_per_step` optimizer updates from one step's rollouts; returns metrics.

    An update whose share has no rollout with a gradient is skipped and counted in `updates_empty`. Raises
    NonFiniteError when a loss or the gradient norm is not finite: that update is not made, those before it in the step
    stay, and the message says how many.
    """
    loss = policy_loss(config)
    shares = torch.arange(rollouts.P).tensor_split(config.batch.updates_per_step)
    sums: dict[str, float] = dict.fromkeys(("loss", "tokens", "low", "high", "dual", "kl"), 0.0)
    norms: list[float] = []
    empty = 0
    policy.model.train()
    for _ in range(config.loss.passes):
        for groups in shares:
            share = make_share(rollouts, stats, decision, torch.isin(rollouts.group_R, groups), config, aggregation)
            if not share.active:
                empty += 1
                continue
            optimizer.zero_grad(set_to_none=True)
            try:
                shares_sums = accumulate(policy, share, loss, config.batch.tokens_per_microbatch)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}, after {len(norms)} updates of this step") from None
            for name, value in shares_sums.items():
                sums[name] += value
            norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.optimizer.grad_clip).item()
            if not math.isfinite(norm):
                raise NonFiniteError(f"the gradient norm is {norm}, after {len(norms)} updates of this step")
            optimizer.step()
            norms.append(norm)
    optimizer.zero_grad(set_to_none=True)
    tokens, updates = max(sums["tokens"], 1.0), max(len(norms), 1)
    return {
        "loss": sums["loss"] / updates,
        "grad_norm": sum(norms) / updates,
        "clip_fraction_low": sums["low"] / tokens,
        "clip_fraction_high": sums["high"] / tokens,
        "clip_fraction_dual": sums["dual"] / tokens,
        "kl": sums["kl"] / tokens,
        "updates": float(len(norms)),
        "updates_empty": float(empty),
    }
