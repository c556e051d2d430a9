"""The same number of kept rollouts every step, by sampling more, in waves, where a rule rejects more.

A trainer drives it:

    waves = Waves(target=256, samples=8)
    wave = kept = generated = 0
    while size := waves.next_size(kept, generated, direction=m, wave=wave):
        ...  # generate `size` rollouts, whole groups of `samples`; grade, judge; count
        wave += 1
    waves.observe(kept, generated, direction=m)
    keep_R = subsample(keep_R, group_R, 256, seed=seed, step=step)
    loss = loss * loss_scale(kept, 256)

Nothing is carried over to the next step, where it would be off policy. Advantages belong to whole groups and are
computed before anything is rejected. Comparisons must count the tokens generated, not the steps.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_DIRECTIONS: tuple[int, ...] = (-1, 0, 1)


class Waves:
    """How many rollouts to sample next, from the share that each direction of control has kept so far.

        size = ceil((target - kept) / f_m)        f_m = EMA(kept / generated | direction m)

    rounded up to whole groups, within what is left of max_factor * target rollouts, for at most max_waves waves.

    Experimental: derived here, measured in no published run. Effect on entropy: none of its own. Under a loss that
    averages over the kept (`losses.KEPT_DENOMINATORS`) the step does not shrink where a rule keeps few; under others it
    shrinks with the share that is kept, waves or not, and more sampling makes it less noisy. Source: this project.

    Args:
        target: >= 1, rollouts to keep in a step.
        samples: >= 1, rollouts of a group.
        max_waves: >= 1. max_factor: >= 1; at most this many times `target` are generated in a step.
        ema: weight of the past in the kept share, in [0, 1). initial_share: in (0, 1], where each share begins.

    Raises:
        ValueError: any of these out of range.
    """

    def __init__(
        self,
        target: int,
        samples: int,
        *,
        max_waves: int = 3,
        max_factor: float = 4.0,
        ema: float = 0.9,
        initial_share: float = 0.5,
    ) -> None:
        for name, value in (("target", target), ("samples", samples), ("max_waves", max_waves)):
            if value < 1:
                raise ValueError(f"{name} = {value!r}: expected an integer >= 1")
        if not 1.0 <= max_factor < math.inf:
            raise ValueError(f"max_factor = {max_factor!r}: expected finite and >= 1, such as 4")
        if not 0.0 <= ema < 1.0:
            raise ValueError(f"ema = {ema!r}: expected 0 <= ema < 1, the weight of the past, such as 0.9")
        if not 0.0 < initial_share <= 1.0:
            raise ValueError(f"initial_share = {initial_share!r}: expected a share in (0, 1], such as 0.5")
        self._target, self._samples, self._max_waves, self._ema = target, samples, max_waves, ema
        self._max_factor = max_factor
        self._budget = max(math.floor(max_factor * target / samples), 1) * samples
        self._share: dict[int, float] = dict.fromkeys(_DIRECTIONS, float(initial_share))

    def share(self, direction: int) -> float:
        """f_m, the share of rollouts that this direction of control is expected to keep."""
        _check_direction(direction)
        return self._share[direction]

    def next_size(self, kept: int, generated: int, *, direction: int = 0, wave: int = 0) -> int:
        """Rollouts of the next wave, a multiple of `samples`; 0 once the target is met or the budget spent.

        Args:
            kept, generated: rollouts of this step so far, 0 <= kept <= generated.
            direction: m. wave: waves already generated in this step.

        Raises:
            ValueError: counts or a direction out of range.
        """
        _check_counts(kept, generated)
        _check_direction(direction)
        if wave < 0:
            raise ValueError(f"wave = {wave!r}: expected the number of waves already generated, >= 0")
        if kept >= self._target or wave >= self._max_waves:
            return 0
        groups = math.ceil((self._target - kept) / self._share[direction] / self._samples)
        return max(min(groups * self._samples, self._left(generated)), 0)

    def group_size(self, direction: int = 0) -> int:
        """Instead of more prompts: samples of each, ceil(samples / f_m), at most max_factor times as many."""
        largest = math.floor(self._max_factor * self._samples)
        return min(largest, math.ceil(self._samples / self.share(direction)))

    def observe(self, kept: int, generated: int, *, direction: int = 0) -> None:
        """Learn the share a whole step kept, all of its waves together. A step that generated nothing says nothing.

        Raises:
            ValueError: counts or a direction out of range.
        """
        _check_counts(kept, generated)
        _check_direction(direction)
        if generated:
            share = self._ema * self._share[direction] + (1.0 - self._ema) * kept / generated
            # A share of 0 would ask for infinitely many; one rollout of a full budget is the least worth knowing.
            self._share[direction] = max(share, 1.0 / self._budget)

    def state_dict(self) -> dict[str, float]:
        """The kept share of each direction, plain numbers: `share_below`, `share_inside`, `share_above`."""
        return {name: self._share[m] for name, m in _NAMES.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: entries missing or unknown, or a share outside (0, 1].
        """
        if set(state) != set(_NAMES):
            raise ValueError(f"state of Waves has {sorted(state)}: expected {sorted(_NAMES)}")
        for name, value in state.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
                raise ValueError(f"state of Waves has {name} = {value!r}: expected a share in (0, 1]")
        self._share = {m: float(state[name]) for name, m in _NAMES.items()}

    def _left(self, generated: int) -> int:
        return (self._budget - generated) // self._samples * self._samples


