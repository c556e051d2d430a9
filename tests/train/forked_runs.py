"""Training runs that can be killed: a process that has imported the trainer forks one run for each line it is sent.

A run so begins in a tenth of the time, and its process is killed, stopped or starved as any other. Lines are JSON:
{"argv": [...], "environment": {...}, "log": "file"} gives {"pid": ...}; {"wait": pid, "limit": seconds} gives
{"code": ...}, the exit status, negative for a signal, or null when it has not ended within the limit.
"""

import json
import os
import sys
import time
import traceback

import transformers.models.qwen3.modeling_qwen3  # noqa: F401 - what every run would import first
from torch.utils.tensorboard.writer import SummaryWriter  # noqa: F401

from entrocraft.train.cli import report_errors
from entrocraft.train.train import main


def begin(argv: list[str], environment: dict[str, str], log: str) -> int:
    """The pid of a run in a process of its own."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        code = report_errors(lambda: main(argv))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pid: int, limit: float) -> int | None:
    """Its exit status as `subprocess` gives it; None when it still runs after the limit."""
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


if __name__ == "__main__":
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = {"code": wait(order["wait"], order["limit"])}
        else:
            answer = {"pid": begin(order["argv"], order["environment"], order["log"])}
        print(json.dumps(answer), flush=True)
