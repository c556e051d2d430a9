"""EntropyController: holds the entropy of a policy to a schedule by choosing what each update learns from."""

import contextlib
import math
import operator
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entrocraft import rules
from entrocraft.aim import Aim
from entrocraft.bands import Band, band, check_reachable
from entrocraft.batch import Batch, checked_rewards
from entrocraft.corrections import wrapped
from entrocraft.decision import Decision, entropy_metrics, keep_metrics
from entrocraft.guard import Guard
from entrocraft.judgement import Judge, Judgement
from entrocraft.kernels.token_stats import TokenStats
from entrocraft.prediction import BatchChange, Gain, LossFn, check_temperature
from entrocraft.release import Release, far
from entrocraft.schedules import NotMeasured, Schedule
from entrocraft.state import ControllerState
from entrocraft.verdict import Rule, Verdict

_RELEASE = Release()


class EntropyScheduleWarning(UserWarning):
    """The schedule starts far above the entropy the model has."""


class EntropyController:
    """Decides, batch by batch, which rollouts or tokens an update may use, so that entropy follows a schedule.

        m = +1 where H > target(k) + width, -1 where H < target(k) - width, else 0
        want = (target(k + 1) - H) / gain

    with H the batch's mean entropy at step k; a rule judges by these. Aggregation: that of the rule (`rules`). Source:
    arXiv 2604.26326, Algorithm 1, for the band and m; want, gain, `Guard` and `Release` are this project's.

    Args:
        schedule: step to target entropy in nats, any callable; or a `Band`, which brings its own width.
        rule: a value of `rules`, or any `Rule`, or the name of one.
        width: of the band around the schedule, nats, >= 0.
        seed: >= 0, for rules that draw.
        warmup_steps: decisions at the start that keep everything and only measure.
        min_kept_fraction, min_groups, min_authority: see `Guard`.
        release: when control lets go for longer, see `Release`; None for never.
        ema, initial_gain: see `Gain`.
        vocab_size: if given, a band above log(vocab_size) is an error.
        last_step: >= 0, if given: the whole schedule is checked up to the step after it, which its update aims at, now
            or, where it begins at the first measured entropy, in the first decision.

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
        release: Release | None = _RELEASE,
        ema: float = 0.9,
        initial_gain: float = 10.0,
        vocab_size: int | None = None,
        last_step: int | None = None,
    ) -> None:
        for name, value in (("seed", seed), ("warmup_steps", warmup_steps), ("last_step", last_step)):
            if value is not None and value < 0:
                raise ValueError(f"{name} = {value!r}: expected an integer >= 0")
        if vocab_size is not None and vocab_size < 2:
            raise ValueError(f"vocab_size = {vocab_size!r}: expected at least 2 tokens, or None if unknown")
        self._band = schedule if isinstance(schedule, Band) else band(schedule, width)
        self._rule = wrapped(rule)
        if release is not None and not isinstance(release, Release):
            raise ValueError(f"release = {release!r}: expected a Release, or None for never")
        self._judge = Judge(
            rule=self._rule,
            guard=Guard(min_kept_fraction=min_kept_fraction, min_groups=min_groups, min_authority=min_authority),
            release=release,
            warmup_steps=warmup_steps,
            seed=seed,
        )
        self._ema = Gain(value=initial_gain, ema=ema).ema
        self._vocab_size, self._last_step = vocab_size, last_step
        if last_step is not None:
            with contextlib.suppress(NotMeasured):  # the rest is checked once there is an entropy
                self._band.check(last_step + 1, vocab_size)
        self._state = ControllerState(gain=float(initial_gain))

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
        sampled: tuple[Tensor, Tensor] | None = None,
    ) -> Decision:
        """Decide on the batch scored at `step`, and remember what is needed to judge the next one.

        A pure function of `state_dict()` and the arguments. Given sample_R, rollouts in another order get the same
        verdicts; without it the order of appearance names them, for the draws of `soft` and the ties of `budget`.

        What rules learn of predicted changes comes from `loss_fn` with everything kept. Their sum over what is kept,
        which `budget` steers by and the gain is learnt from, is the change of the update only if the denominator of
        the loss does not depend on what is kept: not so under `losses.KEPT_DENOMINATORS`.

        Args:
            step: an integer >= 0; what the schedule is asked at. The aim of an update is the schedule at step + 1.
            stats: of the T packed tokens under the policy before the update; with p2_T for the rules that predict.
            rollout_T: int64 `[T]`, non-decreasing. group_R: int64 `[R]`, >= 0. advantage_R: `[R]`, finite.
            reward_R: `[R]`, raw rewards, NaN for no verdict; rule `switch` needs them, and `Release` to see them fall.
            mask_T: bool `[T]`, tokens the loss counts; None for all.
            loss_fn: logprob_T to the scalar loss of the whole batch with everything kept; None means plain policy
                gradient, `-sum(mask A logprob) / sum(mask)`. It holds the given advantages: for a rule that replaces
                them (`switch`), `predicted_change_kept` is NaN and no gain is learnt, unless it is None.
            temperature: > 0, what the logits were divided by; scalar or `[T]`.
            sample_R: int64 `[R]`, number within the group; None takes the order of appearance.
            sampled: (reward, group) as reward_R and group_R, of everything that was drawn where the batch is a part of
                it, chosen by reward: `Release` watches these, for what is left of a batch without its solved prompts
                has less reward the more are solved. None: the batch itself.

        Raises:
            TypeError: step is no integer.
            ValueError: input, or the verdict of a rule, that does not fit, by name; the state is then as it was.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step = {step!r}: expected an integer >= 0")
        check_temperature(temperature, len(stats))
        batch = Batch.of(stats, rollout_T, group_R, advantage_R, reward_R=reward_R, mask_T=mask_T, sample_R=sample_R)
        state = self._observed(step, batch.entropy)
        aim = self._aim(step, batch.entropy, state)
        change = BatchChange.of(stats, batch, advantage_R=batch.advantage_R, loss_fn=loss_fn, temperature=temperature)
        watched = (batch.reward_R, batch.group_R) if sampled is None else checked_rewards(*sampled)
        judgement = self._judge(batch, aim, change, state, step, watched)
        verdict = judgement.verdict
        kept = _kept_change(stats, batch, verdict, change, given_loss=loss_fn is not None, temperature=temperature)
        metrics = entropy_metrics(batch) | keep_metrics(batch, verdict)
        metrics |= _control_metrics(aim, state, step, change, kept) | _release_metrics(judgement)
        self._state = replace(
            state,
            decided=state.decided + 1,
            step=step,
            entropy=batch.entropy,
            predicted=None if math.isnan(kept) else kept,
            kept_fraction=metrics["kept_fraction"],
            release=judgement.memory,
        )
        return _decision(batch, aim, judgement, metrics, stats.logprob_T.device)

    def target(self, step: int, *, entropy: float) -> float:
        """What the schedule asks for at `step`, nats; `entropy` is where it starts if no batch has been seen yet."""
        anchor = entropy if self._state.anchor is None else self._state.anchor
        return self._band.anchored(anchor).target(step)

    def forget_prediction(self) -> None:
        """Say that the last decision led to no update (a skipped step), so that no gain is learnt from it."""
        self._state = replace(self._state, predicted=None)

    def scale_prediction(self, share: float) -> None:
        """Say that the update uses only this share of what was kept, drawn at random (`waves.subsample`): the gain is
        learnt from a prediction that is so much smaller.

        Raises:
            ValueError: share not in (0, 1].
        """
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share = {share!r}: expected a share in (0, 1] of what was kept")
        if self._state.predicted is not None:
            self._state = replace(self._state, predicted=share * self._state.predicted)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain Python numbers and None; JSON keeps it exactly."""
        return self._state.as_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a controller built with the same arguments.

        Raises:
            ValueError: entries missing or unknown, or values of the wrong type.
        """
        self._state = ControllerState.of(state)

    def _observed(self, step: int, entropy: float) -> ControllerState:
        """The state with what this batch tells about the last decision: the gain, and at the first, the anchor."""
        state = self._state
        if state.anchor is None:
            edges = self._band.anchored(entropy)
            if self._last_step is not None:
                edges.check(self._last_step + 1, self._vocab_size)
            state = replace(state, anchor=entropy, excess=edges.target(step) - entropy)
        if not _follows(step, state) or state.predicted is None or state.entropy is None:
            return state
        gain = Gain(value=state.gain, ema=self._ema, numerator=state.numerator, denominator=state.denominator).updated(
            entropy - state.entropy, state.predicted
        )
        return replace(state, gain=gain.value, numerator=gain.numerator, denominator=gain.denominator)

    def _aim(self, step: int, entropy: float, state: ControllerState) -> Aim:
        assert state.anchor is not None, "the first entropy anchors the schedule"
        assert state.excess is not None, "set together with the anchor"
        aim = Aim.of(self._band.anchored(state.anchor), step, entropy)
        check_reachable(aim.high, step, self._vocab_size)
        steers = not isinstance(self._rule, rules.none)
        if state.decided == 0 and steers and far(state.excess, state.anchor):
            warnings.warn(
                f"the schedule starts at {aim.target:.4f} nats, far above the measured entropy of {entropy:.4f}: "
                "entropy would have to be raised first, which costs reward; start it where the model stands "
                "(schedules.measured, or start: measured)",
                EntropyScheduleWarning,
                stacklevel=3,
            )
        return aim