_NAMES: dict[str, int] = {"share_below": -1, "share_inside": 0, "share_above": 1}


def subsample(
    keep_R: np.ndarray,
    group_R: np.ndarray,
    target: int,
    *,
    seed: int,
    step: int,
    sample_R: np.ndarray | None = None,
) -> np.ndarray:
    """bool `[R]`: exactly `target` of the kept rollouts, whole groups first; all of them where there are fewer.

    Groups stand in a circle in random order, each with its kept rollouts in random order; `target` rollouts in a row
    are taken from a random start. So every kept rollout has the same chance, target / kept, and at most two groups are
    cut. The draws depend on (seed, step, group, sample) alone, not on the order of the arguments; other than those of
    the rule `soft`.

    Args:
        keep_R: bool. group_R: int64 >= 0. sample_R: int64 >= 0, number within the group; None: order of appearance.

    Raises:
        ValueError: shapes or dtypes that do not fit, or target < 1.
    """
    if not isinstance(keep_R, np.ndarray) or keep_R.ndim != 1 or keep_R.dtype != np.bool_:
        raise ValueError(
            f"keep_R is a {type(keep_R).__name__} of shape {tuple(keep_R.shape)} and dtype {keep_R.dtype}: expected a "
            "NumPy array, bool [R], such as decision.keep_R.cpu().numpy()"
        )
    for name, value in (("group_R", group_R), ("sample_R", sample_R)):
        if value is not None and value.shape != keep_R.shape:
            raise ValueError(f"{name} has shape {value.shape}: expected {keep_R.shape} like keep_R")
    if target < 1:
        raise ValueError(f"target = {target!r}: expected an integer >= 1")
    kept = np.flatnonzero(keep_R)
    if len(kept) <= target:
        return keep_R.copy()
    names = _appearance(group_R) if sample_R is None else sample_R
    place = {int(group): _draw(seed, step, int(group), 0, 1) for group in np.unique(group_R[kept])}
    circle = sorted(
        kept.tolist(),
        key=lambda r: (
            place[int(group_R[r])],
            int(group_R[r]),
            _draw(seed, step, int(group_R[r]), int(names[r]), 2),
            int(names[r]),
        ),
    )
    start = int(_draw(seed, step, 0, 0, 3) * len(circle))
    chosen_R = np.zeros(len(keep_R), dtype=bool)
    chosen_R[[circle[(start + k) % len(circle)] for k in range(target)]] = True
    return chosen_R


def loss_scale(kept: int, target: int) -> float:
    """min(1, kept / target): what to multiply a loss that averages over the kept by where the budget ran out.

    Such a loss then weighs each rollout as in a full batch. Entropy: nothing by itself. Source: this project.
    """
    return min(1.0, _fraction(kept, target))


def step_scale(kept: int, target: int) -> float:
    """min(1, sqrt(kept / target)): for the learning rate of a loss averaged over the kept, without more sampling.

    Adam's rate goes with the square root of the batch size. Entropy: nothing by itself. Source: Malladi et al.
    (arXiv 2205.10287).
    """
    return min(1.0, math.sqrt(_fraction(kept, target)))


def effective_share(weight_R: np.ndarray) -> float:
    """(sum w)^2 / (R sum w^2), in [0, 1]: effective sample size over R of weights >= 0; 0 where all are 0.

    Source: Kish, Survey Sampling (1965).
    """
    square = math.fsum(weight_R**2) * len(weight_R)
    return math.fsum(weight_R) ** 2 / square if square > 0 else 0.0


def _fraction(kept: int, target: int) -> float:
    if target < 1 or kept < 0:
        raise ValueError(f"kept = {kept!r} and target = {target!r}: expected kept >= 0 and target >= 1")
    return kept / target


def _draw(seed: int, step: int, group: int, sample: int, stream: int) -> float:
    # A fifth word sets these apart from `rules.uniform`, which has four.
    word = np.random.SeedSequence([seed, step, group, sample, stream]).generate_state(1, np.uint64)[0]
    return float(word >> np.uint64(11)) * 2.0**-53


def _appearance(group_R: np.ndarray) -> np.ndarray:
    seen: dict[int, int] = {}
    names = np.empty(len(group_R), dtype=np.int64)
    for r, group in enumerate(group_R.tolist()):
        names[r] = seen[group] = seen.get(group, -1) + 1
    return names


def _check_counts(kept: int, generated: int) -> None:
    if not 0 <= kept <= generated:
        raise ValueError(f"kept = {kept!r} of generated = {generated!r}: expected 0 <= kept <= generated")


def _check_direction(direction: int) -> None:
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction = {direction!r}: expected +1 above the band, -1 below it, 0 inside")
