"""What numbers were measured on and with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "trl", "liger_kernel", "cut-cross-entropy", "verl", "quack-kernels",
    "flash-attn", "pytest-benchmark",
)  # fmt: skip


def machine(device: str) -> dict[str, Any]:
    """Device, memory, threads, commit and versions."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {"device": _cpu(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        found = {"device": torch.cuda.get_device_name(), "memory_bytes": memory, "capability": capability}
    return {**found, "commit": commit(), "versions": versions, "interpreted": os.environ.get("TRITON_INTERPRET") == "1"}


def commit() -> str | None:
    """What is checked out, "-dirty" where more differs from it than documents and results; None where git does not
    know."""
    root = Path(__file__).resolve().parent.parent
    code = [".", ":(exclude)*.md", ":(exclude)bench/results"]
    try:
        run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
        same = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *code], cwd=root, capture_output=True)
    except FileNotFoundError:
        return None
    name = run.stdout.strip()
    return name + "-dirty" * (same.returncode == 1) if name else os.environ.get("ENTROCRAFT_COMMIT")


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
