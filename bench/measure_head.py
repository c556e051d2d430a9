"""Everything this project says about the head on a GPU, measured by one command.

    python bench/measure_head.py --out DIR                          # a GPU, at most eight minutes
    python bench/measure_head.py --out DIR --device cpu --shapes tiny   # the same sections, small, anywhere

Sections: correctness of every mode at full size against fp64 on sampled rows and columns; time of each mode beside the
same matrix products by torch in the same process, and beside eager torch; rows without an upstream gradient; what
collision sums cost; peak memory; bitwise repeatability; launch tiles worth trying; compute-sanitizer and Nsight Compute
where they are installed. Needs torch, Triton and this package. Writes measure_head.json after each section, so that a
run that is cut off leaves what it had, and measure_head.md at the end. A section that fails is named, the others go on,
and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from head_cases import (
    PRODUCTS,
    SHAPES,
    Case,
    eager,
    exact_rows,
    exact_weight_grad,
    library_rows,
    relative_error,
    run_mode,
    store_error,
    weighted,
)
from stopwatch import Bench, Thunk

from entrocraft.kernels import linear_logprob_entropy

# Milliseconds that are aimed at on an H200, by shape.
TARGETS = {
    "qwen3_4b": {"statistics": 20.0, "policy_loss": 57.0, "recompute": 73.0, "frozen": 39.0},
    "llama31_8b": {"statistics": 26.0, "policy_loss": 75.0, "recompute": 98.0, "frozen": 51.0},
}


def correctness(bench: Bench) -> dict[str, Any]:
    """Mean and largest errors of every mode, and of eager torch with bf16 logits on the same rows.

    The bounds are 1e-5 nats for log-probabilities, 3e-5 for entropies (means), on a GPU also 1.5 times the error of the
    library's product with fp32 output and an fp64 reduction; for gradients 1.6 times one store in bf16, and of fp32
    operands 1e-5.
    """
    case = bench.case()
    rows = torch.linspace(0, bench.T - 1, min(128, bench.T), device=bench.device).long()
    columns = torch.cat([case.target_T[:32], torch.arange(32, device=bench.device)]).unique()
    exact, library = exact_rows(case, rows), library_rows(case, rows)
    most = {"logprob": 1e-5, "entropy": 3e-5}
    ending, limit = ("_stores", 1.6) if bench.dtype == torch.bfloat16 else ("_grad", 1e-5)
    found: dict[str, Any] = {"library_fp32": {}}
    for name, value_N in library.items():
        error = float((value_N - exact[name]).abs().mean())
        found["library_fp32"][f"{name}_mean"] = error
        if bench.gpu:
            most[name] = min(most[name], 1.5 * error)
    for mode in PRODUCTS:
        stats, gradients = run_mode(mode, case)
        of_mode: dict[str, float] = {}
        for name, value_T in (("logprob", stats.logprob_T), ("entropy", stats.entropy_T)):
            error_N = (value_T.detach()[rows].double() - exact[name]).abs()
            of_mode[f"{name}_mean"], of_mode[f"{name}_max"] = float(error_N.mean()), float(error_N.max())
        if gradients:
            wanted = exact["hidden_grad_frozen" if mode == "frozen" else "hidden_grad"]
            of_mode["hidden_grad"] = relative_error(gradients[0][rows], wanted)
            of_mode["hidden_grad_stores"] = of_mode["hidden_grad"] / store_error(wanted, bench.dtype)
        if len(gradients) == 2:
            wanted = exact_weight_grad(case, columns, stats)
            of_mode["weight_grad"] = relative_error(gradients[1][columns], wanted)
            of_mode["weight_grad_stores"] = of_mode["weight_grad"] / store_error(wanted, bench.dtype)
        of_mode["ok"] = float(
            all(of_mode[f"{name}_mean"] <= most[name] for name in most)
            and all(value <= limit for name, value in of_mode.items() if name.endswith(ending))
        )
        found[mode] = of_mode
    with torch.no_grad():
        logp_NV = (case.hidden_TH[rows] @ case.weight_VH.T).float().log_softmax(1)
    logprob_N = logp_NV.gather(1, case.target_T[rows, None])[:, 0]
    entropy_N = -(logp_NV.exp() * logp_NV).sum(1)
    found["eager_bf16"] = {
        "logprob_mean": float((logprob_N.double() - exact["logprob"]).abs().mean()),
        "entropy_mean": float((entropy_N.double() - exact["entropy"]).abs().mean()),
    }
    wrong = [mode for mode in PRODUCTS if not found[mode]["ok"]]
    if wrong:
        raise ArithmeticError(f"outside the bounds: {', '.join(wrong)}: {json.dumps(found)}")
    return found


def speed(bench: Bench) -> dict[str, Any]:
    """Milliseconds of every mode, targets beside them, and fractions of the same products by torch."""
    case = bench.case()
    contenders: dict[str, Thunk] = {"product": bench.products(case)}
    contenders |= {mode: (lambda mode=mode: run_mode(mode, case)) for mode in PRODUCTS}
    contenders |= {
        "collision": lambda: run_mode("statistics", case, collision=True),
        "eager_bf16": lambda: eager(case, bench.dtype),
        "eager_fp32": lambda: eager(case, torch.float32),
    }
    ms = bench.times(contenders)
    rate = 2e-9 * bench.T * bench.V * bench.H / ms["product"]
    return {
        "ms": ms,
        "target_ms": TARGETS.get(bench.shape, {}),
        "product_tflops": rate,
        "fraction_of_products": {mode: n * ms["product"] / ms[mode] for mode, n in PRODUCTS.items() if mode in ms},
        "target_fraction": {"statistics": 0.85, "cache": 0.87, "policy_loss": 0.87},
        "collision_on_top": ms["collision"] / ms["statistics"] - 1.0,
        "target_collision_on_top": 0.03,
    }


def zero_rows(bench: Bench) -> dict[str, Any]:
    """Backward alone where 90 % of the rows have no upstream gradient, as a share of the full one (target 0.15)."""
    thunks: dict[str, Thunk] = {}
    for name, share in (("full", 0.0), ("tenth", 0.9)):
        case = bench.case(zero_rows=share)
        stats = linear_logprob_entropy(case.hidden_TH, case.weight_VH, case.target_T, mode="recompute")
        total = weighted(case, stats.logprob_T, stats.entropy_T)
        operands = (case.hidden_TH, case.weight_VH)
        thunks[name] = lambda total=total, operands=operands: torch.autograd.grad(total, operands, retain_graph=True)
    ms = bench.times(thunks)
    return {"backward_ms": ms, "share": ms["tenth"] / ms["full"], "target": 0.15}


def memory(bench: Bench) -> dict[str, Any]:
    """Peak bytes beyond inputs, outputs and gradients, by mode; with main gradients also at eight times the tokens."""
    found: dict[str, Any] = {}
    case = bench.case()
    for mode in PRODUCTS:
        found[mode] = bench.peak_bytes(lambda mode=mode: run_mode(mode, case))
    del case
    T = 8 * bench.T
    case = bench.case(T=T)
    main_grads = [torch.zeros_like(value, dtype=torch.float32) for value in (case.hidden_TH, case.weight_VH)]

    def long() -> object:
        stats = linear_logprob_entropy(
            case.hidden_TH, case.weight_VH, case.target_T, mode="recompute",
            hidden_main_grad_TH=main_grads[0], weight_main_grad_VH=main_grads[1],
        )  # fmt: skip
        weighted(case, stats.logprob_T, stats.entropy_T).backward()
        return stats

    found[f"recompute, T = {T:,}, main gradients"] = bench.peak_bytes(long)
    found["target"] = 2**30
    return found


def repeatability(bench: Bench) -> dict[str, Any]:
    """Whether two calls agree to the last bit, and rows with the same rows alone."""
    case = bench.case()
    found: dict[str, Any] = {}
    for mode in PRODUCTS:
        (one, first), (two, second) = run_mode(mode, case), run_mode(mode, case)
        pairs = [(one.logprob_T, two.logprob_T), (one.entropy_T, two.entropy_T), *zip(first, second, strict=True)]
        found[mode] = all(torch.equal(a, b) for a, b in pairs)
    few = max(1, bench.T // 7)
    alone = Case(*(value[:few] if value is not case.weight_VH else value for value in case))
    stats, part = (run_mode("statistics", one, batch_invariant=True)[0] for one in (case, alone))
    same = [torch.equal(getattr(stats, name)[:few], getattr(part, name)) for name in ("logprob_T", "entropy_T")]
    found["row_is_the_same_in_any_batch"] = all(same)
    # The same row at every place of a batch, in whatever block and tile: equal bits everywhere.
    one = Case(*(value[:1].expand(bench.T, *value.shape[1:]) if i != 1 else value for i, value in enumerate(case)))
    one = one._replace(hidden_TH=one.hidden_TH.detach().contiguous().requires_grad_())
    stats, gradients = run_mode("recompute", one, batch_invariant=True)
    spread = [stats.logprob_T.detach(), stats.entropy_T.detach(), gradients[0]]
    found["row_is_the_same_at_any_place"] = all(torch.equal(value, value[:1].expand_as(value)) for value in spread)
    if not all(found.values()):
        raise ArithmeticError(f"not repeatable: {found}")
    return found


def tiles(bench: Bench) -> dict[str, Any]:
    """Other launch tiles for the forward kernel, on this chip: milliseconds of the statistics."""
    if not bench.gpu:
        return {"skipped": "launch tiles are those of a GPU"}
    from entrocraft.kernels import linear_logprob_launch as launch

    line = launch.capability(torch.cuda.current_device())
    kept = launch.FORWARD_TILES[line]
    plain, found = kept.plain, {}
    tried = {
        "as it is": plain,
        "flatten": plain._replace(flatten=not plain.flatten),
        "four stages": plain._replace(num_stages=4, flatten=False),
        "128 x 128": plain._replace(BLOCK_V=128, num_stages=4),
        "256 x 128": plain._replace(BLOCK_T=256, BLOCK_V=128),
    }
    case = bench.case()
    for collision in (False, True):
        for name, tile in tried.items():
            launch.FORWARD_TILES[line] = launch.Tiles(tile, tile)
            try:
                ms = bench.times({"ms": lambda collision=collision: run_mode("statistics", case, collision=collision)})
                found[f"{name}, collision={collision}"] = ms.get("ms")
            except Exception as error:  # a tile that does not compile or fit is a result
                found[f"{name}, collision={collision}"] = f"{type(error).__name__}: {str(error)[:80]}"
            finally:
                launch.FORWARD_TILES[line] = kept
    return found


def sanitizer(bench: Bench) -> dict[str, Any]:
    """compute-sanitizer over random small configurations, where the tool is installed."""
    here = Path(__file__).resolve().parent
    command = ["compute-sanitizer", "--error-exitcode", "3", sys.executable, here / "stress_head.py", "--count", "20"]
    return _with_tool(bench, command)


def profile(bench: Bench) -> dict[str, Any]:
    """Nsight Compute's summary of the first two launches of K1 and K3, where the tool is installed and may count."""
    kernels = "regex:stats_kernel|dlogits_kernel"
    here = [sys.executable, __file__, "--out", "profiled", "--shapes", bench.shape]
    command = ["ncu", "--kernel-name", kernels, "--launch-count", "2", *here, "--sections", "speed", "--rounds", "1"]
    return _with_tool(bench, command)


