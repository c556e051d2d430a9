"""JSON over HTTP with a deadline, from many threads at once; nothing but the standard library."""

import http.client
import json
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from entrocraft.train.deadline import WaitedTooLong


class ServerError(RuntimeError):
    """A server that could not be reached, or answered with an error."""


class Server:
    """One HTTP server, asked by `who`."""

    def __init__(self, url: str, who: str) -> None:
        self.url, self.who = url.rstrip("/"), who
        parts = urllib.parse.urlsplit(self.url)
        self._make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._path = parts.netloc, parts.path

    def ask(self, method: str, path: str, body: Any = None, *, what: str, deadline: float, setting: str) -> Any:
        """The answer, decoded; None for an empty one. `deadline` is a time of `time.monotonic`.

        Raises WaitedTooLong beyond it and ServerError for anything else that went wrong.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._too_late(what, setting)
        connection = self._make(self._host, timeout=left)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, self._path + path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        except TimeoutError:
            raise self._too_late(what, setting) from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.who} asked {self.url} to {what}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if answer.status != http.client.OK:
            told = " ".join(text[:500].decode(errors="replace").split())
            raise ServerError(f"{self.who} asked {self.url} to {what}: it answered {answer.status}: {told}")
        return json.loads(text) if text.strip() else None

    def _too_late(self, what: str, setting: str) -> WaitedTooLong:
        return WaitedTooLong(
            f"{self.who} waited for {self.url} to {what} longer than {setting} allows. Look at the server's log; raise "
            f"{setting} if it was only slow"
        )


def all_of(calls: Sequence[Callable[[], Any]], at_once: int) -> list[Any]:
    """The results of all calls, in order, `at_once` of them at a time; the first failure is raised at once."""
    with ThreadPoolExecutor(max_workers=max(1, min(at_once, len(calls)))) as pool:
        futures = [pool.submit(call) for call in calls]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            if future.exception() is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                raise future.exception() or AssertionError
        return [future.result() for future in futures]
