"""The penalty for leaving a reference: its gradient against a plain loop, what it runs, and what it costs when off."""

import dataclasses
import math

import pytest
import torch

from entrocraft import Decision
from entrocraft.train.config import BatchConfig, Config, ModelConfig, SamplingConfig
from entrocraft.train.config_lora import LoraConfig
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.config_reference import ReferenceConfig
from entrocraft.train.control import build_method
from entrocraft.train.loading import load
from entrocraft.train.parallel import Ranks
from entrocraft.train.policy import Policy
from entrocraft.train.reference import Reference, divergence
from entrocraft.train.sampling import HuggingFaceEngine
from entrocraft.train.step import Learning, accumulate, make_share
from entrocraft.train.tiny_model import build_tiny_model

CPU = torch.device("cpu")
SHAPE = TinyModelConfig(hidden_size=16, layers=1, heads=2, mlp_size=32, context=64)
PROMPTS = [(5, 6, 7), (9, 10), (30, 31, 32, 33)]
ALL = torch.ones(6, dtype=torch.bool)


def make_config(**reference):
    return Config(
        model=ModelConfig(tiny=SHAPE),
        batch=BatchConfig(prompts_per_step=3, samples_per_prompt=2, tokens_per_microbatch=64),
        sampling=SamplingConfig(max_response_tokens=7, temperature=0.9),
        reference=ReferenceConfig(**reference),
        seed=5,
    )


@pytest.fixture
def batch():
    """A float64 policy, its rollouts and scores, and a decision that rejects the first and the third."""
    model, tokenizer = build_tiny_model(SHAPE, 0)
    policy = Policy(model.double(), tokenizer, temperature=0.9, device=CPU)
    engine = HuggingFaceEngine(policy.model, make_config().sampling, eos_ids=range(3, 40), pad_id=0)
    rollouts = engine.sample(PROMPTS, 2, stream=(0,))
    keep_R = torch.tensor([False, True, False, True, True, True])
    advantage_R = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 2.0])
    decision = Decision(
        keep_T=keep_R[rollouts.rollout_T],
        keep_R=keep_R,
        advantage_R=advantage_R,
        direction=0,
        bypassed=False,
        reason="",
        metrics={},
    )
    return policy, rollouts, policy.score(rollouts, 64), decision


def logprobs(policy, rollouts, r):
    """Of one rollout's response, by transformers' own logits."""
    response = rollouts.token_T[rollouts.rollout_T == r]
    prompt = rollouts.prompts[int(rollouts.group_R[r])]
    ids = torch.cat([torch.tensor(prompt), response])[None]
    logits = policy.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double() / 0.9
    return logits.log_softmax(-1).gather(1, response[:, None])[:, 0]


def plain_gradient(policy, other, rollouts, stats, decision, config, weights=None):
    """weights: of each rollout's tokens in the policy loss and in the penalty; None: the mean over all tokens."""
    even = [1 / rollouts.T] * rollouts.R
    policy_R, penalty_R = weights or (even, even)
    total, start = torch.zeros((), dtype=torch.float64), 0
    for r, length in enumerate(rollouts.length_R.tolist()):
        logprob, old = logprobs(policy, rollouts, r), stats.logprob_T[start : start + length]
        start += length
        if decision.keep_R[r]:
            total = total - (float(decision.advantage_R[r]) * (logprob - old).exp()).sum() * policy_R[r]
        if decision.keep_R[r] or config.kl_on == "all":
            with torch.no_grad():
                reference = logprobs(other, rollouts, r)
            d = reference - logprob
            per_token = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1, "k3+": d**2 / 2}[config.kl]
            total = total + config.kl_coefficient * per_token.sum() * penalty_R[r]
    total.backward()
    gradients = [p.grad.clone() for p in policy.model.parameters()]
    policy.model.zero_grad()
    return gradients


@pytest.mark.parametrize("kl_on", ["all", "kept"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "k3+"])
def test_gradient_equals_a_plain_loop(batch, kl, kl_on):
    policy, rollouts, stats, decision = batch
    config = make_config(kl_coefficient=0.7, kl=kl, kl_on=kl_on)
    reference = Reference.load(config, policy, Ranks(), CPU)  # built from another seed than the policy
    assert reference is not None
    reference.policy.model.double()
    penalty = reference.penalty(rollouts, stats, decision, 64)
    expected = plain_gradient(policy, reference.policy, rollouts, stats, decision, config.reference)
    learning = Learning(
        method=build_method(config), state={}, aggregation="token_mean", config=config, step=1, penalty=penalty
    )
    share = make_share(learning, rollouts, stats, decision, ALL)
    # Rollout 4 is kept and has no advantage: it has nothing to teach but its KL.
    assert share.active == ([0, 1, 2, 3, 4, 5] if kl_on == "all" else [1, 3, 4, 5])
    accumulate(policy, share, 64)
    for parameter, gradient in zip(policy.model.parameters(), expected, strict=True):
        assert float((parameter.grad - gradient).abs().max() / gradient.abs().max()) < 1e-5


