"""Methods in the trainer: gradients against a plain loop, in any micro-batch, and scored again where that counts."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "entrocraft"))

from acting_methods import STATES

from entrocraft import Decision
from entrocraft.kernels import clamped_entropy
from entrocraft.methods import METHODS
from entrocraft.train.config import BatchConfig, Config, LossConfig, OptimizerConfig, SamplingConfig
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.control import build_method
from entrocraft.train.policy import Policy
from entrocraft.train.sampling import HuggingFaceEngine
from entrocraft.train.step import Learning, accumulate, make_share, update
from entrocraft.train.tiny_model import build_tiny_model

PROMPTS = [(5, 6, 7), (9, 10), (30, 31, 32, 33)]
GROUP, ALL = 4, torch.ones(12, dtype=torch.bool)


def _learning(method="plain", *, state=None, aggregation="token_mean", updates=1, policy="ppo_clip", **options):
    config = Config(
        batch=BatchConfig(
            prompts_per_step=3, samples_per_prompt=GROUP, tokens_per_microbatch=512, updates_per_step=updates
        ),
        sampling=SamplingConfig(max_response_tokens=9, temperature=0.9),
        loss=LossConfig(method=method, method_options=options, policy=policy),
        optimizer=OptimizerConfig(lr=0.1, grad_clip=1e9),
    )
    state = STATES.get(method, {}) if state is None else state
    return Learning(method=build_method(config), state=state, aggregation=aggregation, config=config, step=1)


@pytest.fixture
def batch():
    """A tiny policy in fp64, twelve rollouts it has sampled, scored before it moved a little, and a decision."""
    torch.manual_seed(0)
    model, tokenizer = build_tiny_model(TinyModelConfig(hidden_size=32, layers=2, heads=2, mlp_size=48, context=64), 3)
    policy = Policy(model.double(), tokenizer, temperature=0.9, device=torch.device("cpu"))
    engine = HuggingFaceEngine(
        policy.model, SamplingConfig(max_response_tokens=9, temperature=0.9), eos_ids=policy.eos_ids, pad_id=0
    )
    rollouts = engine.sample(PROMPTS, GROUP, stream=(1, 2, 3))
    stats = policy.score(rollouts, 512)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    keep_R = torch.arange(12) % 5 != 2
    decision = Decision(
        keep_T=keep_R[rollouts.rollout_T],
        keep_R=keep_R,
        advantage_R=torch.linspace(-1.2, 1.0, 12),
        direction=0,
        bypassed=False,
        reason="",
        metrics={},
    )
    return policy, rollouts, stats, decision


def _gradient(policy, share, budget=512):
    policy.model.zero_grad()
    sums = accumulate(policy, share, budget)
    return sums["loss"], [p.grad.clone() for p in policy.model.parameters()]


def _close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=3e-7 * float(other.abs().max()))


def _logits(policy, rollouts):
    """[T, V] logits at the sampling temperature, one sequence at a time."""
    rows, start = [], 0
    for r, length in enumerate(rollouts.length_R.tolist()):
        prompt, response = PROMPTS[r // GROUP], rollouts.token_T[start : start + length]
        start += length
        ids = torch.cat([torch.tensor(prompt), response])[None]
        rows.append(policy.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / 0.9)
    return torch.cat(rows)


@pytest.mark.parametrize(("method", "options"), [("entropy_bonus", {"coefficient": 0.7}), ("aent", {"share": 0.4})])
def test_a_bonus_adds_the_gradient_of_the_mean_entropy_of_all_tokens(batch, method, options):
    policy, rollouts, stats, decision = batch
    plain = make_share(_learning(), rollouts, stats, decision, ALL)
    paid = make_share(_learning(method, **options), rollouts, stats, decision, ALL)
    loss, gradient = _gradient(policy, plain)
    loss_paid, gradient_paid = _gradient(policy, paid)
    logits_TV = _logits(policy, rollouts)
    if method == "entropy_bonus":
        logp_TV, price = logits_TV.log_softmax(1), 0.7
    else:  # of the likelier 60 % of the vocabulary
        kept = -(-6 * logits_TV.shape[1] // 10)
        logp_TV, price = logits_TV.topk(kept, dim=1).values.log_softmax(1), 0.2
    mean = -(logp_TV.exp() * logp_TV).sum(1).mean()
    policy.model.zero_grad()
    (-price * mean).backward()
    assert loss_paid - loss == pytest.approx(-price * mean.item(), rel=1e-6)
    _close(gradient_paid, [g + p.grad for g, p in zip(gradient, policy.model.parameters(), strict=True)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_no_micro_batch_changes_a_gradient(batch, method, aggregation):
    policy, rollouts, stats, decision = batch
    share = make_share(_learning(method, aggregation=aggregation), rollouts, stats, decision, ALL)
    loss, gradient = _gradient(policy, share)
    assert any(float(g.abs().max()) > 0 for g in gradient)
    for budget in (14, 40):
        loss_split, gradient_split = _gradient(policy, share, budget)
        assert loss_split == pytest.approx(loss, rel=1e-6, abs=1e-7)
        _close(gradient_split, gradient)


@pytest.mark.parametrize("policy_name", ["gspo", "cispo"])
def test_another_policy_loss_takes_the_place_of_ppo_clip(batch, policy_name):
    policy, rollouts, stats, decision = batch
    whole = make_share(_learning(policy=policy_name), rollouts, stats, decision, ALL)
    loss, gradient = _gradient(policy, whole)
    ppo_loss, _ = _gradient(policy, make_share(_learning(), rollouts, stats, decision, ALL))
    assert abs(loss - ppo_loss) > 1e-3
    for budget in (14, 40):
        _close(_gradient(policy, whole, budget)[1], gradient)


def test_what_looks_at_the_policy_is_scored_again_once_it_has_moved(batch):
    policy, rollouts, stats, decision = batch
    learning = _learning("repo", beta=0.5)
    stale = make_share(learning, rollouts, stats, decision, ALL)
    fresh = make_share(learning, rollouts, stats, decision, ALL, moved=policy)
    now = policy.score(rollouts, 512)
    for share, seen in ((stale, stats), (fresh, now)):
        expected_T = decision.advantage_R[rollouts.rollout_T] - 0.5 * (seen.logprob_T + seen.entropy_T)
        torch.testing.assert_close(share.objective.advantage_T, expected_T)
    assert float((stale.objective.advantage_T - fresh.objective.advantage_T).abs().max()) > 1e-3
    torch.testing.assert_close(fresh.objective.old_logprob_T, stats.logprob_T)


def test_members_of_the_batch_alone_are_counted(batch):
    _, rollouts, stats, decision = batch
    member_R = torch.arange(12) % 2 == 0
    learning = dataclasses.replace(_learning(), member_R=member_R)
    share = make_share(learning, rollouts, stats, decision, ALL)
    counted_T = member_R[rollouts.rollout_T]
    expected_T = (counted_T & decision.keep_T).float() / int(counted_T.sum())
    torch.testing.assert_close(share.objective.weight_T, expected_T)


def test_rejected_rollouts_run_for_their_entropy_where_that_has_a_price(batch):
    policy, rollouts, stats, decision = batch
    nothing = dataclasses.replace(decision, advantage_R=torch.zeros(12))
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    before = float(policy.score(rollouts, 512).entropy_T.double().mean())
    metrics = update(policy, optimizer, rollouts, stats, nothing, _learning("entropy_bonus", coefficient=1.0))
    assert metrics["updates"] == 1
    assert float(policy.score(rollouts, 512).entropy_T.double().mean()) > before + 1e-4


def test_the_clamped_entropy_of_the_policy_is_that_of_its_head(batch):
    policy, rollouts, _, _ = batch
    from entrocraft.train.packing import pack

    (packed,) = pack(rollouts, range(12), 512)
    stats = policy.token_stats(packed, rollouts.token_T, clamped_share=0.3)
    clamped_N = stats.clamped_entropy_T
    weight_VH = policy.model.get_output_embeddings().weight
    hidden = policy.head.hidden(input_ids=packed.input_BL, position_ids=packed.position_BL)
    hidden_NH = hidden.flatten(0, -2)[packed.source_N]
    torch.testing.assert_close(clamped_N, clamped_entropy(hidden_NH, weight_VH, share=0.3, temperature=0.9))
    assert bool((clamped_N < stats.entropy_T).all())
    scored = policy.score(rollouts, 64, clamped_share=0.3)  # packed otherwise, in the rollouts' own order
    torch.testing.assert_close(scored.clamped_entropy_T[packed.token_N], clamped_N.detach())
    assert policy.score(rollouts, 64).clamped_entropy_T is None


def test_a_policy_loss_that_would_not_be_used_is_refused():
    with pytest.raises(
        ValueError, match=r"loss\.policy = 'gspo': loss\.method = 'kl_cov' has a policy loss of its own"
    ):
        _learning("kl_cov", policy="gspo")
