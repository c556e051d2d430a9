"""verl's torch path of the head, as the benchmarks call it, against fp64: values and gradients, worse than ours."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from rivals import all_rivals, run
from suite_cases import JOBS, Shape, make_operands
from suite_contest import complaint
from suite_errors import Truth, bounds

RIVALS = {rival.name: rival for rival in all_rivals()}
SHAPE = Shape(96, 64, 2_000)


@pytest.mark.parametrize("name", ["statistics", "logprob", "both", "frozen"])
def test_verl_s_head_runs_and_is_as_right_as_bf16_logits_are(name):
    job = JOBS[name]
    assert RIVALS["verl_torch"].does(name, job)
    assert RIVALS["verl_torch"].why_not(SHAPE, "cpu") is None
    operands = make_operands(SHAPE, job, "peaked", device="cpu")
    truth = Truth(operands, job)
    theirs, ours = (truth.errors(*run(RIVALS[rival], operands, job)) for rival in ("verl_torch", "entrocraft"))
    assert complaint("verl_torch", theirs, bounds(RIVALS["verl_torch"])) is None, theirs
    assert 0 < ours["logprob_mean"] < 1e-5 < theirs["logprob_mean"]
    for gradient in ("hidden_grad", "weight_grad")[: job.gradients]:
        assert 0 < ours[gradient] < theirs[gradient]


WITHOUT_RAY = """
import subprocess
import sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "tensordict"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NoRay())
import importlib.util
import rivals_packages
call = rivals_packages._verl_triton_call()
from verl.utils.kernel import kernels
place = importlib.util.find_spec("verl").submodule_search_locations[0]
print(call.__self__.__module__, kernels.efficient_entropy_forward.__name__, place)
"""


def test_verl_s_kernels_load_without_ray_as_from_a_wheel_that_was_carried():
    folder = Path(__file__).resolve().parents[2] / "bench"
    run = subprocess.run([sys.executable, "-c", WITHOUT_RAY], cwd=folder, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    module, kernel, place = run.stdout.split()
    assert (module, kernel) == ("verl.utils.kernel.linear_cross_entropy", "efficient_entropy_forward")
    assert Path(place).name == "verl"
