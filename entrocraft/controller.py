"""EntropyController: holds the entropy of a policy to a schedule by choosing what each update learns from."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from entrocraft import rules
from entrocraft.bands import Band, band, check_reachable
from entrocraft.batch import Batch
from entrocraft.decision import Decision, entropy_metrics, keep_metrics
from entrocraft.guard import Guard
from entrocraft.kernels.token_stats import TokenStats
from entrocraft.prediction import BatchChange, Gain, LossFn, check_temperature
from entrocraft.rules import Rule, RuleInputs, Verdict
from entrocraft.schedules import Schedule

# A first target this much above the measured entropy, relative and absolute, asks for entropy the model never had.
_FAR_ABOVE_SHARE = 0.25
_FAR_ABOVE_NATS = 0.02


class EntropyScheduleWarning(UserWarning):
    """The schedule starts far above the entropy the model has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerState:
    """All that a controller remembers; plain numbers, so that JSON keeps it exactly. None: not known yet.

    decided: decisions made. step: of the last one. entropy: then, nats. predicted: P(kept), nats for a unit step, of
    the last decision. gain, numerator, denominator: see `Gain`. anchor: first entropy measured, nats. excess: first
    target minus that, nats. kept_fraction: share of rollouts kept by the last decision.
    """

    decided: int = 0
    step: int | None = None
    entropy: float | None = None
    predicted: float | None = None
    gain: float = 10.0
    numerator: float = 0.0
    denominator: float = 0.0
    anchor: float | None = None
    excess: float | None = None
    kept_fraction: float | None = None


class _Aim(NamedTuple):
    """Where the entropy should be, nats, and the change that would bring it to the schedule's next value."""

    target: float
    low: float
    high: float
    direction: int
    need: float


class _Judgement(NamedTuple):
    verdict: Verdict
    bypassed: bool
    reason: str


