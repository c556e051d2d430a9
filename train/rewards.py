"""Scores a batch of completions with a reward function that may raise, hang or kill its process.

    with RewardPool("math_verify", workers=4, timeout_s=5.0) as pool:
        batch = pool.score(completions, answers, prompts)
    batch.reward_R      # NaN where there is no verdict

Completions travel to the workers in chunks, which makes cheap rewards cheap. A chunk that fails as a whole,
because one of its completions hung or took the worker with it, is run again one by one, so that only the
culprit loses its score.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from pebble import ProcessExpired, ProcessFuture, ProcessPool
from torch import Tensor

from entrocraft.train.graders import Reward, load_reward, math_verify, sum_pair
from entrocraft.train.reward_worker import Row, Verdict, WorkerContext, judge, judge_chunk, load_error, prepare

__all__ = ["Reward", "RewardBatch", "RewardPool", "load_reward", "math_verify", "sum_pair"]

logger = logging.getLogger(__name__)

_MAX_CHUNK = 64
"""Completions in a chunk at most: bounds what one hanging completion makes us do twice."""
_GRACE_S = 60.0
"""Seconds past its time limit after which an unanswered task means that the pool itself is broken. Covers the
3 s between SIGTERM and SIGKILL and the start of a new worker on a busy machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardBatch:
    """Scores of R completions, and what became of those that have none."""

    reward_R: Tensor
    """fp32 on the CPU; NaN where there is no verdict: timeouts + errors + unscorable of them."""
    timeouts: int
    """Completions whose reward ran past the time limit."""
    errors: int
    """Completions whose reward raised, returned something that is not a finite number, or ended its worker."""
    unscorable: int
    """Completions for which the reward returned None: it has no opinion, as on an unreadable gold answer."""
    first_error: str | None
    """What the first error said, with the index of its completion; None without errors."""


