"""What can be asked of an environment: versions and requirements from metadata, and code tried in its own process.

For `doctor.py`, and like it of the standard library alone at the top: it must load where torch does not.
"""

import importlib.metadata as metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TRAIN = Path(__file__).resolve().parent

TORCH_PROBE = """
import json, torch, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    gpu = torch.cuda.is_available()
cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if gpu else []
a = torch.ones(8, 8, dtype=torch.bfloat16, device="cuda" if gpu else "cpu")
print(json.dumps({
    "version": torch.__version__, "build": torch.version.cuda or torch.version.hip,
    "cards": [[card.name, card.total_memory, f"{card.major}.{card.minor}"] for card in cards],
    "bf16": float((a @ a)[0, 0]) == 8.0, "native": gpu and cards[0].major >= 8,
    "cpu": torch.backends.cpu.get_cpu_capability(), "warnings": [str(w.message).splitlines()[0] for w in caught],
}))
"""
TRITON_PROBE = """
import triton, triton.language as tl  # first, because it fails faster than torch loads
import torch

@triton.jit
def double(x_ptr, y_ptr, T, BLOCK_T: tl.constexpr):
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        tl.store(y_ptr + t, 2 * tl.load(x_ptr + t, mask=t < T, other=0.0), mask=t < T)

x, y = torch.arange(5.0), torch.full((5,), float("nan"))
double[(1,)](x, y, 5, BLOCK_T=4)
assert torch.equal(y, 2 * x), y
"""


def version_of(name: str) -> str | None:
    """Installed version of a distribution, from its metadata; nothing is imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, which compare as versions do: "3.10.1+cpu" gives (3, 10)."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def attempt(code: str, **environ: str) -> tuple[str, str]:
    """Runs `code` as a script of its own with this Python: (its output, "") or ("", the last line of its error)."""
    with tempfile.TemporaryDirectory() as folder:  # a file, because Triton reads its kernels' source
        script = Path(folder) / "probe.py"
        script.write_text(code)
        searched = os.pathsep.join(path for path in sys.path if path and Path(path).resolve() != TRAIN)
        environment = {**os.environ, "PYTHONPATH": searched, "HF_HUB_OFFLINE": "1", **environ}
        try:
            done = subprocess.run(
                [sys.executable, script], capture_output=True, text=True, timeout=180, env=environment
            )
        except subprocess.TimeoutExpired:
            return "", "no answer in 180 seconds"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return (done.stdout, "") if done.returncode == 0 else ("", lines[-1])


def broken_requirements(name: str) -> list[tuple[str, str]]:
    """What an installed distribution asks of others and does not get: (requirement, the version found or "nothing")."""
    from packaging.requirements import Requirement

    broken = []
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        found = version_of(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and not (found and requirement.specifier.contains(found, prereleases=True)):
            broken.append((f"{requirement.name}{requirement.specifier}", found or "nothing"))
    return broken
