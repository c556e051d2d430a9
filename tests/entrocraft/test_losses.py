"""PPO-clip against a plain re-derivation with gradients by case; weights against loops, and under seven splits."""

import math
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrocraft import PPOClip, token_weights
from entrocraft.losses import AGGREGATIONS


def _by_cases(
    logprob: float, old: float, advantage: float, low: float, high: float, dual: float | None
) -> tuple[float, float]:
    """(loss, d loss / d logprob) of one token, by which clip binds; written without min, max or autograd."""
    log_ratio = logprob - old
    inside = -20.0 <= log_ratio <= 20.0
    ratio = math.exp(min(max(log_ratio, -20.0), 20.0))
    if advantage > 0 and ratio > 1.0 + high:
        return -(1.0 + high) * advantage, 0.0
    if advantage < 0 and dual is not None and ratio > max(dual, 1.0 - low):
        return -dual * advantage, 0.0
    if advantage < 0 and ratio < 1.0 - low:
        return -(1.0 - low) * advantage, 0.0
    return -ratio * advantage, -ratio * advantage if inside else 0.0


# Ratios well inside and outside every clip: low 0.8, high 1.2, dual 3, and the clamp of the log-ratio at 20.
LOG_RATIOS = [-25.0, -1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 1.2, 2.0, 25.0]


@pytest.mark.parametrize("dual", [3.0, 1.5, None])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (3e-4, 4e-4), (1.0, 10.0)])
def test_ppo_values_and_gradients(low: float, high: float, dual: float | None) -> None:
    loss_fn = PPOClip(clip_low=low, clip_high=high, dual_clip=dual)
    cases = [(r, a) for r in LOG_RATIOS for a in (-2.0, -0.5, 0.0, 0.5, 2.0)]
    old_T = torch.linspace(-3.0, -0.1, len(cases), dtype=torch.float64)
    logprob_T = (old_T + torch.tensor([r for r, _ in cases], dtype=torch.float64)).requires_grad_()
    advantage_T = torch.tensor([a for _, a in cases], dtype=torch.float64)
    loss_T = loss_fn(logprob_T, old_T, advantage_T)
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), logprob_T)
    flags = loss_fn.clipped(logprob_T, old_T, advantage_T)
    gone_T = torch.stack(list(flags.values())).sum(0)
    assert gone_T.tolist() == ((gradient_T == 0) & (advantage_T != 0)).long().tolist()
    for i, (_, advantage) in enumerate(cases):
        loss, slope = _by_cases(float(logprob_T[i].detach()), float(old_T[i]), advantage, low, high, dual)
        assert float(loss_T[i].detach()) == pytest.approx(loss, rel=1e-12, abs=1e-12), cases[i]
        assert float(gradient_T[i]) == pytest.approx(slope, rel=1e-12, abs=1e-12), cases[i]


def test_clipped_says_where_the_gradient_is_gone() -> None:
    # By hand: r = 0.7, 1, 1.3, 4 for A = +1, then for A = -1.
    log_ratio_T = torch.tensor([0.7, 1.0, 1.3, 4.0] * 2, dtype=torch.float64).log().requires_grad_()
    advantage_T = torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=torch.float64)
    zero_T = torch.zeros(8, dtype=torch.float64)
    loss_fn = PPOClip()
    flags = {name: flag_T.tolist() for name, flag_T in loss_fn.clipped(log_ratio_T, zero_T, advantage_T).items()}
    assert flags == {
        "high": [False, False, True, True, False, False, False, False],
        "low": [False, False, False, False, True, False, False, False],
        "dual": [False, False, False, False, False, False, False, True],
    }
    (gradient_T,) = torch.autograd.grad(loss_fn(log_ratio_T, zero_T, advantage_T).sum(), log_ratio_T)
    anywhere = [any(flag[i] for flag in flags.values()) for i in range(8)]
    assert [float(g) == 0.0 for g in gradient_T] == anywhere


