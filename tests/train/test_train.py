"""The whole loop: resumed, misused, and fed with rewards that misbehave. What else may happen is in test_faults.py."""

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from entrocraft.train.checkpoint import CheckpointFolder
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.config_reader import load_config
from entrocraft.train.metrics import depends_on_the_clock
from entrocraft.train.run import Run
from entrocraft.train.spread import SpreadEngine
from entrocraft.train.tiny_model import build_tiny_model

SCRIPT = Path(__file__).resolve().parents[2] / "train" / "train.py"

REWARDS = '''
import time

def odd(completion, answer, prompt):
    return float(len(completion) % 2)

def mute(completion, answer, prompt):
    return None

seen = 0

def late(completion, answer, prompt):
    global seen
    seen += 1
    return 0.0 if seen <= 32 else float(len(completion) % 2)

def huge(completion, answer, prompt):
    return 3e38 * (len(completion) % 2)

def troubled(completion, answer, prompt):
    """Hangs on the first problem, raises on the second, has no verdict on the third."""
    if answer == "0":
        time.sleep(60)
    if answer == "1":
        raise RuntimeError("no idea")
    return None if answer == "2" else float(len(completion) % 2)
'''


@pytest.fixture
def work(tmp_path):
    """A folder with problems, rewards that can be imported, and a small configuration."""
    prepare(tmp_path)
    return tmp_path


