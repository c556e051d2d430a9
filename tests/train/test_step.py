"""The update: gradients against a plain loop without packing or weights, micro-batches, dropped rollouts, NaN."""

import dataclasses

import pytest
import torch

from entrocraft import Decision
from entrocraft.train.config import BatchConfig, Config, LossConfig, OptimizerConfig, SamplingConfig
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.control import build_method
from entrocraft.train.errors import NonFiniteError
from entrocraft.train.policy import Policy
from entrocraft.train.sampling import HuggingFaceEngine
from entrocraft.train.step import Learning, accumulate, make_share, update
from entrocraft.train.throughput import Work
from entrocraft.train.tiny_model import build_tiny_model

PROMPTS = [(5, 6, 7), (9, 10), (30, 31, 32, 33)]
GROUP = 4


def make_config(**loss):
    return Config(
        batch=BatchConfig(prompts_per_step=3, samples_per_prompt=GROUP, tokens_per_microbatch=512),
        sampling=SamplingConfig(max_response_tokens=9, temperature=0.9),
        loss=LossConfig(**loss),
        optimizer=OptimizerConfig(lr=0.1, grad_clip=1e9),
    )


def learning(config, aggregation="token_mean", **changes):
    arguments = {"method": build_method(config), "state": {}, "aggregation": aggregation, "step": 1} | changes
    return Learning(config=config, **arguments)


ALL = torch.ones(12, dtype=torch.bool)


@pytest.fixture
def batch():
    """A float64 policy, rollouts of ragged lengths, their scores shifted so that ratios leave 1, and a decision."""
    shape = TinyModelConfig(hidden_size=32, layers=2, heads=2, mlp_size=64, context=64)
    model, tokenizer = build_tiny_model(shape, 0)
    policy = Policy(model.double(), tokenizer, temperature=0.9, device=torch.device("cpu"))
    engine = HuggingFaceEngine(policy.model, make_config().sampling, eos_ids=range(3, 40), pad_id=0)
    rollouts = engine.sample(PROMPTS, GROUP, stream=(0,))
    stats = policy.score(rollouts, 512)
    noise_T = 0.3 * torch.randn(rollouts.T, dtype=torch.float64)
    stats = dataclasses.replace(stats, logprob_T=stats.logprob_T + noise_T)
    keep_R = torch.tensor([r not in (2, 5, 6) for r in range(12)])
    advantage_R = torch.randn(12)
    advantage_R[8] = 0.0
    decision = Decision(
        keep_T=keep_R[rollouts.rollout_T],
        keep_R=keep_R,
        advantage_R=advantage_R,
        direction=0,
        bypassed=False,
        reason="",
        metrics={},
    )
    return policy, rollouts, stats, decision


