"""`train.py --plan`: prints what a run would need of memory on each rank, and what to change where it does not fit."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from entrocraft.train.config import Config
from entrocraft.train.config_reader import load_config
from entrocraft.train.plan import GB, RESERVE, Advice, Plan, advise, make_plan
from entrocraft.train.plan_sizes import Known


def wanted(argv: Sequence[str]) -> bool:
    """Whether the command line asks for a plan."""
    return any(word in ("--plan", "--plan-json") for word in argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py --plan",
        description="Predicts the memory of each process of a run, from meta tensors, before anything is loaded. Every "
        "setting of train.py may stand beside these options. Exit code 0: it fits; 3: it does not.",
        allow_abbrev=False,
    )
    parser.add_argument("--plan", action="store_true", help="print the plan instead of training")
    parser.add_argument("--plan-json", action="store_true", help="print it as JSON")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes of the run (default: 1)")
    parser.add_argument(
        "--gpu-memory", type=float, default=80.0, metavar="GB", help="memory of a device, 10^9 bytes (default: 80)"
    )
    parser.add_argument(
        "--plan-shape", metavar="SHAPE", help="a config.json, its text, or a known name, in the place of model.path"
    )
    return parser


def main(argv: Sequence[str], console: Console | None = None, known: Known | None = None) -> int:
    """Plans the run that the command line describes; returns the exit code. known: as for `make_plan`."""
    options, rest = _parser().parse_known_args(argv)
    config, known, gpu_bytes = load_config(rest), known or Known(), int(options.gpu_memory * GB)
    plan = make_plan(config, options.world_size, gpu_bytes=gpu_bytes, shape=options.plan_shape, known=known)
    on_cpu = config.device == "cpu"
    advice: list[Advice] = []
    if not on_cpu and not plan.fits(gpu_bytes):
        advice = advise(config, options.world_size, gpu_bytes=gpu_bytes, shape=options.plan_shape, known=known)
    if options.plan_json:
        print(json.dumps(as_json(plan, gpu_bytes, advice)))
    else:
        show(plan, config, gpu_bytes, advice, console or Console())
    return 0 if on_cpu or plan.fits(gpu_bytes) else 3


def as_json(plan: Plan, gpu_bytes: int, advice: Sequence[Advice]) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes."""
    phases = [{"name": phase.name, "peak": phase.peak, "parts": dict(phase.parts)} for phase in plan.phases]
    return {
        **asdict(plan),
        "phases": phases,
        "peak": plan.peak,
        "reserve": RESERVE,
        "gpu_bytes": gpu_bytes,
        "fits": plan.fits(gpu_bytes),
        "advice": [asdict(change) for change in advice],
    }


def show(plan: Plan, config: Config, gpu_bytes: int, advice: Sequence[Advice], console: Console) -> None:
    """Prints the plan for people."""
    of = "all trained" if plan.trained == plan.parameters else f"{plan.trained:,} of them trained"
    console.print(f"{plan.source}: {plan.parameters:,} parameters, {of}; {plan.dtype}, {plan.attention} attention")
    console.print(
        f"{plan.world_size} process{'es' if plan.world_size > 1 else ''}; a micro-batch of {plan.rows} x {plan.length} "
        f"= {plan.rows * plan.length:,} tokens. GB of 10^9 bytes, of the fullest process:"
    )
    console.print(_table(plan))
    kept = plan.activations
    checkpointing = "on" if config.model.gradient_checkpointing else "off"
    console.print(
        f"activations kept for the backward pass: {_gb(kept['without'])} GB, with checkpointing {_gb(kept['with'])} GB "
        f"(it is {checkpointing})"
    )
    if plan.host_bytes:
        console.print(f"host memory: {_gb(plan.host_bytes)} GB for each process")
    if plan.cache_tokens is not None:
        console.print(f"vLLM: keys and values of {plan.cache_tokens:,} tokens")
    if config.device == "cpu":
        console.print(f"peak {_gb(plan.peak)} GB of host memory for each process")
        return
    verdict = "fits" if plan.fits(gpu_bytes) else "does not fit"
    console.print(
        f"peak {_gb(plan.peak)} GB + {_gb(RESERVE)} GB for CUDA, NCCL and the allocator: [bold]{verdict}[/bold] into "
        f"{_gb(gpu_bytes)} GB"
    )
    for change in advice:
        console.print(f"  {change.change}: {_gb(change.peak)} GB, {'fits' if change.fits else 'too much still'}")


def _table(plan: Plan) -> Table:
    table = Table("GB", *(phase.name for phase in plan.phases))
    for column in table.columns[1:]:
        column.justify = "right"
    for name in dict.fromkeys(name for phase in plan.phases for name in phase.parts):
        table.add_row(name, *(_gb(phase.parts[name]) if name in phase.parts else "" for phase in plan.phases))
    table.add_section()
    table.add_row("in all", *(_gb(phase.peak) for phase in plan.phases))
    return table


def _gb(size: int) -> str:
    return f"{size / GB:.1f}" if size >= 0.1 * GB else f"{size / GB:.2g}"
