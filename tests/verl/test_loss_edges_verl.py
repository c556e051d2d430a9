"""verl's losses at their edges: importance weights, log-ratios that are far off, and what is no registered loss."""

import inspect
import re
from dataclasses import replace

import pytest
import torch
from both_losses import SAMPLES, assert_same, configs, core_algos, ours, random_tokens, verls

from entrocraft import methods
from entrocraft.kl import ESTIMATORS
from entrocraft.losses import PPOClip
from entrocraft.methods import Plain, Tokens, make_objective
from entrocraft.surrogates import build_loss

SEEDS = (0, 1, 2, 3)
WIDE = PPOClip(clip_low=1.0, clip_high=1.0, dual_clip=None)
CLIPS = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15}

METHODS = {
    "vanilla": Plain(loss_fn=PPOClip(clip_low=0.1, clip_high=0.15)),
    **{name: Plain(loss_fn=build_loss(name, clip_low=0.1, clip_high=0.15)) for name in ("gspo", "cispo", "geo_mean")},
    **{name: Plain(loss_fn=build_loss(name)) for name in ("sapo", "gpg")},
    "kl_cov": methods.build("kl_cov", fraction=0.1),
    "clip_cov": methods.build("clip_cov", fraction=1.0, loss_fn=PPOClip(clip_low=0.1, clip_high=0.15, dual_clip=None)),
}
CHOICE = {"kl_cov": {"kl_cov_ratio": 0.1, "ppo_kl_coef": 1.0}, "clip_cov": {"clip_cov_ratio": 1.0}}


def _weighed(seed: int, *, by_token: bool, by_sequence: bool) -> Tokens:
    tokens = random_tokens(seed, by_token=by_token)
    generator = torch.Generator().manual_seed(seed)
    count = len(tokens.group_R) if by_sequence else len(tokens.mask_T)
    weight = 0.1 + 2 * torch.rand(count, generator=generator)
    return replace(tokens, importance_T=weight[tokens.rollout_T] if by_sequence else weight)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "geo_mean"])
def test_importance_weights_multiply_the_loss(seed, name):
    tokens = _weighed(seed, by_token=name.endswith("cov"), by_sequence=False)
    theirs = verls(name, tokens, "seq_mean_token_mean", CHOICE.get(name), **CLIPS)
    assert_same(ours(METHODS[name], tokens, "seq_mean_token_mean"), theirs)
    plain = ours(METHODS[name], replace(tokens, importance_T=None), "seq_mean_token_mean")
    assert float((plain[1] - theirs[1]).norm() / theirs[1].norm()) > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_importance_weights_of_geo_mean(seed):
    """On purpose: verl weighs a sequence by the geometric mean of its weights, ours each token by its own.

    Where a sequence has one weight, they are the same.
    """
    tokens = _weighed(seed, by_token=False, by_sequence=True)
    theirs = verls("geo_mean", tokens, "token_mean", **CLIPS)
    assert_same(ours(METHODS["geo_mean"], tokens, "seq_mean_token_mean"), theirs)
    apart = _weighed(seed, by_token=False, by_sequence=False)
    assert apart.importance_T is not None
    logw_T, counted_T = apart.importance_T.log() * apart.mask_T, apart.mask_T.float()
    mean_R, count_R = (
        torch.zeros(len(apart.group_R)).index_add(0, apart.rollout_T, one_T) for one_T in (logw_T, counted_T)
    )
    weight_T = (mean_R / count_R).exp()[apart.rollout_T]
    theirs = verls("geo_mean", apart, "token_mean", **CLIPS)
    assert_same(ours(METHODS["geo_mean"], replace(apart, importance_T=weight_T), "seq_mean_token_mean"), theirs)
    mine = ours(METHODS["geo_mean"], apart, "seq_mean_token_mean")
    assert float((mine[1] - theirs[1]).norm() / theirs[1].norm()) > 0.1


def _far(log_ratio: float, advantage: float) -> Tokens:
    """A random batch whose first rollout is one counted token with this log-ratio and advantage."""
    tokens = random_tokens(6)
    first_T = tokens.rollout_T == 0
    alone_T = torch.arange(len(first_T)) == 0
    return replace(
        tokens,
        old_logprob_T=torch.where(first_T, tokens.stats.logprob_T - log_ratio, tokens.old_logprob_T),
        advantage_T=torch.where(first_T, advantage, tokens.advantage_T),
        mask_T=torch.where(first_T, alone_T, tokens.mask_T),
    )


@pytest.mark.parametrize(("log_ratio", "advantage"), [(15.0, -1.0), (9.0, -1.0), (-30.0, 1.0), (-12.0, -1.0)])
def test_gspo_stops_where_verls_does(log_ratio, advantage):
    tokens = _far(log_ratio, advantage)
    mine = ours(METHODS["gspo"], tokens, "seq_mean_token_mean")
    theirs = verls("gspo", tokens, "seq_mean_token_mean", **CLIPS)
    assert_same(mine, theirs)
    assert bool(mine[1][0] == 0) == bool(theirs[1][0] == 0)