def plain_gradient(policy, rollouts, stats, decision, aggregation):
    """The same loss written as loops over sequences with the definition of each aggregation."""
    policy.model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    start = 0
    kept_tokens = sum(int(n) for n, k in zip(rollouts.length_R, decision.keep_R, strict=True) if k)
    active = {
        g: sum(1 for r in range(12) if r // GROUP == g and decision.keep_R[r] and decision.advantage_R[r] != 0)
        for g in range(3)
    }
    for r, length in enumerate(rollouts.length_R.tolist()):
        prompt, response = PROMPTS[r // GROUP], rollouts.token_T[start : start + length]
        old = stats.logprob_T[start : start + length]
        start += length
        if not decision.keep_R[r]:
            continue
        ids = torch.cat([torch.tensor(prompt), response])[None]
        logits = policy.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / 0.9
        ratio = (logits.log_softmax(-1).gather(1, response[:, None])[:, 0] - old).exp()
        a = float(decision.advantage_R[r])
        per_token = torch.maximum(-ratio * a, -ratio.clamp(0.8, 1.2) * a)
        if a < 0:
            per_token = torch.minimum(per_token, torch.full_like(per_token, -3.0 * a))
        share = {
            "token_mean": 1 / rollouts.T,
            "kept_tokens": 1 / kept_tokens,
            "seq_mean_token_sum": 1 / 12,
            "seq_mean_token_mean": 1 / (12 * length),
            "seq_mean_token_sum_norm": 1 / (12 * 9),
            "fixed": 1 / (12 * 9),
            "eq5": 1 / (3 * max(active[r // GROUP], 1)),
        }[aggregation]
        total = total + share * per_token.sum()
    total.backward()
    return total.item(), [p.grad.clone() for p in policy.model.parameters()]


AGGREGATIONS = [
    "token_mean",
    "kept_tokens",
    "seq_mean_token_sum",
    "seq_mean_token_mean",
    "seq_mean_token_sum_norm",
    "fixed",
    "eq5",
]


# Budgets: one sequence a pass, a few, all at once; the gradient must be the same.
@pytest.mark.parametrize("budget", [14, 40, 512])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_and_gradient_equal_a_plain_loop(batch, aggregation, budget):
    policy, rollouts, stats, decision = batch
    expected, gradients = plain_gradient(policy, rollouts, stats, decision, aggregation)
    policy.model.zero_grad()
    share = make_share(learning(make_config(), aggregation), rollouts, stats, decision, ALL)
    sums = accumulate(policy, share, budget)
    # Weights are fp32 by contract: each token's share is rounded by 6e-8 of itself before the sum, whose terms are of
    # the size of the largest entries where they cancel.
    assert sums["loss"] == pytest.approx(expected, rel=1e-6, abs=1e-7)
    for p, gradient in zip(policy.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-6, atol=2e-7 * float(gradient.abs().max()))


def test_rollouts_without_a_gradient_are_never_run(batch):
    _, rollouts, stats, decision = batch
    share = make_share(learning(make_config()), rollouts, stats, decision, ALL)
    assert share.active == [0, 1, 3, 4, 7, 9, 10, 11]  # 2, 5, 6 rejected; 8 has advantage 0


def test_two_updates_equal_two_halves_one_after_the_other(batch):
    policy, rollouts, stats, decision = batch
    start = [p.detach().clone() for p in policy.model.parameters()]
    config = make_config()
    config = dataclasses.replace(
        config, batch=BatchConfig(prompts_per_step=3, samples_per_prompt=GROUP, updates_per_step=3)
    )
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    metrics = update(policy, optimizer, rollouts, stats, decision, learning(config))
    assert metrics["updates"] == 3
    together = [p.detach().clone() for p in policy.model.parameters()]
    with torch.no_grad():
        for p, value in zip(policy.model.parameters(), start, strict=True):
            p.copy_(value)
    for g in range(3):
        share = make_share(learning(config), rollouts, stats, decision, rollouts.group_R == g)
        optimizer.zero_grad()
        accumulate(policy, share, 512)
        optimizer.step()
    for p, value in zip(policy.model.parameters(), together, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-9, atol=1e-12)


def test_everything_rejected_leaves_the_policy_alone_and_is_counted(batch):
    policy, rollouts, stats, decision = batch
    start = [p.detach().clone() for p in policy.model.parameters()]
    nothing = dataclasses.replace(decision, advantage_R=torch.zeros(12))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.1)
    metrics = update(policy, optimizer, rollouts, stats, nothing, learning(make_config(passes=2)))
    assert (metrics["updates"], metrics["updates_empty"], metrics["loss"]) == (0, 2, 0)
    assert all(torch.equal(p, q) for p, q in zip(policy.model.parameters(), start, strict=True))


def test_nan_raises_before_the_policy_moves(batch):
    policy, rollouts, stats, decision = batch
    start = [p.detach().clone() for p in policy.model.parameters()]
    poisoned = dataclasses.replace(stats, logprob_T=stats.logprob_T.where(rollouts.rollout_T != 3, float("nan")))
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    with pytest.raises(NonFiniteError, match=r"the loss of \d+ tokens is nan"):
        update(policy, optimizer, rollouts, poisoned, decision, learning(make_config()))
    assert all(torch.equal(p, q) for p, q in zip(policy.model.parameters(), start, strict=True))


def test_clip_fractions_and_kl_against_numpy(batch):
    policy, rollouts, stats, decision = batch
    share = make_share(learning(make_config()), rollouts, stats, decision, ALL)
    now_T = policy.score(rollouts, 512).logprob_T
    sums = accumulate(policy, share, 512)
    running = torch.isin(rollouts.rollout_T, torch.tensor(share.active))
    log_ratio = (now_T - stats.logprob_T)[running].numpy()
    advantage = decision.advantage_R[rollouts.rollout_T][running].numpy()
    ratio = 2.718281828459045**log_ratio
    assert sums["tokens"] == running.sum().item()
    assert sums["high"] == ((advantage > 0) & (ratio > 1.2)).sum() > 0
    assert sums["low"] == ((advantage < 0) & (ratio < 0.8)).sum() > 0
    assert sums["kl"] == pytest.approx((ratio - 1 - log_ratio).sum(), rel=1e-6)
    assert (sums["positive"], sums["negative"]) == ((advantage > 0).sum(), (advantage < 0).sum())
    assert sums["high_positive"] == sums["high"]
    assert sums["low_negative"] == sums["low"]
    assert sums["low_positive"] == 0  # PPO leaves the gradient there
    assert sums["high_negative"] == sums["dual"] == ((advantage < 0) & (ratio > 3.0)).sum()
    lengths = [len(PROMPTS[r // GROUP]) + int(rollouts.length_R[r]) - 1 for r in share.active]
    assert [sums[name] for name in Work.NAMES] == [sum(lengths), sum(n * n for n in lengths), running.sum().item()]
