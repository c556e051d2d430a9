import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from entrocraft.train.rewards import RewardPool

# What a reward may do to the process it runs in, chosen by the completion.
NASTY = """
import os, signal, sys, time
from pathlib import Path

def nasty(completion, answer, prompt):
    if completion == "hang":
        time.sleep(600)
    if completion == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if completion == "spin":
        while True:
            pass
    if completion == "raise":
        raise RuntimeError("boom")
    if completion == "sys-exit":
        sys.exit(3)
    if completion == "os-exit":
        os._exit(7)
    if completion == "os-exit-0":
        os._exit(0)
    if completion == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"none": None, "nan": float("nan"), "inf": float("inf"), "text": "1.0", "list": [1.0]}.get(
        completion, float(answer)
    )

class Client:
    # An async reward held by an object, which is called.
    waiting = 0

    async def __call__(self, completion, answer, prompt):
        import asyncio
        self.waiting += 1
        try:
            if completion == "raise":
                raise OSError("no connection")
            if completion == "own time-out":
                raise TimeoutError("the server is slow")
            if completion == "cancel":
                raise asyncio.CancelledError
            if completion == "stubborn":
                while True:
                    try:
                        await asyncio.sleep(600)
                    except asyncio.CancelledError:
                        pass
            await asyncio.sleep(600 if completion == "hang" else 0.2)
            return {"none": None, "text": "1.0"}.get(completion, float(answer))
        finally:
            self.waiting -= 1

client = Client()

async def waits(completion, answer, prompt):
    return await client(completion, answer, prompt)

def brief(completion, answer, prompt):
    return None if completion == "quiet" else float(len(completion))

def pid(completion, answer, prompt):
    Path(prompt, str(os.getpid())).touch()
    if completion == "hang":
        while True:
            pass
    return 1.0
"""


@pytest.fixture
def nasty_module(tmp_path, monkeypatch):
    (tmp_path / "nasty_rewards.py").write_text(NASTY)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def score(pool: RewardPool, completions: list[str], answers: list[str] | None = None):
    return pool.score(completions, answers or ["1"] * len(completions), ["p"] * len(completions))


# kind -> which counter it lands in. 0 is a time-out: a worker that ends with success says nothing to anyone.
HANGS = ["hang", "spin", "os-exit-0"]
ERRORS = ["raise", "sys-exit", "os-exit", "kill", "nan", "inf", "text", "list"]


@pytest.mark.parametrize("kind", [*HANGS, *ERRORS, "none"])
def test_only_the_culprit_loses_its_score(nasty_module, kind):
    completions = ["fine"] * 7 + [kind] + ["fine"] * 7
    answers = [str(place) for place in range(15)]
    with RewardPool("nasty_rewards:nasty", workers=2, timeout_s=0.4) as pool:
        batch = score(pool, completions, answers)
        again = score(pool, ["fine"] * 15, answers)
    expected = torch.arange(15.0)
    assert torch.equal(again.reward_R, expected)
    expected[7] = torch.nan
    torch.testing.assert_close(batch.reward_R, expected, equal_nan=True, rtol=0, atol=0)
    counts = (batch.timeouts, batch.errors, batch.unscorable)
    assert counts == (kind in HANGS, kind in ERRORS, kind == "none")
    assert (batch.first_error is not None) == (kind in ERRORS)
    if kind in ERRORS:
        assert batch.first_error is not None
        assert batch.first_error.startswith("completion 7: ")


def test_many_culprits_at_once(nasty_module):
    completions = [kind for kind in (*HANGS, *ERRORS, "none") for kind in ("fine", kind, "fine")]
    start = time.monotonic()
    with RewardPool("nasty_rewards:nasty", workers=2, timeout_s=0.3) as pool:
        batch = score(pool, completions)
    assert batch.reward_R.isnan().tolist() == [False, True, False] * 12
    assert (batch.timeouts, batch.errors, batch.unscorable) == (3, 8, 1)
    assert time.monotonic() - start < 30


