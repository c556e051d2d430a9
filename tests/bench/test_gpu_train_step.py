"""The one command for a GPU, at its CPU size and in this process: what it reports is what was run."""

import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_train_step

    yield gpu_train_step
    sys.modules.pop("gpu_train_step", None)


@pytest.mark.parametrize(("part", "ranks"), [("whole", 1), ("rank_of_8", 8)])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_rank_is_measured_and_planned(bench, tmp_path, part, ranks):
    cpu = torch.device("cpu")
    found = bench.run_part(part, "tiny", cpu, tmp_path, 1)
    assert (found["ranks"], found["tokens"]) == (ranks, 128)
    for name in ("score", "update"):
        phase = found[name]
        assert phase["tokens_per_second"] == pytest.approx(128 * (2 if name == "update" else 1) / phase["seconds"])
        assert phase["tflops"] > 0
        assert phase["mfu"] is None  # no peak is known of a CPU
        assert 0 < phase["predicted_gb"] < phase["peak_gb"]  # this process holds more than tensors
    assert not torch.distributed.is_initialized()


def test_a_rank_of_eight_keeps_an_eighth(bench):
    cpu = torch.device("cpu")
    kept = {}
    for ranks in (1, 8):
        with bench.joined(ranks, cpu):
            step = bench.Step("tiny", cpu, ranks)
            kept[ranks] = sum(parameter.to_local().numel() for parameter in step.policy.model.parameters())
            rollouts = step.batch(2)
            assert (rollouts.R, rollouts.T) == (2, 2 * 49)
    assert kept[8] == pytest.approx(kept[1] / 8, rel=0.01)
    assert bench.largest("tiny", cpu) == {"skipped": "a CPU has no limit that torch would keep to"}
