"""Where the time of our own calls goes: the kernels of each mode, by torch's profiler.

python bench/suite_profile.py --head qwen3_4b --tokens 16384 --out profile.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from head_cases import PRODUCTS, run_mode
from suite_cases import DTYPE, HEADS, JOBS, Shape, make_operands
from suite_machine import machine
from torch.profiler import ProfilerActivity, profile


def kernels(mode: str, shape: Shape, device: str, most: int = 12) -> list[dict[str, Any]]:
    """The costliest kernels (on a CPU, operators) of one warm call: name, calls, microseconds, share."""
    case = make_operands(shape, JOBS["both"], "peaked", device=device, dtype=DTYPE).case
    run_mode(mode, case)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as found:
        run_mode(mode, case)
        if device == "cuda":
            torch.cuda.synchronize()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = [(event.key, event.count, getattr(event, key)) for event in found.key_averages()]
    total = sum(took for _, _, took in rows) or 1.0
    rows = sorted(rows, key=lambda row: -row[2])[:most]
    return [{"name": n, "calls": c, "us": round(took, 1), "share": round(took / total, 4)} for n, c, took in rows]


def main(arguments: list[str] | None = None) -> int:
    """Profile every mode, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--head", choices=list(HEADS), default="qwen3_4b")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    H, V = HEADS[given.head]
    shape = Shape(given.tokens, H, V)
    modes = {}
    for mode in PRODUCTS:
        modes[mode] = kernels(mode, shape, given.device)
        print(mode)
        for row in modes[mode]:
            print(f"  {row['us']:>12,.1f} us {row['share']:>6.1%} {row['calls']:>5} x {row['name'][:90]}", flush=True)
        report = {"machine": machine(given.device), "size": {"head": given.head, **shape._asdict()}, "modes": modes}
        given.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
