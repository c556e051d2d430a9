"""Rollouts: properties by hand, selection against a plain loop, every bad field named."""

import re
from typing import Any

import pytest
import torch

from entrocraft import Rollouts


def _fields() -> dict[str, Any]:
    # Four rollouts of two prompts, the third of them empty.
    return {
        "token_T": torch.tensor([5, 6, 7, 8, 9, 4]),
        "rollout_T": torch.tensor([0, 0, 1, 3, 3, 3]),
        "mask_T": torch.tensor([True, False, True, True, True, False]),
        "group_R": torch.tensor([0, 0, 1, 1]),
        "sample_R": torch.tensor([0, 1, 0, 1]),
        "prompts": ((1, 2), (3,)),
        "truncated_R": torch.tensor([False, True, False, False]),
        "weight_version": 3,
        "sampler_logprob_T": torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]),
    }


def test_sizes_and_lengths() -> None:
    rollouts = Rollouts(**_fields())
    assert (rollouts.T, rollouts.R, rollouts.P) == (6, 4, 2)
    assert rollouts.length_R.tolist() == [2, 1, 0, 3]


@pytest.mark.parametrize(
    "keep",
    [
        [True, False, True, True],
        [False, True, False, False],
        [True, True, True, True],
        [False, False, False, False],
        [False, False, True, False],
    ],
)
def test_select_keeps_whole_rollouts_under_their_names(keep: list[bool]) -> None:
    rollouts = Rollouts(**_fields())
    chosen = rollouts.select(torch.tensor(keep))
    expected_token, expected_rollout, expected_logprob = [], [], []
    for new, old in enumerate([r for r in range(4) if keep[r]]):
        for t in range(6):
            if int(rollouts.rollout_T[t]) == old:
                expected_token.append(int(rollouts.token_T[t]))
                expected_logprob.append(-1.0 - t)
                expected_rollout.append(new)
    assert chosen.token_T.tolist() == expected_token
    assert chosen.rollout_T.tolist() == expected_rollout
    assert chosen.sampler_logprob_T is not None
    assert chosen.sampler_logprob_T.tolist() == expected_logprob
    assert chosen.group_R.tolist() == [g for g, k in zip([0, 0, 1, 1], keep, strict=True) if k]
    assert chosen.sample_R.tolist() == [s for s, k in zip([0, 1, 0, 1], keep, strict=True) if k]
    assert chosen.truncated_R.tolist() == [t for t, k in zip([False, True, False, False], keep, strict=True) if k]
    assert chosen.prompts == rollouts.prompts
    assert chosen.weight_version == 3


def test_no_rollouts_at_all() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    rollouts = Rollouts(
        token_T=empty,
        rollout_T=empty,
        mask_T=empty.bool(),
        group_R=empty,
        sample_R=empty,
        prompts=(),
        truncated_R=empty.bool(),
        weight_version=0,
    )
    assert (rollouts.T, rollouts.R, rollouts.P) == (0, 0, 0)
    assert rollouts.select(torch.zeros(0, dtype=torch.bool)).R == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("token_T", torch.zeros(5, dtype=torch.int64), "token_T must be int64 of shape (6,)"),
        ("token_T", torch.zeros(6), "token_T must be int64"),
        ("rollout_T", torch.tensor([0, 1, 0, 3, 3, 3]), "rollout_T must not decrease"),
        ("rollout_T", torch.tensor([0, 0, 1, 3, 3, 4]), "[0, 4), got values from 0 to 4"),
        ("rollout_T", torch.tensor([-1, 0, 1, 3, 3, 3]), "got values from -1 to 3"),
        ("rollout_T", torch.zeros(6, dtype=torch.int32), "rollout_T must be one-dimensional int64"),
        ("mask_T", torch.ones(6), "mask_T must be bool"),
        ("group_R", torch.tensor([0, 0, 1, 2]), "group_R must index prompts, so lie in [0, 2)"),
        ("sample_R", torch.tensor([0, 0, 0, 1]), "must name each rollout once"),
        ("sample_R", torch.tensor([0, 1, -1, 1]), "sample_R must be >= 0, got -1"),
        ("sample_R", torch.zeros(4), "sample_R must be torch.int64"),
        ("truncated_R", torch.zeros(4), "truncated_R must be torch.bool"),
        ("truncated_R", torch.zeros(3, dtype=torch.bool), "truncated_R must be torch.bool of shape (4,)"),
        ("weight_version", -1, "weight_version must be >= 0 steps, got -1"),
        ("sampler_logprob_T", torch.zeros(6, dtype=torch.float64), "sampler_logprob_T must be float32"),
    ],
)
def test_bad_fields_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Rollouts(**(_fields() | {field: value}))


def test_select_needs_one_flag_a_rollout() -> None:
    with pytest.raises(ValueError, match=r"keep_R must be bool of shape \(4,\)"):
        Rollouts(**_fields()).select(torch.tensor([True]))