def _kept_change(
    stats: TokenStats,
    batch: Batch,
    verdict: Verdict,
    change: BatchChange | None,
    *,
    given_loss: bool,
    temperature: float | Tensor,
) -> float:
    """P(K), nats for a unit step: predicted change summed over what is kept; NaN where it is not known."""
    if not np.array_equal(verdict.advantage_R, batch.advantage_R):
        if given_loss:  # it holds the given advantages, and plain policy gradient would be in another unit
            return math.nan
        change = BatchChange.of(stats, batch, advantage_R=verdict.advantage_R, loss_fn=None, temperature=temperature)
    if change is None:
        return math.nan
    return change.kept(verdict.keep_R, verdict.keep_T, batch.rollout_T, verdict.weight_R)


def _decision(
    batch: Batch, aim: Aim, judgement: Judgement, metrics: dict[str, float], device: torch.device
) -> Decision:
    verdict = judgement.verdict
    keep_R, keep_T, advantage_R = verdict.keep_R, verdict.keep_T, verdict.advantage_R
    if verdict.weight_R is not None:  # a weight of 0 is a rejection, and looks like any other
        weighs_R = verdict.weight_R != 0
        advantage_R = np.where(weighs_R, advantage_R * verdict.weight_R, advantage_R)
        keep_R, keep_T = keep_R & weighs_R, None if keep_T is None else keep_T & weighs_R[batch.rollout_T]
    if keep_T is None:
        keep_T = keep_R[batch.rollout_T]
    return Decision(
        keep_T=torch.from_numpy(keep_T).to(device),
        keep_R=torch.from_numpy(keep_R).to(device),
        advantage_R=torch.from_numpy(advantage_R).float().to(device),
        direction=aim.direction,
        bypassed=judgement.bypassed,
        reason=judgement.reason,
        metrics=metrics,
    )


