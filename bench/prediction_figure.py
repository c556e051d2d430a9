"""Predicted against realised entropy change of whole batches, and what the theorem's condition says of them.

A position-conditioned policy, small enough to sample exactly: a two-layer perceptron reads a code of the prompt and
of the position and gives logits over V tokens; a rollout is right if its first token is among those the prompt likes.
The rows of all positions share every weight, so the prediction, which takes rows for independent, is put to a test.
Of RAFT++, GRPO and NSR besides, this one without right rollouts (`nsr`) and with them at advantage 0 (`nsr_parity`):
the log-likelihood by sign of the advantage, the share of tokens and rollouts where LL > OSB, and quartiles of S - Sbar,
which has the sign of LL - OSB (`entrocraft.theorem`).

    python bench/prediction_figure.py [--quick] [--out DIRECTORY]

Writes prediction.json and prediction.png. Two minutes at most on one CPU core.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from entrocraft import PPOClip, TokenStats, advantages, predicted_entropy_change
from entrocraft.theorem import theorem_condition
from entrocraft.train.demo import provenance

mpl.use("Agg")

PROMPTS, SAMPLES, LENGTH, VOCAB, WIDTH = 16, 8, 6, 24, 48
PASSES = {"on policy": 1, "4 clipped passes": 4}
# Steps large enough for the entropy to move, small enough for a first order to mean something.
RATES = {"sgd": 1.0, "adam": 1e-3}
ESTIMATORS = ("raft_pp", "grpo", "nsr", "nsr_parity")
QUARTILES = {"lower": 0.25, "median": 0.5, "upper": 0.75}
SCORES = tuple(f"score_{of}_{name}" for of in ("token", "sequence") for name in QUARTILES)
LIKELIHOOD = ("logprob_positive", "logprob_negative", "entropy", "reward", "share_tokens", "share_sequences", *SCORES)


class Policy:
    """Logits of every (prompt, position), `[P, LENGTH, V]`, from one perceptron."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        code = torch.randn(PROMPTS, LENGTH, 16, generator=generator, dtype=torch.float64)
        self.code_NH = code.reshape(-1, 16)
        self.first_HW = (torch.randn(16, WIDTH, generator=generator, dtype=torch.float64) / 4).requires_grad_()
        self.head_WV = (torch.randn(WIDTH, VOCAB, generator=generator, dtype=torch.float64) / 3).requires_grad_()
        self.liked_PV = torch.rand(PROMPTS, VOCAB, generator=generator) < 0.4
        self.generator = generator

    def parameters(self) -> list[Tensor]:
        return [self.first_HW, self.head_WV]

    def logits(self) -> Tensor:
        return (self.code_NH @ self.first_HW).tanh() @ self.head_WV


def score(logits_NV: Tensor, row_T: Tensor, token_T: Tensor) -> TokenStats:
    """Statistics of the sampled tokens by their definitions."""
    logp_NV = torch.log_softmax(logits_NV, -1)
    p_NV = logp_NV.exp()
    return TokenStats(
        logprob_T=logp_NV[row_T, token_T],
        entropy_T=-(p_NV * logp_NV).sum(-1)[row_T],
        lse_T=torch.logsumexp(logits_NV, -1)[row_T],
        p2_T=p_NV.square().sum(-1)[row_T].detach(),
        p2logp_T=(p_NV.square() * logp_NV).sum(-1)[row_T].detach(),
    )


