"""Decision: what a controller hands back for one batch."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entrocraft.batch import Batch
from entrocraft.guard import carrying, taught
from entrocraft.verdict import Verdict
from entrocraft.waves import effective_share


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
    """Which tokens the loss of this step may use, with which advantages, and why.

    keep_T: bool `[T]`; False takes a token out of the loss (`losses.token_weights`). Tokens outside the mask follow
        their rollout, or stay True where single tokens are judged.
    keep_R: bool `[R]`; some token of the rollout is kept. Rollouts where it is False need no forward pass.
    advantage_R: fp32 `[R]`; what the loss must use.
    direction: +1 entropy above the band, -1 below it, 0 inside.
    bypassed: `Guard` or `Release` set the rule's verdict aside and everything is kept.
    reason: one sentence.
    metrics: plain floats; NaN where a quantity is not defined for this batch.

    Raises:
        ValueError: a tensor of another dtype, not one-dimensional, keep_R and advantage_R of different length, or a
            direction other than -1, 0 and +1.
    """

    keep_T: Tensor
    keep_R: Tensor
    advantage_R: Tensor
    direction: int
    bypassed: bool
    reason: str
    metrics: dict[str, float]

    def __post_init__(self) -> None:
        rollouts = self.keep_R.numel()
        for name, value, dtype in (
            ("keep_T", self.keep_T, torch.bool),
            ("keep_R", self.keep_R, torch.bool),
            ("advantage_R", self.advantage_R, torch.float32),
        ):
            size = value.numel() if name == "keep_T" else rollouts
            if value.shape != (size,) or value.dtype != dtype:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: expected ({size},) and {dtype}"
                )
        if self.direction not in (-1, 0, 1):
            raise ValueError(f"direction = {self.direction!r}: expected +1 above the band, -1 below it, 0 inside")


def entropy_metrics(batch: Batch) -> dict[str, float]:
    """What the batch's entropy looks like, in nats, before anything is rejected."""
    return {
        "entropy": batch.entropy,
        "entropy_seq_mean": batch.entropy_seq_mean,
        "entropy_p10": batch.entropy_percentile(0.1),
        "entropy_p50": batch.entropy_percentile(0.5),
        "entropy_p90": batch.entropy_percentile(0.9),
        "logprob_positive": batch.logprob_mean(batch.advantage_R > 0),
        "logprob_negative": batch.logprob_mean(batch.advantage_R < 0),
    }


def keep_metrics(batch: Batch, verdict: Verdict) -> dict[str, float]:
    """What was kept; a weight of 0 rejects a rollout. Where single tokens are judged look at the tokens' fraction:
    those of rollouts count each that keeps any.

    authority: share of rollouts with an advantage other than 0 and a token that counts. active_fraction: of all
    rollouts, those of them that are kept; active_fraction_negative: with an advantage below 0 (what collapses in arXiv
    2604.26326, App. C.5); kept_groups: the prompts of the active. acceptance_mean: mean chance of being kept, which for
    a rule that does not draw is the kept fraction itself. weight_min, weight_mean, weight_max: of what the advantage of
    each kept rollout is multiplied by (c_x under `corrections.group_scale`), 1 where the rule does not weigh.
    effective_share: effective sample size of those weights over R, rejected rollouts weighing 0; the kept fraction
    where all weigh the same.
    """
    keep_R = taught(verdict)
    chance_R = keep_R if verdict.probability_R is None else verdict.probability_R
    active_R = keep_R & (verdict.advantage_R != 0) & (batch.counted_R > 0)
    weight_R = keep_R * (1.0 if verdict.weight_R is None else verdict.weight_R)
    weight_N = weight_R[keep_R]
    tokens = float(batch.counted_R[keep_R].sum())
    if verdict.keep_T is not None:
        tokens = float(np.count_nonzero(verdict.keep_T & batch.mask_T & keep_R[batch.rollout_T]))
    return {
        "kept_fraction": float(keep_R.mean()),
        "acceptance_mean": math.fsum(chance_R) / len(chance_R),
        "weight_min": float(weight_N.min()) if len(weight_N) else math.nan,
        "weight_mean": math.fsum(weight_N) / len(weight_N) if len(weight_N) else math.nan,
        "weight_max": float(weight_N.max()) if len(weight_N) else math.nan,
        "effective_share": effective_share(weight_R),
        "kept_token_fraction": tokens / len(batch.entropy_N),
        "kept_fraction_positive": _share(keep_R, batch.advantage_R > 0),
        "kept_fraction_negative": _share(keep_R, batch.advantage_R < 0),
        "kept_groups": float(len(np.unique(batch.group_R[active_R]))),
        "active_fraction": float(active_R.mean()),
        "active_fraction_negative": float((active_R & (verdict.advantage_R < 0)).mean()),
        "authority": float(carrying(batch, verdict).mean()),
    }


def _share(keep_R: np.ndarray, of_R: np.ndarray) -> float:
    return float(keep_R[of_R].mean()) if of_R.any() else math.nan
