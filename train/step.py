"""One training step's update: rollouts and a decision in, a better policy out.

The share of each optimizer update is fixed before anything is dropped, and so are the weights of its tokens; a rollout
whose tokens have no gradient adds nothing to the loss, so it is never run through the model.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entrocraft import Decision, ImportanceWeights, PolicyObjective, Rollouts, TokenStats
from entrocraft.losses import PPOClip
from entrocraft.methods import Method, State, Tokens, make_objective
from entrocraft.objective import LossFn
from entrocraft.surrogates import build_loss
from entrocraft.train.config import Config
from entrocraft.train.errors import NonFiniteError
from entrocraft.train.packing import MicroBatch, pack, sequence_lengths
from entrocraft.train.parallel import balanced
from entrocraft.train.policy import Policy
from entrocraft.train.reference import Penalty
from entrocraft.train.sharding import clip_gradients, last_of_update
from entrocraft.train.throughput import Work


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learning:
    """How a step's rollouts become losses: the method with its state at this step, and how tokens are averaged."""

    method: Method
    state: State
    aggregation: str
    config: Config
    step: int
    member_R: Tensor | None = None
    """bool: rollouts that the advantage estimator leaves in the batch at all. None: every one."""
    penalty: Penalty | None = None
    """What leaving the reference costs, for the same T tokens that are given to `make_share`."""
    importance: ImportanceWeights | None = None
    """Correction for a sampler that is not the policy, where the sampler gives its log-probabilities."""
    factor: float = 1.0
    """What the policy loss is multiplied by."""

    def objective(
        self, rollouts: Rollouts, stats: TokenStats, old_logprob_T: Tensor, advantage_R: Tensor, keep_T: Tensor | None
    ) -> PolicyObjective:  # fmt: skip
        """The loss of some rollouts as one optimizer update; `stats` are those of the policy it changes."""
        tokens = Tokens(
            stats=stats,
            old_logprob_T=old_logprob_T,
            advantage_T=advantage_R[rollouts.rollout_T],
            mask_T=rollouts.mask_T,
            rollout_T=rollouts.rollout_T,
            group_R=rollouts.group_R,
            keep_T=keep_T,
            importance_T=self.importance_T(rollouts, old_logprob_T),
            seed=self.config.seed,
            step=self.step,
        )
        scale = loss_scale(self.aggregation, self.config, rollouts.R)
        return make_objective(
            self.method, tokens, self.state, aggregation=self.aggregation, advantage_R=advantage_R, scale=scale
        )

    def members(self, rollouts: Rollouts) -> Rollouts:
        """The same rollouts, with the tokens of those that the advantage estimator takes out masked."""
        if self.member_R is None:
            return rollouts
        return replace(rollouts, mask_T=rollouts.mask_T & self.member_R[rollouts.rollout_T])

    def importance_T(self, rollouts: Rollouts, old_logprob_T: Tensor) -> Tensor | None:
        """Weights of the policy at the start of the step over the sampler; None where there is nothing to correct."""
        if self.importance is None or rollouts.sampler_logprob_T is None:
            return None
        return self.importance(
            old_logprob_T, rollouts.sampler_logprob_T, rollouts.rollout_T, rollouts.mask_T, rollouts.R
        ).weight_T


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share:
    """What one optimizer update sees: some prompts' rollouts, and their loss."""

    rollouts: Rollouts
    objective: PolicyObjective

    @property
    def active(self) -> list[int]:
        """Rollouts with a gradient."""
        return torch.unique(self.rollouts.rollout_T[self.objective.active_T]).tolist()


def policy_loss(config: Config) -> LossFn:
    """The configured loss of one token."""
    loss = config.loss
    if loss.policy == "ppo_clip":
        return PPOClip(clip_low=loss.clip_low, clip_high=loss.clip_high, dual_clip=loss.dual_clip)
    return build_loss(loss.policy, **loss.policy_options)


