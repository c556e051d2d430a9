"""What runs inside a reward worker process, and how such a process is started.

Apart from `train/rewards.py` so that a worker can be started from this module alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, NamedTuple

from entrocraft.train.graders import Reward, load_reward

Row = tuple[str, str, str]
"""(completion, answer, prompt), in the order a reward takes them."""


class Verdict(NamedTuple):
    """What one call of the reward gave. Neither a score nor an error: the reward returned None."""

    score: float | None = None
    error: str | None = None
    timed_out: bool = False


LARGEST_SCORE = 3.4028234e38
"""Largest finite fp32: rewards are kept in that type."""


AT_ONCE = 64
"""Calls of an async reward that wait together, at most."""


def is_async(reward: Reward) -> bool:
    """Whether calling the reward gives something to await."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def judge(reward: Reward, row: Row) -> Verdict:
    """Call the reward once and never raise, except for Ctrl-C in a process that listens to it."""
    try:
        return _verdict(reward(*row))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() in a grader must not end the worker
        return _failure(error)


def _verdict(value: Any) -> Verdict:
    if value is None:
        return Verdict()
    # float("1.0") would work, but a reward that returns text has a bug worth hearing about.
    score = math.nan if isinstance(value, str | bytes) else float(value)
    if not abs(score) <= LARGEST_SCORE:
        return Verdict(error=f"the reward returned {value!r:.200}, expected a number that fits into fp32, or None")
    return Verdict(score=score)


def _failure(error: BaseException) -> Verdict:
    return Verdict(error=f"{type(error).__name__}: {error}"[:500])


async def _judge_all(reward: Any, rows: Sequence[Row], timeout_s: float) -> list[Verdict]:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(row: Row) -> Verdict:
        async with places:
            limit = asyncio.timeout(timeout_s)
            try:
                async with limit:
                    return _verdict(await reward(*row))
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                # A TimeoutError of the reward's own, as of a connection, is an error; ours is a time-out.
                return Verdict(timed_out=True) if limit.expired() else _failure(error)

    return list(await asyncio.gather(*map(one, rows)))


def judge_rows(reward: Reward, rows: Sequence[Row], timeout_s: float) -> list[Verdict]:
    """Verdicts in order. An async reward is awaited for many rows at once, each at most `timeout_s` long; a plain one
    is called row by row, and whoever calls this sees to its time."""
    if not is_async(reward):
        return [judge(reward, row) for row in rows]
    # One loop for the life of the process: a reward may keep a connection open from one batch to the next.
    global _runner
    _runner = _runner or asyncio.Runner()
    return _runner.run(_judge_all(reward, rows, timeout_s))


_runner: asyncio.Runner | None = None
_rewards: list[Reward] = []
_load_error: str | None = None


def prepare(reward_names: Sequence[str]) -> None:
    """Load the rewards, once, when the worker starts; their import does not count against any time limit."""
    global _rewards, _load_error
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _rewards = [load_reward(name) for name in reward_names]
    except Exception as error:  # told by load_error(); a worker that dies here would be restarted for ever
        _load_error = str(error)
    else:
        if "math_verify" in reward_names:  # compiles its regular expressions: 0.2 s
            judge(load_reward("math_verify"), ("1", "1", ""))


def _end_with_parent() -> None:
    # A worker busy with a hanging completion does not notice that its parent was killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def load_error() -> str | None:
    """Why the worker has no rewards, or None if all is well."""
    return _load_error


def judge_chunk(which: int, rows: list[Row], timeout_s: float) -> tuple[list[Verdict], float]:
    """The verdicts of reward number `which` on a chunk, and the seconds they took."""
    assert _rewards, "prepare() ran and load_error() was asked before any chunk"
    start = time.perf_counter()
    verdicts = judge_rows(_rewards[which], rows, timeout_s)
    return verdicts, time.perf_counter() - start


class _WorkerProcess(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _main_hidden():
            return ForkServerProcess._Popen(process_obj)  # type: ignore[attr-defined]


class WorkerContext(ForkServerContext):
    """Forks workers from a server process that never ran threads or CUDA, and leaves `__main__` alone.

    multiprocessing would import the caller's main script again in every worker: slow for a trainer, and a
    second run of everything for a script without `if __name__ == "__main__"`. A reward worker needs nothing
    from there.
    """

    Process = _WorkerProcess  # type: ignore[assignment]


_main_lock = threading.Lock()


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Take away, while a process is started, the two attributes by which multiprocessing finds `__main__`."""
    main = sys.modules["__main__"]
    with _main_lock:
        hidden = {name: main.__dict__[name] for name in ("__file__", "__spec__") if name in main.__dict__}
        main.__dict__.pop("__file__", None)
        main.__spec__ = None
        try:
            yield
        finally:
            main.__dict__.update(hidden)
