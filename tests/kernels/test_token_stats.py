"""TokenStats: pieces keep their numbers and their gradients; a wrong shape is an error that names the field."""

import dataclasses

import pytest
import torch

from entrocraft.kernels import TokenStats

FIELDS = [field.name for field in dataclasses.fields(TokenStats)]
DIFFERENTIABLE = ("logprob_T", "entropy_T", "lse_T")


def _stats(T: int, *, optional: bool = True) -> TokenStats:
    fields = {name: torch.randn(T, requires_grad=True) for name in DIFFERENTIABLE}
    if optional:
        fields |= {name: torch.rand(T) for name in ("p2_T", "p2logp_T", "varentropy_T")}
        fields |= {"argmax_T": torch.randint(0, 9, (T,)), "top1_T": torch.rand(T) < 0.5}
    return TokenStats(**fields)


# A ragged split, an empty part and a single token, with and without the optional fields.
@pytest.mark.parametrize("sizes", [(3, 5), (4, 0, 1), (1,), (0,)], ids=str)
@pytest.mark.parametrize("optional", [True, False])
def test_cat_then_index_gives_the_parts_back(sizes, optional):
    parts = [_stats(T, optional=optional) for T in sizes]
    whole = TokenStats.cat(parts)
    assert len(whole) == sum(sizes)
    start = 0
    for part in parts:
        again = whole.index(torch.arange(start, start + len(part)))
        assert list(again.as_dict()) == list(part.as_dict()) == FIELDS[: 8 if optional else 3]
        for name, field in part.as_dict().items():
            torch.testing.assert_close(getattr(again, name), field, rtol=0, atol=0)
        start += len(part)


def test_index_by_mask_carries_gradients_and_detach_cuts_them():
    stats = _stats(5)
    mask_T = torch.tensor([True, False, False, True, False])
    picked = stats.index(mask_T)
    assert len(picked) == 2
    picked.entropy_T.sum().backward()
    torch.testing.assert_close(stats.entropy_T.grad, mask_T.float())
    detached = stats.detach()
    assert not any(field.requires_grad for field in detached.as_dict().values())
    torch.testing.assert_close(detached.lse_T, stats.lse_T.data)


def test_z_loss_and_its_gradient():
    stats = _stats(4)
    stats.z_loss_T.sum().backward()
    torch.testing.assert_close(stats.z_loss_T.data, stats.lse_T.data**2, rtol=0, atol=0)
    torch.testing.assert_close(stats.lse_T.grad, 2 * stats.lse_T.data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprob_T": torch.zeros(2, 2)}, r"logprob_T is torch.float32 \(2, 2\)"),
        ({"logprob_T": torch.zeros(3, dtype=torch.int64)}, "logprob_T is torch.int64"),
        ({"entropy_T": torch.zeros(4)}, r"entropy_T is torch.float32 \(4,\)"),
        ({"lse_T": torch.zeros(3).double()}, "lse_T is torch.float64"),
        ({"p2_T": None}, "p2_T and p2logp_T come together"),
        ({"top1_T": None}, "argmax_T and top1_T come together"),
        ({"argmax_T": torch.zeros(3)}, "argmax_T is torch.float32"),
    ],
)
def test_wrong_fields_are_named(changes, message):
    fields = {name: torch.zeros(3) for name in TokenStats.__slots__}
    fields |= {"argmax_T": torch.zeros(3, dtype=torch.int64), "top1_T": torch.zeros(3, dtype=torch.bool)} | changes
    with pytest.raises(ValueError, match=message):
        TokenStats(**fields)


def test_cat_refuses_nothing_and_mixtures():
    with pytest.raises(ValueError, match="parts is empty"):
        TokenStats.cat([])
    with pytest.raises(ValueError, match="some parts have p2_T"):
        TokenStats.cat([_stats(2), _stats(2, optional=False)])
