"""Predicted against realised entropy change of whole batches, and the log-likelihood by sign of the advantage.

A position-conditioned policy, small enough to sample exactly: a two-layer perceptron reads a code of the prompt and
of the position and gives logits over V tokens; a rollout is right if its first token is among those the prompt likes.
The rows of all positions share every weight, so the prediction, which takes rows for independent, is put to a test.

    python bench/prediction_figure.py [--quick] [--out DIRECTORY]

Writes prediction.json and prediction.png. Two minutes at most on two CPU cores.
"""

import argparse
import json
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

mpl.use("Agg")

PROMPTS, SAMPLES, LENGTH, VOCAB, WIDTH = 16, 8, 6, 24, 48
PASSES = {"on policy": 1, "4 clipped passes": 4}
# Steps large enough for the entropy to move, small enough for a first order to mean something.
RATES = {"sgd": 1.0, "adam": 1e-3}
ESTIMATORS = ("raft_pp", "grpo", "nsr")


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
    """One row a step: predicted change (mean over tokens, for a unit step), realised change, what the theorem says."""
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
        advantage_R = estimate(torch.where(right_R, 1.0, -1.0), group_R, None)
        advantage_T = advantage_R[rollout_T].double()

        def loss(logprob_T: Tensor, old_T: Tensor = stats.logprob_T, a_T: Tensor = advantage_T) -> Tensor:
            return loss_fn(logprob_T, old_T, a_T).mean()

        predicted = float(predicted_entropy_change(stats, loss).mean())
        for _ in range(passes):
            optimiser.zero_grad()
            loss(torch.log_softmax(policy.logits(), -1)[row_T, token_T]).backward()
            optimiser.step()
        with torch.no_grad():
            after = score(policy.logits(), row_T, token_T)
        entropy = float(stats.entropy_T.mean())
        theorem = theorem_condition(stats, rollout_T, None, advantage_R)
        rows.append(
            {
                "predicted": predicted,
                "realised": float(after.entropy_T.mean()) - entropy,
                "entropy": entropy,
                "reward": float(right_R.double().mean()),
                "share_tokens": theorem.share_tokens,
                "logprob_positive": theorem.logprob_positive,
                "logprob_negative": theorem.logprob_negative,
            }
        )
    return rows


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
    """Every optimizer with every kind of re-use under GRPO, then the three estimators under SGD with 4 passes."""
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
        names = ("logprob_positive", "logprob_negative", "entropy", "reward", "share_tokens")
        # NaN, where a sign has no rollout, is no JSON.
        curves[estimator] = {n: [None if row[n] != row[n] else row[n] for row in rows] for n in names}
    return {"steps": steps, "seeds": seeds, "rates": RATES, "agreement": runs, "likelihood": curves}


def draw(results: dict[str, Any]) -> Figure:
    """Above, realised against predicted; below, log-likelihood by sign of the advantage, and the entropy."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(2, 4)
    for axis, (name, run) in zip(axes[0], results["agreement"].items(), strict=True):
        axis.scatter(run["predicted"], run["realised"], s=6)
        axis.axline((0, 0), slope=run["slope"], color="black", linewidth=0.8)
        axis.set_title(f"{name}\nr = {run['correlation']:.2f}, same sign {run['sign_agreement']:.0%}", fontsize=9)
        axis.set_xlabel("predicted (unit step)")
        axis.set_ylabel("realised, nats")
    for axis, (name, curve) in zip(axes[1], results["likelihood"].items(), strict=False):
        for sign, colour in (("positive", "tab:blue"), ("negative", "tab:red")):
            values = [np.nan if x is None else x for x in curve[f"logprob_{sign}"]]
            axis.plot(values, color=colour, linewidth=0.9, label=f"A {'>' if sign == 'positive' else '<'} 0")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylabel("log-likelihood, nats a token")
        axis.legend(fontsize=8)
        axes[1, 3].plot(curve["entropy"], label=name)
    axes[1, 3].set_title("entropy, nats", fontsize=9)
    axes[1, 3].legend(fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the agreement, write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="12 steps, one seed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    results = measure(steps=12, seeds=1) if options.quick else measure(steps=150, seeds=3)
    for name, run in results["agreement"].items():
        numbers = ", ".join(f"{key} {run[key]:.3g}" for key in ("slope", "correlation", "sign_agreement"))
        print(f"{name:24} {numbers}")
    print(f"{time.perf_counter() - begin:.0f} s")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "prediction.json").write_text(json.dumps(results, allow_nan=False) + "\n")
    draw(results).savefig(options.out / "prediction.png", dpi=110)


if __name__ == "__main__":
    main()
