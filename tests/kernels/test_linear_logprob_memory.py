"""Peak transient memory of forward plus backward, measured in a process of its own."""

import subprocess
import sys

import pytest
import torch

MIB = 1 << 20
LIMIT_MIB = 512

# Resident memory of the process on a CPU, the allocator's peak on a GPU. What counts is the peak above what is there
# before the forward (weight, hidden, libraries and their thread pools, warmed up by a small call), less the gradients.
SCRIPT = """
import re, sys, torch
from entrocraft.kernels import linear_logprob_entropy

device = sys.argv[1]
torch.set_num_threads(2)
# VmHWM is the peak of VmRSS since this program began; ru_maxrss would begin with the peak of the parent process.
status = lambda field: int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def run(T, V, H, measured):
    hidden_TH = torch.empty(T, H, dtype=torch.bfloat16, device=device).normal_().requires_grad_()
    weight_VH = torch.empty(V, H, dtype=torch.bfloat16, device=device).normal_(std=H**-0.5).requires_grad_()
    target_T = torch.randint(0, V, (T,), device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else status("VmRSS")
    if device == "cpu" and measured:
        # The peak never falls: an earlier one above `before` would hide memory.
        assert status("VmHWM") - before < 16 << 20, (status("VmHWM"), before)
    stats = linear_logprob_entropy(hidden_TH, weight_VH, target_T)
    (stats.logprob_T.mean() + 0.01 * stats.entropy_T.mean()).backward()
    after = torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")
    return after - before - weight_VH.grad.nbytes - hidden_TH.grad.nbytes

run(64, 1024, 256, False)
print(run(4096, 151936, 256, True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_forward_and_backward_need_at_most_512_mib():
    # The Qwen3 vocabulary in bf16: one [T, V] tensor would be 1,187 MiB in bf16 and 2,374 MiB in fp32.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, device], capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    transient_MiB = int(result.stdout) / MIB
    print(f"transient peak: {transient_MiB:.0f} MiB")
    # The fp32 copy of a weight slice, its gradient and the tiles are there: less than this would mean a broken measure.
    assert 4 < transient_MiB <= LIMIT_MIB
