"""What is made of a batch: the rule's verdict, unless warm-up, guard or release say that everything is kept."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from entrocraft import rules
from entrocraft.aim import Aim
from entrocraft.batch import Batch
from entrocraft.guard import Guard, rejects, taught
from entrocraft.prediction import BatchChange
from entrocraft.release import Memory, Release
from entrocraft.state import ControllerState
from entrocraft.verdict import Rule, RuleInputs, Verdict, check_verdict


class Judgement(NamedTuple):
    """A verdict that stands, what was said of it, and what is to be remembered.

    bypassed: the rule's own was set aside. reach: nats, the sum of the predicted changes of the sign that is needed.
    """

    verdict: Verdict
    bypassed: bool
    reason: str
    memory: Memory
    reach: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A rule with what may overrule it. release: None for never."""

    rule: Rule
    guard: Guard
    release: Release | None
    warmup_steps: int
    seed: int

    def __call__(
        self,
        batch: Batch,
        aim: Aim,
        change: BatchChange | None,
        state: ControllerState,
        step: int,
        watched: tuple[np.ndarray | None, np.ndarray],
    ) -> Judgement:
        """Judge one batch. watched: rewards, and the group of each, by which the release judges.

        Raises:
            ValueError: the rule refuses the batch, or its verdict does not fit.
        """
        inputs = rule_inputs(batch, aim, change, gain=state.gain, seed=self.seed, step=step)
        verdict = self.rule(inputs)
        check_verdict(verdict, inputs, self.rule)
        reach = _reach(inputs, aim.need, state.gain, tokens=verdict.keep_T is not None)
        memory = state.release
        if self.release is not None:
            memory = self.release.rewarded(memory, *watched)
            memory = self.release.held(memory, entropy=aim.entropy, need=aim.need)

        def stands(verdict: Verdict, reason: str, *, bypassed: bool = False) -> Judgement:
            return Judgement(verdict, bypassed, reason, memory, reach)

        everything = Verdict(keep_R=np.ones(len(batch.group_R), dtype=bool), advantage_R=batch.advantage_R)
        if state.decided < self.warmup_steps:
            reason = f"warm-up {state.decided + 1} of {self.warmup_steps}: {aim.place}, everything kept"
            return stands(everything, reason)
        if isinstance(self.rule, rules.none):
            return stands(verdict, self._kept(batch, verdict, aim))
        if self.release is not None and memory.since is not None:
            why = f"released {self.release.waiting(memory)}"
            return stands(everything, f"{why}; {aim.place}, everything kept", bypassed=True)
        why = self.guard.reason(batch, verdict, inputs.change_T)
        if self.release is not None:
            memory, let_go = self.release.judged(
                memory,
                step=step,
                entropy=aim.entropy,
                need=aim.need,
                kept=_kept_share(batch, verdict),
                reach=reach,
                acts=not why and _acts(batch, verdict),
            )
            if let_go:
                return stands(everything, f"released, {let_go}; {aim.place}, everything kept", bypassed=True)
        if why:
            return stands(everything, f"bypassed, {why}; {aim.place}, everything kept", bypassed=True)
        return stands(verdict, self._kept(batch, verdict, aim))

    def _kept(self, batch: Batch, verdict: Verdict, aim: Aim) -> str:
        kept = f"kept {int(taught(verdict).sum())} of {len(verdict.keep_R)} rollouts"
        if verdict.keep_T is not None:
            kept = f"kept {_kept_tokens(batch, verdict)} of {len(batch.entropy_N)} tokens"
        return f"{aim.place}: {self.rule} {kept}"


def rule_inputs(batch: Batch, aim: Aim, change: BatchChange | None, *, gain: float, seed: int, step: int) -> RuleInputs:
    """What a rule is asked of a batch. gain: realised over predicted entropy change."""
    return RuleInputs(
        direction=aim.direction,
        want=aim.need / gain,
        rollout_T=batch.rollout_T,
        mask_T=batch.mask_T,
        group_R=batch.group_R,
        sample_R=batch.sample_R,
        advantage_R=batch.advantage_R,
        reward_R=batch.reward_R,
        change_T=None if change is None else change.change_T,
        change_R=None if change is None else change.change_R,
        seed=seed,
        step=step,
    )


def _acts(batch: Batch, verdict: Verdict) -> bool:
    weighs = verdict.weight_R is not None and bool((verdict.weight_R != 1.0).any())
    return weighs or rejects(batch, verdict)


def _reach(inputs: RuleInputs, need: float, gain: float, *, tokens: bool) -> float:
    """Nats: what would be predicted if all that moves entropy the way of `need`, and nothing else, were kept."""
    change_N = inputs.change_T if tokens else inputs.change_R
    if change_N is None:
        return math.nan
    return gain * math.fsum(change_N[change_N * math.copysign(1.0, need) > 0]) * math.copysign(1.0, need)


def _kept_share(batch: Batch, verdict: Verdict) -> float:
    if verdict.keep_T is None:
        return float(taught(verdict)[batch.counted_R > 0].mean())
    return _kept_tokens(batch, verdict) / len(batch.entropy_N)


def _kept_tokens(batch: Batch, verdict: Verdict) -> int:
    return int(np.count_nonzero(verdict.keep_T & batch.mask_T & taught(verdict)[batch.rollout_T]))
