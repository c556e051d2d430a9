"""Scores a batch of completions with reward functions that may raise, hang or kill their process.

    with RewardPool("math_verify", workers=4, timeout_s=5.0, also={"my_rewards:brief": 0.1}) as pool:
        batch = pool.score(completions, answers, prompts)
    batch.reward_R      # math_verify + 0.1 brief; NaN where there is no verdict
    batch.right_R       # whether math_verify gave 1

One reward decides what is right; others may add to the score, each with a weight, or be recorded only (weight 0).
Completions travel to the workers in chunks, which makes cheap rewards cheap. A chunk that fails as a whole,
because one of its completions hung or took the worker with it, is run again one by one, so that only the
culprit loses its score.

The processes are pebble's, which ends a single call that takes too long; the standard library's pool and joblib's can
only wait for it, or lose everything under way. It costs nothing: GSM8K's 1,319 answers take math_verify on two workers
as long as they take in the standard library's pool, and a call that does nothing 40 microseconds.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from pebble import ProcessExpired, ProcessFuture, ProcessPool
from torch import Tensor

from entrocraft.train.config import RewardConfig
from entrocraft.train.graders import Reward, load_reward, math_verify, strict_box, sum_pair
from entrocraft.train.reward_worker import (
    Row,
    Verdict,
    WorkerContext,
    is_async,
    judge_chunk,
    judge_rows,
    load_error,
    prepare,
)

__all__ = ["Reward", "RewardBatch", "RewardPool", "load_reward", "math_verify", "strict_box", "sum_pair"]

logger = logging.getLogger(__name__)

_MAX_CHUNK = 64
"""Completions in a chunk at most: bounds what one hanging completion makes us do twice."""
_GRACE_S = 60.0
"""Seconds past its time limit after which an unanswered task means that the pool itself is broken. Covers the
3 s between SIGTERM and SIGKILL and the start of a new worker on a busy machine."""


_ASYNC_MARGIN_S = 1.0
"""Seconds that a chunk of async calls, each with its own time limit, may take beyond it before it is killed."""

Task = tuple[int, list[Row]]
"""Which reward, and a chunk of rows for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardBatch:
    """Scores of R completions, and what became of those that have none."""

    reward_R: Tensor
    """fp32 on the CPU: the weighted sum of the scores. NaN where there is no verdict: the deciding reward gave none, or
    one that has a weight timed out or failed. A further reward without an opinion (None) adds nothing."""
    right_R: Tensor
    """bool: whether the deciding reward gave 1 or more, before weights."""
    score_R: dict[str, Tensor]
    """Scores of each reward before weights, by its short name; NaN for none. The deciding one comes first."""
    timeouts: int
    """Calls, of all rewards, that ran past the time limit."""
    errors: int
    """Calls, of all rewards, that raised, returned something that is not a finite number, or ended their worker."""
    unscorable: int
    """Completions for which the deciding reward returned None: it has no opinion, as on an unreadable gold answer."""
    first_error: str | None
    """What the first error said, with the index of its completion; None without errors."""


