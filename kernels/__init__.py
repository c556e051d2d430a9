"""Fused linear head: per-token log-probability and full-vocabulary entropy without the logits."""

from entrocraft.kernels.clamped_entropy import clamped_entropy
from entrocraft.kernels.hf_head import FusedHead
from entrocraft.kernels.linear_logprob import linear_logprob_entropy, linear_logprob_entropy_reference
from entrocraft.kernels.linear_policy_loss import linear_policy_loss
from entrocraft.kernels.logits_logprob import logits_logprob_entropy, logits_logprob_entropy_reference
from entrocraft.kernels.plan import HeadPlan, plan_head
from entrocraft.kernels.token_stats import TokenStats

__all__ = [
    "FusedHead",
    "HeadPlan",
    "TokenStats",
    "clamped_entropy",
    "linear_logprob_entropy",
    "linear_logprob_entropy_reference",
    "linear_policy_loss",
    "logits_logprob_entropy",
    "logits_logprob_entropy_reference",
    "plan_head",
]
