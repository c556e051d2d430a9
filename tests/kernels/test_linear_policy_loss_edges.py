"""linear_policy_loss as a citizen of autograd: graphs walked twice, main gradients, shards, memory, errors."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from entrocraft.kernels import linear_logprob_entropy, linear_logprob_entropy_reference, linear_policy_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FACTOR_T = torch.linspace(-1.0, 2.0, 37)


def _loss(logprob_N, entropy_N, rows):
    """Not linear, so that what upstream gradient a row gets depends on its values."""
    factor_N = FACTOR_T[rows].to(logprob_N.device)
    return (factor_N * logprob_N.exp() - 0.1 * entropy_N.square()).sum()


def _exact(head):
    """Loss and gradients by name in fp64, on full logits."""
    stats, leaves = head.run(linear_logprob_entropy_reference, torch.float64)
    total = _loss(stats.logprob_T, stats.entropy_T, slice(0, len(stats)))
    return total.detach(), dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def _close(actual, exact, tolerance: float = 1e-5) -> None:
    assert actual is not None
    size = max(1.0, float(exact.abs().max()))
    torch.testing.assert_close(actual.double(), exact.double(), rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("buffer_bytes", [1 << 26, 8_000])
def test_a_graph_walked_twice(make_head, buffer_bytes):
    head = make_head(37, 67, 12, bias=True, ignored=5)
    _, exact = _exact(head)
    (total, _), leaves = head.run(linear_policy_loss, loss=_loss, buffer_bytes=buffer_bytes)
    operands = list(leaves.values())
    once = torch.autograd.grad(total, operands, torch.tensor(0.5).to(total.device), retain_graph=True)
    copies = [gradient.clone() for gradient in once]
    thrice = torch.autograd.grad(3 * total, operands, retain_graph=True)
    (-total).backward()  # this one may use the stored gradients up
    for name, first, copy, third, leaf in zip(leaves, once, copies, thrice, operands, strict=True):
        torch.testing.assert_close(first, copy, rtol=0, atol=0)
        _close(first, 0.5 * exact[name])
        _close(third, 3.0 * exact[name])
        _close(leaf.grad, -exact[name])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


def test_gradients_add_up(make_head):
    head = make_head(37, 67, 12)
    _, exact = _exact(head)
    (total, _), leaves = head.run(linear_policy_loss, loss=_loss)
    for times in (1, 2):
        total.backward(retain_graph=True)
        for name, leaf in leaves.items():
            _close(leaf.grad, times * exact[name])


def test_stats_are_those_of_the_head_and_constant(make_head):
    head = make_head(37, 67, 12, ignored=5, collision=True, varentropy=True, argmax=True)
    (_, stats), _ = head.run(linear_policy_loss, loss=_loss, buffer_bytes=8_000)
    wanted, _ = head.run(linear_logprob_entropy)
    assert stats.as_dict().keys() == wanted.as_dict().keys()
    for name, field in stats.as_dict().items():
        assert not field.requires_grad
        torch.testing.assert_close(field, getattr(wanted, name).detach(), rtol=1e-5, atol=1e-5)


def test_without_gradients_the_value_is_the_same(make_head):
    head = make_head(37, 67, 12, bias=True)
    (total, _), leaves = head.run(linear_policy_loss, loss=_loss, buffer_bytes=8_000)
    with torch.no_grad():
        plain, stats = linear_policy_loss(
            **leaves, target_T=head.target_T, loss=_loss, buffer_bytes=8_000, **head.options
        )
    assert not plain.requires_grad
    torch.testing.assert_close(plain, total.detach(), rtol=1e-6, atol=1e-6)
    _close(plain, _exact(head)[0])
    assert len(stats) == 37


def test_a_constant_loss_and_an_empty_batch(make_head):
    head = make_head(37, 67, 12)
    (total, _), leaves = head.run(linear_policy_loss, loss=lambda *_: torch.tensor(2.5))
    total.backward()
    assert float(total.detach()) == 2.5
    assert all(float(leaf.grad.abs().max()) == 0.0 for leaf in leaves.values())
    (total, stats), leaves = make_head(0, 67, 12).run(linear_policy_loss, loss=_loss, lengths_R=[0])
    total.backward()
    assert (float(total.detach()), len(stats), leaves["hidden_TH"].grad.shape) == (0.0, 0, (0, 12))
    assert float(leaves["weight_VH"].grad.abs().max()) == 0.0


def test_a_nan_is_passed_on(make_head):
    head = make_head(37, 67, 12)
    head.hidden_TH[3, 2] = math.nan
    (total, stats), leaves = head.run(linear_policy_loss, loss=_loss)
    total.backward()
    assert total.isnan()
    assert stats.logprob_T.isnan().nonzero().tolist() == [[3]]
    assert leaves["hidden_TH"].grad.isnan().any(1).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("buffer_bytes", [1 << 26, 8_000])
def test_main_gradients(make_head, buffer_bytes):
    # Added to what is there; the padding rows of the vocabulary stay as they are.
    head = make_head(37, 60, 12, dtype=torch.float16, ignored=4)
    _, exact = _exact(head)
    padded_VH = torch.cat([head.weight_VH, torch.ones_like(head.weight_VH[:7])]).requires_grad_()
    hidden_TH = head.hidden_TH.clone().requires_grad_()
    mains = {
        "hidden_main_grad_TH": torch.ones_like(hidden_TH, dtype=torch.float32, requires_grad=False),
        "weight_main_grad_VH": torch.full((67, 12), 2.0, device=hidden_TH.device),
    }
    arguments = {"target_T": head.target_T, "loss": _loss, "vocab_size": 60, "buffer_bytes": buffer_bytes, **mains}
    total, _ = linear_policy_loss(hidden_TH, padded_VH, **arguments)
    total.backward(retain_graph=True)
    assert hidden_TH.grad is padded_VH.grad is None
    # Exponentials are bf16: their rounding is 2^-9 of a term.
    _close(mains["hidden_main_grad_TH"] - 1.0, exact["hidden_TH"], 4e-3)
    _close(mains["weight_main_grad_VH"][:60] - 2.0, exact["weight_VH"], 4e-3)
    assert float((mains["weight_main_grad_VH"][60:] - 2.0).abs().max()) == 0.0
    with pytest.raises(RuntimeError, match="a second backward through linear_policy_loss, whose main gradients"):
        total.backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device-side assertion would end the process")
def test_main_gradients_are_for_an_upstream_gradient_of_one(make_head):
    (total, _), _ = make_head(37, 67, 12).run(linear_policy_loss, loss=_loss, weight_main_grad_VH=torch.zeros(67, 12))
    with pytest.raises(RuntimeError, match=r"upstream gradient of 0.5, but its main gradients.*for 1; put the factor"):
        (0.5 * total).backward()


def test_small_gradients_of_fp16_wait_for_the_loss_scale(make_head):
    # 1e-6 of a gradient is nothing in fp16; 2^16 times it is not.
    head = make_head(37, 67, 12, dtype=torch.float16)
    _, exact = _exact(head)
    (total, _), leaves = head.run(linear_policy_loss, loss=lambda *arguments: 1e-6 * _loss(*arguments))
    (total * 2.0**16).backward()
    for name, leaf in leaves.items():
        _close(leaf.grad / (1e-6 * 2.0**16), exact[name], 4e-3)


def test_second_derivative_is_refused(make_head):
    (total, _), leaves = make_head(37, 67, 12).run(linear_policy_loss, loss=_loss)
    for one in leaves.values():
        (first,) = torch.autograd.grad(total, [one], create_graph=True)
        for other in leaves.values():
            with pytest.raises(RuntimeError, match="linear_policy_loss has no second derivative"):
                torch.autograd.grad(first.square().sum(), [other], retain_graph=True)


def test_under_autocast_and_with_a_checkpointed_backbone(make_head):
    head = make_head(37, 67, 12)
    backbone_HH = torch.randn(12, 12, device=head.hidden_TH.device).requires_grad_()

    def run(hidden_of):
        (total, _), leaves = head.run(
            lambda hidden_TH, **more: linear_policy_loss(hidden_of(hidden_TH), **more), loss=_loss
        )
        return torch.autograd.grad(total, [*leaves.values(), backbone_HH])

    def forward(hidden_TH):
        return torch.tanh(hidden_TH @ backbone_HH)

    wanted = run(forward)
    with torch.autocast(head.hidden_TH.device.type, dtype=torch.bfloat16, enabled=False):
        checkpointed = run(lambda hidden_TH: checkpoint(forward, hidden_TH, use_reentrant=False))
    for actual, expected in zip(checkpointed, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    _, exact = _exact(head)
    with torch.autocast(head.hidden_TH.device.type, dtype=torch.bfloat16):
        (total, _), leaves = head.run(linear_policy_loss, loss=_loss)
    total.backward()
    for name, leaf in leaves.items():
        _close(leaf.grad, exact[name])


# The compiler hides this warning of its own, at any graph break with such a tensor; here warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.skipif(INTERPRETED, reason="compiles what the interpreter runs")
def test_a_compiled_caller_breaks_its_graph_here(make_head):
    torch._dynamo.reset()
    head = make_head(37, 67, 12)

    def step(hidden_TH, weight_VH, target_T):
        total, stats = linear_policy_loss(torch.tanh(hidden_TH), weight_VH, target_T, loss=_loss)
        return 2.0 * total, stats.logprob_T

    results = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        (total, logprob_T), leaves = head.run(function)
        results.append([total.detach(), logprob_T, *torch.autograd.grad(total, list(leaves.values()))])
    for actual, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="linear_policy_loss"):
        head.run(torch.compile(step, backend="aot_eager", fullgraph=True))


class _OfClampedEntropy:
    clamped_share = 0.2

    def __call__(self, logprob_N, entropy_N, rows):
        return logprob_N.sum() - entropy_N.sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"loss": lambda logprob_N, *_: logprob_N},
            r"loss returned torch.float32 \(37,\) for rows 0 to 37; expected one",
        ),
        ({"loss": lambda *_: 1.0}, r"loss returned 1.0 for rows 0 to 37"),
        ({"loss": lambda *_: torch.tensor(1)}, r"loss returned torch.int64 \(\)"),
        ({"lengths_R": [30, 6]}, "lengths_R sums to 36 over 2 sequences; expected 37, the rows of hidden_TH"),
        ({"lengths_R": [40, -3]}, r"lengths_R is \[40, -3\]; expected non-negative integers"),
        ({"lengths_R": torch.tensor([37])}, r"lengths_R is tensor\(\[37\]\).*pass lengths_R.tolist\(\)"),
        ({"buffer_bytes": 0}, "buffer_bytes is 0; expected a positive number of bytes, such as 1073741824"),
        ({"weight_main_grad_VH": torch.zeros(3, 12)}, "weight_main_grad is torch.float32"),
        ({"vocab_start": 3}, "group is None and vocab_start is 3"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"loss": _OfClampedEntropy()}, "clamped_share = 0.2; expected a loss of the entropy of whole rows: give this"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),  # an address would differ from process to process
)
def test_what_is_refused(make_head, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_head(37, 67, 12).run(linear_policy_loss, **({"loss": _loss} | arguments))


# Two ranks with uneven shards, a bias and padding, so little room that chunks would be cut differently on each, and a
# sequence that has to be recomputed.
RANK = """
import sys, torch, torch.distributed as dist
from entrocraft.kernels import linear_policy_loss
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
case = torch.load(f"{folder}/case.pt")
v = slice(0, 20) if rank == 0 else slice(20, 70)
leaves = [case["hidden_TH"].requires_grad_(), case["weight_VH"][v].clone().requires_grad_()]
leaves.append(case["bias_V"][v].clone().requires_grad_())
def loss(logprob_N, entropy_N, rows):
    return (case["factor_T"][rows] * logprob_N.exp() - 0.1 * entropy_N.square()).sum()
