"""The fused op against plain logits while training: a right op passes, a wrong one stops the run before it learns."""

import contextlib
import dataclasses
import io
import json

import pytest
import torch

import entrocraft.kernels.hf_head as hf_head
from entrocraft import Rollouts, TokenStats
from entrocraft.kernels import FusedHead
from entrocraft.train.config import Config
from entrocraft.train.config_checkpoint import SelfCheckConfig
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.packing import pack
from entrocraft.train.policy import Policy
from entrocraft.train.self_check import differences, due, some_rows
from entrocraft.train.tiny_model import build_tiny_model
from entrocraft.train.train import main


def make_policy(*, tied=True):
    shape = TinyModelConfig(hidden_size=16, layers=1, heads=2, mlp_size=32, context=64, tied=tied)
    model, tokenizer = build_tiny_model(shape, 0)
    with torch.no_grad():
        model.model.norm.weight.mul_(5.0)  # opinions: logits of size 5 instead of 0.3
    return Policy(model, tokenizer, temperature=0.7, device=torch.device("cpu"))


def make_rollouts():
    length_R = torch.tensor([1, 9, 4])
    token_T = torch.arange(14) * 7 % 250
    return Rollouts(
        token_T=token_T,
        rollout_T=torch.arange(3).repeat_interleave(length_R),
        mask_T=torch.ones(14, dtype=torch.bool),
        group_R=torch.tensor([0, 0, 1]),
        sample_R=torch.tensor([0, 1, 0]),
        prompts=((5, 6, 7), (9,)),
        truncated_R=torch.zeros(3, dtype=torch.bool),
        weight_version=0,
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_op_and_logits_agree_and_are_the_models_own(tied):
    policy, rollouts = make_policy(tied=tied), make_rollouts()
    for chosen in range(3):
        batch = some_rows(rollouts, chosen, 16)
        fused, reference = policy.stats_and_reference(batch, rollouts.token_T)
        assert max(differences(fused, reference).values()) < 1e-5
        logit_TV = policy.model(input_ids=batch.input_BL).logits[0] / 0.7
        logp_TV = logit_TV.double().log_softmax(1)[batch.source_N]
        expected = logp_TV.gather(1, rollouts.token_T[batch.token_N][:, None])[:, 0]
        torch.testing.assert_close(reference.logprob_T.double(), expected, atol=1e-5, rtol=1e-5)
        entropy = -(logp_TV.exp() * logp_TV).sum(1)
        torch.testing.assert_close(reference.entropy_T.double(), entropy, atol=1e-5, rtol=1e-5)
    scored = policy.score(rollouts, 64)  # packed with others, as training does it
    rows = some_rows(rollouts, 1, 16)
    alone = policy.stats_and_reference(rows, rollouts.token_T)[1].logprob_T
    torch.testing.assert_close(alone, scored.logprob_T[rows.token_N], atol=1e-5, rtol=0)


def test_the_reference_has_bias_scale_and_softcap():
    policy = make_policy(tied=False)
    head = policy.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.linspace(-1, 1, head.weight.shape[0]))
    policy.model.config.final_logit_softcapping = 2.0
    fused = FusedHead(policy.model)
    hidden_TH, target_T = torch.randn(5, 16), torch.tensor([0, 3, 258, 17, 99])
    reference = fused.reference_stats(hidden_TH, target_T, temperature=0.5)
    z_TV = (2.0 * torch.tanh((hidden_TH @ head.weight.T + head.bias) / 2.0) / 0.5).double()
    expected = z_TV.log_softmax(1).gather(1, target_T[:, None])[:, 0]
    torch.testing.assert_close(reference.logprob_T.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        fused.stats(hidden_TH, target_T, temperature=0.5).logprob_T, reference.logprob_T, atol=1e-5, rtol=0
    )


def test_rows_are_spread_over_one_rollout():
    rollouts = make_rollouts()
    (alone,) = pack(rollouts, [1], 64)
    assert some_rows(rollouts, 1, 3).token_N.tolist() == [1, 5, 9]
    assert some_rows(rollouts, 1, 3).source_N.tolist() == [2, 6, 10]
    assert some_rows(rollouts, 1, 99).token_N.tolist() == alone.token_N.tolist()
    assert some_rows(rollouts, 0, 4).token_N.tolist() == [0]
    assert [step for step in range(1, 12) if due(step, 5)] == [1, 6, 11]
    assert not any(due(step, 0) for step in range(1, 12))


