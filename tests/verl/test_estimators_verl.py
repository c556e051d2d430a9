"""Advantages, aggregation, KL and importance weights against verl 0.9.1, values and gradients.

verl pads rollouts into [R, L] blocks with a 0/1 mask; here tokens are packed. The same random batch goes to both.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

from entrocraft import advantages
from entrocraft.importance import ImportanceWeights
from entrocraft.kl import kl
from entrocraft.losses import token_weights

SEEDS = (0, 1, 2)
GROUPS, SAMPLES, LONGEST = 4, 5, 9
ROLLOUTS = GROUPS * SAMPLES


class Batch(NamedTuple):
    """A ragged batch with holes in its mask (tool tokens), padded [R, L] for verl and packed [T] for us."""

    mask_RL: Tensor
    old_RL: Tensor
    logprob_RL: Tensor
    reward_R: Tensor
    group_R: Tensor
    rollout_T: Tensor
    inside_RL: Tensor

    def packed(self, value_RL: Tensor) -> Tensor:
        return value_RL[self.inside_RL]

    @property
    def mask_T(self) -> Tensor:
        return self.packed(self.mask_RL).bool()


def make_batch(seed: int, *, spread: float = 0.3, rewards: str = "binary", holes: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    length_R = torch.randint(1, LONGEST + 1, (ROLLOUTS,), generator=generator)
    inside_RL = torch.arange(LONGEST)[None] < length_R[:, None]
    mask_RL = inside_RL.clone()
    if holes:
        mask_RL &= (torch.rand(ROLLOUTS, LONGEST, generator=generator) < 0.85) | (torch.arange(LONGEST) == 0)[None]
    old_RL = -2.5 * torch.rand(ROLLOUTS, LONGEST, generator=generator)
    logprob_RL = old_RL + spread * torch.randn(ROLLOUTS, LONGEST, generator=generator)
    reward_R = torch.rand(ROLLOUTS, generator=generator)
    reward_R = (reward_R < 0.4).float() if rewards == "binary" else reward_R
    return Batch(
        mask_RL.float(), old_RL, logprob_RL, reward_R,
        torch.arange(GROUPS).repeat_interleave(SAMPLES),
        torch.arange(ROLLOUTS).repeat_interleave(length_R), inside_RL,
    )  # fmt: skip


def close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-6 of each element, in fp32, or within three roundings of the largest, of which small ones are the rest
    (verl subtracts rewards of size 1 in fp32)."""
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-6, atol=1.8e-7 * scale)


# -- advantages

ESTIMATORS = {
    "grpo": (core_algos.compute_grpo_outcome_advantage, {}),
    "dr_grpo": (core_algos.compute_grpo_outcome_advantage, {"norm_adv_by_std_in_grpo": False}),
    "rloo": (core_algos.compute_rloo_outcome_advantage, {}),
    "opo": (core_algos.compute_opo_outcome_advantage, {}),
    "reinforce_pp": (core_algos.compute_reinforce_plus_plus_outcome_advantage, {}),
    "reinforce_pp_baseline": (core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage, {}),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rewards", ["binary", "real"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages(name, rewards, seed):
    batch = make_batch(seed, rewards=rewards)
    last_R = (batch.mask_RL * torch.arange(1, LONGEST + 1)).argmax(1)
    reward_RL = torch.zeros(ROLLOUTS, LONGEST).scatter(1, last_R[:, None], batch.reward_R[:, None])
    estimate, options = ESTIMATORS[name]
    arguments = {"token_level_rewards": reward_RL, "response_mask": batch.mask_RL, "config": AlgoConfig(gamma=1.0)}
    theirs_RL, _ = estimate(**arguments, index=batch.group_R.numpy(), **options)
    ours_R = advantages.build(name)(batch.reward_R, batch.group_R, batch.mask_RL.sum(1).long())
    close(ours_R[:, None] * batch.mask_RL, theirs_RL)


# -- aggregation

MODES = {
    "token_mean": "token-mean",
    "seq_mean_token_sum": "seq-mean-token-sum",
    "seq_mean_token_mean": "seq-mean-token-mean",
    "seq_mean_token_sum_norm": "seq-mean-token-sum-norm",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", MODES)
def test_aggregation(mode, seed):
    batch = make_batch(seed)
    theirs = core_algos.agg_loss(loss_mat=batch.logprob_RL, loss_mask=batch.mask_RL, loss_agg_mode=MODES[mode])
    # verl's default is the padded width, ours the longest response, which padding cannot change.
    scale = float(LONGEST) if mode == "seq_mean_token_sum_norm" else None
    weight_T = token_weights(batch.rollout_T, batch.mask_T, batch.group_R, aggregation=mode, scale=scale)
    close((weight_T * batch.packed(batch.logprob_RL)).sum(), theirs)


# -- KL and importance weights


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kind", "penalty"), [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl"), ("k1+", "k1+"), ("k3+", "k3+")]
)
def test_kl(kind, penalty, seed):
    batch = make_batch(seed, spread=1.0)
    logprob_T = batch.packed(batch.logprob_RL).clone().requires_grad_()
    ref_T = batch.packed(batch.old_RL)
    ours_T, theirs_T = kl(logprob_T, ref_T, kind=kind), core_algos.kl_penalty(logprob_T, ref_T, penalty)
    close(ours_T, theirs_T)
    close(*(torch.autograd.grad(one_T.sum(), logprob_T)[0] for one_T in (ours_T, theirs_T)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    ("level", "action", "threshold"),
    [
        ("token", "truncate", 1.2),
        ("sequence", "truncate", 1.5),
        ("token", "mask", "0.7_1.3"),
        ("sequence", "mask", "0.5_2.0"),
    ],
)
def test_importance_weights(level, action, threshold, normalise, seed):
    batch = make_batch(seed)
    log_ratio_RL = (batch.logprob_RL - batch.old_RL) * batch.mask_RL
    theirs_RL, _ = compute_rollout_correction_weights(
        log_ratio_RL, batch.mask_RL, rollout_is=level, rollout_is_threshold=threshold,
        rollout_is_batch_normalize=normalise,
    )  # fmt: skip
    low, high = map(float, threshold.split("_")) if isinstance(threshold, str) else (0.0, threshold)
    made = ImportanceWeights(level=level, action=action, low=low, high=high, normalise=normalise)
    weight_T, _ = made(
        batch.packed(batch.logprob_RL), batch.packed(batch.old_RL), batch.rollout_T, batch.mask_T, ROLLOUTS
    )
    close(weight_T, batch.packed(theirs_RL))


def test_the_numbers_are_not_trivial():
    batch = make_batch(0)
    assert batch.mask_RL.sum() < batch.inside_RL.sum() < ROLLOUTS * LONGEST
    assert 0 < float(batch.reward_R.mean()) < 1
    assert math.isclose(float((batch.logprob_RL - batch.old_RL).std()), 0.3, rel_tol=0.3)
    assert np.isfinite(batch.logprob_RL.numpy()).all()
