"""PolicyObjective: however the rows are cut, the shares add up to the loss written out, in value and gradient."""

import re
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

from entrocraft import CISPO, GSPO, PolicyObjective, PPOClip

LENGTHS = [3, 0, 5, 1, 4]
T = sum(LENGTHS)
TOKEN_CUTS = [[0, T], list(range(T + 1)), [0, 2, 9, T]]
SEQUENCE_CUTS = [[0, T], [*accumulate(LENGTHS, initial=0)], [0, 8, T], [0, 3, 9, T]]


def _batch(**more: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    old_T, advantage_T, weight_T = torch.randn(3, T, generator=draw, dtype=torch.float64)
    return {"old_logprob_T": old_T, "advantage_T": advantage_T, "weight_T": weight_T.abs()} | more


@pytest.mark.parametrize(
    ("loss_fn", "cuts"),
    [(PPOClip(), TOKEN_CUTS), (CISPO(), TOKEN_CUTS), (GSPO(clip_low=0.2, clip_high=0.3), SEQUENCE_CUTS)],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("entropy", ["none", "bonus", "weighted"])
@pytest.mark.parametrize("masked", [False, True])
def test_any_cut_adds_up(loss_fn: Any, cuts: list[list[int]], entropy: str, masked: bool) -> None:
    batch = _batch(lengths_R=LENGTHS)
    if masked:
        batch["mask_T"] = torch.arange(T) % 3 > 0
    if entropy != "none":
        batch["entropy_coefficient"] = 0.3
    if entropy == "weighted":
        batch["entropy_weight_T"] = torch.linspace(0.0, 1.0, T, dtype=torch.float64)
    logprob_T = (batch["old_logprob_T"] + 0.2 * torch.randn(T, dtype=torch.float64)).requires_grad_()
    entropy_T = torch.rand(T, dtype=torch.float64).requires_grad_()
    # Written out.
    whole: tuple[Any, ...] = (LENGTHS, batch.get("mask_T")) if isinstance(loss_fn, GSPO) else ()
    loss_T = loss_fn(logprob_T, batch["old_logprob_T"], batch["advantage_T"], *whole)
    wanted = torch.stack([batch["weight_T"][t] * loss_T[t] for t in range(T)]).sum()
    bonus_T = {"none": torch.zeros(T), "bonus": 0.3 * batch["weight_T"]}.get(entropy)
    bonus_T = 0.3 * batch["entropy_weight_T"] if bonus_T is None else bonus_T
    wanted = wanted - torch.stack([bonus_T[t] * entropy_T[t] for t in range(T)]).sum()
    wanted_gradients = torch.autograd.grad(wanted, [logprob_T, entropy_T])
    assert float(wanted_gradients[0].abs().max()) > 0.01
    objective = PolicyObjective(loss_fn=loss_fn, **batch)
    for cut in cuts:
        shares = [objective(logprob_T[a:b], entropy_T[a:b], slice(a, b)) for a, b in pairwise(cut)]
        total = torch.stack(shares).sum()
        assert total.dim() == 0
        torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad(total, [logprob_T, entropy_T], allow_unused=True)
        if entropy == "none":
            assert gradients[1] is None  # so that the head's backward leaves the entropy out
        for actual, expected in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(
                torch.zeros(T).double() if actual is None else actual, expected, rtol=1e-12, atol=1e-12
            )


def test_a_cut_sequence_is_refused() -> None:
    objective = PolicyObjective(loss_fn=GSPO(), lengths_R=LENGTHS, **_batch())
    zero_T = torch.zeros(T)
    for rows in (slice(0, 2), slice(1, 3), slice(3, 12)):
        with pytest.raises(ValueError, match=rf"rows {rows.start} to {rows.stop} cut a sequence.*give lengths_R"):
            objective(zero_T[rows], zero_T[rows], rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": GSPO()}, "is of whole sequences and lengths_R is None"),
        ({"lengths_R": [T, 1]}, f"lengths_R sums to {T + 1}, the least is 1; expected lengths >= 0 that sum to {T}"),
        ({"lengths_R": [T + 1, -1]}, f"lengths_R sums to {T}, the least is -1"),
        ({"advantage_T": torch.zeros(2)}, f"advantage_T has shape (2,), expected ({T},) like weight_T"),
        ({"mask_T": torch.zeros(T)}, "mask_T is torch.float32; expected bool"),
        ({"entropy_coefficient": float("nan")}, "entropy_coefficient = nan: expected a finite number, such as 0.003"),
    ],
    ids=str,
)
def test_what_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PolicyObjective(**(_batch(loss_fn=PPOClip()) | arguments))
