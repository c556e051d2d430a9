"""What n graded responses to each of P problems say about a policy: mean@n, pass@k, and how sure one can be.

For a problem with c right responses of n, mean@n is c / n and the unbiased estimate of pass@k (Chen et al., arXiv
2107.03374, section 2.1) is 1 - C(n - c, k) / C(n, k). Both are means over problems. Intervals are percentiles over
resampled problems (a cluster bootstrap): the responses to one problem are not independent of each other, and which
problems a set happens to hold is most of the uncertainty: with 30 problems, one is 3.3 points of pass@n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of the n responses to one problem."""

    problem: int
    """`Problem.index`."""
    samples: int
    """n, responses."""
    right: int
    """c, responses whose deciding reward was 1 or more; no verdict counts as not right."""
    distinct: int
    """Different texts among the right ones."""
    reward: float
    """Sum of the rewards that have a verdict."""
    no_verdict: int
    """Responses without one."""
    tokens: int
    """Response tokens, all n together."""
    truncated: int
    """Responses cut off at the longest length."""
    entropy: float | None = None
    """Sum of the policy's entropy over those tokens, nats; None if it was not measured."""
    others: dict[str, int] = field(default_factory=dict)
    """Responses to which each further reward gave 1 or more, by its name."""


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Chance that at least one of k draws without replacement is right: 1 - C(n - c, k) / C(n, k).

    In a form without large factorials. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass_at_k(correct={correct}, samples={samples}, k={k}): expected 0 <= c <= n, 1 <= k <= n")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


def bootstrap_intervals(value_PS: np.ndarray, draws: int, *, seed: int = 0) -> np.ndarray:
    """95 % percentile intervals of the means over P problems of S statistics at once: float64 [S, 2].

    Every draw takes P problems with replacement, the same ones for all statistics. Deterministic in `seed`.
    """
    size = len(value_PS)
    # How often each problem is drawn is all that a mean needs.
    count_DP = np.random.default_rng(seed).multinomial(size, np.full(size, 1.0 / size), size=draws)
    return np.quantile(count_DP @ value_PS / size, [0.025, 0.975], axis=0).T


def summarise(outcomes: Sequence[Outcome], ks: Sequence[int], *, bootstrap: int) -> dict[str, Any]:
    """The numbers of one set of problems.

    accuracy is mean@n; `pass_at_k` and `intervals` (95 %, empty if `bootstrap`, the number of draws, is 0) are by
    name; `<reward>_accuracy` is mean@n under each further reward; reward is the mean over verdicts and
    distinct_correct, response_length and truncated_fraction are means over problems or responses; entropy is per
    token, None if it was not measured.

    Raises ValueError for no outcomes, for a k above a problem's n, and for problems with different n.
    """
    if not outcomes:
        raise ValueError("no outcomes to summarise: expected at least one problem")
    n = outcomes[0].samples
    if any(outcome.samples != n for outcome in outcomes):
        raise ValueError(f"problems with different numbers of responses: {sorted({o.samples for o in outcomes})}")
    columns = {"accuracy": [o.right / n for o in outcomes]}
    columns |= {f"{name}_accuracy": [o.others[name] / n for o in outcomes] for name in outcomes[0].others}
    columns |= {f"pass_at_{k}": [pass_at_k(o.right, n, k) for o in outcomes] for k in ks}
    value_PS = np.array(list(columns.values()), dtype=float).T
    means = dict(zip(columns, value_PS.mean(0).tolist(), strict=True))
    intervals = bootstrap_intervals(value_PS, bootstrap).tolist() if bootstrap else []
    total, tokens = len(outcomes) * n, sum(o.tokens for o in outcomes)
    verdicts = total - sum(o.no_verdict for o in outcomes)
    entropies = [o.entropy for o in outcomes if o.entropy is not None]
    return {
        "problems": len(outcomes),
        "samples": n,
        **means,
        "intervals": dict(zip(columns, intervals, strict=False)),
        "reward": sum(o.reward for o in outcomes) / verdicts if verdicts else None,
        "distinct_correct": sum(o.distinct for o in outcomes) / len(outcomes),
        "no_verdict": total - verdicts,
        "response_length": tokens / total,
        "truncated_fraction": sum(o.truncated for o in outcomes) / total,
        "entropy": sum(entropies) / tokens if len(entropies) == len(outcomes) and tokens else None,
    }


NOT_METRICS = ("problems", "samples", "intervals")


def as_metrics(summaries: Mapping[str, Mapping[str, Any]], unnamed: str) -> dict[str, float | None]:
    """Summaries by set as metrics of a step, `eval_<set>_<name>`; those of the set called `unnamed` without its name.

    mean@n gets its interval as `accuracy_low` and `accuracy_high`. Where no set is unnamed, `eval_accuracy` is the
    mean over sets.
    """
    metrics: dict[str, float | None] = {}
    if summaries and unnamed not in summaries:
        metrics["eval_accuracy"] = sum(s["accuracy"] for s in summaries.values()) / len(summaries)
    for name, summary in summaries.items():
        prefix = "eval_" if name == unnamed else f"eval_{name}_"
        metrics |= {prefix + key: value for key, value in summary.items() if key not in NOT_METRICS}
        if "accuracy" in summary["intervals"]:
            low, high = summary["intervals"]["accuracy"]
            metrics |= {f"{prefix}accuracy_low": low, f"{prefix}accuracy_high": high}
    return metrics