def test_at_ratio_one_it_is_the_policy_gradient() -> None:
    logprob_T = torch.tensor([-0.5, -2.0, -9.0], requires_grad=True)
    advantage_T = torch.tensor([1.5, -0.5, 0.0], requires_grad=True)
    loss_T = PPOClip()(logprob_T, logprob_T, advantage_T)
    loss_T.sum().backward()
    assert loss_T.detach().tolist() == [-1.5, 0.5, 0.0]
    assert logprob_T.grad is not None
    assert logprob_T.grad.tolist() == [-1.5, 0.5, 0.0]
    assert advantage_T.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_low": 0.0}, "clip_low = 0.0"),
        ({"clip_low": 1.5}, "clip_low = 1.5"),
        ({"clip_high": -0.2}, "clip_high = -0.2"),
        ({"clip_high": math.inf}, "clip_high = inf"),
        ({"dual_clip": 1.0}, "dual_clip = 1.0"),
        ({"dual_clip": math.nan}, "dual_clip = nan"),
    ],
)
def test_bad_clips(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PPOClip(**arguments)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"advantage_T has shape \(2,\), expected \(3,\)"):
        PPOClip()(torch.zeros(3), torch.zeros(3), torch.zeros(2))


def _weights_by_loop(
    name: str,
    rollout: list[int],
    mask: list[bool],
    keep: list[bool],
    group: list[int],
    advantage: list[float],
    scale: float | None,
) -> list[float]:
    """The table of `token_weights`, one token at a time."""
    T, R = len(rollout), len(group)
    counted = [sum(1 for t in range(T) if rollout[t] == r and mask[t]) for r in range(R)]
    padded = [sum(1 for t in range(T) if rollout[t] == r) for r in range(R)]
    kept = [sum(1 for t in range(T) if rollout[t] == r and mask[t] and keep[t]) for r in range(R)]
    members = {g: [r for r in range(R) if group[r] == g and kept[r] and advantage[r] != 0] for g in group}
    filled = sum(1 for m in members.values() if m)
    out = []
    for t in range(T):
        r = rollout[t]
        if not (mask[t] and keep[t]):
            out.append(0.0)
        elif name in ("token_mean", "all_tokens"):
            out.append(1.0 / sum(counted))
        elif name == "kept_tokens":
            out.append(1.0 / sum(kept))
        elif name == "seq_mean_token_sum":
            out.append(1.0 / sum(1 for c in counted if c))
        elif name == "seq_mean_token_mean":
            out.append(1.0 / sum(1 for c in counted if c) / counted[r])
        elif name == "seq_mean_token_sum_norm":
            out.append(1.0 / sum(1 for c in counted if c) / (scale if scale is not None else max(padded)))
        elif name == "fixed":
            assert scale is not None
            out.append(1.0 / scale)
        else:
            out.append(1.0 / filled / len(members[group[r]]) if r in members[group[r]] else 0.0)
    return out


@st.composite
def packed(draw: st.DrawFn) -> dict[str, list]:
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=7))
    rollout = [r for r, length in enumerate(lengths) for _ in range(length)]
    T, R = len(rollout), len(lengths)

    def flags() -> list[bool]:
        return draw(st.lists(st.booleans(), min_size=T, max_size=T))

    return {
        "rollout": rollout,
        "mask": flags(),
        "keep": flags(),
        "group": draw(st.lists(st.integers(0, 2), min_size=R, max_size=R)),
        "advantage": draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5]), min_size=R, max_size=R)),
    }


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
@settings(max_examples=60)
@given(batch=packed(), scale=st.sampled_from([None, 3.0, 48.0]))
def test_weights_against_loops(name: str, batch: dict[str, list], scale: float | None) -> None:
    if name == "fixed" and scale is None:
        scale = 12.0
    got = token_weights(
        torch.tensor(batch["rollout"], dtype=torch.int64),
        torch.tensor(batch["mask"], dtype=torch.bool),
        torch.tensor(batch["group"]),
        aggregation=name,
        keep_T=torch.tensor(batch["keep"], dtype=torch.bool),
        advantage_R=torch.tensor(batch["advantage"]),
        scale=scale,
    )
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(_weights_by_loop(name, **batch, scale=scale), rel=1e-6)


