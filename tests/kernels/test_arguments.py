"""Bad input to the ops: an error that names the argument, its value and what was expected."""

import subprocess
import sys

import pytest
import torch

from entrocraft.kernels import linear_logprob_entropy, linear_logprob_entropy_reference, logits_logprob_entropy
from entrocraft.kernels.arguments import assert_on_device


def _arguments(device: str) -> dict:
    return {
        "hidden_TH": torch.randn(3, 4, device=device),
        "weight_VH": torch.randn(5, 4, device=device),
        "target_T": torch.tensor([0, 4, -100], device=device),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_TH": torch.zeros(3, 2, 4)}, r"hidden_TH is torch.float32 \(3, 2, 4\).*\[T, H\]"),
        ({"hidden_TH": torch.zeros(3, 4, dtype=torch.int64)}, "hidden_TH is torch.int64"),
        ({"weight_VH": torch.zeros(5, 3)}, r"weight_VH is \(5, 3\).*row of 4"),
        ({"weight_VH": torch.zeros(0, 4)}, r"weight_VH is \(0, 4\).*at least one row"),
        ({"bias_V": torch.zeros(4)}, r"bias_V is torch.float32 \(4,\).*expected floating point \(5,\)"),
        ({"bias_V": torch.zeros(5, dtype=torch.int64)}, r"bias_V is torch.int64 \(5,\).*expected floating point"),
        ({"target_T": torch.zeros(3, dtype=torch.int32)}, "target_T is torch.int32"),
        ({"target_T": torch.zeros(2, dtype=torch.int64)}, r"target_T is torch.int64 \(2,\)"),
        (
            {"target_T": torch.tensor([0, 5, 1])},
            r"target_T\[1\] is 5, outside the vocabulary \[0, 5\).*ignore_index=-100",
        ),
        ({"target_T": torch.tensor([0, 1, -1])}, r"target_T\[2\] is -1, outside"),
        ({"target_T": torch.tensor([0, 1, -100]), "ignore_index": -1}, r"target_T\[2\] is -100, outside"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a positive finite"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, r"temperature\[1\] is 0.0; expected a positive"),
        ({"temperature": torch.ones(2)}, r"temperature is torch.float32 \(2,\)"),
        ({"temperature": torch.ones(3, requires_grad=True)}, "temperature requires a gradient"),
        ({"softcap": 0.0}, "softcap is 0.0; expected a positive finite number"),
        ({"buffer_bytes": 0}, "buffer_bytes is 0; expected a positive number of bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_linear_head_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        linear_logprob_entropy(**_arguments("cpu") | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_TV": torch.zeros(3)}, r"logit_TV is torch.float32 \(3,\).*\[T, V\]"),
        ({"logit_TV": torch.zeros(3, 0)}, r"logit_TV is \(3, 0\); expected a vocabulary of at least one token"),
        ({"target_T": torch.tensor([0, 7, 1])}, r"target_T\[1\] is 7, outside the vocabulary \[0, 5\)"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"softcap": -3.0}, "softcap is -3.0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_logits_op_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        logits_logprob_entropy(**{"logit_TV": torch.zeros(3, 5), "target_T": torch.tensor([0, 4, 1])} | changes)


def test_target_outside_the_vocabulary_on_a_gpu(device):
    # A GPU is not waited for: without validate the row is NaN, and the others are right.
    if device == "cpu":
        pytest.skip("a CPU always checks")
    arguments = _arguments(device)
    expected = linear_logprob_entropy_reference(**arguments)
    arguments["target_T"][0] = 5
    actual = linear_logprob_entropy(**arguments)
    assert actual.logprob_T[0].isnan()
    torch.testing.assert_close(actual.logprob_T[1:], expected.logprob_T[1:], rtol=0, atol=2e-6)
    torch.testing.assert_close(actual.entropy_T, expected.entropy_T, rtol=0, atol=2e-6)


def test_the_assertion_of_validate():
    # On a CPU torch's device-side assertion is an exception at once.
    assert_on_device(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="target_T has ids outside the vocabulary of 5"):
        assert_on_device(torch.tensor(False), "target_T has ids outside the vocabulary of 5")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("last", "temperature", "stops"), [(4, 1.0, False), (5, 1.0, True), (4, 0.0, True)])
def test_validate_stops_the_device(last, temperature, stops):
    # In a process of its own: after a device-side assertion nothing more runs on the device.
    script = f"""
import torch
from entrocraft.kernels import linear_logprob_entropy
hidden_TH, weight_VH = torch.randn(3, 4, device="cuda"), torch.randn(5, 4, device="cuda")
temperature = torch.tensor([1.0, 1.0, {temperature}], device="cuda")
target_T = torch.tensor([0, -100, {last}], device="cuda")
linear_logprob_entropy(hidden_TH, weight_VH, target_T, temperature=temperature, validate=True)
torch.cuda.synchronize()
"""
    result = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=200, check=False
    )
    assert (result.returncode != 0) == stops, result.stderr[-2000:]
    assert ("assert" in result.stderr) == stops, result.stderr[-2000:]