class RewardPool:
    """Worker processes that run one reward with a time limit per completion. A context manager.

    Args:
        reward_name: a built-in (`math_verify`, `sum_pair`) or an import path `package.module:function`.
        workers: number of processes. 0 runs the reward in this process and without any time limit, for
            rewards that are cheap and trusted.
        timeout_s: seconds one completion may take, looked at every 0.1 s. A process that does not heed
            SIGTERM, as one deep in C code, is killed 3 s later.
        signed: map a reward in [0, 1] to [-1, 1], for rules that read the sign of the raw reward. A reward
            outside [0, 1] is then an error.

    Workers are forked from a server process that has imported the reward but has neither CUDA nor threads
    of torch, so a start is safe with torch loaded and takes milliseconds after a kill. The caller's main
    script is not imported again. Workers ignore SIGINT, and end when their parent is gone.

    Raises:
        ValueError: a bad argument or an unknown reward (at construction).
        RuntimeError: the workers cannot load the reward (on entry).
    """

    def __init__(self, reward_name: str, *, workers: int, timeout_s: float, signed: bool = False) -> None:
        if workers < 0:
            raise ValueError(f"workers={workers} must be 0 (score in this process) or more")
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise ValueError(f"timeout_s={timeout_s} must be a positive number of seconds")
        self.reward_name = reward_name
        self.workers = workers
        self.timeout_s = timeout_s
        self.signed = signed
        self._reward = load_reward(reward_name)
        self._pool: ProcessPool | None = None
        self._seconds_each = 0.0

    def __enter__(self) -> RewardPool:
        if self.workers:
            self._pool = self._new_pool()
            complaint = self._pool.schedule(load_error).result(timeout=_GRACE_S)
            if complaint is not None:
                self._stop()
                raise RuntimeError(f"the reward loads here but not in a worker process: {complaint}")
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def score(self, completions: list[str], answers: list[str], prompts: list[str]) -> RewardBatch:
        """Score R completions. Whatever the reward does, this returns, with NaN for what has no verdict.

        Raises ValueError if the lists differ in length, RuntimeError outside the `with` block.
        """
        if not len(completions) == len(answers) == len(prompts):
            raise ValueError(
                f"{len(completions)} completions, {len(answers)} answers and {len(prompts)} prompts: "
                "give one answer and one prompt for each completion"
            )
        rows = list(zip(completions, answers, prompts, strict=True))
        if self.workers == 0:
            return self._batch([judge(self._reward, row) for row in rows])
        if self._pool is None:
            raise RuntimeError("score() needs the worker processes: use RewardPool in a `with` block")
        return self._batch(self._score_in_workers(rows))

    def _score_in_workers(self, rows: list[Row]) -> list[Verdict]:
        size = self._chunk_size(len(rows))
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        verdicts: list[Verdict] = []
        again: list[int] = []
        for chunk, outcome in zip(chunks, self._run(chunks), strict=True):
            if isinstance(outcome, Verdict):
                if len(chunk) > 1:
                    again += range(len(verdicts), len(verdicts) + len(chunk))
                outcome = [outcome] * len(chunk)
            verdicts += outcome
        for place, outcome in zip(again, self._run([[rows[place]] for place in again]), strict=True):
            verdicts[place] = outcome if isinstance(outcome, Verdict) else outcome[0]
        return verdicts

    def _chunk_size(self, count: int) -> int:
        """Four chunks a worker, for balance, but none expected to take over a quarter of the time limit."""
        balanced = math.ceil(count / (4 * self.workers))
        affordable = self.timeout_s / 4 / self._seconds_each if self._seconds_each else _MAX_CHUNK
        return max(1, int(min(balanced, affordable, _MAX_CHUNK)))

    def _run(self, chunks: Sequence[list[Row]]) -> list[list[Verdict] | Verdict]:
        """For each chunk its verdicts, or the one verdict that says why the chunk failed as a whole."""
        outcomes: list[list[Verdict] | Verdict] = []
        futures = [self._schedule(chunk) for chunk in chunks]
        try:
            for place, chunk in enumerate(chunks):
                outcomes.append(self._outcome(futures[place], len(chunk)))
                if self._pool is None:
                    self._pool = self._new_pool()
                    futures[place + 1 :] = [self._schedule(later) for later in chunks[place + 1 :]]
        finally:
            for future in futures:  # matters only when Ctrl-C ended the loop
                future.cancel()
        return outcomes

    def _schedule(self, chunk: list[Row]) -> ProcessFuture:
        assert self._pool is not None
        return self._pool.schedule(judge_chunk, args=(chunk,), timeout=self.timeout_s)

    def _outcome(self, future: ProcessFuture, count: int) -> list[Verdict] | Verdict:
        """Wait for one chunk. When the pool itself is found broken, `_pool` is None afterwards."""
        try:
            # Chunks are started in order and all before this one are done, so it runs, or is about to.
            verdicts, seconds = future.result(timeout=self.timeout_s + _GRACE_S)
        except TimeoutError:
            if future.done():
                return Verdict(timed_out=True)
            broken = "its workers do not answer"
        except ProcessExpired as error:
            return Verdict(error=f"the reward ended its worker process (exit code {error.exitcode})")
        except BrokenProcessPool as error:
            broken = str(error)
        else:
            self._seconds_each = 0.9 * self._seconds_each + 0.1 * seconds / count
            return verdicts
        logger.warning("reward pool broken (%s); starting new workers", broken)
        self._stop()
        return Verdict(error=f"the reward pool broke: {broken}")

    def _new_pool(self) -> ProcessPool:
        context = WorkerContext()
        # Takes effect if no fork server runs yet in this process: what it has imported, a worker has at once.
        context.set_forkserver_preload(["entrocraft.train.reward_worker", *_libraries(self.reward_name)])
        return ProcessPool(self.workers, initializer=prepare, initargs=(self.reward_name,), context=context)

    def _stop(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def _batch(self, verdicts: Sequence[Verdict]) -> RewardBatch:
        if self.signed:
            verdicts = [_signed(verdict) for verdict in verdicts]
        scores = [math.nan if verdict.score is None else verdict.score for verdict in verdicts]
        errors = [f"completion {at}: {v.error}" for at, v in enumerate(verdicts) if v.error is not None]
        timeouts = sum(verdict.timed_out for verdict in verdicts)
        return RewardBatch(
            reward_R=torch.tensor(scores, dtype=torch.float32),
            timeouts=timeouts,
            errors=len(errors),
            unscorable=sum(math.isnan(score) for score in scores) - len(errors) - timeouts,
            first_error=errors[0] if errors else None,
        )


def _libraries(reward_name: str) -> list[str]:
    return ["math_verify"] if reward_name == "math_verify" else []


def _signed(verdict: Verdict) -> Verdict:
    if verdict.score is None:
        return verdict
    if not 0.0 <= verdict.score <= 1.0:
        return Verdict(error=f"signed=True needs a reward in [0, 1], the reward gave {verdict.score}")
    return Verdict(score=2.0 * verdict.score - 1.0)