class EntropyController:
    """Decides, batch by batch, which rollouts or tokens an update may use, so that entropy follows a schedule.

    Args:
        schedule: step to target entropy in nats, any callable; or a `Band`, which brings its own width.
        rule: a value of `rules`, or any `Rule`, or the name of one.
        width: of the band around the schedule, nats, >= 0.
        seed: >= 0, for rules that draw.
        warmup_steps: decisions at the start that keep everything and only measure.
        min_kept_fraction, min_groups, min_authority: see `Guard`.
        ema, initial_gain: see `Gain`.
        vocab_size: if given, a band above log(vocab_size) is an error.

    Raises:
        ValueError: any of these out of range, an unknown rule, lo > hi.
    """

    def __init__(
        self,
        schedule: Schedule | Band,
        rule: Rule | str,
        *,
        width: float = 0.1,
        seed: int = 0,
        warmup_steps: int = 0,
        min_kept_fraction: float = 0.02,
        min_groups: int = 8,
        min_authority: float = 0.02,
        ema: float = 0.9,
        initial_gain: float = 10.0,
        vocab_size: int | None = None,
    ) -> None:
        for name, value in (("seed", seed), ("warmup_steps", warmup_steps)):
            if value < 0:
                raise ValueError(f"{name} = {value!r}: expected an integer >= 0")
        if vocab_size is not None and vocab_size < 2:
            raise ValueError(f"vocab_size = {vocab_size!r}: expected at least 2 tokens, or None if unknown")
        self._band = schedule if isinstance(schedule, Band) else band(schedule, width)
        self._rule = rules.build(rule) if isinstance(rule, str) else rule
        self._guard = Guard(min_kept_fraction=min_kept_fraction, min_groups=min_groups, min_authority=min_authority)
        self._ema = Gain(value=initial_gain, ema=ema).ema
        self._seed, self._warmup_steps, self._vocab_size = seed, warmup_steps, vocab_size
        self._state = ControllerState(gain=initial_gain)

    def decide(
        self,
        *,
        step: int,
        stats: TokenStats,
        rollout_T: Tensor,
        group_R: Tensor,
        advantage_R: Tensor,
        reward_R: Tensor | None = None,
        mask_T: Tensor | None = None,
        loss_fn: LossFn | None = None,
        temperature: float | Tensor = 1.0,
        sample_R: Tensor | None = None,
    ) -> Decision:
        """Decide on the batch scored at `step`, and remember what is needed to judge the next one.

        A pure function of `state_dict()` and the arguments; rollouts in another order get the same verdicts.

        Args:
            step: >= 0; what the schedule is asked at. The aim of an update is the schedule at step + 1.
            stats: of the T packed tokens under the policy before the update; with p2_T for the rules that predict.
            rollout_T: int64 `[T]`, non-decreasing. group_R: int64 `[R]`, >= 0. advantage_R: `[R]`, finite.
            reward_R: `[R]`, raw rewards; rule `switch` needs them.
            mask_T: bool `[T]`, tokens the loss counts; None for all.
            loss_fn: logprob_T to the scalar loss of the whole batch with everything kept; None means plain policy
                gradient, `-sum(mask A logprob) / sum(mask)`.
            temperature: > 0, what the logits were divided by; scalar or `[T]`.
            sample_R: int64 `[R]`, number within the group; None takes the order of appearance.

        Raises:
            ValueError: input that does not fit, by name; the state is then as it was.
        """
        if step < 0:
            raise ValueError(f"step = {step!r}: expected an integer >= 0")
        check_temperature(temperature, len(stats))
        batch = Batch.of(stats, rollout_T, group_R, advantage_R, reward_R=reward_R, mask_T=mask_T, sample_R=sample_R)
        state = self._observed(step, batch.entropy)
        aim = self._aim(step, batch.entropy, state)
        change = BatchChange.of(stats, batch, advantage_R=batch.advantage_R, loss_fn=loss_fn, temperature=temperature)
        judgement = self._judge(batch, aim, change, state, step)
        verdict, used = judgement.verdict, change
        if not np.array_equal(verdict.advantage_R, batch.advantage_R):
            # loss_fn holds the given advantages; those a rule puts in their place go by plain policy gradient.
            used = BatchChange.of(stats, batch, advantage_R=verdict.advantage_R, loss_fn=None, temperature=temperature)
        kept = math.nan if used is None else used.kept(verdict.keep_R, verdict.keep_T, batch.rollout_T)
        metrics = entropy_metrics(batch) | keep_metrics(batch, verdict)
        metrics |= _control_metrics(aim, state, batch.entropy, change, kept)
        metrics["bypassed"] = float(judgement.bypassed)
        self._state = replace(
            state,
            decided=state.decided + 1,
            step=step,
            entropy=batch.entropy,
            predicted=None if math.isnan(kept) else kept,
            kept_fraction=metrics["kept_fraction"],
        )
        return _decision(batch, aim, judgement, metrics, stats.logprob_T.device)

    def forget_prediction(self) -> None:
        """Say that the last decision led to no update (a skipped step), so that no gain is learnt from it."""
        self._state = replace(self._state, predicted=None)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain Python numbers and None; JSON keeps it exactly."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a controller built with the same arguments.

        Raises:
            ValueError: entries missing or unknown.
        """
        known = {field.name for field in fields(ControllerState)}
        if set(state) != known:
            raise ValueError(
                f"controller state lacks {sorted(known - set(state))} and has unknown {sorted(set(state) - known)}: "
                "expected what state_dict() of this version returned"
            )
        self._state = ControllerState(**state)

    def _observed(self, step: int, entropy: float) -> ControllerState:
        """The state with what this batch tells about the last decision: the gain, and at the first, the anchor."""
        state = self._state
        if state.anchor is None:
            target = self._band.anchored(entropy).target(step)
            state = replace(state, anchor=entropy, excess=target - entropy)
        followed = state.step is not None and step == state.step + 1
        if not followed or state.predicted is None or state.entropy is None:
            return state
        gain = Gain(value=state.gain, ema=self._ema, numerator=state.numerator, denominator=state.denominator).updated(
            entropy - state.entropy, state.predicted
        )
        return replace(state, gain=gain.value, numerator=gain.numerator, denominator=gain.denominator)

    def _aim(self, step: int, entropy: float, state: ControllerState) -> _Aim:
        assert state.anchor is not None, "the first entropy anchors the schedule"
        assert state.excess is not None, "set together with the anchor"
        edges = self._band.anchored(state.anchor)
        low, high = edges(step)
        check_reachable(high, step, self._vocab_size)
        aim = _Aim(
            target=edges.target(step),
            low=low,
            high=high,
            direction=int(entropy > high) - int(entropy < low),
            need=edges.target(step + 1) - entropy,
        )
        steers = not isinstance(self._rule, rules.none)
        if state.decided == 0 and steers and _far_above(state.excess, state.anchor):
            warnings.warn(
                f"the schedule starts at {aim.target:.4f} nats, far above the measured entropy of {entropy:.4f}: "
                "entropy would have to be raised first, which costs reward; start it where the model stands "
                "(schedules.measured, or start: measured)",
                EntropyScheduleWarning,
                stacklevel=3,
            )
        return aim

    def _judge(
        self, batch: Batch, aim: _Aim, change: BatchChange | None, state: ControllerState, step: int
    ) -> _Judgement:
        """The rule's verdict, or everything kept where the warm-up or the guard says so."""
        verdict = self._rule(
            RuleInputs(
                direction=aim.direction,
                want=aim.need / state.gain,
                rollout_T=batch.rollout_T,
                mask_T=batch.mask_T,
                group_R=batch.group_R,
                sample_R=batch.sample_R,
                advantage_R=batch.advantage_R,
                reward_R=batch.reward_R,
                change_T=None if change is None else change.change_T,
                change_R=None if change is None else change.change_R,
                seed=self._seed,
                step=step,
            )
        )
        where = {1: "above", -1: "below", 0: "inside"}[aim.direction]
        place = f"entropy {batch.entropy:.4f} nats {where} the band [{aim.low:.4f}, {aim.high:.4f}]"
        everything = Verdict(keep_R=np.ones(len(batch.group_R), dtype=bool), advantage_R=batch.advantage_R)
        if state.decided < self._warmup_steps:
            reason = f"warm-up {state.decided + 1} of {self._warmup_steps}: {place}, everything kept"
            return _Judgement(everything, bypassed=False, reason=reason)
        why = "" if isinstance(self._rule, rules.none) else self._guard.reason(batch, verdict)
        if why:
            return _Judgement(everything, bypassed=True, reason=f"bypassed, {why}; {place}, everything kept")
        kept = f"kept {int(verdict.keep_R.sum())} of {len(verdict.keep_R)} rollouts"
        if verdict.keep_T is not None:
            tokens = int(np.count_nonzero(verdict.keep_T & batch.mask_T))
            kept = f"kept {tokens} of {len(batch.entropy_N)} tokens"
        return _Judgement(verdict, bypassed=False, reason=f"{place}: {self._rule} {kept}")


