"""Hugging Face rollouts: what comes out is what the model would say, and a function of the stream alone."""

import math

import pytest
import torch

from entrocraft.train.config import SamplingConfig
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.errors import NonFiniteError
from entrocraft.train.mismatch import mismatch_metrics
from entrocraft.train.policy import Policy
from entrocraft.train.sampling import HuggingFaceEngine, stream_seed
from entrocraft.train.spread import join
from entrocraft.train.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def policy():
    shape = TinyModelConfig(hidden_size=32, layers=2, heads=2, mlp_size=64, context=64)
    model, tokenizer = build_tiny_model(shape, 0)
    with torch.no_grad():  # make the end mark likely enough that both ends of a response are seen
        model.model.norm.weight.mul_(6.0)
    return Policy(model, tokenizer, temperature=1.0, device=torch.device("cpu"))


def engine(policy, **options):
    config = SamplingConfig(**{"max_response_tokens": 12} | options)
    return HuggingFaceEngine(policy.model, config, eos_ids=[*policy.eos_ids, *range(60, 90)], pad_id=policy.pad_id)


PROMPTS = [(5, 6, 7), (9,), (30, 31, 32, 33, 34)]


def same(a, b):
    return torch.equal(a.token_T, b.token_T) and torch.equal(a.rollout_T, b.rollout_T)


def test_layout_and_ends(policy):
    made = engine(policy)
    made.publish(4)
    rollouts = made.sample(PROMPTS, 5, stream=(0, 1))
    assert (rollouts.R, rollouts.P, rollouts.weight_version) == (15, 3, 4)
    assert rollouts.group_R.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert rollouts.sample_R.tolist() == [0, 1, 2, 3, 4] * 3
    assert rollouts.prompts == tuple(PROMPTS)
    ends = torch.tensor(made.eos_ids)
    pieces = rollouts.token_T.split(rollouts.length_R.tolist())
    assert {bool(t) for t in rollouts.truncated_R} == {True, False}
    for piece, truncated in zip(pieces, rollouts.truncated_R.tolist(), strict=True):
        assert not torch.isin(piece[:-1], ends).any()
        assert torch.isin(piece[-1], ends).item() != truncated
        assert len(piece) == 12 if truncated else len(piece) <= 12


def test_same_stream_same_rollouts_whatever_was_drawn_before(policy):
    made = engine(policy)
    first = made.sample(PROMPTS, 4, stream=(3, 1, 7))
    before = torch.get_rng_state()
    made.sample(PROMPTS, 2, stream=(3, 1, 8))
    assert torch.equal(torch.get_rng_state(), before)  # the global stream is left alone
    torch.rand(5)
    assert same(made.sample(PROMPTS, 4, stream=(3, 1, 7)), first)
    assert not same(made.sample(PROMPTS, 4, stream=(3, 1, 8)), first)
    assert stream_seed(3, 1, 7) != stream_seed(3, 17)


def test_frequencies_agree_with_the_scored_distribution(policy):
    """First tokens of 4,000 rollouts of prompts of unequal length against p from a plain forward pass: chi-square."""
    made = engine(policy, max_response_tokens=1, temperature=0.7, rollouts_per_batch=4096)
    count = 4000
    rollouts = made.sample(PROMPTS[:2], count, stream=(0,))
    for g, prompt in enumerate(PROMPTS[:2]):
        with torch.no_grad():
            p_V = (policy.model(torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1)
        seen_V = torch.bincount(rollouts.token_T[rollouts.group_R[rollouts.rollout_T] == g], minlength=len(p_V))
        likely = p_V * count >= 5
        observed = torch.cat([seen_V[likely], seen_V[~likely].sum()[None]]).double()
        expected = torch.cat([p_V[likely], p_V[~likely].sum()[None]]) * count
        statistic = float(((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum())
        freedom = len(expected) - 1
        assert freedom >= 5
        assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.6}], ids=["all", "top_k", "top_p"])
