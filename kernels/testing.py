"""The tolerance rule: a kernel may lose at most twice what torch itself loses in the same dtype, plus a floor."""

from __future__ import annotations

from torch import Tensor


def assert_no_worse_than_torch(
    actual: Tensor, in_torch: Tensor, exact: Tensor, *, floor: float = 1e-6, name: str = "tensor"
) -> None:
    """Raise AssertionError unless  max|actual - exact| <= 2 max|in_torch - exact| + floor.

    `actual` is what is tested, `in_torch` plain torch on the same operands, `exact` the same in fp64; all of one shape.
    Where `exact` is NaN or infinite, `actual` must be the same; where `in_torch` alone is, it grants no error. The
    message shows the worst element in all three.
    `floor` (same unit as the tensors) is for values whose error in torch is 0 by luck; it belongs to the quantity, not
    to the machine.
    """
    if not actual.shape == in_torch.shape == exact.shape:
        raise AssertionError(f"{name}: shapes {actual.shape}, {in_torch.shape} and {exact.shape} differ")
    if actual.numel() == 0:
        return
    actual, in_torch, exact = (value.detach().double().cpu().flatten() for value in (actual, in_torch, exact))
    finite = exact.isfinite()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    if not bool((finite | same).all()):
        i = int((~(finite | same)).nonzero()[0, 0])
        raise AssertionError(f"{name}[{i}] is {float(actual[i])}; expected {float(exact[i])}")
    if not bool(actual[finite].isfinite().all()):
        i = int((finite & ~actual.isfinite()).nonzero()[0, 0])
        raise AssertionError(f"{name}[{i}] is {float(actual[i])}; expected {float(exact[i])}")
    error = (actual - exact).abs().where(finite, 0.0)
    # Where torch alone overflows it grants nothing: an infinite bound would let every other element pass.
    error_in_torch = (in_torch - exact).abs().where(finite & in_torch.isfinite(), 0.0)
    bound = 2.0 * float(error_in_torch.max()) + floor
    worst = int(error.argmax())
    if not float(error[worst]) <= bound:
        raise AssertionError(
            f"{name}: error {float(error[worst]):.3e} at flat index {worst}, allowed 2 x "
            f"{float(error_in_torch.max()):.3e} (torch) + {floor:.1e}\n"
            f"  actual {float(actual[worst])!r}\n  torch  {float(in_torch[worst])!r}\n"
            f"  exact  {float(exact[worst])!r}"
        )