total, stats = linear_policy_loss(*leaves[:2], case["target_T"], bias_V=leaves[2], loss=loss, vocab_size=67,
    lengths_R=[5, 20, 0, 3, 9], buffer_bytes=4_000, softcap=9.0, group=dist.group.WORLD, vocab_start=v.start)
total.backward()
torch.save([total.detach(), stats.entropy_T, *(leaf.grad for leaf in leaves)], f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
"""


def test_a_sharded_vocabulary(make_head, tmp_path):
    head = make_head(37, 67, 12, bias=True, ignored=5, softcap=9.0)
    head.hidden_TH, head.weight_VH, head.target_T, head.bias_V = (
        operand.cpu() for operand in (head.hidden_TH, head.weight_VH, head.target_T, head.bias_V)
    )
    total, exact = _exact(head)
    padded = {name: torch.cat([getattr(head, name), torch.ones_like(getattr(head, name)[:3])])
              for name in ("weight_VH", "bias_V")}  # fmt: skip
    case = {"hidden_TH": head.hidden_TH, "target_T": head.target_T, "factor_T": FACTOR_T, **padded}
    torch.save(case, tmp_path / "case.pt")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", RANK, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)[-3000:]
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for result in results:
        _close(result[0], total)
        _close(result[2], exact["hidden_TH"])
    torch.testing.assert_close(results[0][:3], results[1][:3], rtol=0, atol=0)
    for place, name in ((3, "weight_VH"), (4, "bias_V")):
        whole = torch.cat([result[place] for result in results])
        _close(whole[:67], exact[name])
        assert float(whole[67:].abs().max()) == 0.0


# Exponentials of all rows would be 128 MiB, their logits 256 MiB, the weight gradient in fp32 is 16 MiB.
MEMORY = """
import re, sys, torch
from entrocraft.kernels import linear_policy_loss
device = sys.argv[1]
torch.set_num_threads(1)  # two of these run at once
status = lambda field: int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def run(T, V, H, measured):
    hidden_TH = torch.empty(T, H, dtype=torch.bfloat16, device=device).normal_().requires_grad_()
    weight_VH = torch.empty(V, H, dtype=torch.bfloat16, device=device).normal_(std=H**-0.5).requires_grad_()
    target_T = torch.randint(0, V, (T,), device=device)
    main_VH = torch.zeros(V, H, device=device) if sys.argv[2] == "main" else None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else status("VmRSS")
    if device == "cpu" and measured:
        assert status("VmHWM") - before < 16 << 20, (status("VmHWM"), before)
    loss, _ = linear_policy_loss(hidden_TH, weight_VH, target_T, buffer_bytes=32 << 20, weight_main_grad_VH=main_VH,
        loss=lambda logprob_N, entropy_N, rows: logprob_N.mean() + 0.01 * entropy_N.mean())
    loss.backward()
    after = torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")
    return after - before - hidden_TH.grad.nbytes - (weight_VH.grad.nbytes if main_VH is None else 0)

run(64, 1024, 128, False)
print(run(1024, 65536, 64, True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_the_buffer_and_one_weight_gradient(device):
    sizes_MiB = {"plain": 16, "main": 0}
    runs = [
        subprocess.Popen([sys.executable, "-P", "-c", MEMORY, device, kind], stdout=-1, stderr=-1, text=True)
        for kind in sizes_MiB
    ]
    try:
        results = [run.communicate(timeout=200) for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, (printed, errors), (kind, weight_MiB) in zip(runs, results, sizes_MiB.items(), strict=True):
        assert run.returncode == 0, errors[-2000:]
        transient_MiB = int(printed) / (1 << 20)
        print(f"transient peak, {kind}: {transient_MiB:.0f} MiB")
        # Less than the tiles and the exponentials of a few rows would mean a broken measure.
        assert 4 < transient_MiB <= weight_MiB + 32 + 12