def loss_scale(aggregation: str, config: Config, rollouts: int) -> float | None:
    """Constant denominator of the aggregations that have one, tokens; None for those that count tokens themselves."""
    longest = float(config.sampling.max_response_tokens)
    return {"fixed": rollouts * longest, "seq_mean_token_sum_norm": longest}.get(aggregation)


def make_share(
    learning: Learning,
    rollouts: Rollouts,
    stats: TokenStats,
    decision: Decision,
    chosen_R: Tensor,
    *,
    moved: Policy | None = None,
) -> Share:
    """The rollouts where the bool `chosen_R` is True, weighed as one optimizer update.

    moved: the policy, where it is no longer what `stats` scored; it scores again if the method looks at where it is.
    """
    token_N = chosen_R[rollouts.rollout_T].nonzero()[:, 0]
    part, old = learning.members(rollouts).select(chosen_R), stats.index(token_N)
    now = old
    if moved is not None and learning.method.needs_current:
        now = moved.score(part, learning.config.batch.tokens_per_microbatch)
    advantage_R, keep_T = decision.advantage_R[chosen_R], decision.keep_T[token_N]
    objective = learning.objective(part, now, old.logprob_T, advantage_R, keep_T)
    if learning.factor != 1.0:
        objective = replace(objective, weight_T=learning.factor * objective.weight_T)
    if learning.penalty is not None:
        scale = loss_scale(learning.aggregation, learning.config, part.R)
        objective = learning.penalty.index(token_N).added_to(
            objective, part, aggregation=learning.aggregation, keep_T=keep_T, advantage_R=advantage_R, scale=scale
        )
    return Share(rollouts=part, objective=objective)


SIGNS = ("positive", "negative")
"""Of an advantage."""


def _zeros() -> dict[str, float]:
    sides = [f"{side}_{sign}" for side in ("low", "high") for sign in SIGNS]
    return dict.fromkeys(("loss", "tokens", "low", "high", "dual", "kl", *SIGNS, *sides, *Work.NAMES), 0.0)


def accumulate(policy: Policy, share: Share, tokens_per_microbatch: int) -> dict[str, float]:
    """Adds the gradient of the share's loss to the parameters; returns sums over its running tokens, for the metrics.

    The result does not depend on `tokens_per_microbatch`, nor on the number of ranks, beyond rounding: ranks share the
    rollouts out by length, and the weights of tokens are of the whole share. Raises NonFiniteError, on all ranks, for a
    NaN or infinite loss on any.
    """
    sums, trouble = _zeros(), None
    active = share.active
    mine = balanced(sequence_lengths(share.rollouts, active), policy.ranks.size)[policy.ranks.rank]
    batches = pack(share.rollouts, [active[i] for i in mine], tokens_per_microbatch)
    sums |= Work.of(share.rollouts, [active[i] for i in mine]).as_dict()
    count = policy.ranks.largest(len(batches))
    for number in range(count):
        last_of_update(policy.model, number + 1 == count)
        if number >= len(batches):
            policy.idle().backward()
            continue
        trouble = _learn(policy, share, batches[number], sums) or trouble
    parts = policy.ranks.gather((sums, trouble))
    troubles = [found for _, found in parts if found is not None]
    if troubles:
        raise NonFiniteError(troubles[0])
    return {name: sum(part[name] for part, _ in parts) for name in sums}


