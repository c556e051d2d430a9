"""The penalty of long responses, and what becomes of those that were cut off."""

import math

import pytest
import torch

from entrocraft import advantages
from entrocraft.losses import token_weights
from entrocraft.overlong import handle_truncated, overlong_penalty


def test_the_penalty_is_a_line_over_the_buffer():
    length_R = torch.tensor([0, 16_384, 18_432, 20_480, 22_528])
    penalty_R = overlong_penalty(length_R, limit=20_480, buffer=4_096, factor=2.0)
    assert penalty_R.tolist() == [0.0, 0.0, -1.0, -2.0, -3.0]


def test_truncated_responses():
    reward_R = torch.tensor([1.0, 0.0, 0.0])
    truncated_R = torch.tensor([False, True, False])
    rollout_T = torch.tensor([0, 0, 1, 1, 1, 2])
    mask_T = torch.ones(6, dtype=torch.bool)
    arguments = (reward_R, mask_T, rollout_T, truncated_R)
    group_R = torch.zeros(3, dtype=torch.int64)

    reward, mask = handle_truncated(*arguments, handling="keep")
    assert torch.equal(reward, reward_R)
    assert torch.equal(mask, mask_T)
    reward, mask = handle_truncated(*arguments, handling="mask")
    assert mask.tolist() == [True, True, False, False, False, True]
    weight_T = token_weights(rollout_T, mask, group_R, aggregation="token_mean")
    assert weight_T.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0, 0, 1 / 3])
    reward, mask = handle_truncated(*arguments, handling="no_verdict")
    assert math.isnan(float(reward[1]))
    # Its group is that of the other two: +-1 over their deviation of sqrt(1/2), instead of 2/3, -1/3, -1/3.
    assert advantages.grpo(reward, group_R).tolist() == pytest.approx([2**-0.5, 0.0, -(2**-0.5)], rel=1e-5)


def test_tool_tokens_count_nowhere():
    rollout_T = torch.tensor([0, 0, 0, 1, 1])
    mask_T = torch.tensor([True, False, True, True, True])
    for aggregation in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum"):
        group_R = torch.zeros(2, dtype=torch.int64)
        with_tool = token_weights(rollout_T, mask_T, group_R, aggregation=aggregation)
        without = token_weights(rollout_T[mask_T], mask_T[mask_T], group_R, aggregation=aggregation)
        assert with_tool[1] == 0
        assert torch.equal(with_tool[mask_T], without)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="buffer = 0, limit = 100: expected 0 < buffer <= limit"):
        overlong_penalty(torch.tensor([1]), limit=100, buffer=0)
    for factor in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"factor = {factor}: expected a finite number >= 0"):
            overlong_penalty(torch.tensor([1]), limit=100, buffer=10, factor=factor)
    with pytest.raises(ValueError, match="handling = 'drop'"):
        handle_truncated(*(torch.zeros(1),) * 4, handling="drop")
    reward_R, mask_T, rollout_T = torch.zeros(2), torch.ones(2, dtype=torch.bool), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"truncated_R must be bool of shape \(2,\), like reward_R; got shape \(3,\)"):
        handle_truncated(reward_R, mask_T, rollout_T, torch.zeros(3, dtype=torch.bool), handling="mask")
    with pytest.raises(ValueError, match=r"truncated_R must be bool .* torch\.int64"):
        handle_truncated(reward_R, mask_T, rollout_T, torch.zeros(2, dtype=torch.int64), handling="mask")
    with pytest.raises(ValueError, match=r"reward_R is torch\.int64: 'no_verdict' writes NaN"):
        handle_truncated(reward_R.long(), mask_T, rollout_T, mask_T, handling="no_verdict")
