"""Responses that are too long or cut off: TRL's reward, and its way from sampled tokens to a loss, against ours."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from trl.rewards import get_soft_overlong_punishment

from entrocraft import advantages
from entrocraft.losses import PPOClip
from entrocraft.methods import Plain
from entrocraft.overlong import handle_truncated, overlong_penalty

CLIP = {"epsilon": 0.2, "epsilon_high": 0.2}
PLAIN = Plain(loss_fn=PPOClip(dual_clip=None))
EOS = 1
LIMIT, BUFFER = 16, 12  # of the batch's responses, so that most of them cost something


def _theirs(limit, buffer, length_R):
    reward = get_soft_overlong_punishment(max_completion_len=limit, soft_punish_cache=buffer)
    return torch.tensor(reward(completion_ids=[[5] * length for length in length_R.tolist()]))


@pytest.mark.parametrize(
    ("limit", "buffer", "step"), [(100, 20, 1), (16, 16, 1), (20_480, 4_096, 61)], ids=["short", "all", "dapo"]
)
def test_the_penalty_up_to_the_limit(limit, buffer, step):
    """Every length, or every 61st and the limit; `factor` is what TRL's trainer calls the weight of the reward."""
    length_R = torch.cat([torch.arange(0, limit, step), torch.tensor([limit])])
    theirs_R = _theirs(limit, buffer, length_R)
    assert theirs_R[-1] == -1.0
    assert bool((theirs_R < 0).any())
    for factor in (1.0, 0.5):
        ours_R = overlong_penalty(length_R, limit=limit, buffer=buffer, factor=factor)
        torch.testing.assert_close(ours_R, factor * theirs_R, rtol=1e-6, atol=0.0)


def test_beyond_the_limit_trl_stays_at_its_lowest():
    """On purpose: ours is verl's line, which goes on, TRL's is Equation 13 of DAPO, which ends at -1.

    They are one where the sampler stops at the limit. Where it does not, the line still tells the longer of two
    responses from the shorter: a prompt whose responses are all too long keeps something to learn from.
    """
    length_R = torch.tensor([100, 101, 110, 140])
    theirs_R, ours_R = _theirs(100, 20, length_R), overlong_penalty(length_R, limit=100, buffer=20)
    assert theirs_R.tolist() == [-1.0, -1.0, -1.0, -1.0]
    assert ours_R.tolist() == pytest.approx([-1.0, -1.05, -1.5, -3.0])
    assert torch.equal(ours_R.clamp(min=-1.0), theirs_R)
    group_R = torch.zeros(4, dtype=torch.int64)
    assert advantages.dr_grpo(theirs_R, group_R).tolist() == [0.0] * 4
    assert advantages.dr_grpo(ours_R, group_R).tolist() == pytest.approx([0.6375, 0.5875, 0.1375, -1.3625])


# -- responses that were cut off: tokens go in where TRL samples, and come out of its loss


def _cut(batch):
    """The same with some responses cut off, and an end mark on the others: TRL tells them apart by that."""
    rollouts = batch.rollouts
    truncated_R = torch.arange(rollouts.R) % 5 == 2
    last_R = rollouts.length_R.cumsum(0) - 1
    token_T = rollouts.token_T.clone()
    token_T[last_R[~truncated_R]] = EOS
    return replace(batch, rollouts=replace(rollouts, token_T=token_T, truncated_R=truncated_R))


def _sampled(trainer, batch, reward):
    """What TRL makes of these tokens up to its loss, with `reward` for the only reward."""
    rollouts = batch.rollouts
    runs = {"completion_ids": rollouts.token_T, "env_mask": rollouts.mask_T.long()}
    lists = {
        name: [run.tolist() for run in value_T.split(rollouts.length_R.tolist())] for name, value_T in runs.items()
    }
    prompt_ids = [list(rollouts.prompts[group]) for group in rollouts.group_R.tolist()]
    trainer.rollout_func = lambda prompts, trainer: {"prompt_ids": prompt_ids, "logprobs": None, **lists}
    trainer.reward_funcs = [reward]
    trainer.model.train()
    made = trainer._generate_and_score_completions([{"prompt": "a"} for _ in prompt_ids])
    return made | {"old_per_token_logps": batch.padded(batch.old_logprob_T)}