def _decision(
    batch: Batch, aim: _Aim, judgement: _Judgement, metrics: dict[str, float], device: torch.device
) -> Decision:
    verdict = judgement.verdict
    keep_T = verdict.keep_R[batch.rollout_T] if verdict.keep_T is None else verdict.keep_T
    return Decision(
        keep_T=torch.from_numpy(keep_T).to(device),
        keep_R=torch.from_numpy(verdict.keep_R).to(device),
        advantage_R=torch.from_numpy(verdict.advantage_R).float().to(device),
        direction=aim.direction,
        bypassed=judgement.bypassed,
        reason=judgement.reason,
        metrics=metrics,
    )


def _control_metrics(
    aim: _Aim, state: ControllerState, entropy: float, change: BatchChange | None, kept: float
) -> dict[str, float]:
    assert state.anchor is not None, "set when the batch was observed"
    assert state.excess is not None, "set together with the anchor"
    return {
        "target": aim.target,
        "band_low": aim.low,
        "band_high": aim.high,
        "direction": float(aim.direction),
        "error": entropy - aim.target,
        "need": aim.need,
        "gain": state.gain,
        "predicted_change_all": math.nan if change is None else math.fsum(change.change_R),
        "predicted_change_kept": kept,
        "predicted_change": state.gain * kept,
        "realised_change": math.nan if state.entropy is None else entropy - state.entropy,
        "target_start_excess": state.excess,
        "target_start_far_above": float(_far_above(state.excess, state.anchor)),
    }


def _far_above(excess: float, entropy: float) -> bool:
    return excess > max(_FAR_ABOVE_SHARE * entropy, _FAR_ABOVE_NATS)
