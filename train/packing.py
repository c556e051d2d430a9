"""Packs ragged sequences into micro-batches of bounded size.

A micro-batch is a [B, L] block of token ids. L is its longest sequence; shorter ones share a row, one after the
other, with position ids that start again at 0, from which transformers derives the block-diagonal causal mask.
Padding stands at the end of a row, where causal attention never looks. So no token sees its neighbours in the pack,
and the quadratic cost of attention is B L^2, not (B L)^2.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entrocraft import Rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward pass. N is the number of response tokens in it."""

    input_BL: Tensor
    """int64 token ids; 0 where there is padding."""
    position_BL: Tensor
    """int64 positions, starting at 0 for each sequence."""
    source_N: Tensor
    """int64: flat index into [B * L] of the position whose hidden state predicts each response token."""
    token_N: Tensor
    """int64: index of each response token among the T packed tokens of the rollouts."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on another device."""
        return MicroBatch(
            input_BL=self.input_BL.to(device),
            position_BL=self.position_BL.to(device),
            source_N=self.source_N.to(device),
            token_N=self.token_N.to(device),
        )


def _fill_rows(lengths: list[int], budget: int) -> list[list[tuple[int, int, int]]]:
    """Places sequences, longest first, each in the row with most room; opens a new micro-batch when none has room.

    Returns, for each micro-batch, (sequence, row, offset). B * L <= budget, with L the first, longest sequence's
    length.
    """
    batches: list[list[tuple[int, int, int]]] = []
    rows: list[tuple[int, int]] = []  # (-room, row), most room first
    width = height = 0
    for sequence in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[sequence]
        if rows and -rows[0][0] >= length:
            room, row = heapq.heappop(rows)
        elif batches and height < budget // width:
            room, row, height = -width, height, height + 1
        else:
            batches.append([])
            rows, width, height = [], length, 1
            room, row = -width, 0
        batches[-1].append((sequence, row, width + room))
        heapq.heappush(rows, (room + length, row))
    return batches


def sequence_lengths(rollouts: Rollouts, chosen: Sequence[int]) -> list[int]:
    """Tokens that are fed for each of the rollouts with the indices `chosen`: prompt and response without its last
    token, which is predicted but predicts nothing."""
    length_R, group_R = rollouts.length_R.tolist(), rollouts.group_R.tolist()
    return [len(rollouts.prompts[group_R[r]]) + length_R[r] - 1 for r in chosen]


def idle_batch(token: int) -> MicroBatch:
    """The least that can be run: one token, predicting token 0 of the rollouts."""
    one = torch.zeros(1, dtype=torch.int64)
    return MicroBatch(input_BL=torch.full((1, 1), token), position_BL=one[None], source_N=one, token_N=one)


def pack(rollouts: Rollouts, chosen: Sequence[int], tokens_per_microbatch: int) -> list[MicroBatch]:
    """Packs the rollouts with the indices `chosen` into micro-batches of at most `tokens_per_microbatch` tokens.

    The result depends on the lengths alone, so the same rollouts are packed alike on every run. Raises ValueError
    when one sequence, prompt and response together, is longer than the budget.
    """
    start_R = [0, *torch.cumsum(rollouts.length_R, 0).tolist()]
    group_R = rollouts.group_R.tolist()
    prompts = [rollouts.prompts[group_R[r]] for r in chosen]
    lengths = sequence_lengths(rollouts, chosen)
    if lengths and max(lengths) > tokens_per_microbatch:
        worst = max(range(len(lengths)), key=lengths.__getitem__)
        raise ValueError(
            f"batch.tokens_per_microbatch = {tokens_per_microbatch}: rollout {chosen[worst]} has {lengths[worst]} "
            "tokens, prompt and response together; raise the budget, or lower sampling.max_response_tokens"
        )
    return [
        _block(placed, lengths, prompts, [chosen[s] for s, _, _ in placed], start_R, rollouts)
        for placed in _fill_rows(lengths, tokens_per_microbatch)
    ]


def _block(
    placed: list[tuple[int, int, int]],
    lengths: list[int],
    prompts: list[tuple[int, ...]],
    rollout_ids: list[int],
    start_R: list[int],
    rollouts: Rollouts,
) -> MicroBatch:
    width = max(lengths[s] for s, _, _ in placed)
    height = 1 + max(row for _, row, _ in placed)
    input_BL = torch.zeros(height, width, dtype=torch.int64)
    position_BL = torch.zeros(height, width, dtype=torch.int64)
    sources, tokens = [], []
    for (sequence, row, offset), r in zip(placed, rollout_ids, strict=True):
        prompt, first, last = prompts[sequence], start_R[r], start_R[r + 1]
        end = offset + lengths[sequence]
        input_BL[row, offset : offset + len(prompt)] = torch.tensor(prompt)
        input_BL[row, offset + len(prompt) : end] = rollouts.token_T[first : last - 1]
        position_BL[row, offset:end] = torch.arange(lengths[sequence])
        predictor = row * width + offset + len(prompt) - 1
        sources.append(torch.arange(predictor, predictor + last - first))
        tokens.append(torch.arange(first, last))
    return MicroBatch(
        input_BL=input_BL, position_BL=position_BL, source_N=torch.cat(sources), token_N=torch.cat(tokens)
    )
