"""linear_policy_loss against the same loss on full logits in fp64: values, gradients, and the products they cost.

The same tests hold for both paths: the torch path, and Triton on a GPU or under TRITON_INTERPRET=1.
"""

import logging
import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from entrocraft import CISPO, GSPO, PolicyObjective, PPOClip, token_weights
from entrocraft.kernels import (
    linear_logprob_entropy,
    linear_logprob_entropy_reference,
    linear_policy_loss,
    logits_logprob_entropy_reference,
)
from entrocraft.kernels.policy_loss_passes import Chunk, chunks_of
from entrocraft.kernels.testing import assert_no_worse_than_torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = torch.cuda.is_available() or INTERPRETED
LOW = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
LENGTHS = [7, 0, 12, 1, 9, 8]
T, V, H = sum(LENGTHS), 67, 12
OBJECTIVES = {
    "ppo": {"loss_fn": PPOClip(dual_clip=1.5)},
    "ppo with entropy bonus": {"loss_fn": PPOClip(), "entropy_coefficient": 0.3},
    "cispo": {"loss_fn": CISPO(clip_low=0.3)},
    "gspo": {"loss_fn": GSPO(clip_low=0.02, clip_high=0.03)},
    "gspo with entropy bonus": {"loss_fn": GSPO(clip_low=0.02, clip_high=0.03), "entropy_coefficient": -0.2},
}
EVERY_OPTION = {"bias": True, "softcap": 8.0, "row_temperature": True, "ignored": 11}
# Room for all rows; for some of them; for a fraction of the longest sequence.
BUDGETS = {"one chunk": 1 << 26, "chunks": 10_000, "long sequences": 2_000}


def _objective(head, **fields) -> PolicyObjective:
    """A batch for this head: ratios on both sides of every clip, a rejected sequence, one without advantage."""
    device = head.hidden_TH.device
    rows = len(head.target_T)
    lengths = LENGTHS if rows == T else [rows]
    stats, _ = head.run(linear_logprob_entropy_reference, torch.float64)
    rollout_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    advantage_R = torch.tensor([1.0, 9.0, -1.5, 0.0, 0.7, 2.0])[: len(lengths)].to(device)
    mask_T = (head.target_T != head.options.get("ignore_index", -100)) & (torch.rand(rows) < 0.9).to(device)
    weight_T = token_weights(
        rollout_T,
        mask_T,
        torch.zeros(len(lengths), dtype=torch.int64, device=device),
        aggregation="seq_mean_token_mean",
        keep_T=rollout_T != 5,
    )
    return PolicyObjective(
        old_logprob_T=(stats.logprob_T.detach() + 0.4 * torch.randn(rows).to(device)).float(),
        advantage_T=advantage_R[rollout_T],
        weight_T=weight_T,
        lengths_R=lengths,
        mask_T=mask_T,
        **fields,
    )


def _reference_of(loss):
    """The loss on the statistics of full logits."""

    def op(**arguments):
        stats = linear_logprob_entropy_reference(**arguments)
        return loss(stats.logprob_T, stats.entropy_T, slice(0, len(stats))), stats

    return op


def _rounded(head, loss, upstream: float) -> dict[str, torch.Tensor]:
    """Exact gradients but for two roundings, which are stored exponentials' too: of dz to bf16, and of the result."""
    hidden_TH, weight_VH = head.hidden_TH.double(), head.weight_VH.double()
    logit_TV = hidden_TH @ weight_VH.T + (0.0 if head.bias_V is None else head.bias_V.double())
    logit_TV.requires_grad_()
    stats = logits_logprob_entropy_reference(logit_TV, head.target_T, **head.options)
    total = loss(stats.logprob_T, stats.entropy_T, slice(0, len(stats))) * upstream
    dz_TV = torch.autograd.grad(total, logit_TV)[0].bfloat16().double()
    gradients = {"hidden_TH": dz_TV @ weight_VH, "weight_VH": dz_TV.T @ hidden_TH, "bias_V": dz_TV.sum(0)}
    return {name: gradient.to(head.hidden_TH.dtype).double() for name, gradient in gradients.items()}


