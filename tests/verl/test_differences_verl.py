"""What of verl is here and what is not, the edges of its formulas, and where ours differ on purpose.

Uneven groups, rollouts alone or without a token, far log-ratios, rejection of rollouts.
"""

import itertools

import pytest
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights, compute_rollout_rejection_mask

from entrocraft import advantages
from entrocraft.importance import ImportanceWeights
from entrocraft.kl import kl
from entrocraft.losses import token_weights

# verl's name: ours. The vectorised ones are the same estimators, computed otherwise.
SAME = {
    "grpo": "grpo",
    "grpo_vectorized": "grpo",
    "rloo": "rloo",
    "rloo_vectorized": "rloo",
    "opo": "opo",
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
}
# They need a critic, a greedy rollout, several rewards, pass@k, or gradient norms; gpg is dr_grpo times a number.
NOT_OURS = {"gae", "remax", "gdpo", "grpo_passk", "gpg", "optimal_token_baseline", "tir_optimal_token_baseline"}

REWARD = [1.0, 0.0, 0.5, 0.25, 1.0, 0.0, 0.75, 0.0]
GROUP = [0, 0, 0, 1, 1, 1, 1, 1]
LENGTH = [3, 5, 1, 4, 2, 6, 1, 2]


def _theirs(name, rewards, groups, lengths, **options):
    """The estimator's number for each rollout, read off its first token."""
    mask_RL = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).float()
    reward_RL = torch.zeros_like(mask_RL)
    reward_RL[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = torch.tensor(rewards)
    estimate = core_algos.get_adv_estimator_fn(name)
    arguments = {"token_level_rewards": reward_RL, "response_mask": mask_RL, "index": torch.tensor(groups).numpy()}
    advantage_RL, _ = estimate(**arguments, config=AlgoConfig(gamma=1.0), **options)
    return advantage_RL[:, 0]


def _ours(name, rewards, groups, lengths):
    return advantages.build(name)(torch.tensor(rewards), torch.tensor(groups), torch.tensor(lengths))


def test_every_estimator_of_verl_is_accounted_for():
    assert set(core_algos.ADV_ESTIMATOR_REGISTRY) == set(SAME) | NOT_OURS
    assert set(SAME.values()) <= set(advantages.ADVANTAGES)


@pytest.mark.parametrize("name", SAME)
def test_uneven_groups(name):
    theirs_R = _theirs(name, REWARD, GROUP, LENGTH).float()
    torch.testing.assert_close(_ours(SAME[name], REWARD, GROUP, LENGTH), theirs_R, rtol=1e-6, atol=1e-7)


def test_gpg_is_dr_grpo_times_the_share_of_rewards_that_are_not_zero():
    factor = len(REWARD) / sum(r != 0 for r in REWARD)
    ours_R = factor * _ours("dr_grpo", REWARD, GROUP, LENGTH)
    torch.testing.assert_close(ours_R, _theirs("gpg", REWARD, GROUP, LENGTH), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SAME)
def test_a_rollout_alone_in_its_group(name):
    rewards, groups, lengths = [*REWARD, 0.8], [*GROUP, 2], [*LENGTH, 3]
    ours_R = _ours(SAME[name], rewards, groups, lengths)
    theirs_R = _theirs(name, rewards, groups, lengths).float()
    if name == "rloo_vectorized":
        # On purpose: verl's two RLOOs disagree, 0 here and the reward in the other; ours is the reward, as in `grpo`.
        assert float(theirs_R[-1]) == 0.0
        assert float(ours_R[-1]) == pytest.approx(0.8)
        ours_R, theirs_R = ours_R[:-1], theirs_R[:-1]
    torch.testing.assert_close(ours_R, theirs_R, rtol=1e-6, atol=1e-7)


def test_equal_rewards_are_exactly_nothing_here_and_rounding_there():
    # On purpose: verl subtracts a rounded mean and divides by 1e-6; eq5 counts whose advantage is not 0.
    largest = 0.0
    for value, size in itertools.product((0.1, 0.3, 0.7, 0.9), (3, 6, 7, 9)):
        arguments = [value] * size, [0] * size, [2] * size
        assert _ours("grpo", *arguments).tolist() == [0.0] * size
        largest = max(largest, float(_theirs("grpo", *arguments).abs().max()))
    assert 1e-3 < largest < 0.1


def test_opo_of_a_group_without_tokens():
    # On purpose: verl's baseline is 0 / 0 there; ours is 0, and no token of the loss ever reads it.
    rewards, groups = [1.0, 0.0], [0, 0]
    mask_RL = torch.zeros(2, 3)
    reward_RL = torch.tensor(rewards)[:, None] * torch.tensor([0.0, 0.0, 1.0])
    theirs_RL, _ = core_algos.compute_opo_outcome_advantage(reward_RL, mask_RL, torch.tensor(groups).numpy())
    assert bool(theirs_RL.isnan().all())
    assert _ours("opo", rewards, groups, [0, 0]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "penalty"), [("k1", "k1"), ("k2", "k2"), ("k3", "k3"), ("k1+", "k1+"), ("k3+", "k3+")]
)
def test_kl_beyond_its_clamps(kind, penalty):
    # d = ref - logprob: below -20, between, where e^d - d - 1 passes 10, above 20.
    logprob_T = torch.tensor([-0.5, -3.0, -3.5, -40.0], requires_grad=True)
    ref_T = torch.tensor([-30.0, -0.7, -0.5, -0.25])
    ours_T, theirs_T = kl(logprob_T, ref_T, kind=kind), core_algos.kl_penalty(logprob_T, ref_T, penalty)
    torch.testing.assert_close(ours_T, theirs_T, rtol=1e-6, atol=1e-7)
    gradients = [torch.autograd.grad(value_T.sum(), logprob_T)[0] for value_T in (ours_T, theirs_T)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


# -- rollout correction


def _ragged(seed, spread):
    """Padded log-ratios and mask of 12 rollouts with holes, one of them without a token that counts."""
    generator = torch.Generator().manual_seed(seed)
    mask_RL = torch.rand(12, 8, generator=generator) < 0.6
    mask_RL[:, 0], mask_RL[7] = True, False
    rollout_T = torch.arange(12).repeat_interleave(8)
    return spread * torch.randn(12, 8, generator=generator), mask_RL, rollout_T


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("level", "option"), [("token", "token_k1"), ("sequence", "seq_sum_k1"), ("geometric", "seq_mean_k1")]
)
@pytest.mark.parametrize(("low", "high"), [(0.9, 1.25), (0.999, 1.001)])
def test_rejection(low, high, level, option, seed):
    # On purpose: verl's k1 is log(sampler / policy), so its bounds are those of 1 / ratio; ours are of the ratio.
    log_ratio_RL, mask_RL, rollout_T = _ragged(seed, 0.3 if high > 1.1 else 2e-3)
    theirs_RL, _ = compute_rollout_rejection_mask(
        log_ratio_RL * mask_RL, mask_RL.float(), rollout_rs=option, rollout_rs_threshold=f"{1 / high}_{1 / low}"
    )
    made = ImportanceWeights(level=level, action="reject", low=low, high=high)
    log_ratio_T, mask_T = log_ratio_RL.flatten(), mask_RL.flatten()
    weight_T, metrics = made(log_ratio_T, torch.zeros_like(log_ratio_T), rollout_T, mask_T, 12)
    assert torch.equal(weight_T, theirs_RL.flatten())
    assert 0 < metrics["importance_outside"] < 1


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_metrics_of_the_weights(level):
    log_ratio_RL, mask_RL, rollout_T = _ragged(0, 0.3)
    theirs_RL, theirs = compute_rollout_correction_weights(
        log_ratio_RL * mask_RL, mask_RL.float(), rollout_is=level, rollout_is_threshold=1.2
    )
    log_ratio_T = log_ratio_RL.flatten()
    made = ImportanceWeights(level=level, high=1.2)
    weight_T, ours = made(log_ratio_T, torch.zeros_like(log_ratio_T), rollout_T, mask_RL.flatten(), 12)
    torch.testing.assert_close(weight_T, theirs_RL.flatten(), rtol=1e-6, atol=1e-7)
    # On purpose: verl gives the largest token weight after the cut, which is the cut; ours are of the ratios before it.
    assert ours["importance_max"] > 1.2
    largest = 1.2 if level == "token" else ours["importance_max"]
    assert theirs["rollout_is_max"] == pytest.approx(largest, rel=1e-5)
    assert ours["importance_ess"] == pytest.approx(theirs["rollout_is_eff_sample_size"], rel=1e-5)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_aggregation_with_a_rollout_that_counts_nowhere(mode):
    loss_RL, mask_RL, rollout_T = _ragged(1, 1.0)
    padded_RL = loss_RL.clone().requires_grad_()
    theirs = core_algos.agg_loss(padded_RL, mask_RL.float(), mode)
    (theirs_RL,) = torch.autograd.grad(theirs, padded_RL)
    group_R = torch.arange(12) // 4
    weight_T = token_weights(rollout_T, mask_RL.flatten(), group_R, aggregation=mode.replace("-", "_"))
    torch.testing.assert_close(weight_T, theirs_RL.flatten(), rtol=1e-6, atol=0.0)
    assert not weight_T.view(12, 8)[7].any()
    torch.testing.assert_close((weight_T * loss_RL.flatten()).sum(), theirs.detach(), rtol=1e-6, atol=1e-7)
