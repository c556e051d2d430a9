"""What the benchmarks of policy loss, scoring and decisions check before they time: wrong answers do not pass."""

import os
import subprocess
import sys
from pathlib import Path

import bench_policy_loss
import bench_rejection
import bench_scoring
import pytest
import torch
from bench_policy_loss import CALLS, limits
from bench_rejection import RULES, exact_changes, exact_keep, make_step
from suite_cases import Shape
from suite_contest import Contender, Measured, complaint

from entrocraft import EntropyController, predicted_entropy_change

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module", params=[64, 70], ids=["whole rollouts", "a ragged one"])
def field(request):
    """The contenders of the policy loss, as they would be timed."""
    found: dict[str, Contender] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_policy_loss, "compete", lambda field, device, rounds: found.update(field))
        bench_policy_loss.group.__wrapped__(Shape(request.param, 32, 2000), "cpu", 1, tuple(CALLS))
    return found


@pytest.mark.parametrize("name", CALLS)
def test_a_policy_loss_is_right_and_one_without_gradients_is_refused(name, field):
    contender = field[name]
    loss, answer, gradients = contender.thunk()
    errors = contender.errors((loss, answer, gradients))
    assert complaint(name, errors, contender.bounds) is None, errors
    assert {"loss", "hidden_grad", "weight_grad"} <= set(errors)
    assert ("logprob_mean" in errors) == (name != "liger_chunked_grpo")
    assert contender.bounds == limits(CALLS[name])
    for number, which in enumerate(("hidden_grad", "weight_grad")):
        nothing = [torch.zeros_like(value) if place == number else value for place, value in enumerate(gradients)]
        assert f"{which} 1 > " in str(complaint(name, contender.errors((loss, answer, nothing)), contender.bounds))
    assert "loss" in str(complaint(name, contender.errors((loss + 0.1, answer, gradients)), contender.bounds))


def test_a_ragged_last_sequence_is_padded_and_scored_as_it_is_alone():
    shape = Shape(300, 32, 600)
    model = bench_scoring.make_model(shape, "cpu").float()
    input_BL, target_T = bench_scoring.make_batch(shape, "cpu")
    assert input_BL.shape == (3, 128)
    assert target_T.shape == (384,)
    assert input_BL.flatten()[:300].roll(-1)[:299].equal(target_T[:299])
    with torch.no_grad():
        found_T = bench_scoring._logits(model, input_BL, target_T)[0][256:300]
        alone_T = bench_scoring._logits(model, input_BL[2:, :44], target_T[256:300])[0]
    assert found_T.sub(alone_T).abs().max() < 1e-4
    assert bench_scoring.make_batch(Shape(256, 32, 600), "cpu")[0].shape == (2, 128)
    assert bench_scoring.make_batch(Shape(20, 32, 600), "cpu")[0].shape == (1, 20)


def test_entropy_changes_are_those_the_controller_predicts():
    step = make_step(64, 64)
    rollout_T, advantage_R = step["rollout_T"], step["advantage_R"]
    change_T = predicted_entropy_change(step["stats"], lambda logprob_T: -(advantage_R[rollout_T] * logprob_T).mean())
    predicted_R = torch.zeros(64).index_add(0, rollout_T, change_T)
    exact_R = exact_changes(step)
    assert float((predicted_R - exact_R).norm() / exact_R.norm()) < 1e-5


def test_decisions_are_made_a_second_time_and_differ_from_rule_to_rule():
    found = bench_rejection.group.__wrapped__(64, 64, 1)
    for rule in RULES:
        assert isinstance(measured := found[rule], Measured)
        assert measured.info["errors"].get("decision") == (None if rule == "soft" else 0.0)
    step = make_step(64, 64)
    target = float(step["stats"].entropy_T.mean()) - 0.2
    kept = {rule: keep_R for rule in RULES if (keep_R := exact_keep(rule, step, target)) is not None}
    counts = {rule: int(keep_R.sum()) for rule, keep_R in kept.items()}
    assert counts["none"] == 64 > counts["budget"] > counts["first_order"] > 32 > counts["hard"]


def test_a_decision_that_keeps_another_rollout_is_refused(monkeypatch):
    class Other(EntropyController):
        def decide(self, **given):
            decision = super().decide(**given)
            decision.keep_R[[0, 1]] = ~decision.keep_R[[0, 1]]
            decision.keep_T[:] = decision.keep_R[given["rollout_T"]]
            decision.metrics["kept_fraction"] = float(decision.keep_R.double().mean())
            return decision

    monkeypatch.setattr(bench_rejection, "EntropyController", Other)
    found = bench_rejection.group.__wrapped__(64, 64, 1)
    assert isinstance(found["soft"], Measured)
    for rule in ("none", "hard", "first_order", "budget"):
        assert found[rule] == f"{rule} is wrong and is not timed: decision 0.0312 > 0"


INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
from rivals import all_rivals, run
from suite_cases import JOBS, Shape, make_operands
from suite_errors import Truth
rivals = {rival.name: rival for rival in all_rivals()}
for name in ("liger_linear_ce", "liger_linear_ce_fp32", "liger_linear_ce_tokens"):
    for job_name in ("logprob", "frozen", "half_zero", "mean_loss"):
        job = JOBS[job_name]
        if rivals[name].does(job_name, job):
            operands = make_operands(Shape(16, 32, 300), job, "peaked", device="cpu")
            errors = Truth(operands, job).errors(*run(rivals[name], operands, job))
            assert errors and max(errors.values()) < 1e-5, (name, job_name, errors)
            print(name, job_name, *errors)
"""


@pytest.mark.slow
def test_liger_s_linear_cross_entropies_are_right_in_triton_s_interpreter():
    command = [sys.executable, "-P", "-c", INTERPRETED, str(BENCH)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert run.returncode == 0, run.stderr
    said = [line.split() for line in run.stdout.splitlines()]
    assert [line[:2] for line in said if line[0].startswith("liger")] == [
        ["liger_linear_ce", "mean_loss"], ["liger_linear_ce_fp32", "mean_loss"],
        *(["liger_linear_ce_tokens", name] for name in ("logprob", "frozen", "half_zero", "mean_loss")),
    ]  # fmt: skip
    assert said[0][2:] == ["loss", "hidden_grad", "weight_grad"]
