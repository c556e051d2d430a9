"""`train.py --verify-resume`: proof, on this machine with these settings, that a run goes on as if it never stopped.

    python train/train.py --verify-resume --config train/configs/gsm8k_tiny.yaml --data.train gsm8k_train.jsonl
    torchrun --nproc-per-node 8 train/train.py --verify-resume=20 --config ...

Started as the run itself will be, each process starts one of its own, which trains n steps and saves after half of
them. That checkpoint, with the records, then goes to fresh processes, which make the second half again. Every metric
(wall-clock times and memory excepted), every record and the whole last checkpoint, weights and optimizer included,
must be the same, bit for bit; or alike, where kernels or schedulers do not allow that (`exactness`). Both runs stay in
`run_dir/verify_resume`; `run_dir` itself is not touched.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from entrocraft.train.checkpoint import CheckpointFolder
from entrocraft.train.config import Config
from entrocraft.train.config_reader import load_config
from entrocraft.train.errors import TrainingStopped
from entrocraft.train.metrics import METRICS_FILE
from entrocraft.train.parallel import Ranks
from entrocraft.train.policy import choose_device
from entrocraft.train.run_difference import Compared, compare_checkpoints, compare_records, compare_statistically

OPTION = "--verify-resume"
_STEPS = 8
_REAPED_S = 60.0  # a killed process is gone in no time, unless it is stuck in a driver
_SCRIPT = Path(__file__).with_name("train.py")


def asked_for(argv: Sequence[str]) -> bool:
    """Whether the command line asks for a verification instead of a run."""
    return any(word.split("=")[0] == OPTION for word in argv)


def parse(argv: Sequence[str]) -> tuple[int, list[str]]:
    """Steps to train, and the arguments without the option. ValueError unless the steps are an even number above 0."""
    steps, rest = str(_STEPS), []
    for word in argv:
        if word == OPTION or word.startswith(OPTION + "="):
            steps = word.partition("=")[2] or steps
        else:
            rest.append(word)
    if not steps.isdigit() or int(steps) < 2 or int(steps) % 2:
        raise ValueError(f"{OPTION}={steps}: expected an even number of steps, 2 or more, such as {OPTION}={_STEPS}")
    return int(steps), rest


def exactness(config: Config, device: torch.device) -> tuple[bool, str]:
    """Whether two runs of this configuration on such a device are the same bit for bit, and why."""
    engine = config.engine
    if engine.name == "vllm_server":
        return False, (
            "statistical: requests reach the vLLM server in an order, and so in batches, that time decides, and "
            "rounding depends on the batch"
        )
    if not engine.seeded:
        return False, "statistical: engine.seeded is off, and the random state of vLLM's sampler is in no checkpoint"
    if device.type != "cpu" and engine.name == "vllm":
        return False, f"statistical: on {device.type} vLLM's kernels round by the size of the batch at hand"
    if device.type != "cpu":
        return False, (
            f"statistical: on {device.type} kernels add in any order, of a gradient as of a product, unless "
            "torch.use_deterministic_algorithms is on, and the trainer does not turn it on"
        )
    if engine.name == "hf":
        return True, "exact: transformers draws each batch from a random stream named by seed and step"
    return True, "exact to the token: each rollout has a seed of its own, and vLLM schedules within this process"


def verify(argv: Sequence[str], console: Console | None = None) -> int:
    """Runs both runs and compares them; returns 0, or 1 when they differ, naming the first difference.

    Raises TrainingStopped when one of the runs fails.
    """
    steps, arguments = parse(argv)
    config = load_config(arguments)
    with Ranks.joined(device=torch.device("cpu"), timeout_s=config.parallel.timeout_s) as ranks:
        console = console or Console(quiet=not ranks.main)
        folder = Path(config.run_dir) / "verify_resume"
        if ranks.main and folder.exists():
            shutil.rmtree(folder)
        ranks.barrier()
        whole, resumed = folder / "whole", folder / "resumed"
        half = (
            f"--checkpoint.every={steps // 2}",
            "--checkpoint.keep=2",
            f"--optimizer.steps={steps}",
            "--logging.report=false",
        )
        console.print(f"training {steps} steps, with a checkpoint after {steps // 2}")
        patience_s = max(config.engine.start_timeout_s, config.engine.sample_timeout_s) + config.parallel.timeout_s
        _train(ranks, whole, [*arguments, *half, "--resume=never"], patience_s)
        if ranks.main:
            _hand_over(whole, resumed, steps // 2)
        ranks.barrier()
        console.print(f"training again from step {steps // 2}, in as many fresh processes ({ranks.size})")
        _train(ranks, resumed, [*arguments, *half, "--resume=auto"], patience_s)
        failed = ranks.main and judge(config, whole, resumed, steps, ranks.size, console)
        return int(ranks.from_main(failed))


def _train(ranks: Ranks, run_dir: Path, arguments: Sequence[str], patience_s: float) -> None:
    """One run in a process of its own for each rank, with their output in files beside it.

    Raises TrainingStopped with the end of the output when one fails, or for `patience_s` seconds adds nothing to what
    it writes.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    log = run_dir.with_name(f"{run_dir.name}.rank{ranks.rank}.log")
    environment = dict(os.environ)
    if "MASTER_ADDR" in environment:  # they meet at a place of their own: at the one that was given, we have met
        environment |= {"MASTER_PORT": str(ranks.from_main(_free_port())), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    command = [sys.executable, str(_SCRIPT), *arguments, f"--run_dir={run_dir}"]
    with log.open("w") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            trouble = _trouble(child, (log, run_dir), f"rank {ranks.rank} of the verification", patience_s)
        finally:
            child.kill()
            child.wait(_REAPED_S)
    troubles = ranks.gather(trouble)
    if any(troubles):
        rank = next(rank for rank, trouble in enumerate(troubles) if trouble)
        tails = ranks.gather("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
        raise TrainingStopped(
            f"{run_dir}: {troubles[rank]}, so nothing could be compared; the end of its output:\n{tails[rank]}"
        )


def _trouble(child: subprocess.Popen[bytes], written: Sequence[Path], who: str, patience_s: float) -> str | None:
    """Waits until a run ends, as long as what it writes goes on growing; what went wrong, if anything."""
    size, since = -1, time.monotonic()
    while child.poll() is None:
        files = [file for place in written for file in (place.iterdir() if place.is_dir() else [place])]
        if (now := sum(_size(file) for file in files)) != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > patience_s:
            return (
                f"{who} waited {patience_s:g} s for its training process {child.pid} to write anything (raise "
                "engine.sample_timeout_s or parallel.timeout_s if it was only slow)"
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(min(0.5, patience_s))
    return f"the training process of {who} ended with status {child.returncode}" if child.returncode else None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # renamed meanwhile
        return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _hand_over(whole: Path, resumed: Path, step: int) -> None:
    """Gives a folder what a run that stopped after `step` would have left in it, and a little more: the records of
    later steps, which a resumed run must cut off."""
    checkpoint = next(f for f in CheckpointFolder(whole, keep=2).whole() if f.name == f"step_{step:06d}")
    (resumed / "checkpoints").mkdir(parents=True)
    checkpoint.rename(resumed / "checkpoints" / checkpoint.name)
    for record in whole.iterdir():
        if record.suffix in (".jsonl", ".yaml", ".json"):
            shutil.copy(record, resumed / record.name)


def judge(config: Config, whole: Path, resumed: Path, steps: int, processes: int, console: Console) -> bool:
    """Prints what was compared between two runs of so many steps and processes; whether something differs.

    Raises TrainingStopped when the second did not begin at its checkpoint.
    """
    log = resumed.with_name(f"{resumed.name}.rank0.log").read_text(errors="replace")
    if f"resuming after step {steps // 2}" not in log:
        raise TrainingStopped(f"{resumed} did not go on from its checkpoint of step {steps // 2}: {log[-500:]}")
    exact, why = exactness(config, choose_device(config.device))
    if exact:
        last = [CheckpointFolder(run, keep=2).whole()[-1] for run in (whole, resumed)]
        lines = compare_records(whole, resumed, after=steps // 2) + compare_checkpoints(*last)
    else:
        more = config.refill.oversample or config.refill.zero_variance == "refill"
        exact_names = ("lr", "staleness") if more else ("lr", "samples", "prompts", "staleness")
        lines = compare_statistically(whole, resumed, after=steps // 2, exact=exact_names)
    table = Table("compared", "count", "result", title=f"resume, {processes} process(es), {why}", title_justify="left")
    for line in lines:
        note = f" ({line.note})" if line.note else ""
        alike = "equal" if exact else "alike"
        table.add_row(line.what + note, str(line.count), "DIFFERS" if line.difference else alike)
    console.print(table)
    return _tell(lines, whole, console)


def _tell(lines: Sequence[Compared], whole: Path, console: Console) -> bool:
    first = next((line for line in lines if line.difference), None)
    if first is None:
        console.print(
            f"resume verified, {sum(line.count for line in lines)} things compared; both runs: {whole.parent}"
        )
        return False
    print(
        f"resume NOT verified. First difference, in one piece and after the restart: {first.what}: {first.difference}. "
        f"Something that decides a step is in no checkpoint (state kept by a reward?) or differs from time to time "
        f"(kernels that add in any order?); compare {METRICS_FILE} of the two runs in {whole.parent}",
        file=sys.stderr,
    )
    return True
