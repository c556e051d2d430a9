"""The modes of the linear head: each gives the reference's gradients, at its price in products, as the rule chooses."""

import logging
import os

import pytest
import torch

from entrocraft.kernels import linear_logprob_entropy, linear_logprob_entropy_reference, plan_head
from entrocraft.kernels.head import Exponentials

TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
EVERY_OPTION = {"bias": True, "softcap": 8.0, "row_temperature": True, "ignored": 11, "collision": True}
LOW = [torch.float16] if TRITON else [torch.bfloat16, torch.float16]


def _one_store(exact: torch.Tensor) -> float:
    """What rounding the exact gradient to bf16 once loses: stored exponentials are bf16, whatever the operands are."""
    return float((exact.bfloat16().double() - exact).norm())


def _row_bytes(V: int, dtype: torch.dtype) -> int:
    """Bytes of a row of exponentials, or a little more."""
    return V * (2 if dtype.itemsize == 2 else dtype.itemsize) + 16 + 8 * (1 + V // 128)


@pytest.mark.parametrize("stored", [0, 13, 37], ids=lambda rows: f"{rows}_rows_kept")
@pytest.mark.parametrize("options", [{}, {"softcap": 8.0}, EVERY_OPTION], ids=["plain", "softcap", "every_option"])
def test_cache_gives_the_gradients_of_the_reference(make_head, check_head, stored, options):
    head = make_head(37, 131, 24, **options)
    check_head(head, mode="cache", cache_bytes=stored * _row_bytes(131, torch.float32), buffer_bytes=50_000)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every_option"])
def test_cached_exponentials_cost_one_rounding(make_head, dtype, options):
    head = make_head(37, 131, 24, dtype=dtype, **options)
    upstream = torch.randn(3, 37, device=head.hidden_TH.device)
    gradients = []
    for op, cast, more in (
        (linear_logprob_entropy, None, {"mode": "cache", "cache_bytes": 1 << 20}),
        (linear_logprob_entropy, None, {"mode": "recompute"}),
        (linear_logprob_entropy_reference, torch.float64, {}),
    ):
        stats, leaves = head.run(op, cast, **more)
        total = (upstream * torch.stack([stats.logprob_T, stats.entropy_T, stats.lse_T])).sum()
        gradients.append(torch.autograd.grad(total, list(leaves.values())))
    for cached, recomputed, exact in zip(*gradients, strict=True):
        error, error_recomputed = (float((one.double() - exact).norm()) for one in (cached, recomputed))
        assert error_recomputed <= 1.6 * _one_store(exact)
        assert error <= 1.6 * max(error_recomputed, _one_store(exact))


@pytest.mark.parametrize("entropy_gradient", [True, False])
@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every_option"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_frozen_head(make_head, entropy_gradient, options, dtype):
    head = make_head(37, 131, 24, dtype=dtype, **options)
    wanted = ["logprob_T", "lse_T"] + ["entropy_T"] * entropy_gradient
    upstream = torch.randn(3, 37, device=head.hidden_TH.device)
    results = []
    for op, cast, more in (
        (
            linear_logprob_entropy,
            None,
            {"mode": "frozen", "entropy_gradient": entropy_gradient, "buffer_bytes": 30_000},
        ),
        (linear_logprob_entropy_reference, None, {}),
        (linear_logprob_entropy_reference, torch.float64, {}),
    ):
        to = cast or dtype
        leaf_TH = head.hidden_TH.detach().to(to).requires_grad_()
        bias_V = None if head.bias_V is None else head.bias_V.to(to)
        stats = op(leaf_TH, head.weight_VH.to(to), head.target_T, bias_V=bias_V, **head.options, **more)
        total = (torch.stack([getattr(stats, name) for name in wanted]) * upstream[: len(wanted)]).sum()
        results.append((stats, torch.autograd.grad(total, [leaf_TH])[0].double()))
    (stats, gradient), (_, in_torch), (exact, exact_gradient) = results
    torch.testing.assert_close(stats.logprob_T.double(), exact.logprob_T, rtol=0, atol=2e-5)
    assert stats.entropy_T.requires_grad == entropy_gradient
    error, error_in_torch = (float((one - exact_gradient).norm()) for one in (gradient, in_torch))
    allowed = 1.6 * max(error_in_torch, _one_store(exact_gradient)) if dtype.itemsize == 2 else 2 * error_in_torch
    assert error <= allowed + 1e-6 * float(exact_gradient.norm())


def test_products_of_each_mode(make_head, count_products):
    head = make_head(64, 40, 8)
    unit = 64 * 40 * 8
    counts = {}
    for mode, frozen, entropy in (
        ("recompute", False, True),
        ("cache", False, True),
        ("recompute", True, True),
        ("frozen", True, True),
        ("frozen", True, False),
    ):
        hidden_TH = head.hidden_TH.detach().requires_grad_()
        weight_VH = head.weight_VH.detach().requires_grad_(not frozen)
        with count_products() as products:
            stats = linear_logprob_entropy(
                hidden_TH, weight_VH, head.target_T, mode=mode, cache_bytes=1 << 20, entropy_gradient=entropy
            )
            forward = products.count
            (stats.logprob_T.sum() + (stats.entropy_T.sum() if entropy else 0.0)).backward()
        counts[mode, frozen, entropy] = (forward / unit, (products.count - forward) / unit)
    logits = 0 if TRITON else 1  # Triton's own products are not counted
    assert counts == {
        ("recompute", False, True): (logits, 2 + logits),
        ("cache", False, True): (logits, 2),
        ("recompute", True, True): (logits, 1 + logits),
        ("frozen", True, True): (logits + 2, 0),
        ("frozen", True, False): (logits + 1, 0),
    }


@pytest.mark.parametrize("mode", ["recompute", "cache"])
def test_a_graph_can_be_walked_twice(make_head, mode):
    stats, leaves = make_head(9, 40, 8, ignored=2).run(linear_logprob_entropy, mode=mode, cache_bytes=5 * 200)
    total = stats.logprob_T.sum() + stats.entropy_T[:4].sum()
    first, second = (torch.autograd.grad(total, list(leaves.values()), retain_graph=True) for _ in range(2))
    for left, right in zip(first, second, strict=True):
        assert float(left.abs().max()) > 0.0
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_the_rule_at_its_boundaries():
    basis, exponentials = 4 * 1000 * 64, 1000 * 1200
    cases = [
        # needs_hidden, needs_weight, cache_bytes, entropy_gradient -> mode, products
        ((False, False, exponentials, True), ("statistics", 1)),
        ((True, True, 0, True), ("recompute", 4)),
        ((True, True, exponentials - 1, True), ("recompute", 4)),
        ((True, True, exponentials, True), ("cache", 3)),
        ((False, True, exponentials, True), ("cache", 2)),
        ((True, False, 2 * basis - 1, True), ("recompute", 3)),
        ((True, False, 2 * basis, True), ("frozen", 3)),
        ((True, False, basis - 1, False), ("recompute", 3)),
        ((True, False, basis, False), ("frozen", 2)),
    ]
    for (hidden, weight, cache_bytes, entropy), expected in cases:
        plan = plan_head(
            1000,
            64,
            bytes_per_row=1200,
            needs_hidden=hidden,
            needs_weight=weight,
            cache_bytes=cache_bytes,
            entropy_gradient=entropy,
        )
        assert (plan.mode, plan.products) == expected
        assert plan.kept_bytes <= cache_bytes
    part = plan_head(1000, 64, bytes_per_row=1200, mode="cache", cache_bytes=exponentials // 4)
    assert part == ("cache", 250, 300_000, 3.75)
    assert str(part) == "cache: 3.75 products, keeps 0.3 MiB of 250 rows"


def test_no_rule_looks_at_other_rows_where_the_batch_may_not_matter():
    sizes = {"bytes_per_row": 1200, "batch_invariant": True}
    for needs_weight in (True, False):
        plan = plan_head(1000, 64, needs_weight=needs_weight, cache_bytes=1 << 30, **sizes)
        assert plan.mode == "recompute"
    assert plan_head(1000, 64, mode="cache", cache_bytes=1_200_000, **sizes).stored_rows == 1000
    with pytest.raises(ValueError, match="cache_bytes = 1199999 do not hold 1000 rows of 1200 bytes"):
        plan_head(1000, 64, mode="cache", cache_bytes=1_199_999, **sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_is_the_same_wherever_it_stands_and_whatever_could_be_cached(make_head, dtype):
    head = make_head(80, 600, 64, dtype=dtype)
    found = []
    for rows in (slice(40, 44), slice(0, 80)):
        leaf_TH = head.hidden_TH[rows].detach().requires_grad_()
        stats = linear_logprob_entropy(
            leaf_TH, head.weight_VH, head.target_T[rows], batch_invariant=True, cache_bytes=16 * 2600
        )
        (stats.logprob_T.sum() + stats.entropy_T.sum()).backward()
        assert leaf_TH.grad is not None
        found.append((stats.logprob_T.detach(), stats.entropy_T.detach(), leaf_TH.grad))
    for alone, among in zip(*found, strict=True):
        if TRITON and dtype == torch.float16 and alone.dim() == 2:
            continue  # the scale of an fp16 gradient is the batch's
        torch.testing.assert_close(alone, among[40:44], rtol=0, atol=0)


def test_the_rule_is_applied_and_logged(make_head, caplog):
    head = make_head(21, 77, 5)
    live = head.hidden_TH, head.weight_VH
    row_bytes = 77 * 4 + 12 + 2 * 4  # a pitch of 80, and a shift for 64 columns
    with caplog.at_level(logging.INFO, logger="entrocraft.kernels"):
        for cache_bytes in (21 * row_bytes - 1, 21 * row_bytes):
            head.run(linear_logprob_entropy, cache_bytes=cache_bytes)
        linear_logprob_entropy(*live, head.target_T)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[1] for line in lines] == ["recompute", "cache", "statistics"]
    assert lines[0] == "head of 21 rows, hidden size 5: recompute: 4 products, keeps 0.0 MiB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, "mode is 'fast'; expected one of auto, statistics, recompute, cache, frozen"),
        ({"mode": "statistics"}, r"mode is 'statistics', which has no gradient.*torch.no_grad"),
        ({"mode": "frozen"}, r"mode is 'frozen', but weight_VH or bias_V requires a gradient; freeze the head"),
        ({"cache_bytes": -1}, "cache_bytes is -1; expected a number of bytes"),
    ],
)
def test_a_mode_that_cannot_be(make_head, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_head(3, 7, 4).run(linear_logprob_entropy, **arguments)


@pytest.mark.skipif(TRITON, reason="on a GPU statistics never depend on the batch; see test_linear_logprob_triton.py")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant(make_head, dtype):
    # 301 rows at once, the same rows in uneven pieces, and a row alone: the same bits, in the hidden gradient too.
    head = make_head(301, 1000, 96, dtype=dtype, collision=True, row_temperature=True)
    upstream = torch.randn(2, 301)

    def run(rows):
        leaf_TH = head.hidden_TH[rows].detach().requires_grad_()
        options = head.options | {"temperature": head.options["temperature"][rows]}
        stats = linear_logprob_entropy(leaf_TH, head.weight_VH, head.target_T[rows], batch_invariant=True, **options)
        (upstream[0][rows] * stats.logprob_T + upstream[1][rows] * stats.entropy_T).sum().backward()
        return [*stats.detach().as_dict().values(), leaf_TH.grad]

    whole = run(slice(0, 301))
    for piece in (slice(0, 64), slice(64, 130), slice(130, 131), slice(250, 301)):
        for name, left, right in zip(
            ("logprob", "entropy", "lse", "p2", "p2logp", "gradient"), run(piece), whole, strict=True
        ):
            torch.testing.assert_close(left, right[piece], rtol=0, atol=0, msg=f"{name} of {piece}")
    exact = linear_logprob_entropy_reference(
        head.hidden_TH.double(), head.weight_VH.double(), head.target_T, **head.options
    )
    torch.testing.assert_close(whole[0].double(), exact.logprob_T, rtol=0, atol=2e-5)


def test_chunks_of_a_frozen_head_leave_room_for_their_gradients(make_head):
    from entrocraft.kernels.head import Head
    from entrocraft.kernels.head_passes import chunk_rows

    head = Head(torch.zeros(5, 8192), torch.zeros(100, 8192), None, torch.zeros(5).long(), 1.0)
    bare, beside = chunk_rows(head, 1 << 20), chunk_rows(head, 1 << 20, beside=4 * 8192)
    row_bytes = (1 << 20) / bare
    assert row_bytes < 600
    assert beside * (row_bytes + 4 * 8192) <= 1 << 20 < (beside + 1) * (row_bytes + 4 * 8192 + 1)


def test_room_for_exponentials():
    from entrocraft.kernels.head import Head

    for dtype, V, pitch in ((torch.bfloat16, 13, 16), (torch.float32, 13, 16), (torch.float64, 13, 14)):
        head = Head(torch.zeros(5, 3, dtype=dtype), torch.zeros(V, 3, dtype=dtype), None, torch.zeros(5).long(), 1.0)
        room = Exponentials.empty(head, 4, 8)
        assert (room.value_NV.shape, room.shift_NS.shape, room.rows) == ((4, pitch), (4, 2), 4)
        assert room.value_NV.nbytes + room.shift_NS.nbytes == 4 * Exponentials.bytes_per_row(head, 8)
        picked = room.pick(torch.tensor([1, 3, 4]))
        assert picked.rows == 2  # row 4 is not covered