def _with_tool(bench: Bench, command: list[Any]) -> dict[str, Any]:
    if not bench.gpu:
        return {"skipped": f"{command[0]} looks at a GPU"}
    if shutil.which(command[0]) is None:
        return {"skipped": f"{command[0]} is not on the PATH"}
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240, cwd=folder)
    if run.returncode:
        raise RuntimeError(f"{command[0]} exited with {run.returncode}: {(run.stdout + run.stderr)[-2000:]}")
    return {"output": run.stdout[-12_000:].splitlines()}


SECTIONS = {
    run.__name__: run for run in (correctness, speed, zero_rows, memory, repeatability, tiles, sanitizer, profile)
}


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    root = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "commit": git.stdout.strip() or None, "versions": versions, "cuda": torch.version.cuda}


def markdown(report: dict[str, Any]) -> str:
    """A table of each section."""
    lines = [f"# Head on {report['machine']['device']}, commit {report['machine']['commit']}", ""]
    for shape, sections in report["shapes"].items():
        lines += [f"## {shape}: T, H, V = {SHAPES[shape]}", ""]
        for name, found in sections.items():
            lines += [f"### {name}", "", "```", json.dumps(found, indent=1), "```", ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for measure_head.json and .md")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["qwen3_4b", "llama31_8b"])
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use --device cpu --shapes tiny")
    given.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(given.device), "shapes": {}, "failed": []}
    for shape in given.shapes:
        bench, found = Bench(shape, given.device, given.rounds), {}
        report["shapes"][shape] = found
        for name in given.sections:
            print(f"{shape}: {name} ...", file=sys.stderr, flush=True)
            try:
                found[name] = SECTIONS[name](bench)
            except Exception as error:  # one that fails must not take the others with it
                traceback.print_exc()
                found[name] = {"error": f"{type(error).__name__}: {error}"}
                report["failed"].append(f"{shape}: {name}")
            if bench.gpu:
                torch.cuda.empty_cache()
            (given.out / "measure_head.json").write_text(json.dumps(report, indent=1) + "\n")
    (given.out / "measure_head.md").write_text(markdown(report))
    print(markdown(report))
    for name in report["failed"]:
        print(f"FAILED: {name}", file=sys.stderr)
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
