"""TokenStats: pieces keep their numbers and their gradients; a wrong shape is an error that names the field."""

import pytest
import torch

from entrocraft.kernels import TokenStats


def _stats(T: int, *, collision: bool = True) -> TokenStats:
    fields = {name: torch.randn(T, requires_grad=name[:2] != "p2") for name in TokenStats.__slots__}
    return TokenStats(**fields if collision else {name: f for name, f in fields.items() if name[:2] != "p2"})


# A ragged split, an empty part and a single token, with and without the collision fields.
@pytest.mark.parametrize("sizes", [(3, 5), (4, 0, 1), (1,), (0,)], ids=str)
@pytest.mark.parametrize("collision", [True, False])
def test_cat_then_index_gives_the_parts_back(sizes, collision):
    parts = [_stats(T, collision=collision) for T in sizes]
    whole = TokenStats.cat(parts)
    assert len(whole) == sum(sizes)
    start = 0
    for part in parts:
        again = whole.index(torch.arange(start, start + len(part)))
        for name in TokenStats.__slots__:
            assert (
                (getattr(part, name) is None) == (getattr(again, name) is None) == (not collision and name[:2] == "p2")
            )
            if getattr(part, name) is not None:
                torch.testing.assert_close(getattr(again, name), getattr(part, name), rtol=0, atol=0)
        start += len(part)


def test_index_by_mask_carries_gradients_and_detach_cuts_them():
    stats = _stats(5)
    mask_T = torch.tensor([True, False, False, True, False])
    picked = stats.index(mask_T)
    assert len(picked) == 2
    picked.entropy_T.sum().backward()
    torch.testing.assert_close(stats.entropy_T.grad, mask_T.float())
    detached = stats.detach()
    assert not any(getattr(detached, name).requires_grad for name in TokenStats.__slots__)
    torch.testing.assert_close(detached.lse_T, stats.lse_T.data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprob_T": torch.zeros(2, 2)}, r"logprob_T is torch.float32 \(2, 2\)"),
        ({"logprob_T": torch.zeros(3, dtype=torch.int64)}, "logprob_T is torch.int64"),
        ({"entropy_T": torch.zeros(4)}, r"entropy_T is torch.float32 \(4,\)"),
        ({"lse_T": torch.zeros(3).double()}, "lse_T is torch.float64"),
        ({"p2_T": None}, "p2_T and p2logp_T come together"),
    ],
)
def test_wrong_fields_are_named(changes, message):
    fields = {name: torch.zeros(3) for name in TokenStats.__slots__} | changes
    with pytest.raises(ValueError, match=message):
        TokenStats(**fields)


def test_cat_refuses_nothing_and_mixtures():
    with pytest.raises(ValueError, match="parts is empty"):
        TokenStats.cat([])
    with pytest.raises(ValueError, match="some parts have p2_T"):
        TokenStats.cat([_stats(2), _stats(2, collision=False)])