def _splits(T: int) -> Iterator[list[list[int]]]:
    """Seven ways to cut T tokens into micro-batches, from one piece to single tokens, in order and out of it."""
    generator = torch.Generator().manual_seed(3)
    shuffled = torch.randperm(T, generator=generator).tolist()
    for order, size in ((range(T), T), (range(T), 1), (range(T), 7), (range(T), 64), (shuffled, 7), (shuffled, 50)):
        yield [list(order[i : i + size]) for i in range(0, T, size)]
    yield [shuffled[:1], shuffled[1:3], shuffled[3:]]


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_loss_and_gradient_are_the_same_under_seven_splits(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    length_R = torch.tensor([5, 1, 0, 40, 17, 3, 29, 30])
    rollout_T = torch.repeat_interleave(torch.arange(8), length_R)
    T = len(rollout_T)
    mask_T, keep_T = torch.rand(2, T, generator=generator) < 0.7
    advantage_R = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 2.0, -2.0, 0.25])
    weight_T = token_weights(
        rollout_T,
        mask_T,
        torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]),
        aggregation=name,
        keep_T=keep_T,
        advantage_R=advantage_R,
        scale=100.0,
    ).double()
    logits_TV = torch.randn(T, 6, generator=generator, dtype=torch.float64)
    old_T = torch.log_softmax(logits_TV + 0.3 * torch.randn(T, 6, generator=generator), -1)[:, 0]

    def piece(head: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        logprob = torch.log_softmax(logits_TV[tokens] @ head, -1)[:, 0]
        loss = PPOClip()(logprob, old_T[tokens], advantage_R[rollout_T[tokens]].double())
        return (weight_T[tokens] * loss).sum()

    results = []
    for split in _splits(T):
        head = torch.eye(6, dtype=torch.float64).requires_grad_()
        losses = [piece(head, tokens) for tokens in split]
        for loss in losses:
            loss.backward()
        assert head.grad is not None
        results.append((sum(float(loss.detach()) for loss in losses), head.grad.clone()))
    assert len(results) == 7
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-11, atol=1e-14)
    assert float(results[0][1].abs().max()) > 1e-6


def test_masking_out_and_zeroing_the_advantage_differ_only_in_the_denominator() -> None:
    rollout_T = torch.tensor([0, 0, 1, 1, 1, 1])
    mask_T, group_R = torch.ones(6, dtype=torch.bool), torch.tensor([0, 0])
    keep_T = rollout_T == 0
    assert token_weights(rollout_T, mask_T, group_R, aggregation="token_mean", keep_T=keep_T).tolist() == (
        pytest.approx([1 / 6, 1 / 6, 0, 0, 0, 0])
    )
    assert token_weights(rollout_T, mask_T, group_R, aggregation="kept_tokens", keep_T=keep_T).tolist() == (
        pytest.approx([1 / 2, 1 / 2, 0, 0, 0, 0])
    )


def test_nothing_kept_weighs_nothing() -> None:
    rollout_T, group_R = torch.tensor([0, 0, 1]), torch.tensor([0, 1])
    none_T = torch.zeros(3, dtype=torch.bool)
    for name in AGGREGATIONS:
        weight_T = token_weights(
            rollout_T,
            ~none_T,
            group_R,
            aggregation=name,
            keep_T=none_T,
            advantage_R=torch.ones(2),
            scale=5.0,
        )
        assert weight_T.tolist() == [0.0, 0.0, 0.0]


def test_bad_weights_are_named() -> None:
    rollout_T, mask_T, group_R = torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool), torch.tensor([0, 0])
    with pytest.raises(ValueError, match="unknown aggregation 'tokn_mean': did you mean 'token_mean'"):
        token_weights(rollout_T, mask_T, group_R, aggregation="tokn_mean")
    with pytest.raises(ValueError, match="'eq5' needs advantage_R"):
        token_weights(rollout_T, mask_T, group_R, aggregation="eq5")
    with pytest.raises(ValueError, match="'fixed' needs scale"):
        token_weights(rollout_T, mask_T, group_R, aggregation="fixed")
    with pytest.raises(ValueError, match=r"scale = 0.0"):
        token_weights(rollout_T, mask_T, group_R, aggregation="fixed", scale=0.0)
    with pytest.raises(ValueError, match="keep_T must be bool"):
        token_weights(rollout_T, mask_T, group_R, aggregation="token_mean", keep_T=torch.ones(2))
    with pytest.raises(ValueError, match=r"advantage_R has shape \(3,\)"):
        token_weights(rollout_T, mask_T, group_R, aggregation="eq5", advantage_R=torch.ones(3))
