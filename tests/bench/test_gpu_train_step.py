"""The one command for a GPU, at its CPU size and in this process: what it reports is what was run."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from entrocraft.train.plan import make_plan
from entrocraft.train.plan_trace import Allocations

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
        assert phase["predicted_over_measured"] == pytest.approx(phase["predicted_gb"] / phase["peak_gb"])
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_what_is_planned_is_what_a_round_allocates(bench, ranks):
    """Every storage that operations make, counted, against the plan's parts of the same phase: what is kept from step
    to step exactly, and the most at one time of what comes and goes. The process itself would hide it all.

    After a round, FSDP's buffers are there already and only change size, so gathered weights are not counted. The
    head's workspace is the CPU's here: one fp32 [tokens, V] in a backward pass, and nothing that is seen in a forward.
    """
    cpu, sequences = torch.device("cpu"), 8
    shape = bench.SIZES["tiny"][0]
    config = bench.settings("tiny", sequences, "cpu")
    plan = {phase.name: phase.parts for phase in make_plan(config, ranks, shape=json.dumps(shape)).phases}
    with bench.joined(ranks, cpu):
        step = bench.Step("tiny", cpu, ranks)
        rollouts = step.batch(sequences)
        for name, workspace in (("update", 4 * rollouts.T * shape["vocab_size"]), ("score", 0)):
            run, parts = getattr(step, name), dict(plan[name])
            run(rollouts)
            with Allocations() as seen:
                run(rollouts)
            kept = {kind: parts.pop(kind) for kind in ("weights", "optimizer")}
            for not_seen in ("gathered weights", "head buffer"):
                del parts[not_seen]
            assert seen.peak == pytest.approx(sum(parts.values()) + workspace, rel=0.08)
        parameters = list(step.policy.model.parameters())
        state = [value for p in parameters for value in step.optimizer.state[p].values()]
        for kind, tensors in (("weights", parameters), ("optimizer", state)):
            local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
            assert sum(tensor.untyped_storage().nbytes() for tensor in local) == kept[kind]


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
