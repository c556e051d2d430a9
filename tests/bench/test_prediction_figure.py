"""The prediction figure: its policy's gradients and numbers by hand, and a short real run."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import prediction_figure  # noqa: E402
from prediction_figure import ESTIMATORS, LIKELIHOOD, agreement, condition, score, train  # noqa: E402

from entrocraft.train.demo import provenance  # noqa: E402


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


def test_the_condition_by_hand():
    """One row p = (1/2, 1/4, 1/4): H = 1.5 log 2, S = (log 2 / 4, -log 2 / 8, -log 2 / 8), Sbar = log 2 / 16."""
    log_2 = math.log(2.0)
    logits_NV = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    token_T, rollout_T = torch.tensor([0, 1, 1, 0, 0, 2]), torch.tensor([0, 0, 0, 1, 1, 2])
    member_T = rollout_T < 2
    stats = score(logits_NV, torch.zeros(6, dtype=torch.int64), token_T)
    found = condition(stats, rollout_T, member_T, torch.tensor([1.0, -1.0, -1.0]))
    likely = 3 / 16 * log_2  # S - Sbar of the first token; that of the others is -likely
    expected = {
        "share_tokens": 3 / 5,
        "share_sequences": 1 / 2,
        "logprob_positive": -5 / 3 * log_2,
        "logprob_negative": -log_2,
        "score_token_lower": -likely,
        "score_token_median": likely,
        "score_token_upper": likely,
        "score_sequence_lower": 0.0,  # of -likely / 3 and likely
        "score_sequence_median": likely / 3,
        "score_sequence_upper": 2 / 3 * likely,
    }
    assert found == pytest.approx(expected, abs=1e-12)
    nothing = condition(stats, rollout_T, torch.zeros(6, dtype=torch.bool), torch.zeros(3))
    assert nothing.keys() == found.keys()
    assert all(math.isnan(value) for value in nothing.values())


def test_who_is_taken_out_is_in_no_denominator():
    """The first batch is the same for all; each of its rollouts has as many tokens."""
    first = {name: train(name, "sgd", 1, 1, seed=0)[0] for name in ("psr", "raft_pp", "nsr", "nsr_parity")}
    right = first["nsr"]["reward"]
    assert 0.2 < right < 0.8
    assert first["psr"]["predicted"] == pytest.approx(first["raft_pp"]["predicted"] / right)
    assert first["nsr"]["predicted"] == pytest.approx(first["nsr_parity"]["predicted"] / (1 - right))
    assert abs(first["nsr"]["realised"]) > 1.2 * abs(first["nsr_parity"]["realised"])
    for share in ("share_tokens", "share_sequences"):
        parts = right * first["psr"][share] + (1 - right) * first["nsr"][share]
        assert first["nsr_parity"][share] == first["raft_pp"][share] == pytest.approx(parts)
        assert first["nsr"][share] != first["nsr_parity"][share]


def test_a_short_run_writes_what_it_measured(tmp_path):
    prediction_figure.main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "prediction.json").read_text())
    assert (tmp_path / "prediction.png").read_bytes().startswith(b"\x89PNG")
    assert {name: results[name] for name in ("commit", "versions", "machine")} == provenance()
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
    assert all(tuple(curve) == LIKELIHOOD for curve in results["likelihood"].values())
    assert results["likelihood"]["nsr"]["entropy"][1:] != results["likelihood"]["nsr_parity"]["entropy"][1:]
    assert all(x is None for x in results["likelihood"]["raft_pp"]["logprob_negative"])
    assert all(x is None for x in results["likelihood"]["nsr"]["logprob_positive"])
    assert all(x < 0 for x in results["likelihood"]["grpo"]["logprob_positive"])
