"""The reference policy, and the penalty for leaving it.

A penalty is one more term of the loss, sum over tokens of  coefficient w_t k(logprob_t, ref_logprob_t),  with the
weights w_t of the aggregation, so that it is normalised as the policy loss is. Rejected rollouts have policy weight 0;
with `kl_on = all` this term keeps them in the batch, and they are run for it alone.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from entrocraft import Decision, Rollouts, TokenStats
from entrocraft.kl import kl
from entrocraft.losses import token_weights
from entrocraft.objective import PolicyObjective, Term
from entrocraft.train.config import Config
from entrocraft.train.config_reference import ReferenceConfig
from entrocraft.train.loading import load
from entrocraft.train.lora import without_adapters
from entrocraft.train.parallel import Ranks
from entrocraft.train.policy import Policy
from entrocraft.train.sharding import compute_dtype, needs_sharding


def _penalty_of(kind: str, logprob_N: Tensor, old_logprob_N: Tensor, ref_logprob_N: Tensor) -> Tensor:
    """In the signature of a `Term`, whose third argument is the reference's here."""
    return kl(logprob_N, ref_logprob_N, kind=kind)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Penalty:
    """The KL term of one batch of rollouts."""

    config: ReferenceConfig
    ref_logprob_T: Tensor
    """fp32, nats; the scored policy's own where a token's rollout was left out."""
    scored_T: Tensor
    """bool: tokens of the rollouts that were not."""

    def index(self, token_N: Tensor) -> "Penalty":
        """That of the tokens with these indices."""
        return replace(self, ref_logprob_T=self.ref_logprob_T[token_N], scored_T=self.scored_T[token_N])

    def added_to(
        self,
        objective: PolicyObjective,
        rollouts: Rollouts,
        *,
        aggregation: str,
        keep_T: Tensor,
        advantage_R: Tensor,
        scale: float | None,
    ) -> PolicyObjective:
        """The objective of these rollouts with the penalty in it."""
        kept_T = keep_T if self.config.kl_on == "kept" else None
        if kept_T is None:  # eq5 would leave rollouts without an advantage out, which drift like the others
            advantage_R = torch.ones_like(advantage_R)
        weight_T = token_weights(
            rollouts.rollout_T,
            rollouts.mask_T,
            rollouts.group_R,
            aggregation=aggregation,
            keep_T=kept_T,
            advantage_R=advantage_R,
            scale=scale,
        )
        term = Term(
            loss_fn=partial(_penalty_of, self.config.kl),
            advantage_T=self.ref_logprob_T,
            weight_T=self.config.kl_coefficient * weight_T,
        )
        return replace(objective, extra=(*objective.extra, term))


class Reference:
    """A frozen policy that scores what the trained one sampled."""

    def __init__(
        self, policy: Policy, config: ReferenceConfig, scoring: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.policy = policy
        self.config = config
        self._scoring = scoring

    @staticmethod
    def load(config: Config, policy: Policy, ranks: Ranks, device: torch.device) -> "Reference | None":
        """What `config.reference` asks for; None, and nothing loaded, at coefficient 0. All ranks call together.

        Raises ValueError for a reference with another vocabulary, and what loading a model raises.
        """
        own = config.reference
        if own.kl_coefficient == 0:
            return None
        if config.lora.rank is not None and own.path is None:
            return Reference(policy, own, partial(without_adapters, policy.model))
        model_config = replace(config.model, path=own.path or config.model.path, gradient_checkpointing=False)
        dtype = compute_dtype(config.parallel, device=device, pretrained=model_config.path is not None)
        sharded = needs_sharding(config.parallel, ranks.size, dtype)
        parallel = replace(config.parallel, cpu_offload=config.parallel.cpu_offload or (own.offload and sharded))
        model, tokenizer = load(model_config, parallel, device=device, size=ranks.size, seed=config.seed)
        model.requires_grad_(False)
        place = torch.device("cpu") if own.offload and not sharded else device
        frozen = Policy(model, tokenizer, temperature=policy.temperature, device=place, ranks=ranks)
        if frozen.vocab_size != policy.vocab_size:
            raise ValueError(
                f"reference.path = {own.path!r} has a vocabulary of {frozen.vocab_size} tokens, the policy of "
                f"{policy.vocab_size}; expected models with one tokenizer"
            )
        return Reference(frozen, own, partial(_on, frozen, device) if place != device else nullcontext)

    def penalty(self, rollouts: Rollouts, stats: TokenStats, decision: Decision, tokens: int) -> Penalty:
        """The penalty of a batch whose policy statistics are `stats`; `tokens` a micro-batch.

        Rollouts that will not be run, and those without a token that counts, are not scored here either.
        """
        wanted_R = torch.bincount(rollouts.rollout_T[rollouts.mask_T], minlength=rollouts.R) > 0
        if self.config.kl_on == "kept":
            wanted_R &= decision.keep_R
        ref_logprob_T = stats.logprob_T.clone()
        if bool(wanted_R.any()):
            with self._scoring():
                scored = self.policy.score(rollouts.select(wanted_R), tokens)
            ref_logprob_T[wanted_R[rollouts.rollout_T]] = scored.logprob_T.to(ref_logprob_T.dtype)
        return Penalty(config=self.config, ref_logprob_T=ref_logprob_T, scored_T=wanted_R[rollouts.rollout_T])


@contextmanager
def _on(policy: Policy, device: torch.device) -> Iterator[None]:
    """Brings a whole reference to the device for as long as it scores."""
    policy.model.to(device)
    home, policy.device = policy.device, device
    try:
        yield
    finally:
        policy.model.to(home)
        policy.device = home


def divergence(penalty: Penalty, stats: TokenStats, mask_T: Tensor) -> float:
    """Mean of k3 over the tokens that count and were scored, nats: how far the policy has moved from the reference. NaN
    where there is none."""
    return float(kl(stats.logprob_T, penalty.ref_logprob_T, kind="k3")[mask_T & penalty.scored_T].double().mean())