def test_each_token_comes_with_the_log_probability_it_was_drawn_with(policy, options):
    """Against one pass without a cache, cut as the sampler cuts; in chunks, and with prompts of unequal length."""
    made = engine(policy, temperature=0.7, rollouts_per_batch=4, **options)
    rollouts = made.sample(PROMPTS, 3, stream=(5,))
    assert rollouts.sampler_logprob_T is not None
    pieces = zip(
        rollouts.token_T.split(rollouts.length_R.tolist()),
        rollouts.sampler_logprob_T.split(rollouts.length_R.tolist()),
        rollouts.group_R.tolist(),
        strict=True,
    )
    for token_L, logprob_L, group in pieces:
        ids = torch.tensor([[*PROMPTS[group], *token_L.tolist()]])
        with torch.no_grad():
            logit_LV = policy.model(ids).logits[0, len(PROMPTS[group]) - 1 : -1].double() / 0.7
        ranked_LV, order_LV = logit_LV.sort(dim=1, descending=True)
        p_LV = ranked_LV.softmax(1)
        if "top_k" in options:
            p_LV[:, 5:] = 0.0
        if "top_p" in options:  # what is needed to reach 0.6, the one that crosses it included
            p_LV[(p_LV.cumsum(1) - p_LV) >= 0.6] = 0.0
        logp_LV = (p_LV / p_LV.sum(1, keepdim=True)).log()
        expected = torch.zeros_like(logp_LV).scatter(1, order_LV, logp_LV).gather(1, token_L[:, None])[:, 0]
        torch.testing.assert_close(logprob_L.double(), expected, atol=1e-5, rtol=0)
    scored = Policy(policy.model, policy.tokenizer, temperature=0.7, device=policy.device).score(rollouts, 256)
    apart = mismatch_metrics(scored.logprob_T, rollouts)
    if options:  # what is cut off is missing from the scored distribution's denominator
        assert 0.05 < apart["mismatch_mean"] < 2.0
        assert apart["mismatch_ratio_p99"] < 1.0
    else:
        assert apart["mismatch_max"] < 1e-5


def test_bfloat16_with_a_cache_is_measured():
    """The module scores whole sequences and samples token by token: in 8 bits these are two policies."""
    shape = TinyModelConfig(hidden_size=64, layers=2, heads=2, mlp_size=128, context=64)
    model, tokenizer = build_tiny_model(shape, 0)
    with torch.no_grad():
        model.model.norm.weight.mul_(6.0)
    low = Policy(model.bfloat16(), tokenizer, temperature=1.0, device=torch.device("cpu"))
    rollouts = engine(low).sample(PROMPTS, 8, stream=(0,))
    apart = mismatch_metrics(low.score(rollouts, 256).logprob_T, rollouts)
    assert 1e-4 < apart["mismatch_mean"] < 0.1
    assert apart["mismatch_ratio_p01"] < 1.0 < apart["mismatch_ratio_p99"]


def test_chunks_of_rollouts_are_drawn_from_the_same_policy(policy):
    rollouts = engine(policy, rollouts_per_batch=4).sample(PROMPTS, 5, stream=(1,))
    assert rollouts.R == 15
    stats = policy.score(rollouts, 256)
    assert bool(torch.isfinite(stats.logprob_T).all())
    assert float(stats.logprob_T.max()) < 1e-6


def test_the_models_own_sampling_defaults_do_not_bend_the_distribution(policy):
    """Instruct models ship a repetition penalty and the like; rollouts must come from what is scored."""
    expected = engine(policy).sample(PROMPTS, 4, stream=(2,))
    defaults = policy.model.generation_config
    defaults.repetition_penalty, defaults.min_new_tokens = 5.0, 8
    try:
        rollouts = engine(policy).sample(PROMPTS, 4, stream=(2,))
        assert policy.model.generation_config.repetition_penalty == 5.0
    finally:
        defaults.repetition_penalty, defaults.min_new_tokens = None, None
    assert same(rollouts, expected)


def test_a_policy_of_nan_says_so():
    shape = TinyModelConfig(hidden_size=16, layers=1, heads=2, mlp_size=32, context=32)
    model, tokenizer = build_tiny_model(shape, 0)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    broken = Policy(model, tokenizer, temperature=1.0, device=torch.device("cpu"))
    with pytest.raises(NonFiniteError, match=r"weight version 0 gives probabilities that are not numbers"):
        engine(broken).sample(PROMPTS, 1, stream=(0,))


def test_no_end_mark_is_an_error(policy):
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        HuggingFaceEngine(policy.model, SamplingConfig(), eos_ids=[], pad_id=0)


def test_a_prompt_draws_the_same_in_whatever_part_of_the_batch_it_is_sampled(policy):
    whole = engine(policy).sample(PROMPTS, 4, stream=(3, 1))
    parts = [engine(policy).sample(PROMPTS[i : i + 1], 4, stream=(3, 1), first_prompt=i) for i in range(3)]
    assert same(join(parts), whole)
    assert same(engine(policy, rollouts_per_batch=3).sample(PROMPTS, 4, stream=(3, 1)), whole)
    assert not same(engine(policy).sample(PROMPTS, 4, stream=(3, 1), first_prompt=1), whole)


def test_rollouts_of_other_weights_are_not_joined(policy):
    made = engine(policy)
    one = made.sample(PROMPTS, 1, stream=(0,))
    made.publish(2)
    with pytest.raises(ValueError, match=r"weight_version differs between parts: \[0, 2\]"):
        join([one, made.sample(PROMPTS, 1, stream=(0,))])
