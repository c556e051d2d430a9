"""Waits that end, in words; real threads and real sockets."""

import http.server
import json
import socket
import threading
import time

import pytest

from entrocraft.train.deadline import Caller, WaitedTooLong
from entrocraft.train.errors import TrainingStopped
from entrocraft.train.http_json import Server, ServerError, all_of


@pytest.fixture
def caller():
    made = Caller("rank 3", "the engine")
    yield made
    made.close()


def test_calls_are_made_in_order_on_one_thread(caller):
    seen = []
    futures = [caller.start(lambda i=i: seen.append((i, threading.get_ident()))) for i in range(5)]
    for future in futures:
        caller.wait(future, "count", 5, "x")
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    assert len({thread for _, thread in seen}) == 1
    assert seen[0][1] != threading.get_ident()


def test_what_a_call_raises_is_raised_here(caller):
    with pytest.raises(ZeroDivisionError):
        caller.call(lambda: 1 / 0, "divide", 5, "x")
    assert caller.call(lambda: 7, "go on", 5, "x") == 7

    def times_out_itself():
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        caller.call(times_out_itself, "give up", 5, "x")


def test_a_wait_ends_with_names(caller):
    hang = threading.Event()
    started = time.monotonic()
    with pytest.raises(WaitedTooLong, match=r"rank 3 waited 0.2 s for the engine to load\. .*raise engine.limit"):
        caller.call(lambda: hang.wait(20), "load", 0.2, "engine.limit")
    assert time.monotonic() - started < 5
    with pytest.raises(WaitedTooLong, match="rank 3 cannot ask the engine to draw: it still has not done: load"):
        caller.call(lambda: 1, "draw", 5, "x")
    assert issubclass(WaitedTooLong, TrainingStopped)  # so that a run ends in order
    hang.set()


class Answers(http.server.BaseHTTPRequestHandler):
    """Echoes JSON; `/slow` takes its time; `/bad` refuses."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/slow":
            time.sleep(1)
        told = b"no\n  such thing" if self.path == "/api/bad" else body
        self.send_response(400 if self.path == "/api/bad" else 200)
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server():
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield Server(f"http://127.0.0.1:{made.server_port}/api/", "rank 3")
    made.shutdown()
    made.server_close()


def ask(server, path, body=None, seconds=5.0):
    return server.ask("POST", path, body, what="answer", deadline=time.monotonic() + seconds, setting="engine.limit_s")


def test_questions_and_answers(server):
    assert ask(server, "/echo", {"a": [1, 2.5, "ä"]}) == {"a": [1, 2.5, "ä"]}
    assert ask(server, "/echo") is None
    big = {"tokens": list(range(200_000))}
    assert ask(server, "/echo", big) == json.loads(json.dumps(big))


def test_errors_name_both_sides(server):
    with pytest.raises(ServerError, match=rf"rank 3 asked {server.url} to answer: it answered 400: no such thing"):
        ask(server, "/bad", {})
    with pytest.raises(WaitedTooLong, match=rf"rank 3 waited for {server.url} to answer longer than engine.limit_s"):
        ask(server, "/slow", {}, seconds=0.2)
    with pytest.raises(WaitedTooLong):
        ask(server, "/echo", {}, seconds=-1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = Server(f"http://127.0.0.1:{free.getsockname()[1]}", "rank 3")
    with pytest.raises(ServerError, match=r"rank 3 asked http://127.* to answer: ConnectionRefusedError"):
        ask(gone, "/echo", {})


def test_many_at_once_in_order_and_the_first_failure_at_once(server):
    answers = all_of([lambda i=i: ask(server, "/echo", {"i": i}) for i in range(50)], 8)
    assert [answer["i"] for answer in answers] == list(range(50))
    assert all_of([], 8) == []
    made = []

    def call(i):
        if i == 0:
            raise ServerError("first")
        time.sleep(0.05)
        made.append(i)

    with pytest.raises(ServerError, match="first"):
        all_of([lambda i=i: call(i) for i in range(100)], 2)
    assert len(made) < 10  # the rest were called off