def _learn(policy: Policy, share: Share, batch: MicroBatch, sums: dict[str, float]) -> str | None:
    """The gradient of one micro-batch; adds to `sums` and says what is wrong with its loss, if anything."""
    _, lengths = torch.unique_consecutive(share.rollouts.rollout_T[batch.token_N], return_counts=True)
    objective = share.objective.take(batch.token_N, lengths.tolist()).to(policy.device)
    stats = policy.token_stats(batch, share.rollouts.token_T, clamped_share=objective.clamped_share)
    entropy_N = stats.entropy_T if stats.clamped_entropy_T is None else stats.clamped_entropy_T
    logprob_N = stats.logprob_T
    total = objective(logprob_N, entropy_N, slice(0, len(logprob_N)))
    total.backward()  # also where it is no number: other ranks wait for it
    of_sign = dict(zip(SIGNS, (objective.advantage_T > 0, objective.advantage_T < 0), strict=True))
    for name, clipped_N in objective.clipped(logprob_N.detach()).items():
        sums[name] += clipped_N.sum().item()
        for sign, sign_N in of_sign.items():
            sums[f"{'low' if name == 'low' else 'high'}_{sign}"] += (clipped_N & sign_N).sum().item()
    # k3 estimator of KL(old || new), Schulman 2020: non-negative for every token.
    counted_N = objective.weight_T != 0
    log_ratio_N = (logprob_N.detach() - objective.old_logprob_T)[counted_N]
    sums["kl"] += (log_ratio_N.exp() - 1 - log_ratio_N).sum().item()
    sums["loss"] += total.item()
    sums["tokens"] += counted_N.sum().item()
    for sign, sign_N in of_sign.items():
        sums[sign] += (counted_N & sign_N).sum().item()
    return None if torch.isfinite(total) else f"the loss of {len(logprob_N)} tokens is {total.item()}"


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    stats: TokenStats,
    decision: Decision,
    learning: Learning,
) -> dict[str, float]:
    """Makes `loss.passes` x `batch.updates_per_step` optimizer updates from one step's rollouts; returns metrics.

    An update whose share has no rollout with a gradient, or none at all, is skipped and counted in `updates_empty`: of
    prompts with a signal fewer may be left than there are updates. Raises NonFiniteError when a loss or the gradient
    norm is not finite: that update is not made, those before it in the step stay, and the message says how many.

    clip_fraction_SIDE: of all tokens. clip_fraction_SIDE_SIGN: of the tokens whose advantage has that sign, `dual`
    being on the high side. `Work.NAMES`: what went through the model.
    """
    config = learning.config
    shares = torch.arange(rollouts.P).tensor_split(config.batch.updates_per_step)
    sums = _zeros()
    norms: list[float] = []
    empty = 0
    for _ in range(config.loss.passes):
        for groups in shares:
            if not len(groups):
                empty += 1
                continue
            chosen_R = torch.isin(rollouts.group_R, groups)
            share = make_share(learning, rollouts, stats, decision, chosen_R, moved=policy if norms else None)
            if not share.active:
                empty += 1
                continue
            policy.model.train()
            optimizer.zero_grad(set_to_none=True)
            try:
                shares_sums = accumulate(policy, share, config.batch.tokens_per_microbatch)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}, after {len(norms)} updates of this step") from None
            for name, value in shares_sums.items():
                sums[name] += value
            norm = clip_gradients(policy.model, config.optimizer.grad_clip, policy.ranks)
            if not math.isfinite(norm):
                raise NonFiniteError(f"the gradient norm is {norm}, after {len(norms)} updates of this step")
            optimizer.step()
            norms.append(norm)
    optimizer.zero_grad(set_to_none=True)
    return _means(sums, norms) | {"updates_empty": float(empty)}


def _means(sums: dict[str, float], norms: list[float]) -> dict[str, float]:
    """Metrics of a step from sums over its updates."""
    tokens, updates = max(sums["tokens"], 1.0), max(len(norms), 1)
    return {
        "loss": sums["loss"] / updates,
        "grad_norm": sum(norms) / updates,
        "clip_fraction_low": sums["low"] / tokens,
        "clip_fraction_high": sums["high"] / tokens,
        "clip_fraction_dual": sums["dual"] / tokens,
        **{
            f"clip_fraction_{side}_{sign}": sums[f"{side}_{sign}"] / max(sums[sign], 1.0)
            for side in ("low", "high")
            for sign in SIGNS
        },
        "kl": sums["kl"] / tokens,
        "updates": float(len(norms)),
        **{name: sums[name] for name in Work.NAMES},
    }