@pytest.mark.parametrize(
    ("name", "method", "clips"),
    [
        ("clip_cov", methods.build("clip_cov", fraction=1e-9, lower=98.0, upper=99.0, loss_fn=WIDE), (1.0, 1.0)),
        ("kl_cov", methods.build("kl_cov", fraction=1e-9), (0.2, 0.2)),
        ("geo_mean", Plain(loss_fn=build_loss("geo_mean")), (0.4, 0.4)),
    ],
)  # fmt: skip
def test_far_log_ratios_are_not_clamped_by_verl(name, method, clips):
    """On purpose: ours stop at exp(20), without gradient there; verl's ratio, and loss, of that token are e^25.

    Within the limit, at e^8, both are the same.
    """
    choice = {"clip_cov": {"clip_cov_ratio": 1e-9, "clip_cov_lb": 98.0, "clip_cov_ub": 99.0},
              "kl_cov": {"kl_cov_ratio": 1e-9, "ppo_kl_coef": 1.0}}.get(name)  # fmt: skip
    arguments = {"policy_loss": choice, "clip_ratio_low": clips[0], "clip_ratio_high": clips[1]}
    near, far = _far(8.0, -1.0), _far(25.0, -1.0)
    assert_same(ours(method, near, "seq_mean_token_mean"), verls(name, near, "seq_mean_token_mean", **arguments))
    mine, theirs = ours(method, far, "seq_mean_token_mean"), verls(name, far, "seq_mean_token_mean", **arguments)
    assert float(theirs[1][0]) > 1e8
    assert float(mine[1][0]) == 0.0
    torch.testing.assert_close(mine[1][1:], theirs[1][1:], rtol=1e-6, atol=1e-7 * float(mine[1].abs().max()))


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_the_entropy_that_a_bonus_pays_for(mode):
    """verl's `compute_entropy_loss`, from logits, against what our bonus takes off a loss; values and gradients."""
    tokens = random_tokens(7)
    lengths_R = torch.tensor(tokens.lengths_R)
    kept = torch.arange(int(lengths_R.max()))[None] < lengths_R[:, None]
    logits_RLV = torch.randn(*kept.shape, 11, generator=torch.Generator().manual_seed(7), requires_grad=True)
    mask_RL = torch.zeros_like(kept).masked_scatter(kept, tokens.mask_T)
    theirs = core_algos.compute_entropy_loss(logits_RLV, mask_RL.float(), mode)
    aggregation, bonus = mode.replace("-", "_"), methods.build("entropy_bonus", coefficient=0.7)
    objective = make_objective(
        bonus, replace(tokens, advantage_T=torch.zeros(len(tokens.mask_T))), {}, aggregation=aggregation
    )
    entropy_T = torch.distributions.Categorical(logits=logits_RLV[kept]).entropy()
    mine = objective(tokens.stats.logprob_T, entropy_T, slice(0, len(entropy_T))) / -0.7
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    gradients = [torch.autograd.grad(one, logits_RLV, retain_graph=True)[0] for one in (mine, theirs)]
    torch.testing.assert_close(*gradients, rtol=2e-6, atol=1e-6 * float(gradients[1].abs().max()))


@pytest.mark.parametrize("seed", SEEDS)
def test_reinforce_with_importance_weights(seed):
    """verl's loss of its bypass mode is ours of plain policy gradient, `gpg`."""
    tokens = _weighed(seed, by_token=True, by_sequence=False)
    assert tokens.importance_T is not None
    lengths_R = torch.tensor(tokens.lengths_R)
    kept = torch.arange(int(lengths_R.max()))[None] < lengths_R[:, None]

    def padded(value_T):
        return torch.zeros(kept.shape, dtype=value_T.dtype).masked_scatter(kept, value_T)

    logprob_T = tokens.stats.logprob_T.clone().requires_grad_()
    loss, _ = core_algos.compute_policy_loss_reinforce(
        padded(tokens.old_logprob_T), padded(logprob_T), padded(tokens.advantage_T), padded(tokens.mask_T).float(),
        "seq-mean-token-sum", configs.ActorConfig(strategy="fsdp", rollout_n=SAMPLES, use_dynamic_bsz=True),
        padded(tokens.importance_T),
    )  # fmt: skip
    theirs = loss.detach(), torch.autograd.grad(loss, logprob_T)[0]
    assert_same(ours(METHODS["gpg"], tokens, "seq_mean_token_sum"), theirs)


def test_every_function_of_verl_is_compared_or_named():
    here = {
        name
        for name, one in inspect.getmembers(core_algos, inspect.isfunction)
        if one.__module__ == core_algos.__name__
    }
    registered = {one.__name__ for one in core_algos.POLICY_LOSS_REGISTRY.values()}
    registered |= {one.__name__ for one in core_algos.ADV_ESTIMATOR_REGISTRY.values()}
    compared = {"agg_loss", "compute_entropy_loss", "compute_policy_loss_reinforce", "kl_penalty", "kl_penalty_forward"}
    # The registries themselves, the older spelling of vanilla, and what needs a critic, a schedule of KL or resampling.
    others = {
        "register_policy_loss", "get_policy_loss_fn", "register_adv_est", "get_adv_estimator_fn", "get_kl_controller",
        "compute_policy_loss", "compute_rewards", "compute_value_loss", "compute_pf_ppo_reweight_data",
    }  # fmt: skip
    assert here == registered | compared | others


def test_every_kl_of_verl_is_here_or_named_as_missing():
    names = set(re.findall(r'"(\w+)"', inspect.getsource(core_algos.kl_penalty_forward)))
    # kl, mse and low_var_kl are further names of k1, k2, k3; full is not implemented there, abs is no estimate of KL.
    assert names == {"k1", "kl", "k2", "mse", "k3", "low_var_kl", "abs", "full"}
    assert {"k1", "k2", "k3", "k1+", "k3+"} == set(ESTIMATORS)