def prepare(folder):
    (folder / "my_rewards.py").write_text(REWARDS)
    problems = [{"prompt": f"{i} plus {i} is", "answer": str(i)} for i in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    config = {
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "model": {"tiny": {"hidden_size": 16, "layers": 1, "heads": 2, "mlp_size": 32, "context": 64}},
        "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 32},
        "batch": {"prompts_per_step": 4, "samples_per_prompt": 4, "updates_per_step": 2, "tokens_per_microbatch": 128},
        "sampling": {"max_response_tokens": 6},
        "reward": {"name": "my_rewards:odd", "workers": 0},
        "loss": {"passes": 2},
        "entropy": {"rule": "budget", "schedule": {"start": "measured", "end": 5.0}, "width": 0.05},
        "optimizer": {"steps": 12, "lr": 0.01},
        "checkpoint": {"every": 3},
        "logging": {"report": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


def environment(work):
    return {**os.environ, "PYTHONPATH": str(work), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def here(work, *overrides, code=0):
    """A run in this process: what it wrote to standard output and standard error."""
    from entrocraft.train.cli import report_errors
    from entrocraft.train.train import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.syspath_prepend(str(work))
        patch.delitem(sys.modules, "my_rewards", raising=False)  # `late` counts its calls, from none in a new process
        assert report_errors(lambda: main([f"--config={work / 'run.yaml'}", *overrides])) == code, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def rows(folder):
    """The metrics of a run without those of the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not depends_on_the_clock(key)} for row in lines]


def test_less_memory_from_a_checkpoint_on_is_the_same_run(work):
    """The remedies of a run that is out of memory: smaller micro-batches and batches of rollouts, recomputation.

    Advantages that are no differences: a loss in which they cancel is nearly all rounding.
    """
    short = ["--optimizer.steps=6", "--optimizer.lr=1e-4", "--entropy.rule=null", "--reference.kl_coefficient=0.01"]
    short.append("--loss.advantage=reinforce")
    here(work, *short)
    whole = rows(work / "run")
    for folder in (work / "run" / "checkpoints").iterdir():
        if folder.name > "step_000003":
            shutil.rmtree(folder)
    smaller = ["--batch.tokens_per_microbatch=40", "--model.gradient_checkpointing=true", "--reference.offload=true"]
    here(work, *short, "--resume=auto", *smaller, "--sampling.rollouts_per_batch=3")
    again = rows(work / "run")
    assert [row["step"] for row in again] == [1, 2, 3, 4, 5, 6]
    assert again[:3] == whole[:3]
    for name in ("loss", "grad_norm", "entropy", "reward", "reference_kl"):
        new, old = ([row[name] for row in made[3:]] for made in (again, whole))
        rounding = 1e-8 if name == "reference_kl" else 0.0  # a mean of squares of what float32 knows to 1e-6
        assert new == pytest.approx(old, rel=1e-5, abs=rounding), name
    assert [row["grad_norm"] for row in again[3:]] != [row["grad_norm"] for row in whole[3:]], "as if nothing changed"


def test_a_run_is_not_written_over_and_not_mixed_with_other_settings(work):
    here(work, "--optimizer.steps=3")
    done = here(work, code=2)
    assert "already holds a run (step_000003); go on with --resume auto" in done.stderr
    done = here(work, "--resume=auto", "--optimizer.lr=0.5", code=2)
    assert "optimizer.lr: 0.01 -> 0.5" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    done = here(work, "--resume=auto", "--optimizer.steps=4", code=2)  # the schedule spans the run: another curve
    assert "optimizer.steps: 3 -> 4" in done.stderr
    fixed = ("--entropy.schedule.steps=12", f"--run_dir={work / 'fixed'}")
    here(work, *fixed, "--optimizer.steps=3")
    here(work, *fixed, "--resume=auto", "--optimizer.steps=4")  # with a curve of its own, a longer run is the same run
    timed = (*fixed, "--loss.method=flexible_clip", f"--run_dir={work / 'timed'}")
    here(work, *timed, "--optimizer.steps=3")
    done = here(work, *timed, "--resume=auto", "--optimizer.steps=4", code=2)  # but not with a timetable of the run
    assert "optimizer.steps: 3 -> 4" in done.stderr
    assert [row["step"] for row in rows(work / "fixed")] == [1, 2, 3, 4]
    (work / "begun").mkdir()
    (work / "begun" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "no checkpoint yet, but metrics" in here(work, f"--run_dir={work / 'begun'}", code=2).stderr


def test_misbehaving_rewards_are_counted_and_the_run_goes_on(work):
    names = ("--reward.name=my_rewards:troubled", "--reward.workers=2", "--reward.timeout_s=0.5")
    here(work, *names, "--batch.prompts_per_step=12", "--batch.samples_per_prompt=2", "--optimizer.steps=2")
    for row in rows(work / "run"):
        assert (row["reward_timeouts"], row["reward_errors"], row["reward_unscorable"]) == (2, 2, 2)
        assert math.isfinite(row["reward"])
    events = [json.loads(line) for line in (work / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "reward_failed"] == [1, 2]
    assert "no idea" in events[0]["first"]


def test_a_gradient_that_overflows_skips_the_step_counts_it_dumps_the_batch_and_stops(work):
    huge = ("--reward.name=my_rewards:huge", "--loss.advantage=dr_grpo", "--optimizer.max_bad_steps=2")
    done = here(work, *huge, "--entropy.rule=none", code=1)
    assert "stopped: 2 steps in a row could not be trained on" in done.stderr
    assert [row["steps_skipped"] for row in rows(work / "run")] == [1, 1]
    events = [json.loads(line) for line in (work / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["step_skipped", "step_skipped"]
    assert "the gradient norm is" in events[0]["reason"]
    batch = torch.load(events[0]["batch"], weights_only=True)
    assert len(batch["prompts"]) == 4
    assert len(batch["group_R"]) == len(batch["reward_R"]) == 16
    assert set(batch["reward_R"].tolist()) == {0.0, float(torch.tensor(3e38))}


def test_nan_in_hidden_skips_that_step_and_the_next_one_learns(work, monkeypatch):
    """In this process, with a fault injected into the backbone's last norm while step 2 is scored."""
    from entrocraft.train.config_reader import load_config
    from entrocraft.train.metrics import MetricsLog
    from entrocraft.train.rewards import RewardPool
    from entrocraft.train.run import Run
    from entrocraft.train.train import train_step

    monkeypatch.syspath_prepend(str(work))
    training = Run(load_config([f"--config={work / 'run.yaml'}"]))
    training.begin(None)
    score = training.policy.score

    def poisoned_score(*arguments, **options):
        norm = training.policy.model.model.norm
        with norm.register_forward_hook(lambda module, inputs, output: output * float("nan")):
            return score(*arguments, **options)

    def weights():
        return torch.cat([p.detach().flatten() for p in training.policy.model.parameters()])

    seen, moved, said = [], [], []
    pool = RewardPool("my_rewards:odd", workers=0, timeout_s=1.0)
    with pool, MetricsLog(training.dir, resume_step=None) as log:
        for step in (1, 2, 3):
            training.step, before = step, weights()
            with monkeypatch.context() as patch:
                if step == 2:
                    patch.setattr(training.policy, "score", poisoned_score)
                row = train_step(training, pool, log, said.append)
            log.log(step, row)
            seen.append(row["steps_skipped"])
            moved.append(not torch.equal(before, weights()))
    training.end()
    assert seen == [0, 1, 0]
    assert [line[:14] for line in said] == ["step 2 skipped"]
    assert moved == [True, False, True]
    assert training.samples == 3 * 16
    events = [json.loads(line) for line in (training.dir / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [2]
    assert "log-probability" in events[0]["reason"]
    assert Path(events[0]["batch"]).is_file()


def test_broken_weights_are_refused_with_the_reason(work):
    shape = TinyModelConfig(hidden_size=16, layers=1, heads=2, mlp_size=32, context=64)
    model, tokenizer = build_tiny_model(shape, 0)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(work / "broken")
    tokenizer.save_pretrained(work / "broken")
    done = here(work, f"--model.path={work / 'broken'}", code=2)
    assert "Qwen3ForCausalLM gives hidden states that are not numbers: its weights are broken" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["--batch.tokens_per_microbatch=16"], "expected at least 18"),
        (["--loss.aggregation=tokenmean"], "did you mean 'token_mean'?"),
        (["--loss.clip_low=2"], "clip_low = 2"),
        (["--optimizer.betas=[2,0.9]"], "optimizer.betas = (2.0, 0.9): expected two numbers in [0, 1)"),
        (["--optimizer.warmup_steps=-5"], "optimizer.warmup_steps = -5: expected 0 or more"),
        (["--entropy.preset=paper_v1", "--entropy.rule=null", "--loss.aggregation=kept_tokens"], "brings its own"),
        (["run.yaml"], "write --config run.yaml"),
        (["--data.answer_field=anser"], "did you mean 'answer'?"),
        (["--data.max_prompt_tokens=4"], "the limit max_prompt_tokens is 4"),
        (["--model.tiny.context=18"], "the limit is the model's context of 18 tokens less 6 for the response"),
        (["--sampling.max_response_tokens=64"], "has no room left for a prompt"),
        (["--entropy.rule=budgett"], "unknown rule 'budgett': did you mean 'budget'?"),
        (["--entropy.schedule.kind=linera"], "unknown schedule 'linera': did you mean 'linear'?"),
        (["--entropy.schedule.start=9"], "log(vocab_size = 259)"),
        (["--loss.advantage=grop"], "did you mean 'grpo'?"),
        (["--batch.prompts_per_step=14"], "has only 12 usable problems"),
        (["--model.path=./missing"], "model.path = './missing': no such folder"),
        (["--model.path=missing/model"], "neither a folder with a model"),
        (["--device=cuda:7"], "no CUDA device here"),
        (["--reward.name=odd"], "unknown reward 'odd'"),
    ],
    ids=lambda value: value[0].split("=")[0].strip("-") if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_anything_is_written(work, overrides, message):
    if "cuda" in overrides[0] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    told = here(work, *overrides, code=2).stderr.strip()
    assert told.startswith("error: ")
    assert message in told
    assert not (work / "run").exists()


def test_switch_refuses_rewards_of_0_and_1(work):
    done = here(work, "--entropy.preset=paper_code", "--entropy.rule=null", code=2)
    assert "-1" in done.stderr
    here(work, "--entropy.preset=paper_code", "--entropy.rule=null", "--reward.signed=true", "--resume=auto")
    assert rows(work / "run")[-1]["reward"] < 1
    assert (work / "run" / "config.yaml").exists()


def test_a_checkpoint_before_the_first_update_changes_nothing(work):
    """No reward differs within a group until step 3, so the optimizer is unused when the first checkpoints are made."""
    late = ("--reward.name=my_rewards:late", "--entropy.rule=none", "--optimizer.steps=6")
    here(work, *late, "--checkpoint.every=1")
    here(work, *late, "--checkpoint.every=100", f"--run_dir={work / 'whole'}")
    updates = [row["updates"] for row in rows(work / "whole")]
    assert updates[:2] == [0, 0]
    assert updates[-1] > 0
    assert rows(work / "run") == rows(work / "whole")


def test_a_run_goes_on_beside_an_engine_that_rests(work, monkeypatch):
    """Loading makes gradients and moments of the optimizer, for which an engine that is awake leaves no room."""
    order = []
    load = CheckpointFolder.load_newest
    monkeypatch.setattr(SpreadEngine, "rest", lambda self: order.append("rest"))
    monkeypatch.setattr(CheckpointFolder, "load_newest", lambda self, *rest: order.append("load") or load(self, *rest))
    config = load_config([f"--config={work / 'run.yaml'}"])
    monkeypatch.syspath_prepend(str(work))
    assert Run(config).resume() is None
    assert order == ["rest", "load"]


def test_no_verdict_at_all_stops_the_run_with_a_checkpoint(work):
    done = here(work, "--reward.name=my_rewards:mute", "--optimizer.max_bad_steps=2", "--logging.report=true", code=1)
    assert "stopped: 2 steps in a row could not be trained on" in done.stderr
    assert "none of 16 rollouts has a verdict" in done.stdout
    assert [path.name for path in (work / "run" / "checkpoints").iterdir()] == ["step_000002"]
    assert (work / "run" / "report.html").exists()


def test_the_record_is_on_the_disk_before_the_checkpoint_that_needs_it(work, monkeypatch):
    order, fsync = [], os.fsync

    def watched(descriptor):
        order.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    here(work, "--optimizer.steps=3")
    assert order.index("metrics.jsonl") < order.index("COMPLETE.json") < order.index("checkpoints")


def test_real_problems_through_the_shipped_configuration(work):
    """GSM8K's fields and marks, graded by math-verify in worker processes, with a long problem that is dropped."""
    rows_in = [
        {"question": f"What is {i} + {i}?", "answer": f"Twice {i} is <<{i}*2={2 * i}>>.\n#### {2 * i:,}"}
        for i in range(600, 605)
    ]
    rows_in.append({"question": "What is 1 + 1? " * 60, "answer": "#### 2"})
    (work / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_in))
    config = SCRIPT.parent / "configs" / "gsm8k_tiny.yaml"
    short = (
        "--optimizer.steps=2",
        "--sampling.max_response_tokens=8",
        f"--run_dir={work / 'gsm'}",
        "--device=cpu",
        "--logging.report=false",
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT), f"--config={config}", f"--data.train={work / 'gsm8k.jsonl'}", *short],
        env=environment(work),
        text=True,
        cwd=work,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for row in rows(work / "gsm"):
        assert (row["reward"], row["reward_unscorable"], row["reward_errors"]) == (0, 0, 0)
        assert 5 < row["entropy"] < math.log(259)
    (event,) = [json.loads(line) for line in (work / "gsm" / "events.jsonl").read_text().splitlines()]
    assert (event["kind"], event["count"]) == ("prompts_dropped", 1)


def test_evaluation_of_a_finished_run(work):
    from entrocraft.train.cli import main

    here(work, "--optimizer.steps=2", f"--data.eval={work / 'train.jsonl'}")
    last = rows(work / "run")[-1]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.syspath_prepend(str(work))
        assert main(["eval", str(work / "run"), "--samples", "4"]) == 0
    result = json.loads((work / "run" / "eval" / "results.json").read_text())["sets"]["eval"]
    assert result["problems"] == 12
    assert 0 < result["accuracy"] < 1
    assert result["pass_at_4"] >= result["accuracy"]
    assert 0 < result["distinct_correct"] <= 4
    assert result["entropy"] == pytest.approx(last["eval_entropy"], abs=0.1)
