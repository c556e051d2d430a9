"""Which rollouts, or which of their tokens, an update may learn from.

Every rule is a frozen value that is called with the same `RuleInputs` and returns a `Verdict`. m is the direction:
+1 where the entropy of the batch is above its band, -1 below, 0 inside. A is the advantage of a rollout, D its
predicted entropy change under the configured loss (`prediction.py`). The rules `soft`, `hard` and `switch` are
three published forms of one idea and differ on purpose; none of them is a default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrocraft.predictive import LEVELS as LEVELS
from entrocraft.predictive import budget, first_order
from entrocraft.registry import build_from, lookup
from entrocraft.verdict import Rule, RuleInputs, Verdict

# exp(-50) is 2e-22, less than any uniform of 53 bits but 0: an acceptance probability below it is none.
_EXPONENT_LIMIT = -50.0


@dataclass(frozen=True, slots=True)
class none:
    """Keep every rollout as it is: no control, the arm to compare with.

    Aggregation: any. Entropy: whatever loss and advantages do. Source: the uncontrolled baselines of arXiv 2604.26326.
    """

    def __call__(self, inputs: RuleInputs) -> Verdict:
        return _keep_all(inputs)


@dataclass(frozen=True, slots=True)
class soft:
    """Accept a rollout when `u <= exp(min(0, gamma m A))`, u uniform in [0, 1).

    Above the band positive advantages pass and negative ones rarely, below it the other way round; inside, or with
    A = 0, everything passes. u depends on (seed, step, group, sample) alone. At gamma = 10 and eight rollouts a
    prompt, an opposite sign passes with probability 0.029 at best (seven of eight in its majority class) and 9e-5 at
    four of eight: nearly `hard`.

    Entropy: above the band it is meant to fall, below it to rise. On policy, without clipping, positive-only and
    negative-only updates share their expected direction, so the size of the drift changes and not its sign; in
    small simulations the effect comes with clipped, re-used batches, which is not proved for language models.

    Aggregation: the paper's is `eq5` (preset `paper_v1`), over what is kept with an advantage: an update is then as
    large as an unfiltered one. Under `token_mean` it shrinks with what is rejected.

    gamma: >= 0, sharpness. Experimental: no released code contains it, so that no run with gamma = 10 could be looked
    at. Source: arXiv 2604.26326 v1, Algorithm 1, gamma = 10.
    """

    gamma: float = 10.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma < float("inf"):
            raise ValueError(f"gamma = {self.gamma!r}: expected finite and >= 0; the paper's first version has 10")

    def acceptance(self, direction: int, advantage_R: np.ndarray) -> np.ndarray:
        """Probability of accepting each rollout, float64 `[R]`: exp(clip(gamma m A, -50, 0))."""
        return np.exp(np.clip(self.gamma * direction * advantage_R, _EXPONENT_LIMIT, 0.0))

    def __call__(self, inputs: RuleInputs) -> Verdict:
        probability_R = self.acceptance(inputs.direction, inputs.advantage_R)
        keep_R = np.ones(len(probability_R), dtype=bool)
        for index in np.flatnonzero(probability_R < 1.0):  # only those that can be rejected draw
            u = uniform(inputs.seed, inputs.step, int(inputs.group_R[index]), int(inputs.sample_R[index]))
            keep_R[index] = u <= probability_R[index]
        return Verdict(keep_R=keep_R, advantage_R=inputs.advantage_R, probability_R=probability_R)


@dataclass(frozen=True, slots=True)
class soft_expected(soft):
    """`soft` without the draw: keep every rollout, and multiply its advantage by `exp(min(0, gamma m A))`.

    Where the loss is proportional to the advantage (`Verdict.weight_R` has the exceptions), the update is the
    expectation of soft's over its draws, so it has less noise. Nothing counts as rejected: the controller's limits on
    what is kept never bind. Aggregation: `token_mean` and others of the whole batch; under `eq5`, where soft's
    denominator shrinks with what it rejects and this one's does not, the two differ.

    Entropy: as `soft`. gamma: >= 0. Source: this project.
    """

    def __call__(self, inputs: RuleInputs) -> Verdict:
        everything = np.ones(len(inputs.advantage_R), dtype=bool)
        weight_R = self.acceptance(inputs.direction, inputs.advantage_R)
        return Verdict(keep_R=everything, advantage_R=inputs.advantage_R, weight_R=weight_R)


@dataclass(frozen=True, slots=True)
class hard:
    """Accept a rollout when `m A >= 0`: positive-only above the band, negative-only below it, A = 0 always.

    Aggregation: as `soft`, the paper's being `eq5` (preset `paper_v2`).
    Entropy: as `soft`, of which it is the limit of large gamma.
    Source: arXiv 2604.26326 v2, Algorithm 1.
    """

    def __call__(self, inputs: RuleInputs) -> Verdict:
        return Verdict(keep_R=inputs.direction * inputs.advantage_R >= 0, advantage_R=inputs.advantage_R)


@dataclass(frozen=True, slots=True)
class switch:
    """Keep every rollout; outside the band replace its advantage by a part of its raw reward R, -1 or +1.

        m = +1: A' = max(R, 0)        m = -1: A' = min(R, 0)        m = 0: A' = A

    Nothing is removed, so the denominator of the loss stays. Unlike the papers' rules it also moves prompts whose
    rollouts all agree (+1 for all-correct above the band, -1 for all-wrong below), a large part of its authority.
    A reward of NaN (no verdict) gets advantage 0.

    Aggregation: `token_mean`, that of the released code (preset `paper_code`).
    Entropy: as `soft`, and stronger, by those prompts. Source: the released code of arXiv 2604.26326, which has no
    guard: it trains on whatever is left, where the controller's default limits restore every given advantage once
    too few rollouts have one, or control costs the reward. `min_kept_fraction=0, min_groups=0, min_authority=0,
    release=None` switch all that off (`Guard`, `Release`). Under a given `loss_fn`, which holds the given advantages,
    nothing is predicted for the replaced ones.

    Raises ValueError for any reward other than -1 and +1: with 0 and 1, min(R, 0) would be 0 and do nothing.
    """

    def __call__(self, inputs: RuleInputs) -> Verdict:
        reward_R = inputs.reward_R
        if reward_R is None:
            raise ValueError("rule 'switch' needs reward_R, the raw rewards of -1 and +1")
        wrong_R = ~np.isnan(reward_R) & (np.abs(reward_R) != 1.0)
        if wrong_R.any():
            where = int(np.flatnonzero(wrong_R)[0])
            raise ValueError(
                f"reward_R[{where}] = {float(reward_R[where])!r}: rule 'switch' needs rewards of -1 and +1; "
                "map 0 and 1 with 2 R - 1"
            )
        if inputs.direction == 0:
            return _keep_all(inputs)
        known_R = np.nan_to_num(reward_R, nan=0.0)
        part_R = np.maximum(known_R, 0.0) if inputs.direction > 0 else np.minimum(known_R, 0.0)
        return Verdict(keep_R=np.ones(len(part_R), dtype=bool), advantage_R=part_R)


def uniform(seed: int, step: int, group: int, sample: int) -> float:
    """A number in [0, 1) that belongs to this rollout at this step, whoever asks and in whatever order."""
    word = np.random.SeedSequence([seed, step, group, sample]).generate_state(1, np.uint64)[0]
    return float(word >> np.uint64(11)) * 2.0**-53


RULES: dict[str, Callable[..., Rule] | str] = {
    "none": none,
    "soft": soft,
    "soft_expected": soft_expected,
    "hard": hard,
    "switch": switch,
    "first_order": first_order,
    "budget": budget,
    "group_scale": "entrocraft.corrections:group_scale",  # these two wrap a rule, given as `rule=`
    "tempered": "entrocraft.corrections:tempered",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A rule with the aggregation of the loss (`losses.token_weights`) that belongs to it."""

    rule: Rule
    aggregation: str


PRESETS: dict[str, Preset] = {
    # arXiv 2604.26326, first version: Algorithm 1 and Equation 5.
    "paper_v1": Preset(rule=soft(gamma=10.0), aggregation="eq5"),
    # Its second version: Algorithm 1 and Equation 5.
    "paper_v2": Preset(rule=hard(), aggregation="eq5"),
    # What the authors released, and presumably ran; exactly so only with the guard switched off, see `switch`.
    "paper_code": Preset(rule=switch(), aggregation="token_mean"),
}


def build(name: str, **arguments: Any) -> Rule:
    """The rule of that name, or of the import path `package.module:name`.

    Raises:
        ValueError: unknown name, arguments it does not take, or values it refuses.
    """
    return build_from(RULES, name, arguments, "rule")


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: unknown name.
    """
    return lookup(PRESETS, name, "preset")


def _keep_all(inputs: RuleInputs) -> Verdict:
    return Verdict(keep_R=np.ones(len(inputs.advantage_R), dtype=bool), advantage_R=inputs.advantage_R)