def test_under_eq5_every_rollout_has_its_penalty(batch):
    """Those without an advantage too, which the mean of the policy loss leaves out."""
    policy, rollouts, stats, decision = batch
    config = make_config(kl_coefficient=0.7, kl="k2", kl_on="all")
    reference = Reference.load(config, policy, Ranks(), CPU)
    assert reference is not None
    reference.policy.model.double()
    groups = rollouts.group_R.tolist()
    taught = [g for g, kept, A in zip(groups, decision.keep_R, decision.advantage_R, strict=True) if kept and A != 0]
    weights = (
        [1 / (taught.count(g) * len(set(taught))) if g in taught else 0.0 for g in groups],
        [1 / (groups.count(g) * len(set(groups))) for g in groups],
    )
    expected = plain_gradient(policy, reference.policy, rollouts, stats, decision, config.reference, weights)
    penalty = reference.penalty(rollouts, stats, decision, 64)
    learning = Learning(
        method=build_method(config), state={}, aggregation="eq5", config=config, step=1, penalty=penalty
    )
    accumulate(policy, make_share(learning, rollouts, stats, decision, ALL), 64)
    for parameter, gradient in zip(policy.model.parameters(), expected, strict=True):
        assert float((parameter.grad - gradient).abs().max() / gradient.abs().max()) < 1e-5
    assert divergence(penalty, stats, rollouts.mask_T) > 0.01


@pytest.mark.parametrize("kl_on", ["all", "kept"])
def test_rollouts_that_the_advantage_takes_out_have_no_penalty(batch, kl_on):
    """As `psr` and `nsr` do: they are in neither mean, are not run, and are no part of the divergence."""
    policy, rollouts, stats, decision = batch
    config = make_config(kl_coefficient=0.7, kl="k2", kl_on=kl_on)
    reference = Reference.load(config, policy, Ranks(), CPU)
    assert reference is not None
    reference.policy.model.double()
    member_R = torch.tensor([True, True, False, False, True, True])
    member_T = member_R[rollouts.rollout_T]
    weights = [float(member) / int(member_T.sum()) for member in member_R]
    expected = plain_gradient(policy, reference.policy, rollouts, stats, decision, config.reference, (weights, weights))
    learning = Learning(
        method=build_method(config), state={}, aggregation="token_mean", config=config, step=1, member_R=member_R
    )
    left = learning.members(rollouts)
    penalty = reference.penalty(left, stats, decision, 64)
    share = make_share(dataclasses.replace(learning, penalty=penalty), rollouts, stats, decision, ALL)
    assert share.active == ([0, 1, 4, 5] if kl_on == "all" else [1, 4, 5])
    accumulate(policy, share, 64)
    for parameter, gradient in zip(policy.model.parameters(), expected, strict=True):
        assert float((parameter.grad - gradient).abs().max() / gradient.abs().max()) < 1e-5
    drift = []
    for r in share.active:
        with torch.no_grad():
            d = logprobs(reference.policy, rollouts, r) - logprobs(policy, rollouts, r)
        drift += (d.exp() - d - 1).tolist()
    assert divergence(penalty, stats, left.mask_T) == pytest.approx(sum(drift) / len(drift), rel=1e-6)
    nothing = dataclasses.replace(penalty, scored_T=torch.zeros_like(penalty.scored_T))
    assert math.isnan(divergence(nothing, stats, left.mask_T))


def test_without_a_penalty_rejected_rollouts_are_not_run_and_nothing_is_loaded(batch):
    policy, rollouts, stats, decision = batch
    config = make_config()
    assert Reference.load(config, policy, Ranks(), CPU) is None
    learning = Learning(method=build_method(config), state={}, aggregation="token_mean", config=config, step=1)
    assert make_share(learning, rollouts, stats, decision, ALL).active == [1, 3, 5]
    with pytest.raises(ValueError, match=r"reference.path = 'x': expected nothing beside reference.kl_coefficient = 0"):
        make_config(path="x")
    with pytest.raises(ValueError, match=r"reference.kl_coefficient = -1"):
        make_config(kl_coefficient=-1)


def test_the_reference_is_the_first_policy_and_with_adapters_the_model_without_them(batch):
    _, rollouts, _, decision = batch
    plain = make_config(kl_coefficient=0.1, offload=True)
    with_adapters = dataclasses.replace(plain, lora=LoraConfig(rank=2))
    for config in (plain, with_adapters):
        model, tokenizer = load(config.model, config.parallel, config.lora, device=CPU, size=1, seed=5)
        policy = Policy(model, tokenizer, temperature=0.9, device=CPU)
        first = policy.score(rollouts, 64)
        reference = Reference.load(config, policy, Ranks(), CPU)
        assert reference is not None
        assert torch.equal(reference.penalty(rollouts, first, decision, 64).ref_logprob_T, first.logprob_T)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        moved = policy.score(rollouts, 64)
        assert float((moved.logprob_T - first.logprob_T).abs().max()) > 0.01
        assert torch.equal(reference.penalty(rollouts, moved, decision, 64).ref_logprob_T, first.logprob_T)
        assert torch.equal(policy.score(rollouts, 64).logprob_T, moved.logprob_T)  # adapters are back
        assert (reference.policy is policy) == (config is with_adapters)


def test_adapters_freeze_the_rest_and_refuse_the_head():
    config = ModelConfig(tiny=dataclasses.replace(SHAPE, tied=False))
    model, _ = load(config, Config().parallel, LoraConfig(rank=2), device=CPU, size=1, seed=5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7
    assert all(".lora_" in name for name in trained)
    with pytest.raises(ValueError, match=r"lora.targets = \['lm_head'\]: expected layers other than the LM head"):
        load(config, Config().parallel, LoraConfig(rank=2, targets=["lm_head"]), device=CPU, size=1, seed=5)
    with pytest.raises(ValueError, match=r"lora.rank = 0: expected a positive number"):
        LoraConfig(rank=0)