def train(estimator: str, optimizer: str, passes: int, steps: int, seed: int) -> list[dict[str, float]]:
    """One row a step: predicted change (mean over tokens, for a unit step), realised change, what the theorem says.

    Rollouts that the estimator takes out of the batch are in neither the loss, its denominator nor the theorem's
    shares. A step that leaves none changes nothing.
    """
    policy = Policy(seed)
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    optimiser = make(policy.parameters(), lr=RATES[optimizer])
    estimate, loss_fn, rows = advantages.build(estimator), PPOClip(), []
    group_R = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    rollout_T = torch.arange(len(group_R)).repeat_interleave(LENGTH)
    row_T = (group_R[:, None] * LENGTH + torch.arange(LENGTH)).flatten()
    for _ in range(steps):
        with torch.no_grad():
            logits_NV = policy.logits()
            token_T = torch.multinomial(logits_NV.softmax(-1)[row_T], 1, generator=policy.generator)[:, 0]
        stats = score(logits_NV, row_T, token_T)
        right_R = policy.liked_PV[group_R, token_T[::LENGTH]]
        reward_R = torch.where(right_R, 1.0, -1.0)
        advantage_R, member_R = estimate(reward_R, group_R, None), advantages.members(estimate, reward_R, group_R)
        member_T = torch.ones_like(row_T, dtype=torch.bool) if member_R is None else member_R[rollout_T]
        advantage_T = advantage_R[rollout_T].double()
        weight_T = member_T.double() / member_T.sum().clamp(min=1)

        def loss(
            logprob_T: Tensor, old_T: Tensor = stats.logprob_T, a_T: Tensor = advantage_T, w_T: Tensor = weight_T
        ) -> Tensor:
            return (w_T * loss_fn(logprob_T, old_T, a_T)).sum()

        predicted = float(predicted_entropy_change(stats, loss).mean())
        for _ in range(passes):
            optimiser.zero_grad()
            loss(torch.log_softmax(policy.logits(), -1)[row_T, token_T]).backward()
            optimiser.step()
        with torch.no_grad():
            after = score(policy.logits(), row_T, token_T)
        entropy = float(stats.entropy_T.mean())
        rows.append(
            {
                "predicted": predicted,
                "realised": float(after.entropy_T.mean()) - entropy,
                "entropy": entropy,
                "reward": float(right_R.double().mean()),
                **condition(stats, rollout_T, member_T, advantage_R),
            }
        )
    return rows


def condition(stats: TokenStats, rollout_T: Tensor, member_T: Tensor, advantage_R: Tensor) -> dict[str, float]:
    """What the theorem says of a batch: shares, log-likelihood by sign, quartiles of S - Sbar; NaN of nothing."""
    theorem = theorem_condition(stats, rollout_T, member_T, advantage_R)
    found = {
        "share_tokens": theorem.share_tokens,
        "share_sequences": theorem.share_sequences,
        "logprob_positive": theorem.logprob_positive,
        "logprob_negative": theorem.logprob_negative,
    }
    scores = {"token": theorem.score_T[member_T], "sequence": theorem.score_R[~theorem.score_R.isnan()]}
    for of, score_N in scores.items():
        for name, share in QUARTILES.items():
            found[f"score_{of}_{name}"] = float(score_N.quantile(share)) if len(score_N) else math.nan
    return found


def agreement(rows: list[dict[str, float]]) -> dict[str, float]:
    """Slope of realised on predicted through the origin, their correlation, and the share of equal signs."""
    predicted, realised = (np.array([row[name] for row in rows]) for name in ("predicted", "realised"))
    return {
        "batches": len(rows),
        "slope": float((realised * predicted).sum() / (predicted**2).sum()),
        "correlation": float(np.corrcoef(predicted, realised)[0, 1]),
        "sign_agreement": float((np.sign(predicted) == np.sign(realised)).mean()),
    }