class RewardPool:
    """Worker processes that run rewards with a time limit per completion. A context manager.

    Args:
        reward_name: the reward that decides what is right: a built-in (`math_verify`, `strict_box`, `sum_pair`) or an
            import path `package.module:function`. A reward may be `async def`: a worker then waits for up to 64 calls
            at once, each with its own time limit.
        workers: number of processes. 0 runs the rewards in this process and, unless they are async, without any time
            limit: for rewards that are cheap and trusted.
        timeout_s: seconds one call may take, looked at every 0.1 s. A process that does not heed
            SIGTERM, as one deep in C code, is killed 3 s later.
        signed: map the deciding reward from [0, 1] to [-1, 1], for rules that read the sign of the raw reward. A
            reward outside [0, 1] is then an error.
        weight: what the deciding reward is multiplied by in the sum.
        also: further rewards by name, with their weights; 0 records the score and nothing else.

    Workers are forked from a server process that has imported the reward but has neither CUDA nor threads
    of torch, so a start is safe with torch loaded and takes milliseconds after a kill. The caller's main
    script is not imported again. Workers ignore SIGINT, and end when their parent is gone.

    Raises:
        ValueError: a bad argument or an unknown reward (at construction).
        RuntimeError: the workers cannot load a reward (on entry).
    """

    def __init__(
        self,
        reward_name: str,
        *,
        workers: int,
        timeout_s: float,
        signed: bool = False,
        weight: float = 1.0,
        also: Mapping[str, float] | None = None,
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers={workers} must be 0 (score in this process) or more")
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise ValueError(f"timeout_s={timeout_s} must be a positive number of seconds")
        weights = {reward_name: weight, **(also or {})}
        if also and reward_name in also:
            raise ValueError(f"also={dict(also)} names {reward_name!r}, which decides; give it a weight of its own")
        for name, value in weights.items():
            if not math.isfinite(value):
                raise ValueError(f"the weight of {name!r} is {value}, expected a finite number")
        self.workers = workers
        self.timeout_s = timeout_s
        self.signed = signed
        self.weights = weights
        self.names = _short_names(list(weights))
        self._rewards = [load_reward(name) for name in weights]
        self._pool: ProcessPool | None = None
        self._seconds_each = [0.0] * len(weights)

    @classmethod
    def of(cls, config: RewardConfig) -> RewardPool:
        """The pool a configuration describes."""
        return cls(
            config.name,
            workers=config.workers,
            timeout_s=config.timeout_s,
            signed=config.signed,
            weight=config.weight,
            also=config.also,
        )

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
        """Score R completions. Whatever the rewards do, this returns, with NaN for what has no verdict.

        Raises ValueError if the lists differ in length, RuntimeError outside the `with` block.
        """
        if not len(completions) == len(answers) == len(prompts):
            raise ValueError(
                f"{len(completions)} completions, {len(answers)} answers and {len(prompts)} prompts: "
                "give one answer and one prompt for each completion"
            )
        rows = list(zip(completions, answers, prompts, strict=True))
        if self.workers == 0:
            return self._batch([judge_rows(reward, rows, self.timeout_s) for reward in self._rewards])
        if self._pool is None:
            raise RuntimeError("score() needs the worker processes: use RewardPool in a `with` block")
        return self._batch(self._score_in_workers(rows))

    def _score_in_workers(self, rows: list[Row]) -> list[list[Verdict]]:
        """Verdicts of every reward on every row."""
        tasks: list[Task] = []
        for which in range(len(self._rewards)):
            size = self._chunk_size(which, len(rows))
            tasks += [(which, rows[start : start + size]) for start in range(0, len(rows), size)]
        verdicts: list[list[Verdict]] = [[] for _ in self._rewards]
        again: list[tuple[int, int]] = []
        for (which, chunk), outcome in zip(tasks, self._run(tasks), strict=True):
            done = verdicts[which]
            if isinstance(outcome, Verdict):
                if len(chunk) > 1:
                    again += [(which, place) for place in range(len(done), len(done) + len(chunk))]
                outcome = [outcome] * len(chunk)
            done += outcome
        for (which, place), outcome in zip(again, self._run([(w, [rows[p]]) for w, p in again]), strict=True):
            verdicts[which][place] = outcome if isinstance(outcome, Verdict) else outcome[0]
        return verdicts

    def _chunk_size(self, which: int, count: int) -> int:
        """Four chunks a worker, for balance, but none expected to take over a quarter of the time limit."""
        balanced = math.ceil(count / (4 * self.workers))
        seconds = 0.0 if is_async(self._rewards[which]) else self._seconds_each[which]
        affordable = self.timeout_s / 4 / seconds if seconds else _MAX_CHUNK
        return max(1, int(min(balanced, affordable, _MAX_CHUNK)))

    def _run(self, tasks: Sequence[Task]) -> list[list[Verdict] | Verdict]:
        """For each chunk its verdicts, or the one verdict that says why the chunk failed as a whole."""
        outcomes: list[list[Verdict] | Verdict] = []
        futures = [self._schedule(task) for task in tasks]
        try:
            for place, task in enumerate(tasks):
                outcomes.append(self._outcome(futures[place], task))
                if self._pool is None:
                    self._pool = self._new_pool()
                    futures[place + 1 :] = [self._schedule(later) for later in tasks[place + 1 :]]
        finally:
            for future in futures:  # matters only when Ctrl-C ended the loop
                future.cancel()
        return outcomes

    def _limit(self, which: int) -> float:
        return self.timeout_s + (_ASYNC_MARGIN_S if is_async(self._rewards[which]) else 0.0)

    def _schedule(self, task: Task) -> ProcessFuture:
        assert self._pool is not None
        which, chunk = task
        return self._pool.schedule(judge_chunk, args=(which, chunk, self.timeout_s), timeout=self._limit(which))

    def _outcome(self, future: ProcessFuture, task: Task) -> list[Verdict] | Verdict:
        """Wait for one chunk. When the pool itself is found broken, `_pool` is None afterwards."""
        which, chunk = task
        try:
            # Chunks are started in order and all before this one are done, so it runs, or is about to.
            verdicts, seconds = future.result(timeout=self._limit(which) + _GRACE_S)
        except TimeoutError:
            if future.done():
                return Verdict(timed_out=True)
            broken = "its workers do not answer"
        except ProcessExpired as error:
            return Verdict(error=f"the reward ended its worker process (exit code {error.exitcode})")
        except BrokenProcessPool as error:
            broken = str(error)
        else:
            self._seconds_each[which] = 0.9 * self._seconds_each[which] + 0.1 * seconds / len(chunk)
            return verdicts
        logger.warning("reward pool broken (%s); starting new workers", broken)
        self._stop()
        return Verdict(error=f"the reward pool broke: {broken}")

    def _new_pool(self) -> ProcessPool:
        context = WorkerContext()
        # Takes effect if no fork server runs yet in this process: what it has imported, a worker has at once.
        libraries = ["math_verify"] if "math_verify" in self.weights else []
        context.set_forkserver_preload(["entrocraft.train.reward_worker", *libraries])
        return ProcessPool(self.workers, initializer=prepare, initargs=(list(self.weights),), context=context)

    def _stop(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def _batch(self, verdicts: list[list[Verdict]]) -> RewardBatch:
        """Adds up what the rewards gave; `verdicts` has a list for each of them."""
        if self.signed:
            verdicts = [[_signed(verdict) for verdict in verdicts[0]], *verdicts[1:]]
        scores = [_scores(row) for row in verdicts]
        total_R = torch.zeros(len(verdicts[0]), dtype=torch.float64)
        for place, weight in enumerate(self.weights.values()):
            if weight or place == 0:
                silent = [place > 0 and v == Verdict() for v in verdicts[place]]
                total_R += weight * scores[place].double().masked_fill(torch.tensor(silent, dtype=torch.bool), 0.0)
        told = [f"completion {at}: {v.error}" for row in verdicts for at, v in enumerate(row) if v.error is not None]
        return RewardBatch(
            reward_R=total_R.float(),
            right_R=scores[0] >= 1.0,
            score_R=dict(zip(self.names, scores, strict=True)),
            timeouts=sum(verdict.timed_out for row in verdicts for verdict in row),
            errors=len(told),
            unscorable=sum(verdict == Verdict() for verdict in verdicts[0]),
            first_error=told[0] if told else None,
        )


def _short_names(paths: list[str]) -> list[str]:
    """Function names without their modules, where that tells the rewards apart."""
    short = [path.rpartition(":")[2] for path in paths]
    count = Counter(short)
    return [name if count[name] == 1 else path for name, path in zip(short, paths, strict=True)]


def _scores(verdicts: Sequence[Verdict]) -> Tensor:
    return torch.tensor([math.nan if v.score is None else v.score for v in verdicts], dtype=torch.float32)


def _signed(verdict: Verdict) -> Verdict:
    if verdict.score is None:
        return verdict
    if not 0.0 <= verdict.score <= 1.0:
        return Verdict(error=f"signed=True needs a reward in [0, 1], the reward gave {verdict.score}")
    return Verdict(score=2.0 * verdict.score - 1.0)
