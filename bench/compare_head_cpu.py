"""The head on a CPU against what trainers do: time and memory of forward plus backward, in one run.

    python bench/compare_head_cpu.py [--T 1024 --H 1024 --V 151936 --repeats 2] [--out bench/results/head_cpu.json]

Every contender computes the log-probability of a target and the entropy over the whole vocabulary from the same bf16
hidden states and weight, and the gradients of both, each in a process of its own, one after the other. Memory is the
peak of the resident set above what stands before the call, less the gradients. Contenders from verl and TRL are
measured where those packages are installed. Times on shared cores are worth their ratios within a run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
MIB = 1 << 20


def entrocraft(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """This project's op."""
    from entrocraft.kernels import linear_logprob_entropy

    stats = linear_logprob_entropy(hidden_TH, weight_VH, target_T, **options)
    return stats.logprob_T, stats.entropy_T


def entrocraft_cache(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """The same with bf16 exponentials kept: three products for four."""
    return entrocraft(hidden_TH, weight_VH, target_T, mode="cache", cache_bytes=1 << 40, buffer_bytes=64 << 20)


def eager_fp32(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 logits, and statistics kept whole."""
    return _statistics(hidden_TH.float() @ weight_VH.float().T, target_T)


def eager_bf16(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 logits, as a model gives them, and fp32 statistics."""
    return _statistics((hidden_TH @ weight_VH.T).float(), target_T)


def _statistics(logit_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    logp_TV = logit_TV.log_softmax(1)
    return logp_TV.gather(1, target_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(1)


def verl_torch(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """verl's chunked torch path; its file alone, since the package as a whole wants Ray."""
    root = importlib.util.find_spec("verl")
    if root is None or not root.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'verl'")
    path = Path(root.submodule_search_locations[0]) / "utils" / "experimental" / "torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    logprob_T, entropy_T = module.FusedLinearForPPO()(hidden_TH, weight_VH, target_T)
    return logprob_T, entropy_T.float()


def trl_chunked(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's chunked op, with the chunk of its trainers."""
    from trl.kernels import ChunkedLogProbFunction  # pyright: ignore[reportMissingImports]

    outputs = ChunkedLogProbFunction.apply(hidden_TH, weight_VH, None, target_T, 1.0, 8192, None, 1.0, ("entropy",))
    return outputs[0], outputs[1]


CONTENDERS: dict[str, Run] = {
    run.__name__: run for run in (entrocraft, entrocraft_cache, eager_fp32, eager_bf16, verl_torch, trl_chunked)
}


def _resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest."""
    found = re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def operands(T: int, V: int, H: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same rows in every process: bf16, peaked like a language model's."""
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.empty(V, H, dtype=torch.bfloat16).normal_(std=H**-0.5, generator=generator)
    target_T = torch.randint(0, V, (T,), generator=generator)
    hidden_TH = (20 * weight_VH[target_T].float() + 1.8 * torch.randn(T, H, generator=generator)).bfloat16()
    return hidden_TH.requires_grad_(), weight_VH.requires_grad_(), target_T


def measure(name: str, T: int, V: int, H: int, repeats: int) -> dict[str, Any]:
    """Seconds of each repeat, peak bytes of the first, and the mean statistics, by which contenders are compared."""
    run = CONTENDERS[name]
    small = operands(64, 512, 64)
    torch.stack(run(*small)).sum().backward()  # thread pools and libraries are there before memory counts
    hidden_TH, weight_VH, target_T = operands(T, V, H)
    before, seconds, transient = _resident("VmRSS"), [], 0
    logprob_T = entropy_T = torch.zeros(0)
    for repeat in range(repeats):
        hidden_TH.grad = weight_VH.grad = None
        start = time.perf_counter()
        logprob_T, entropy_T = run(hidden_TH, weight_VH, target_T)
        (logprob_T.mean() + 0.01 * entropy_T.mean()).backward()
        seconds.append(time.perf_counter() - start)
        if repeat == 0:
            gradients = [leaf.grad.nbytes for leaf in (hidden_TH, weight_VH) if leaf.grad is not None]
            transient = _resident("VmHWM") - before - sum(gradients)
    return {
        "seconds": seconds,
        "transient_bytes": transient,
        "mean_logprob": float(logprob_T.detach().double().mean()),
        "mean_entropy": float(entropy_T.detach().double().mean()),
    }


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.+)", info)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    versions = {}
    for package in ("torch", "numpy", "verl", "trl"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = model[1] if model else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "versions": versions, "commit": commit.stdout.strip()}


def table(results: dict[str, Any], baseline: str = "eager_fp32") -> str:
    """Seconds, memory, and both as a multiple of the baseline's."""
    lines = [f"{'':18}{'seconds':>9}{'ratio':>8}{'MiB':>8}{'ratio':>8}  mean logprob, entropy"]
    there = results.get(baseline, {})
    for name, one in results.items():
        if "skipped" in one:
            lines.append(f"{name:18}not measured: {one['skipped']}")
            continue
        seconds, size = statistics.median(one["seconds"]), one["transient_bytes"] / MIB
        ratios = ("", "")
        if "seconds" in there:
            faster = seconds / statistics.median(there["seconds"])
            ratios = f"{faster:.2f}", f"{one['transient_bytes'] / there['transient_bytes']:.3f}"
        means = f"{one['mean_logprob']:.5f}, {one['mean_entropy']:.5f}"
        lines.append(f"{name:18}{seconds:9.2f}{ratios[0]:>8}{size:8.0f}{ratios[1]:>8}  {means}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure every contender, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("T", 1024), ("H", 1024), ("V", 151_936), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", choices=CONTENDERS, help="measure one, in this process, and print JSON")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    given = parser.parse_args(arguments)
    if given.only:
        print(json.dumps(measure(given.only, given.T, given.V, given.H, given.repeats)))
        return 0
    sizes = [f"--{name}={getattr(given, name)}" for name in ("T", "H", "V", "repeats")]
    results: dict[str, Any] = {}
    for name in CONTENDERS:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, str(Path(__file__).resolve()), "--only", name, *sizes]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        failed = (run.stderr.strip().splitlines() or ["no output"])[-1]
        results[name] = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {"skipped": failed}
    print(table(results))
    if given.out:
        size = {"T": given.T, "H": given.H, "V": given.V, "dtype": "bfloat16"}
        given.out.write_text(json.dumps({"machine": machine(), "size": size, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