def measure(steps: int, seeds: int) -> dict[str, Any]:
    """Every optimizer with every kind of re-use under GRPO, then the estimators under SGD with 4 passes."""
    runs, curves = {}, {}
    for optimizer in RATES:
        for name, passes in PASSES.items():
            rows = [row for seed in range(seeds) for row in train("grpo", optimizer, passes, steps, seed)]
            runs[f"{optimizer}, {name}"] = agreement(rows) | {
                "predicted": [row["predicted"] for row in rows],
                "realised": [row["realised"] for row in rows],
            }
    for estimator in ESTIMATORS:
        rows = train(estimator, "sgd", 4, steps, 0)
        # NaN, where a sign or the whole batch has no rollout, is no JSON.
        curves[estimator] = {n: [None if math.isnan(row[n]) else row[n] for row in rows] for n in LIKELIHOOD}
    return {"steps": steps, "seeds": seeds, "rates": RATES, "agreement": runs, "likelihood": curves}


def draw(results: dict[str, Any]) -> Figure:
    """Above, realised against predicted; below, by estimator, log-likelihood by sign of the advantage and quartiles of
    S - Sbar; on the right the entropy and the shares where LL > OSB."""
    figure = Figure(figsize=(16, 9.5), layout="constrained")
    axes = figure.subplots(3, 5)
    for axis, (name, run) in zip(axes[0], results["agreement"].items(), strict=False):
        axis.scatter(run["predicted"], run["realised"], s=6)
        axis.axline((0, 0), slope=run["slope"], color="black", linewidth=0.8)
        fit = f"slope {run['slope']:.0f}, r = {run['correlation']:.2f}, same sign {run['sign_agreement']:.0%}"
        axis.set(title=f"{name}\n{fit}", xlabel="predicted (unit step)", ylabel="realised, nats")
    # A marker besides, since a step between two that have nothing to show is no line.
    thin = {"linewidth": 0.9, "marker": ".", "markersize": 2}
    for column, (name, found) in enumerate(results["likelihood"].items()):
        curve = {key: np.array(values, dtype=float) for key, values in found.items()}  # None becomes NaN, a gap
        above, below = axes[1:, column]
        for sign, colour in (("positive", "tab:blue"), ("negative", "tab:red")):
            label = f"A {'>' if sign == 'positive' else '<'} 0"
            above.plot(curve[f"logprob_{sign}"], color=colour, label=label, **thin)
        above.set(title=name, ylabel="log-likelihood, nats a token")
        for of, colour in (("token", "tab:green"), ("sequence", "tab:purple")):
            lower, median, upper = (curve[f"score_{of}_{which}"] for which in QUARTILES)
            below.fill_between(np.arange(len(median)), lower, upper, color=colour, alpha=0.25, linewidth=0)
            below.plot(median, color=colour, label=f"per {of}", **thin)
        below.axhline(0.0, color="black", linewidth=0.8)
        below.set(title=f"{name}: median and quartiles", ylabel=r"$S - \bar{S}$, the sign of LL - OSB")
        for axis, key in zip(axes[:, 4], ("entropy", "share_tokens", "share_sequences"), strict=True):
            axis.plot(curve[key], label=name, **thin)
    axes[0, 4].set_title("entropy, nats a token")
    axes[1, 4].set(title="share of tokens where LL > OSB", ylim=(0, 1))
    axes[2, 4].set(title="share of rollouts where LL > OSB", ylim=(0, 1))
    for axis in (axes[0, 4], *axes[1:, :4].flat):
        axis.legend(fontsize=8)
    for axis in (axes[0, 4], *axes[1:].flat):
        axis.set_xlabel("step")
    for axis in axes.flat:
        axis.title.set_fontsize(9)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the agreement, write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="12 steps, one seed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    origin = provenance()
    results = origin | (measure(steps=12, seeds=1) if options.quick else measure(steps=150, seeds=3))
    for name, run in results["agreement"].items():
        numbers = ", ".join(f"{key} {run[key]:.3g}" for key in ("slope", "correlation", "sign_agreement"))
        print(f"{name:24} {numbers}")
    print(f"{time.perf_counter() - begin:.0f} s")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "prediction.json").write_text(json.dumps(results, allow_nan=False) + "\n")
    draw(results).savefig(options.out / "prediction.png", dpi=110)


if __name__ == "__main__":
    main()
