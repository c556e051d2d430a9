"""The row algebra: sums merge over any split, in any order, and a part without probability changes nothing."""

import torch

from entrocraft.kernels.row_stats import ARGMAX, finish, merge_sums, neutral_sums, tile_sums


def _sums(logit_TV: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    return tile_sums(
        logit_TV.clone(), torch.empty_like(logit_TV), target_T, collision=True, varentropy=True, argmax=True
    )


def _assert_finished_alike(left_KT: torch.Tensor, right_KT: torch.Tensor) -> None:
    for left_T, right_T in zip(finish(left_KT)[:7], finish(right_KT)[:7], strict=True):
        torch.testing.assert_close(left_T, right_T, rtol=1e-12, atol=1e-12)


def test_parts_merge_to_the_whole_in_any_order():
    # A ragged split with a part of one column; spread 10, so that maxima of the parts differ by tens.
    logit_TV = 10 * torch.randn(9, 23, dtype=torch.float64)
    target_T = torch.randint(0, 23, (9,))
    whole_KT = _sums(logit_TV, target_T)
    parts = [_sums(logit_TV[:, v], target_T - v.start) for v in (slice(0, 4), slice(4, 5), slice(5, 23))]
    for part_KT, start in zip(parts, (0, 4, 5), strict=True):
        part_KT[ARGMAX] += start
    _assert_finished_alike(merge_sums(merge_sums(parts[0], parts[1]), parts[2]), whole_KT)
    _assert_finished_alike(merge_sums(parts[2], merge_sums(parts[1], parts[0])), whole_KT)
    logp_TV = logit_TV.log_softmax(1)
    p_TV = logp_TV.exp()
    entropy_T = -(p_TV * logp_TV).sum(1)
    expected = [
        logp_TV.gather(1, target_T[:, None])[:, 0],
        entropy_T,
        logit_TV.logsumexp(1),
        (p_TV**2).sum(1),
        (p_TV**2 * logp_TV).sum(1),
        (p_TV * (logp_TV + entropy_T[:, None]) ** 2).sum(1),
        logit_TV.argmax(1),
    ]
    for actual_T, expected_T in zip(finish(whole_KT)[:7], expected, strict=True):
        torch.testing.assert_close(actual_T, expected_T, rtol=1e-12, atol=1e-12)


def test_a_part_of_minus_infinity_changes_nothing():
    logit_TV, target_T = torch.randn(3, 7, dtype=torch.float64), torch.tensor([0, 3, 6])
    empty_KT = _sums(torch.full((3, 4), -torch.inf, dtype=torch.float64), target_T - 7)
    for merged_KT in (merge_sums(_sums(logit_TV, target_T), empty_KT), merge_sums(empty_KT, _sums(logit_TV, target_T))):
        _assert_finished_alike(merged_KT, _sums(logit_TV, target_T))


def test_a_row_of_minus_infinity_alone_is_not_a_distribution():
    values = finish(_sums(torch.full((2, 4), -torch.inf), torch.tensor([0, 1])))
    assert values.logprob_T.isnan().all()
    assert values.entropy_T.isnan().all()


def test_neutral_sums_finish_as_zero():
    values = finish(neutral_sums(3, like=torch.zeros(1), dtype=torch.float32))
    for value_T in values:
        torch.testing.assert_close(value_T.float(), torch.zeros(3), rtol=0, atol=0)


def test_the_first_of_equal_maxima_is_the_argmax():
    logit_TV = torch.tensor([[1.0, 3.0, 3.0, 3.0]])
    left_KT, right_KT = (_sums(logit_TV[:, v], torch.tensor([0])) for v in (slice(0, 2), slice(2, 4)))
    right_KT[ARGMAX] += 2
    assert [
        int(finish(sums).argmax_T) for sums in (_sums(logit_TV, torch.tensor([0])), merge_sums(left_KT, right_KT))
    ] == [1, 1]