def test_a_worker_that_ignores_sigterm_is_killed(nasty_module):
    with RewardPool("nasty_rewards:nasty", workers=1, timeout_s=0.3) as pool:
        batch = score(pool, ["deaf", "fine"])
    assert batch.reward_R.isnan().tolist() == [True, False]
    assert batch.timeouts == 1


def test_math_verify_hangs_on_a_tower_and_is_stopped():
    completions = ["\\boxed{9^{9^{9^{9}}}}", "The answer is 5.", "The answer is 6."]
    with RewardPool("math_verify", workers=1, timeout_s=1.5) as pool:
        batch = pool.score(completions, ["5", "5", "\\frac{"], [""] * 3)
    assert batch.reward_R[1] == 1.0
    assert batch.reward_R.isnan().tolist() == [True, False, True]
    assert (batch.timeouts, batch.errors, batch.unscorable) == (1, 0, 1)


def test_slow_but_honest_rewards_keep_their_scores(tmp_path, monkeypatch):
    """Twelve of 0.15 s in chunks take longer than the limit of one; none of them does."""
    (tmp_path / "slow_rewards.py").write_text(
        "import time\ndef slow(c, a, p):\n    time.sleep(0.15)\n    return float(a)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with RewardPool("slow_rewards:slow", workers=1, timeout_s=0.4) as pool:
        batch = score(pool, ["c"] * 12, [str(place) for place in range(12)])
        assert pool._chunk_size(0, 12) == 1
    assert torch.equal(batch.reward_R, torch.arange(12.0))
    assert batch.timeouts == 0


# 0 is in this process; the others travel. 300 rows of one worker are more than one full chunk of 64.
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_scores_are_in_order(workers, count):
    completions = [f"{place % 7}+1" for place in range(count)]
    with RewardPool("sum_pair", workers=workers, timeout_s=5.0) as pool:
        batch = pool.score(completions, ["4"] * count, [""] * count)
    assert batch.reward_R.dtype == torch.float32
    assert torch.equal(batch.reward_R, torch.tensor([float(place % 7 == 3) for place in range(count)]))
    assert (batch.timeouts, batch.errors, batch.unscorable, batch.first_error) == (0, 0, 0, None)


@pytest.mark.parametrize("workers", [0, 1])
def test_signed_maps_to_minus_one_and_one(nasty_module, workers):
    with RewardPool("nasty_rewards:nasty", workers=workers, timeout_s=5.0, signed=True) as pool:
        batch = score(pool, ["c"] * 4 + ["none"], ["0", "1", "0.5", "-1", "1"])
    torch.testing.assert_close(
        batch.reward_R, torch.tensor([-1.0, 1.0, 0.0, torch.nan, torch.nan]), equal_nan=True, rtol=0, atol=0
    )
    assert (batch.errors, batch.unscorable) == (1, 1)
    assert batch.first_error == "completion 3: signed=True needs a reward in [0, 1], the reward gave -1.0"


def test_in_process_reward_that_raises_is_counted(nasty_module):
    with RewardPool("nasty_rewards:nasty", workers=0, timeout_s=5.0) as pool:
        batch = score(pool, ["fine", "raise", "sys-exit", "none"])
    assert batch.reward_R.isnan().tolist() == [False, True, True, True]
    assert (batch.errors, batch.unscorable) == (2, 1)
    assert batch.first_error == "completion 1: RuntimeError: boom"


def test_tiny_completions_cost_little():
    """256 of them travel in chunks; the best of several rounds is what the pool itself costs."""
    with RewardPool("sum_pair", workers=2, timeout_s=5.0) as pool:
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            batch = pool.score(["1+2"] * 256, ["3"] * 256, ["p"] * 256)
            seconds.append(time.perf_counter() - start)
            assert batch.reward_R.sum() == 256
    assert min(seconds) < 0.05, [round(1e3 * second, 1) for second in seconds]


def test_bad_arguments_are_refused():
    for workers, timeout_s, named in ((-1, 1.0, "workers=-1"), (1, 0.0, "timeout_s=0"), (1, math.inf, "timeout_s=inf")):
        with pytest.raises(ValueError, match=named):
            RewardPool("sum_pair", workers=workers, timeout_s=timeout_s)
    with pytest.raises(ValueError, match=r"unknown reward 'sum'"):
        RewardPool("sum", workers=1, timeout_s=1.0)
    with pytest.raises(RuntimeError, match="in a `with` block"):
        score(RewardPool("sum_pair", workers=1, timeout_s=1.0), ["1+2"])
    with (
        RewardPool("sum_pair", workers=0, timeout_s=1.0) as pool,
        pytest.raises(ValueError, match="1 completions, 2 answers and 1 prompts"),
    ):
        pool.score(["1+2"], ["3", "4"], ["p"])


def test_a_reward_that_only_loads_here_is_told_on_entry(tmp_path, monkeypatch):
    here = f"import os\nif os.getpid() != {os.getpid()}:\n    raise OSError('no data here')\n"
    (tmp_path / "here_rewards.py").write_text(here + "def f(c, a, p):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with (
        pytest.raises(RuntimeError, match=r"not in a worker process: .*OSError: no data here"),
        RewardPool("here_rewards:f", workers=1, timeout_s=1.0),
    ):
        pass


# A script without `if __name__ == "__main__"` must run once. In it: Ctrl-C goes to the whole process group, as
# from a terminal, the workers ignore it, and the pool still answers.
SCRIPT = """
import json, os, signal, sys
sys.path.insert(0, {folder!r})
print("started", flush=True)
from entrocraft.train.rewards import RewardPool
caught = []
signal.signal(signal.SIGINT, lambda *_: caught.append(1))
with RewardPool("nasty_rewards:pid", workers=2, timeout_s=1.0) as pool:
    first = pool.score(["fine"] * 8, ["1"] * 8, [{folder!r} + "/pids"] * 8)
    before = set(os.listdir({folder!r} + "/pids"))
    os.killpg(os.getpgrp(), signal.SIGINT)
    second = pool.score(["fine"] * 8, ["1"] * 8, [{folder!r} + "/pids"] * 8)
    after = set(os.listdir({folder!r} + "/pids"))
print(json.dumps([len(caught), first.reward_R.tolist(), second.reward_R.tolist(), sorted(after - before)]))
"""


def test_workers_ignore_ctrl_c_and_leave_the_main_script_alone(nasty_module):
    (nasty_module / "pids").mkdir()
    script = nasty_module / "main_script.py"
    script.write_text(SCRIPT.format(folder=str(nasty_module)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=90, start_new_session=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("started") == 1
    caught, first, second, new_workers = json.loads(lines[-1])
    assert caught == 1
    assert first == second == [1.0] * 8
    # With two workers one may not have answered before; had Ctrl-C ended them, there would be more new ones.
    assert len(new_workers) <= 1
    assert "Traceback" not in done.stderr


ORPHANS = """
import sys
sys.path.insert(0, {folder!r})
from entrocraft.train.rewards import RewardPool
with RewardPool("nasty_rewards:pid", workers=2, timeout_s=300.0) as pool:
    pool.score(["hang"] * 2, ["1"] * 2, [{folder!r} + "/pids"] * 2)
"""


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_busy_workers_end_with_a_killed_parent(nasty_module):
    pids = nasty_module / "pids"
    pids.mkdir()
    script = nasty_module / "main_script.py"
    script.write_text(ORPHANS.format(folder=str(nasty_module)))
    with subprocess.Popen([sys.executable, script]) as parent:
        deadline = time.monotonic() + 60
        while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = [int(path.name) for path in pids.iterdir()]
        assert len(workers) == 2
        assert all(alive(worker) for worker in workers)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 15
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [worker for worker in workers if alive(worker)] == []


# Which counter each lands in, by its count: one time-out, four errors, one without opinion.
ASYNC_CULPRITS = ["hang", "raise", "own time-out", "cancel", "text", "none"]


@pytest.mark.parametrize("reward", ["nasty_rewards:client", "nasty_rewards:waits"])
@pytest.mark.parametrize("workers", [0, 1])
def test_async_rewards_wait_together_and_only_the_culprit_loses(nasty_module, workers, reward):
    completions = ["fine"] * 40 + ASYNC_CULPRITS + ["fine"] * 18
    answers = [str(place) for place in range(64)]
    with RewardPool(reward, workers=workers, timeout_s=1.0) as pool:
        begun = time.monotonic()
        batch = score(pool, completions, answers)
        together = time.monotonic() - begun
    assert together < 8.0  # one after the other they take 12 s and the hanging one's second
    expected = torch.arange(64.0)
    expected[40:46] = torch.nan
    torch.testing.assert_close(batch.reward_R, expected, equal_nan=True, rtol=0, atol=0)
    assert (batch.timeouts, batch.errors, batch.unscorable) == (1, 4, 1)
    assert batch.first_error == "completion 41: OSError: no connection"


def test_an_async_reward_that_ignores_its_cancellation_is_killed(nasty_module):
    with RewardPool("nasty_rewards:client", workers=1, timeout_s=0.3) as pool:
        batch = score(pool, ["fine", "stubborn"])
    assert batch.reward_R.isnan().tolist() == [False, True]
    assert (batch.timeouts, batch.errors) == (1, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_several_rewards_are_weighed_and_one_decides(nasty_module, workers):
    """Deciding: nasty. Added: brief, None for "quiet". Recorded only: pid, which fails on everything here."""
    also = {"nasty_rewards:brief": 0.5, "nasty_rewards:pid": 0.0}
    completions, answers = ["fine", "quiet", "none", "raise", "ab"], ["1", "0.5", "1", "1", "3"]
    with RewardPool("nasty_rewards:nasty", workers=workers, timeout_s=5.0, weight=2.0, also=also) as pool:
        batch = score(pool, completions, answers)
    nan = torch.nan
    expected = torch.tensor([2 + 0.5 * 4, 1.0, nan, nan, 6 + 0.5 * 2])
    torch.testing.assert_close(batch.reward_R, expected, equal_nan=True, rtol=0, atol=0)
    assert batch.right_R.tolist() == [True, False, False, False, True]
    assert list(batch.score_R) == ["nasty", "brief", "pid"]
    torch.testing.assert_close(batch.score_R["nasty"], torch.tensor([1, 0.5, nan, nan, 3]), equal_nan=True)
    torch.testing.assert_close(batch.score_R["brief"], torch.tensor([4.0, nan, 4, 5, 2]), equal_nan=True)
    assert batch.score_R["pid"].isnan().all()
    assert (batch.timeouts, batch.errors, batch.unscorable) == (0, 1 + 5, 1)


def test_a_weighed_reward_that_fails_leaves_no_verdict(nasty_module):
    with RewardPool("sum_pair", workers=2, timeout_s=0.4, also={"nasty_rewards:nasty": 0.1}) as pool:
        batch = pool.score(["1+2", "hang", "raise", "none"], ["3"] * 4, ["p"] * 4)
    torch.testing.assert_close(
        batch.reward_R, torch.tensor([1.3, torch.nan, torch.nan, 0.0]), equal_nan=True, rtol=1e-6, atol=0
    )
    assert batch.right_R.tolist() == [True, False, False, False]
    assert (batch.timeouts, batch.errors, batch.unscorable) == (1, 1, 0)


def test_signed_maps_the_deciding_reward_alone(nasty_module):
    with RewardPool("sum_pair", workers=0, timeout_s=1.0, signed=True, also={"nasty_rewards:brief": 1.0}) as pool:
        batch = pool.score(["1+2", "12"], ["3"] * 2, ["p"] * 2)
    assert batch.reward_R.tolist() == [1.0 + 3.0, -1.0 + 2.0]
    assert batch.right_R.tolist() == [True, False]


def test_several_rewards_refuse_nonsense():
    with pytest.raises(ValueError, match="names 'sum_pair', which decides"):
        RewardPool("sum_pair", workers=0, timeout_s=1.0, also={"sum_pair": 1.0})
    with pytest.raises(ValueError, match="the weight of 'math_verify' is nan"):
        RewardPool("sum_pair", workers=0, timeout_s=1.0, also={"math_verify": math.nan})
    with pytest.raises(ValueError, match=r"unknown reward 'strict_bx': .* did you mean 'strict_box'"):
        RewardPool("sum_pair", workers=0, timeout_s=1.0, also={"strict_bx": 1.0})
