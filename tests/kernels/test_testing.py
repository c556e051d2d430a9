"""The tolerance rule accepts twice torch's error and a floor, and nothing more."""

import pytest
import torch

from entrocraft.kernels.testing import assert_no_worse_than_torch

EXACT = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


def test_twice_the_error_of_torch_passes_and_more_does_not():
    in_torch = EXACT + torch.tensor([0.0, 0.25, 0.0])
    assert_no_worse_than_torch(EXACT + torch.tensor([0.5, 0.0, 0.0]), in_torch, EXACT, floor=0.0)
    with pytest.raises(
        AssertionError, match=r"(?s)logprob: error 5.625e-01 at flat index 0.*actual 1.5625.*torch  1.0.*exact  1.0"
    ):
        assert_no_worse_than_torch(EXACT + torch.tensor([0.5625, 0, 0]), in_torch, EXACT, floor=0.0, name="logprob")
    assert_no_worse_than_torch(EXACT + torch.tensor([0.5625, 0, 0]), in_torch, EXACT, floor=0.0625)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_must_be_so_in_both(bad):
    with_bad = EXACT.clone()
    with_bad[1] = bad
    assert_no_worse_than_torch(with_bad, with_bad, with_bad, floor=0.0)
    with pytest.raises(AssertionError, match=r"\[1\] is"):
        assert_no_worse_than_torch(with_bad, EXACT, EXACT, floor=1e9)
    with pytest.raises(AssertionError, match=r"\[1\] is"):
        assert_no_worse_than_torch(EXACT, EXACT, with_bad, floor=1e9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_torch_alone_overflowing_grants_nothing(bad):
    in_torch = EXACT + torch.tensor([0.0, 0.0, 0.25])
    in_torch[1] = bad
    assert_no_worse_than_torch(EXACT + torch.tensor([0.0, 0.5, 0.0]), in_torch, EXACT, floor=0.0)
    with pytest.raises(AssertionError, match=r"error 5.625e-01 at flat index 0, allowed 2 x 2.500e-01"):
        assert_no_worse_than_torch(EXACT + torch.tensor([0.5625, 0.0, 0.0]), in_torch, EXACT, floor=0.0)


def test_shapes_must_agree_and_empty_ones_pass():
    with pytest.raises(AssertionError, match="shapes"):
        assert_no_worse_than_torch(EXACT[:2], EXACT, EXACT)
    assert_no_worse_than_torch(EXACT[:0], EXACT[:0], EXACT[:0])