def _compare(head, loss, **only_op) -> dict[str, torch.Tensor]:
    """Loss, statistics and gradients of the op against the reference; gives the op's gradients."""
    runs = []
    # Gradients of 16 bits are rounded before they are multiplied: by a power of two, without another rounding.
    upstream = 2.0 if head.hidden_TH.element_size() == 2 else 1.7
    for op, dtype, more in (
        (linear_policy_loss, None, {"loss": loss, **only_op}),
        (_reference_of(loss), None, {}),
        (_reference_of(loss), torch.float64, {}),
    ):
        (total, stats), leaves = head.run(op, dtype, **more)
        gradients = torch.autograd.grad(total * upstream, list(leaves.values()))
        runs.append([total.detach(), stats.detach(), dict(zip(leaves, gradients, strict=True))])
    assert_no_worse_than_torch(*(run[0][None] for run in runs), floor=5e-6, name="loss")
    for name in runs[2][1].as_dict():
        assert_no_worse_than_torch(*(getattr(run[1], name) for run in runs), floor=5e-6, name=name)
    for name, actual in runs[0][2].items():
        triple = [run[2][name] for run in runs]
        size = float(triple[2].abs().max())
        assert actual.dtype == getattr(head, name).dtype
        if actual.element_size() > 2:
            assert_no_worse_than_torch(*triple, floor=2e-6 * max(size, 1e-3), name=f"gradient of {name}")
        else:
            allowed = _rounded(head, loss, upstream)[name] - triple[2]
            assert float((actual.double() - triple[2]).norm()) <= 1.6 * float(allowed.norm()), name
    return runs[0][2]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(make_head, name, budget):
    head = make_head(T, V, H, spread=1.0, ignored=6)
    loss = _objective(head, **OBJECTIVES[name])
    gradients = _compare(head, loss, lengths_R=LENGTHS, buffer_bytes=BUDGETS[budget])
    assert all(float(gradient.abs().max()) > 1e-3 for gradient in gradients.values())
    nowhere_T = (loss.weight_T == 0) if "bonus" in name else (loss.weight_T * loss.advantage_T == 0)
    assert float(gradients["hidden_TH"][nowhere_T].abs().max()) == 0.0


# A token-level loss may be cut anywhere; an arbitrary closure, of no known shape, in every option and dtype.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 8.0}, EVERY_OPTION], ids=["plain", "softcap", "every_option"])
@pytest.mark.parametrize("lengths_R", [None, LENGTHS], ids=["rows", "sequences"])
def test_any_closure(make_head, dtype, options, lengths_R):
    head = make_head(T, V, H, dtype=dtype, collision=True, varentropy=True, **options)
    factor_T = torch.randn(T).to(head.hidden_TH.device)

    def loss(logprob_N, entropy_N, rows):
        return (factor_T[rows] * torch.tanh(logprob_N / 4) * entropy_N + 0.1 * entropy_N.square()).sum()

    for buffer_bytes in (1 << 26, 8_000):
        _compare(head, loss, lengths_R=lengths_R, buffer_bytes=buffer_bytes)


@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "softcap": 3.0, "row_temperature": True, "ignored": 2}], ids=str
)
@pytest.mark.parametrize("buffer_bytes", [1 << 20, 900])
def test_gradcheck(make_head, options, buffer_bytes):
    head = make_head(6, 11, 4, dtype=torch.float64, **options)
    leaves = [leaf.requires_grad_() for leaf in (head.hidden_TH, head.weight_VH, head.bias_V) if leaf is not None]
    factor_T = torch.randn(6, dtype=torch.float64, device=head.hidden_TH.device)

    def total(hidden_TH, weight_VH, bias_V=None):
        return linear_policy_loss(
            hidden_TH,
            weight_VH,
            head.target_T,
            loss=lambda logprob_N, entropy_N, rows: (factor_T[rows] * logprob_N.exp() * entropy_N).sum(),
            bias_V=bias_V,
            lengths_R=[4, 2],
            buffer_bytes=buffer_bytes,
            **head.options,
        )[0]

    # Small buffers make tiles of a few numbers, and are slow.
    assert torch.autograd.gradcheck(total, leaves, fast_mode=buffer_bytes < 1000)


@hypothesis.settings(max_examples=6 if INTERPRETED else 15)  # the interpreter is slow
@hypothesis.given(
    lengths=st.lists(st.integers(0, 9), max_size=4),
    V=st.integers(1, 90),
    H=st.integers(1, 16),
    seed=st.integers(0, 2**31),
    sequences=st.booleans(),
    dead=st.floats(0.0, 1.0),
    buffer_bytes=st.sampled_from([800, 3_000, 10_000, 1 << 26]),
)
def test_any_shape(device, lengths, V, H, seed, sequences, dead, buffer_bytes):
    torch.manual_seed(seed)
    T = sum(lengths)
    hidden_TH, weight_VH = (torch.randn(rows, H).to(device).requires_grad_() for rows in (T, V))
    target_T = torch.randint(0, V, (T,)).masked_fill(torch.rand(T) < dead / 2, -100).to(device)
    factor_2T = (torch.randn(2, T) * (torch.rand(T) >= dead)).to(device)
    called = []

    def loss(logprob_N, entropy_N, rows):
        called.append(rows)
        return (factor_2T[0, rows] * logprob_N + factor_2T[1, rows] * entropy_N).sum()

    total, stats = linear_policy_loss(
        hidden_TH, weight_VH, target_T, loss=loss, lengths_R=lengths if sequences else None, buffer_bytes=buffer_bytes
    )
    gradients = torch.autograd.grad(total, [hidden_TH, weight_VH])
    assert [t for rows in called for t in range(rows.start, rows.stop)] == list(range(T))
    exact = [operand.detach().double().requires_grad_() for operand in (hidden_TH, weight_VH)]
    exact_stats = linear_logprob_entropy_reference(exact[0], exact[1], target_T)
    exact_total = loss(exact_stats.logprob_T, exact_stats.entropy_T, slice(0, T))
    torch.testing.assert_close(total.double(), exact_total, rtol=0, atol=2e-5)
    torch.testing.assert_close(stats.entropy_T.double(), exact_stats.entropy_T, rtol=0, atol=1e-5)
    for actual, wanted in zip(gradients, torch.autograd.grad(exact_total, exact), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=2e-5)


