"""When a controller lets go for longer than a step: control that costs the reward, or that costs rollouts for nothing.

Two things are watched, and only while control is at work: a mean of the recent rewards against the best it has been,
and the distance of the entropy from the schedule. `Guard` looks at one batch and forgets it; what is remembered here
(`Memory`) is part of the controller's state.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

# The reward that is watched: plain mean of so many batches at first, then the newest counts one in so many.
_BATCHES = 10
# A best is known from so many batches on: one alone, of equal rewards, would be sure of them.
_SURE = 3
# Standard errors of that mean that a fall must exceed, on either side.
_ERRORS = 2.0
# Control costs rollouts where it keeps no more than this share of them.
_FEW = 0.25
# An error this much smaller than the smallest so far is progress.
_PROGRESS = 0.95
# More than this share of the entropy, and so many nats, from where it should be is far.
_FAR_SHARE, _FAR_NATS = 0.25, 0.02


def far(gap: float, entropy: float) -> bool:
    """Whether `gap` nats is far for a policy of that entropy: more than a quarter of it, and than 0.02 nats."""
    return gap > max(_FAR_SHARE * entropy, _FAR_NATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What `Release` remembers; plain numbers, so that JSON keeps it exactly. None: not known yet.

    batches: with rewards so far, ten at most. reward: the mean watched. variance: of that mean. lowest: reward ever
    seen. best: highest the mean has surely been, two standard errors below what was measured. falling, stuck: steps
    counted towards letting go. nearest: smallest distance from the aim since `stuck` began, nats. since: step of
    letting go, None while control holds.
    """

    batches: int = 0
    reward: float | None = None
    variance: float = 0.0
    lowest: float | None = None
    best: float | None = None
    falling: int = 0
    stuck: int = 0
    nearest: float | None = None
    since: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Limits beyond which control lets go: everything is kept, step after step, with a reason, until it may hold again.

    Reward. m is the mean reward of recent batches (the newest counts one in ten), s its standard error, from the
    spread of the prompts' means. Lowest is the smallest reward ever seen, so that rewards of 0 and 1 and of -1 and +1
    are treated alike, and best the highest m - 2 s. Reward has fallen where

        m + 2 s - lowest  <  reward_share (best - lowest)

    Control lets go after `patience` such steps in which it rejected something; those between in which it did not are
    not counted. Rewards of NaN are left out. Without rewards only reach is judged.

    Reach. The aim is out of reach where the schedule's next value is far (more than a quarter of the entropy, and than
    0.02 nats), all predicted changes of the sign that is needed, summed, fall short of it (where they are known), and
    the entropy comes no nearer. Control lets go after `reach_patience` such steps in which it kept at most a quarter
    of the batch; one in which it kept more takes one back. A curve that is followed at a distance, as far below what is
    needed as the predicted changes may be, is none of this.

    It holds again once m is back, m - lowest >= (1 + reward_share) / 2 (best - lowest), and the schedule's next value
    is not far from where the entropy is by then: the demand that did harm is not made again.

    Not seen: reward that never rises, or that falls for another cause than control, which lets go all the same. A
    single reward far below all others makes it blind to falls among these.

    reward_share: in [0, 1]; 0 never lets go over reward. patience: > 0, steps. reach_patience: > 0, steps.
    Source: this project.

    Raises:
        ValueError: a share outside [0, 1], or a patience that is not above 0.
    """

    reward_share: float = 0.8
    patience: int = 5
    reach_patience: int = 30

    def __post_init__(self) -> None:
        if not 0.0 <= self.reward_share <= 1.0:
            raise ValueError(f"reward_share = {self.reward_share!r}: expected a share between 0 and 1, such as 0.8")
        for name in ("patience", "reach_patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected a number of steps > 0")

    def rewarded(self, memory: Memory, reward_R: np.ndarray | None, group_R: np.ndarray) -> Memory:
        """The memory with the rewards of one more batch; as it was where fewer than two have a verdict."""
        found = None if reward_R is None else reward_mean(reward_R, group_R)
        if reward_R is None or found is None:
            return memory
        mean, variance = found
        batches = min(memory.batches + 1, _BATCHES)
        new, old = 1.0 / batches, 1.0 - 1.0 / batches
        reward = new * mean + old * (memory.reward or 0.0)
        variance = new**2 * variance + old**2 * memory.variance
        lowest = float(np.nanmin(reward_R))
        surely = reward - _ERRORS * math.sqrt(variance)
        best = surely if memory.best is None else max(memory.best, surely)
        return replace(
            memory,
            batches=batches,
            reward=reward,
            variance=variance,
            lowest=lowest if memory.lowest is None else min(memory.lowest, lowest),
            best=best if batches >= _SURE else None,
        )

    def judged(
        self, memory: Memory, *, step: int, entropy: float, need: float, kept: float, reach: float, acts: bool
    ) -> tuple[Memory, str]:
        """The memory after a step whose verdict may stand, and why it must not: "" unless control lets go now.

        need: nats from here to the schedule's next value. kept: share of the batch. reach: nats, the most that the
        predicted changes promise towards `need`; NaN where unknown. acts: whether the verdict rejects,
        weighs or replaces anything.
        """
        falling = memory.falling + int(acts) if self.fallen(memory) else 0
        memory = self._distance(replace(memory, falling=falling), entropy, need, kept, reach, acts)
        why = ""
        if memory.falling >= self.patience:
            why = (
                f"reward {memory.reward:.4g} has been below {self.reward_share:.0%} of its best, {memory.best:.4g} "
                f"(both counted from the lowest, {memory.lowest:.4g}), on {memory.falling} steps under control"
            )
        elif memory.stuck >= self.reach_patience:
            why = (
                f"out of reach: {memory.stuck} steps that kept little came no nearer to the schedule than "
                f"{memory.nearest:.4f} nats, this one keeps {kept:.1%}"
            )
        return (replace(memory, since=step), why) if why else (memory, "")

    def held(self, memory: Memory, *, entropy: float, need: float) -> Memory:
        """The memory of a controller that has let go, holding again if it may."""
        if memory.since is None or far(abs(need), entropy) or not self._back(memory):
            return memory
        return replace(memory, falling=0, stuck=0, nearest=None, since=None)

    def fallen(self, memory: Memory) -> bool:
        """Whether the reward is below the share of its best, beyond the noise of both."""
        if memory.reward is None or memory.best is None or memory.lowest is None:
            return False
        surely = memory.reward + _ERRORS * math.sqrt(memory.variance)
        return surely - memory.lowest < self.reward_share * (memory.best - memory.lowest)

    def waiting(self, memory: Memory) -> str:
        """What a controller that has let go waits for, with numbers."""
        until = "the entropy is near the schedule"
        if memory.reward is not None and not self._back(memory):
            until = f"reward, {memory.reward:.4g}, is back at {self._threshold(memory):.4g} and {until}"
        return f"since step {memory.since}, until {until}"

    def _back(self, memory: Memory) -> bool:
        return memory.reward is None or memory.best is None or memory.reward >= self._threshold(memory)

    def _threshold(self, memory: Memory) -> float:
        assert memory.best is not None, "asked only once there is a best"
        assert memory.lowest is not None, "known since the first reward"
        return memory.lowest + (1.0 + self.reward_share) / 2.0 * (memory.best - memory.lowest)

    def _distance(self, memory: Memory, entropy: float, need: float, kept: float, reach: float, acts: bool) -> Memory:
        distance = abs(need)
        if not far(distance, entropy) or reach >= distance:
            return replace(memory, stuck=0, nearest=None)
        if memory.nearest is None or distance < _PROGRESS * memory.nearest:
            return replace(memory, stuck=0, nearest=distance)
        return replace(memory, stuck=max(memory.stuck + (1 if acts and kept <= _FEW else -1), 0))


def reward_mean(reward_R: np.ndarray, group_R: np.ndarray) -> tuple[float, float] | None:
    """Mean reward of a batch and the variance of that mean; None where fewer than two rollouts have a verdict.

    The mean over prompts of their means over rollouts; its variance from the spread of the prompts, or of all
    rollouts where that gives more. Exactly rounded sums: the order of the rollouts does not matter.
    """
    known_R = ~np.isnan(reward_R)
    reward_N, group_N = reward_R[known_R], group_R[known_R]
    if len(reward_N) < 2:
        return None
    order = np.argsort(group_N, kind="stable")
    edge = np.flatnonzero(np.diff(group_N[order])) + 1
    of_group = [math.fsum(part) / len(part) for part in np.split(reward_N[order], edge)]
    return math.fsum(of_group) / len(of_group), max(_error(of_group), _error(reward_N.tolist()))


def _error(values: list[float]) -> float:
    """Variance of the mean of `values`, from their spread."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = math.fsum(values) / count
    return math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count
