"""The prediction figure: its policy's gradients and numbers by hand, and a short real run."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import prediction_figure  # noqa: E402
from prediction_figure import ESTIMATORS, agreement, score  # noqa: E402


def test_agreement_by_hand():
    rows = [{"predicted": p, "realised": r} for p, r in ((1.0, 2.0), (-2.0, -3.0), (1.0, -1.0))]
    found = agreement(rows)
    assert found["slope"] == pytest.approx((2 + 6 - 1) / 6)
    # Means 0 and -2/3: sums of products 7 - 0, squares 6 and 14 - 3 (2/3)^2.
    assert found["correlation"] == pytest.approx(7 / (6 * (14 - 4 / 3)) ** 0.5)
    assert found["sign_agreement"] == pytest.approx(2 / 3)
    assert found["batches"] == 3


def test_score_against_torch_distributions():
    logits_NV = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row_T, token_T = torch.tensor([0, 0, 4, 2]), torch.tensor([1, 6, 0, 3])
    stats = score(logits_NV, row_T, token_T)
    rows = torch.distributions.Categorical(logits=logits_NV[row_T])
    torch.testing.assert_close(stats.logprob_T, rows.log_prob(token_T))
    torch.testing.assert_close(stats.entropy_T, rows.entropy())
    torch.testing.assert_close(stats.p2_T, rows.probs.square().sum(-1))


def test_a_short_run_writes_what_it_measured(tmp_path):
    prediction_figure.main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "prediction.json").read_text())
    assert (tmp_path / "prediction.png").read_bytes().startswith(b"\x89PNG")
    assert list(results["agreement"]) == [
        "sgd, on policy", "sgd, 4 clipped passes", "adam, on policy", "adam, 4 clipped passes",
    ]  # fmt: skip
    for run in results["agreement"].values():
        again = agreement(
            [{"predicted": p, "realised": r} for p, r in zip(run["predicted"], run["realised"], strict=True)]
        )
        assert {name: run[name] for name in again} == again
    # SGD on policy is the case the prediction is made for, up to shared weights.
    assert results["agreement"]["sgd, on policy"]["slope"] > 0
    assert results["agreement"]["sgd, on policy"]["correlation"] > 0.5
    assert tuple(results["likelihood"]) == ESTIMATORS
    assert all(x is None for x in results["likelihood"]["raft_pp"]["logprob_negative"])
    assert all(x is None for x in results["likelihood"]["nsr"]["logprob_positive"])
    assert all(x < 0 for x in results["likelihood"]["grpo"]["logprob_positive"])