def _control_metrics(
    aim: Aim, state: ControllerState, step: int, change: BatchChange | None, kept: float
) -> dict[str, float]:
    assert state.anchor is not None, "set when the batch was observed"
    assert state.excess is not None, "set together with the anchor"
    before = state.entropy if _follows(step, state) else None
    return {
        "target": aim.target,
        "band_low": aim.low,
        "band_high": aim.high,
        "direction": float(aim.direction),
        "error": aim.entropy - aim.target,
        "need": aim.need,
        "gain": state.gain,
        "predicted_change_all": math.nan if change is None else math.fsum(change.change_R),
        "predicted_change_kept": kept,
        "predicted_change": state.gain * kept,
        "realised_change": math.nan if before is None else aim.entropy - before,
        "target_start_excess": state.excess,
        "target_start_far_above": float(far(state.excess, state.anchor)),
    }


def _release_metrics(judgement: Judgement) -> dict[str, float]:
    """Of the guard and of the release. reward_mean, reward_best: as watched, NaN while there is none."""
    memory = judgement.memory
    return {
        "bypassed": float(judgement.bypassed),
        "released": float(memory.since is not None),
        "reach": judgement.reach,
        "reward_mean": math.nan if memory.reward is None else memory.reward,
        "reward_best": math.nan if memory.best is None else memory.best,
    }


def _follows(step: int, state: ControllerState) -> bool:
    """Whether the last decision was the one for the step before."""
    return state.step is not None and step == state.step + 1
