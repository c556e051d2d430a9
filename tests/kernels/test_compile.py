"""The head under torch.compile, activation checkpointing and autocast; its operators by PyTorch's own checks."""

import os

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from entrocraft.kernels import linear_logprob_entropy, linear_logprob_torch

TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles what the interpreter runs")
MODES = [
    {"mode": "recompute", "collision": True, "argmax": True},
    {"mode": "cache", "cache_bytes": 1 << 20, "softcap": 9.0},
    {"mode": "frozen"},
    {"mode": "recompute", "ignore_index": None},
]


def _loss(hidden_TH, weight_VH, target_T, temperature_T, **options):
    """A head between two things that a compiler would fuse."""
    stats = linear_logprob_entropy(torch.tanh(hidden_TH) * 2, weight_VH, target_T, temperature=temperature_T, **options)
    return (stats.logprob_T * torch.arange(len(stats), device=hidden_TH.device)).mean() + 0.1 * stats.entropy_T.sum()


def _arguments(T: int, device: str, *, frozen: bool = False):
    hidden_TH = torch.randn(T, 12, device=device, requires_grad=True)
    weight_VH = torch.randn(71, 12, device=device, requires_grad=not frozen)
    target_T = torch.randint(0, 71, (T,), device=device)
    target_T[1] = 5
    return hidden_TH, weight_VH, target_T, (torch.rand(T, device=device) + 0.5)


def _run(function, arguments, **options):
    leaves = [leaf for leaf in arguments[:2] if leaf.requires_grad]
    loss = function(*arguments, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_one_graph_and_the_same_numbers(device, options):
    torch._dynamo.reset()
    arguments = _arguments(19, device, frozen=options["mode"] == "frozen")
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(_run(compiled, arguments, **options), _run(_loss, arguments, **options), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def test_a_graph_is_traced_without_asking_for_chip_or_addresses(device, monkeypatch):
    # A backend's tiles follow from both, and neither is there while a graph is traced.
    backend = linear_logprob_torch
    kept = backend.tile_columns

    def tile_columns(head):
        assert not torch.compiler.is_dynamo_compiling(), "asked for its tiles in a traced graph"
        return kept(head)

    monkeypatch.setattr(backend, "tile_columns", tile_columns)
    torch._dynamo.reset()
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    for options in MODES:
        arguments = _arguments(19, "cpu", frozen=options["mode"] == "frozen")
        assert all(bool(torch.isfinite(value).all()) for value in _run(compiled, arguments, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_in_one_graph(device, dtype):
    torch._dynamo.reset()
    hidden_TH, weight_VH, target_T, temperature_T = _arguments(19, device)
    cast = (hidden_TH.detach().to(dtype).requires_grad_(), weight_VH.detach().to(dtype).requires_grad_())
    arguments = (*cast, target_T, temperature_T)
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(_run(compiled, arguments), _run(_loss, arguments), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


def test_as_many_tokens_as_there_are(device):
    # The number of tokens changes from step to step: one graph must do for all of them.
    torch._dynamo.reset()
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (17, 23, 40):
            arguments = _arguments(T, device)
            for actual, wanted in zip(_run(compiled, arguments), _run(_loss, arguments), strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("options", MODES[:2], ids=str)
def test_under_activation_checkpointing(device, use_reentrant, options):
    arguments = _arguments(19, device)

    def checkpointed(*args, **more):
        return checkpoint(lambda *inner: _loss(*inner, **more), *args, use_reentrant=use_reentrant)

    wanted = _run(_loss, arguments, **options)
    loss = checkpointed(*arguments, **options)
    loss.backward()  # reentrant checkpointing knows no torch.autograd.grad
    for actual, expected in zip((loss, arguments[0].grad, arguments[1].grad), wanted, strict=True):
        assert actual is not None
        assert torch.equal(actual, expected)


def test_compiled_under_autocast(device):
    torch._dynamo.reset()
    arguments = _arguments(19, device)
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = _run(compiled, arguments)
    for got, wanted in zip(actual, _run(_loss, arguments), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def test_operators_keep_their_word(device):
    # Schema, fake kernels against real outputs, and tracing with dynamic sizes.
    from entrocraft.kernels.head import HeadOptions
    from entrocraft.kernels.head_passes import Setting
    from entrocraft.kernels.linear_logprob_op import packed_scalars
    from entrocraft.kernels.vocab_parallel import Shard

    hidden_TH, weight_VH, target_T, _ = _arguments(9, device)
    for mode, stored in (("recompute", 0), ("cache", 4), ("frozen", 0)):
        setting = Setting(HeadOptions(collision=True), -100, mode, stored, True, Shard())
        weight = weight_VH.detach() if mode == "frozen" else weight_VH
        arguments = (hidden_TH, weight, None, target_T, None, None, None, *packed_scalars(0.5, setting))
        torch.library.opcheck(
            torch.ops.entrocraft.linear_logprob.default,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.parametrize("mode", ["recompute", "cache"])
def test_main_gradients_take_what_autograd_does_not(device, mode):
    # bf16 operands whose gradients are summed over three calls in fp32: nothing is rounded in between.
    T, V, H = 21, 77, 8
    hidden_TH = torch.randn(T, H, device=device).bfloat16().requires_grad_()
    weight_VH = torch.randn(V, H, device=device).bfloat16().requires_grad_()
    if TRITON and device == "cpu":
        pytest.skip("the interpreter truncates bf16")
    main = [torch.full_like(operand, 0.25, dtype=torch.float32) for operand in (hidden_TH, weight_VH)]
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden_TH, weight_VH)]
    for call in range(3):
        target_T = torch.randint(0, V, (T,), device=device)
        target_T[call] = -100
        more = {"mode": mode, "cache_bytes": 11 * 200, "hidden_main_grad_TH": main[0], "weight_main_grad_VH": main[1]}
        for operands, options in (((hidden_TH, weight_VH), more), (exact, {})):
            stats = linear_logprob_entropy(operands[0], operands[1], target_T, **options)
            (stats.logprob_T.sum() + stats.entropy_T.sum()).backward()
    assert hidden_TH.grad is None
    assert weight_VH.grad is None
    for total, leaf in zip(main, exact, strict=True):
        assert leaf.grad is not None
        error = float((total.double() - 0.25 - leaf.grad).norm() / leaf.grad.norm())
        # Stored exponentials are bf16 ones; recomputed logits are never rounded on a CPU.
        assert error <= (2e-3 if mode == "cache" or TRITON else 1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_main_grad_TH": torch.zeros(3, 4).bfloat16()},
            r"hidden_main_grad is torch.bfloat16.*expected torch.float32",
        ),
        ({"weight_main_grad_VH": torch.zeros(4, 4)}, r"weight_main_grad is torch.float32 \(4, 4\).*\(5, 4\)"),
        ({"hidden_main_grad_TH": torch.zeros(3, 4, requires_grad=True)}, "hidden_main_grad requires a gradient"),
        (
            {"weight_main_grad_VH": torch.zeros(5, 4), "bias_V": torch.zeros(5, requires_grad=True)},
            "weight_main_grad_VH with a bias_V that requires a gradient",
        ),
    ],
    ids=str,
)
def test_a_main_gradient_that_cannot_be(changes, message):
    arguments = {"hidden_TH": torch.zeros(3, 4), "weight_VH": torch.zeros(5, 4), "target_T": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=message):
        linear_logprob_entropy(**arguments | changes)
