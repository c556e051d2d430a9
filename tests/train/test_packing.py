"""Packing: every response token once, within the budget, and scores that do not depend on neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrocraft import Rollouts
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.packing import pack
from entrocraft.train.policy import Policy
from entrocraft.train.tiny_model import build_tiny_model


def make_rollouts(prompt_lengths, response_lengths, samples=2, seed=0):
    """Random prompts, `samples` rollouts each; `response_lengths` cycles over the rollouts."""
    generator = torch.Generator().manual_seed(seed)
    prompts = tuple(tuple(torch.randint(3, 259, (n,), generator=generator).tolist()) for n in prompt_lengths)
    count = len(prompts) * samples
    length_R = torch.tensor([response_lengths[r % len(response_lengths)] for r in range(count)])
    token_T = torch.randint(3, 259, (int(length_R.sum()),), generator=generator)
    return Rollouts(
        token_T=token_T,
        rollout_T=torch.arange(count).repeat_interleave(length_R),
        mask_T=torch.ones_like(token_T, dtype=torch.bool),
        group_R=torch.arange(len(prompts)).repeat_interleave(samples),
        sample_R=torch.arange(samples).repeat(len(prompts)),
        prompts=prompts,
        truncated_R=torch.zeros(count, dtype=torch.bool),
        weight_version=0,
    )


@settings(max_examples=40, deadline=None)
@given(
    prompt_lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    response_lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    budget=st.integers(20, 90),
)
def test_every_token_is_placed_once_behind_its_own_prompt(prompt_lengths, response_lengths, budget):
    rollouts = make_rollouts(prompt_lengths, response_lengths)
    batches = pack(rollouts, range(rollouts.R), budget)
    tokens = torch.cat([batch.token_N for batch in batches])
    assert torch.equal(tokens.sort().values, torch.arange(rollouts.T))
    for batch in batches:
        assert batch.input_BL.numel() <= budget
        for source, token in zip(batch.source_N.tolist(), batch.token_N.tolist(), strict=True):
            r = int(rollouts.rollout_T[token])
            prompt = rollouts.prompts[int(rollouts.group_R[r])]
            before = rollouts.token_T[(rollouts.rollout_T == r) & (torch.arange(rollouts.T) < token)].tolist()
            context = [*prompt, *before]
            flat = batch.input_BL.flatten()[source - len(context) + 1 : source + 1].tolist()
            assert flat == context
            assert batch.position_BL.flatten()[source] == len(context) - 1


# Budgets: one sequence a forward pass, several a row, everything at once.
@pytest.mark.parametrize("budget", [40, 97, 4096])
def test_scores_and_gradients_do_not_depend_on_the_packing(budget):
    rollouts = make_rollouts([3, 7, 5], [1, 30, 4, 11], samples=3)
    model, tokenizer = build_tiny_model(TinyModelConfig(hidden_size=32, layers=2, heads=2, mlp_size=64, context=64), 0)
    model = model.double()
    policy = Policy(model, tokenizer, temperature=0.8, device=torch.device("cpu"))
    stats = policy.score(rollouts, budget)
    for batch in pack(rollouts, range(rollouts.R), budget):
        policy.token_stats(batch, rollouts.token_T).logprob_T.sum().backward()
    packed = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    start = 0
    for r, length in enumerate(rollouts.length_R.tolist()):  # one plain forward pass a sequence, no packing at all
        prompt = rollouts.prompts[int(rollouts.group_R[r])]
        response = rollouts.token_T[start : start + length]
        ids = torch.cat([torch.tensor(prompt), response])[None]
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / 0.8
        logp_TV = logits.log_softmax(-1)
        logprob_T = logp_TV.gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(stats.logprob_T[start : start + length], logprob_T, rtol=1e-9, atol=1e-9)
        entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
        torch.testing.assert_close(stats.entropy_T[start : start + length], entropy_T, rtol=1e-9, atol=1e-9)
        logprob_T.sum().backward()
        start += length
    for got, p in zip(packed, model.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad, rtol=1e-8, atol=1e-10)


def test_a_sequence_beyond_the_budget_is_an_error_that_names_it():
    rollouts = make_rollouts([4, 4], [3, 3, 40, 3])
    with pytest.raises(ValueError, match=r"batch.tokens_per_microbatch = 16: rollout 2 has 43 tokens"):
        pack(rollouts, range(rollouts.R), 16)


def test_only_the_chosen_rollouts_are_packed():
    rollouts = make_rollouts([4, 4], [3, 5])
    batches = pack(rollouts, [1, 2], 64)
    tokens = torch.cat([batch.token_N for batch in batches])
    assert sorted(tokens.tolist()) == list(range(3, 11))
    assert pack(rollouts, [], 64) == []
