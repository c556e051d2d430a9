"""The one command for a GPU, at its CPU size: what it reports is what was run, and what failed is said."""

import json
import math
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
    Every token has a gradient, so none are packed.
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
            for not_seen in ("gathered weights", "packed rows", "head buffer"):
                parts.pop(not_seen, None)
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


def test_after_memory_ran_out_in_a_backward_pass_the_rank_has_its_eighth_again(bench):
    def fail(*arguments):
        raise torch.OutOfMemoryError

    cpu = torch.device("cpu")
    with bench.joined(8, cpu):
        step = bench.Step("tiny", cpu, 8)

        def held():
            parameters = list(step.policy.model.parameters())
            return [parameter.to_local().numel() if isinstance(parameter, DTensor) else 0 for parameter in parameters]

        assert bench.runs(step, 1)
        before = held()
        hook = step.policy.model.model.layers[1].register_full_backward_hook(fail)
        assert not bench.runs(step, 1)
        hook.remove()
        assert bench.runs(step, 1)
        assert held() == before
        assert min(before) > 0


@pytest.mark.parametrize("most", [0, 1, 2, 127, 128, 200, 255, 256, 1000])
def test_the_search_finds_the_largest_number_that_fits(bench, most):
    asked = []

    def fits(count):
        asked.append(count)
        return count <= most

    assert bench.most_that_fit(fits, 256) == min(most, 256)
    assert len(asked) == len(set(asked)) <= 9
    assert set(asked) <= set(range(1, 257))
    for limit in (1, 2, 3):
        assert bench.most_that_fit(lambda count: count <= most, limit) == min(most, limit)


def test_both_ends_of_the_search_are_said(bench):
    assert bench.answer(17, 4096) == {"tokens_per_microbatch": 17 * 4096}
    none, capped = bench.answer(0, 4096), bench.answer(256, 4096)
    assert none["tokens_per_microbatch"] == 0
    assert "not one sequence of 4096 tokens fits" in none["note"]
    assert capped["tokens_per_microbatch"] == 1 << 20
    assert "more than 256 sequences were not tried" in capped["note"]


def test_the_command_on_a_cpu(bench, tmp_path):
    """All parts at once, each really in a process of its own: a minute of one core."""
    assert bench.main(["--out", str(tmp_path), "--device", "cpu", "--rounds", "1"]) == 0
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["gpu_train_step.json"]
    report = json.loads((tmp_path / "gpu_train_step.json").read_text())
    assert (report["device"], report["size"]) == ("cpu", "tiny")
    assert report["versions"]["torch"] == torch.__version__
    parts = report["parts"]
    assert list(parts) == ["whole", "rank_of_8", "largest", "demo", "demo_gpu"]
    assert parts["largest"] == {"skipped": "a CPU has no limit that torch would keep to"}
    check_steps(parts["whole"], 1)
    check_steps(parts["rank_of_8"], 8)
    assert parts["whole"]["update"]["predicted_gb"] > parts["rank_of_8"]["update"]["predicted_gb"]
    starts = [check_demo(parts[name]) for name in ("demo", "demo_gpu")]
    assert abs(starts[0] - starts[1]) > 1e-6  # they are two models


def check_steps(part, ranks):
    """Two sequences of 64 tokens, 49 of which have a row in the head; 3 blocks, V = 1,000, H = 64."""
    # Two operations for each: a block's weights and token; pair of tokens and width of all heads; logit and width.
    block = 2 * 64 * (64 + 32) + 3 * 64 * 128 + 2 * 64 + 2 * 16
    forward = 2 * (3 * block * 128 + 3 * 4 * 16 * 2 * 64**2 + 1000 * 64 * 2 * 49)
    assert (part["ranks"], part["tokens"]) == (ranks, 128)
    for name, rounds in (("score", 1), ("update", 2)):
        phase = part[name]
        passes = 6 if name == "update" else 1  # two forward, and two backward of twice the work
        assert phase["tokens_per_second"] == pytest.approx(128 * rounds / phase["seconds"])
        assert phase["tflops"] * 1e12 * phase["seconds"] / passes == pytest.approx(forward)
        assert phase["predicted_over_measured"] == pytest.approx(phase["predicted_gb"] / phase["peak_gb"])


def check_demo(part):
    """Two steps of three arms. They start as one model, which knows nothing after one lesson: near log 600 nats; the
    entropy at the first step is returned."""
    arms = part["arms"]
    assert list(arms) == ["none", "soft", "budget"]
    assert 0 < sum(arm["seconds"] for arm in arms.values()) < part["seconds"]
    first = arms["none"]["entropy_start"]
    for arm in arms.values():
        entropy, target = arm["entropy"], arm["target"]
        assert entropy == pytest.approx([math.log(600)] * 2, rel=0.05)
        assert entropy[0] == arm["entropy_start"] == first < math.log(600)
        assert target == pytest.approx([(first + 0.5) / 2, 0.5])  # linear to 0.5 in two steps
        errors = [abs(e - t) for e, t in zip(entropy, target, strict=True)]
        assert arm["tracking_mae"] == pytest.approx(sum(errors) / 2)
        assert 0 <= arm["reward"] <= arm["pass_at_2"] <= 1
    return first


def test_a_part_that_fails_takes_no_other_with_it(bench, tmp_path, capsys):
    (tmp_path / "demo").write_text("in the way of the folder\n")
    argv = ["--out", str(tmp_path), "--device", "cpu", "--size", "tiny", "--parts", "demo", "largest"]
    assert bench.main(argv) == 1
    report = json.loads((tmp_path / "gpu_train_step.json").read_text())
    assert list(report["parts"]) == ["demo", "largest"]
    assert "the demo ended with" in report["parts"]["demo"]["error"]
    assert str(tmp_path / "demo") in report["parts"]["demo"]["error"]
    assert report["parts"]["largest"] == {"skipped": "a CPU has no limit that torch would keep to"}
    assert json.loads(capsys.readouterr().out) == report


def test_a_part_that_does_not_end_is_given_up(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PART_SECONDS", 0.1)
    assert bench.main(["--out", str(tmp_path), "--device", "cpu", "--parts", "whole"]) == 1
    report = json.loads((tmp_path / "gpu_train_step.json").read_text())
    assert "timed out after 0.1 seconds" in report["parts"]["whole"]["error"]


def test_a_gpu_that_is_not_there_is_asked_for(bench, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as ended:
        bench.main(["--out", str(tmp_path / "nothing"), "--device", "cuda"])
    assert ended.value.code == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