def test_chunks():
    live_L = torch.tensor([0, 1, 5, 6, 7, 9])

    def cut(T, live_L, lengths_R, room):
        return [(c.rows.start, c.rows.stop, c.N) for c in chunks_of(T, live_L, lengths_R, room)]

    assert cut(10, None, None, 4) == [(0, 4, 4), (4, 8, 4), (8, 10, 2)]
    assert cut(10, live_L, None, 2) == [(0, 5, 2), (5, 7, 2), (7, 10, 2)]
    assert cut(10, live_L, None, 6) == [(0, 10, 6)]
    assert cut(10, live_L[:0], None, 2) == [(0, 10, 0)]
    assert cut(0, None, None, 4) == cut(0, None, [0, 0], 4) == []
    assert cut(10, None, [3, 0, 2, 4, 1], 5) == [(0, 5, 5), (5, 10, 5)]
    assert cut(10, None, [8, 1, 1], 5) == [(0, 8, 8), (8, 10, 2)]  # a long sequence is alone
    assert cut(10, None, [1, 8, 1], 5) == [(0, 1, 1), (1, 9, 8), (9, 10, 1)]
    assert cut(10, live_L, [5, 3, 2], 3) == [(0, 5, 2), (5, 8, 3), (8, 10, 1)]
    assert cut(10, live_L, [5, 3, 2], 5) == [(0, 8, 5), (8, 10, 1)]
    assert chunks_of(4, None, [4], 2) == [Chunk(slice(0, 4), slice(0, 4))]


def _products(make_head, count_products, *, factor_T=None, frozen=(), grad=True, ignored=0, **arguments) -> float:
    """Products of forward and backward, in units of all rows once."""
    head = make_head(64, 40, 8, ignored=ignored)
    factor_T = torch.ones(64) if factor_T is None else factor_T
    factor_T = factor_T.to(head.hidden_TH.device)
    _, leaves = head.run(linear_logprob_entropy)
    for name in frozen:
        leaves[name].requires_grad_(False)
    with count_products() as products, torch.set_grad_enabled(grad):
        total, _ = linear_policy_loss(
            **leaves,
            target_T=head.target_T,
            loss=lambda logprob_N, entropy_N, rows: (factor_T[rows] * (logprob_N + entropy_N)).sum(),
            **arguments,
        )
        if grad:
            before = products.count
            total.backward()
            assert products.count == before  # all there is was made in the forward
    return products.count / (64 * 40 * 8)


def test_products(make_head, count_products):
    logits = 0 if TRITON else 1  # Triton's own products are not counted
    quarter_T = (torch.arange(64) % 4 == 0).float()
    wanted = {
        "all": ({}, 2 + logits),
        "chunks": ({"buffer_bytes": 5_000}, 2 + logits),
        "frozen head": ({"frozen": ["weight_VH"]}, 1 + logits),
        "constant hidden": ({"frozen": ["hidden_TH"]}, 1 + logits),
        "no gradient": ({"grad": False}, logits),
        "a quarter of the rows": ({"factor_T": quarter_T}, 2 / 4 + logits),
        "a quarter, in chunks": ({"factor_T": quarter_T, "buffer_bytes": 5_000}, 2 / 4 + logits),
        "no row": ({"factor_T": 0 * quarter_T}, logits),
        "half of the rows ignored": ({"ignored": 32}, (2 + logits) / 2),
    }
    counts = {name: _products(make_head, count_products, **arguments) for name, (arguments, _) in wanted.items()}
    assert counts == {name: count for name, (_, count) in wanted.items()}


def test_a_long_sequence_recomputes_what_did_not_fit(make_head, count_products, caplog):
    with caplog.at_level(logging.INFO, logger="entrocraft.kernels"):
        count = _products(make_head, count_products, lengths_R=[60, 4], buffer_bytes=5_003)
    (line,) = [record.getMessage() for record in caplog.records]
    room = int(line.split()[-2])
    assert 1 < room < 60
    again = (60 - room) / 64
    costs = f"{3 + again:.3g} products, chunks 2, room for {room} rows"
    assert line == f"policy loss of 64 rows, hidden size 8: loss in forward: {costs}"
    assert count == (2 if TRITON else 3 + again)
