"""`train.py --verify-resume`: proof, on this machine with these settings, that a run goes on as if it never stopped.

    python train/train.py --verify-resume --config train/configs/gsm8k_tiny.yaml --data.train gsm8k_train.jsonl
    torchrun --nproc-per-node 8 train/train.py --verify-resume=20 --config ...

Started as the run itself will be, each process starts one of its own, which trains n steps and saves after half of
them. That checkpoint, with the records, then goes to fresh processes, which make the second half again. Every metric
(wall-clock times and memory excepted), every record and the whole last checkpoint, weights and optimizer included,
must be the same, bit for bit. Both runs stay in `run_dir/verify_resume`; `run_dir` itself is not touched.
"""

import os
import shutil
import socket
import subprocess
import sys
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
from entrocraft.train.run_difference import Compared, compare_checkpoints, compare_records, compare_statistically

OPTION = "--verify-resume"
_STEPS = 8
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


def exactness(config: Config) -> tuple[bool, str]:
    """Whether two runs of this configuration draw the same rollouts token by token, and why."""
    engine = config.engine
    if engine.name == "hf":
        return True, "exact: transformers draws each batch from a random stream named by seed and step"
    if engine.name == "vllm_server":
        return False, (
            "statistical: requests reach the vLLM server in an order, and so in batches, that time decides, and "
            "rounding depends on the batch"
        )
    if not engine.seeded:
        return False, "statistical: engine.seeded is off, and the random state of vLLM's sampler is in no checkpoint"
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
        half = f"--checkpoint.every={steps // 2}", "--checkpoint.keep=2", f"--optimizer.steps={steps}"
        console.print(f"training {steps} steps, with a checkpoint after {steps // 2}")
        _train(ranks, whole, [*arguments, *half, "--resume=never"])
        if ranks.main:
            _hand_over(whole, resumed, steps // 2)
        ranks.barrier()
        console.print(f"training again from step {steps // 2}, in as many fresh processes ({ranks.size})")
        _train(ranks, resumed, [*arguments, *half, "--resume=auto"])
        failed = ranks.main and judge(config, whole, resumed, steps, ranks.size, console)
        return int(ranks.from_main(failed))


def _train(ranks: Ranks, run_dir: Path, arguments: Sequence[str]) -> None:
    """One run in a process of its own for each rank, with their output in files beside it.

    Raises TrainingStopped with the end of the output when one fails.
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
            code = child.wait()
        finally:
            child.kill()
    codes = ranks.gather(code)
    if any(codes):
        rank = next(rank for rank, code in enumerate(codes) if code)
        tails = ranks.gather("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
        raise TrainingStopped(
            f"{run_dir}: the process of rank {rank} ended with status {codes[rank]}, so nothing could be compared; "
            f"the end of its output:\n{tails[rank]}"
        )


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
    exact, why = exactness(config)
    if exact:
        last = [CheckpointFolder(run, keep=2).whole()[-1] for run in (whole, resumed)]
        lines = compare_records(whole, resumed, after=steps // 2) + compare_checkpoints(*last)
    else:
        lines = compare_statistically(whole, resumed, after=steps // 2, exact=("lr", "samples", "prompts", "staleness"))
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