def _handled(batch, handling):
    """Ours: the penalty, what becomes of those cut off, then advantages."""
    rollouts = batch.rollouts
    reward_R, mask_T = handle_truncated(
        overlong_penalty(rollouts.length_R, limit=LIMIT, buffer=BUFFER), rollouts.mask_T, rollouts.rollout_T,
        rollouts.truncated_R, handling=handling,
    )  # fmt: skip
    advantage_R = advantages.dr_grpo(reward_R, rollouts.group_R)
    return replace(
        batch,
        rollouts=replace(rollouts, mask_T=mask_T),
        advantage_R=advantage_R,
        advantage_T=advantage_R[rollouts.rollout_T],
    )


def _compared(pair, batch, handling, loss_type, reward, **config):
    """Our batch, and TRL's loss of what it was given, after a look at advantages and the tokens that count."""
    trainer = pair.trainer(loss_type, scale_rewards="none", **config, **CLIP)
    made, ours = _sampled(trainer, batch, reward), _handled(batch, handling)
    torch.testing.assert_close(made["advantages"], ours.advantage_R, rtol=1e-6, atol=1e-7)
    assert float(ours.advantage_R.abs().max()) > 0.1
    counted = made["completion_mask"] * made["tool_mask"]
    assert torch.equal(counted, ours.padded(ours.rollouts.mask_T.long()))
    assert int(made["num_items_in_batch"]) == int(ours.rollouts.mask_T.sum())
    return ours, pair.theirs(trainer, SimpleNamespace(rollouts=ours.rollouts, inputs=lambda items: made))


@pytest.mark.parametrize(("loss_type", "aggregation"), [("dapo", "token_mean"), ("dr_grpo", "fixed")])
def test_masked_responses_leave_the_loss_and_keep_their_reward(pair, loss_type, aggregation):
    batch, reward = _cut(pair.batch(10)), get_soft_overlong_punishment(LIMIT, BUFFER)
    ours, theirs = _compared(pair, batch, "mask", loss_type, reward, mask_truncated_completions=True)
    pair.ours(PLAIN, ours, aggregation).assert_same(theirs)
    kept = pair.ours(PLAIN, _handled(batch, "keep"), aggregation)
    assert kept.distance(theirs) > 0.1


def test_a_masked_response_counts_in_trls_mean_of_sequences(pair):
    """On purpose: ours is a mean over the responses with a token that counts, so masking does not shrink the step."""
    batch, reward = _cut(pair.batch(11)), get_soft_overlong_punishment(LIMIT, BUFFER)
    ours, theirs = _compared(pair, batch, "mask", "grpo", reward, mask_truncated_completions=True)
    left = float((~batch.rollouts.truncated_R).double().mean())

    def their_mean(objective):
        return replace(objective, weight_T=objective.weight_T.double() * left)

    pair.ours(PLAIN, ours, "seq_mean_token_mean", change=their_mean).assert_same(theirs)
    assert pair.ours(PLAIN, ours, "seq_mean_token_mean").distance(theirs) > 0.1


def test_no_verdict_is_trls_reward_of_none(pair):
    """It leaves the group's mean, gets advantage 0, and its tokens stay in the denominator."""
    batch, penalty = _cut(pair.batch(12)), get_soft_overlong_punishment(LIMIT, BUFFER)

    def reward(completion_ids, **_):
        found = zip(penalty(completion_ids), completion_ids, strict=True)
        return [value if ids[-1] == EOS else None for value, ids in found]

    ours, theirs = _compared(pair, batch, "no_verdict", "dapo", reward)
    pair.ours(PLAIN, ours, "token_mean").assert_same(theirs)
    assert pair.ours(PLAIN, _handled(batch, "mask"), "token_mean").distance(theirs) > 0.1