def test_nothing_is_clamped_away():
    """A log-probability above 0, an entropy below 0, NaN and infinity are all differences."""

    def stats(**wrong):
        fields = {name: torch.zeros(2) for name in ("logprob_T", "entropy_T", "lse_T", "p2_T", "p2logp_T")}
        return TokenStats(**fields | {name: torch.tensor([0.0, value]) for name, value in wrong.items()})

    found = differences(stats(logprob_T=1e-3, entropy_T=-1e-2, lse_T=float("nan"), p2_T=float("inf")), stats())
    assert found["logprob_T"] == pytest.approx(1e-3)
    assert found["entropy_T"] == pytest.approx(1e-2)
    assert found["lse_T"] == found["p2_T"] == float("inf")
    assert found["p2logp_T"] == 0.0
    assert differences(stats(lse_T=float("inf")), stats(lse_T=float("inf")))["lse_T"] == 0.0


def trained(work, *overrides):
    """A run of three steps in this process: its exit status, what it said, and its record."""
    (work / "odd_rewards.py").write_text("def odd(completion, answer, prompt): return float(len(completion) % 2)\n")
    problems = [{"prompt": f"{i} plus {i} is", "answer": str(i)} for i in range(4)]
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    tiny = {"hidden_size": 16, "layers": 1, "heads": 2, "mlp_size": 32, "context": 64}
    arguments = [
        *(f"--model.tiny.{name}={value}" for name, value in tiny.items()),
        *(f"--run_dir={work / 'run'}", f"--data.train={work / 'train.jsonl'}", "--device=cpu"),
        *("--batch.prompts_per_step=4", "--batch.samples_per_prompt=4", "--batch.tokens_per_microbatch=64"),
        *("--sampling.max_response_tokens=6", "--reward.name=odd_rewards:odd", "--reward.workers=0"),
        *("--optimizer.steps=3", "--checkpoint.every=1"),
    ]
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.syspath_prepend(str(work))
        code = main([*arguments, *overrides])
    metrics = work / "run" / "metrics.jsonl"
    return code, errors.getvalue(), [json.loads(line) for line in metrics.read_text().splitlines()]


def test_it_is_on_by_default_and_what_it_finds_is_a_metric(tmp_path):
    every = SelfCheckConfig().every
    assert every == Config().self_check.every == 50
    assert [step for step in range(1, 120) if due(step, every)] == [1, 51, 101]
    code, _, rows = trained(tmp_path)  # which says nothing of it
    assert code == 0
    assert [row["step"] for row in rows if "self_check" in row] == [1]
    assert 0 < rows[0]["self_check"] < 1e-5


def test_as_often_as_it_is_told(tmp_path):
    code, _, rows = trained(tmp_path, "--self_check.every=2")
    assert code == 0
    assert [row["step"] for row in rows if "self_check" in row] == [1, 3]
    assert all(0 < row["self_check"] < 1e-5 for row in rows if "self_check" in row)


def test_a_wrong_op_stops_the_run_before_it_learns(tmp_path, monkeypatch):
    """From the third step on the op is off by a hundredth of a nat, as a kernel may be that a driver miscompiles."""
    right, calls = hf_head.linear_logprob_entropy, []

    def wrong(*arguments, **options):
        stats = right(*arguments, **options)
        calls.append(len(stats))
        off = 0.01 if (tmp_path / "run" / "checkpoints" / "step_000002").exists() else 0.0
        return dataclasses.replace(stats, entropy_T=stats.entropy_T - off)

    monkeypatch.setattr(hf_head, "linear_logprob_entropy", wrong)
    code, told, rows = trained(tmp_path, "--self_check.every=2")
    assert calls
    assert code == 1
    assert "stopped: self-check of step 3: the fused head gives entropy that differs by 0.01" in told
    assert "self_check.tolerance = 0.001" in told
    assert [row["step"] for row in rows] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
