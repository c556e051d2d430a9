"""Waits that end: every call into somebody else's engine has a time limit, and says who waited for whom."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from typing import Any

from entrocraft.train.errors import TrainingStopped

_PATIENCE_S = 60.0  # for a last call, when everything else has ended


class WaitedTooLong(TrainingStopped):
    """A wait ended without its answer. Who waited, for whom, for what and for how long is in the message."""


class Caller:
    """One daemon thread that makes the calls it is given, in order.

    A call that never returns keeps this thread and nothing else: whoever waits for it goes on after the time limit, and
    the process can end. All calls come from the same thread, as libraries that bind threads to cores or keep a current
    device for each thread need it.
    """

    def __init__(self, who: str, whom: str) -> None:
        self.who, self.whom = who, whom
        self.stuck = ""
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"calls {whom}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            try:
                future.set_result(call())
            except BaseException as error:  # whatever it is belongs to whoever asked
                future.set_exception(error)

    def start(self, call: Callable[[], Any]) -> "Future[Any]":
        """Makes the call as soon as those before it have ended; does not wait."""
        future: Future[Any] = Future()
        self._calls.put((call, future))
        return future

    def wait(self, future: "Future[Any]", what: str, timeout_s: float, setting: str) -> Any:
        """The future's result, or what it raised.

        Raises WaitedTooLong when there is none after `timeout_s` seconds, the value of `setting`.
        """
        if self.stuck:
            raise WaitedTooLong(f"{self.who} cannot ask {self.whom} to {what}: it still has not done: {self.stuck}")
        try:
            return future.result(timeout_s)
        except TimeoutError:
            if future.done():  # the call itself raised a TimeoutError
                raise
            self.stuck = what
            raise WaitedTooLong(
                f"{self.who} waited {timeout_s:g} s for {self.whom} to {what}. Look at what it was doing (its log, the "
                f"device's memory); raise {setting} if it was only slow"
            ) from None

    def call(self, call: Callable[[], Any], what: str, timeout_s: float, setting: str) -> Any:
        """`start` and `wait` in one."""
        return self.wait(self.start(call), what, timeout_s, setting)

    def close(self) -> None:
        """Ends the thread after its last call, which is waited for: a thread that is in a library's code when the
        interpreter ends takes the process down with it."""
        self._calls.put(None)
        self._thread.join(1.0 if self.stuck else _PATIENCE_S)
