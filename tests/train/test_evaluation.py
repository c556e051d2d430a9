"""Evaluation with a real model: what it counts, that a stopped one goes on, and the same during training."""

import contextlib
import io
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.config_reader import load_config
from entrocraft.train.engines import sampled_context
from entrocraft.train.eval_command import load_policy, main
from entrocraft.train.evaluation import evaluate, sampling_settings
from entrocraft.train.metrics import read_samples
from entrocraft.train.policy import Policy
from entrocraft.train.problem_sets import Problems, load_held_out
from entrocraft.train.rewards import RewardPool
from entrocraft.train.sampling import HuggingFaceEngine
from entrocraft.train.tiny_model import build_tiny_model

REWARDS = """
from pathlib import Path

def even(completion, answer, prompt):
    return None if completion == "" else float(len(completion) % 2 == 0)

def short(completion, answer, prompt):
    return float(len(completion) < 4)

calls = 0

def stops(completion, answer, prompt):
    global calls
    calls += 1
    if Path(__file__).with_name("stop").exists() and calls > 18:
        raise KeyboardInterrupt
    return even(completion, answer, prompt)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A small model, two held-out sets in different columns, training problems of which two repeat held-out ones."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "eval_rewards.py").write_text(REWARDS)
    shape = TinyModelConfig(hidden_size=16, layers=1, heads=2, mlp_size=32, context=64)
    model, tokenizer = build_tiny_model(shape, 0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("train.jsonl", [{"prompt": f"{i} plus {i} is", "answer": str(i)} for i in range(12)])
    write("held.jsonl", [{"prompt": f"{i} plus {i} is", "answer": str(i)} for i in range(10, 15)])
    write("other.jsonl", [{"question": f"count to {i}", "gold": i} for i in range(7)])
    sets = {"other": {"path": str(tmp_path / "other.jsonl"), "prompt_field": "question", "answer_field": "gold"}}
    config = {
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "held.jsonl"), "max_prompt_tokens": 32},
        "batch": {"prompts_per_step": 2, "samples_per_prompt": 2, "tokens_per_microbatch": 256},
        "sampling": {"max_response_tokens": 6},
        "reward": {"name": "eval_rewards:even", "workers": 0, "also": {"eval_rewards:short": 0}},
        "entropy": {"rule": "none"},
        "optimizer": {"steps": 4, "lr": 0.01},
        "checkpoint": {"every": 2},
        "evaluation": {"samples": 4, "sets": sets, "every": 2, "rollouts_per_batch": 8, "saved_samples": 3},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def parts(work):
    config = load_config([f"--config={work / 'run.yaml'}"])
    policy = Policy.load(config.model, temperature=1.0, device=torch.device("cpu"), seed=0)
    engine = HuggingFaceEngine(policy.model, config.sampling, eos_ids=policy.eos_ids, pad_id=policy.pad_id)
    return config, policy, engine, load_held_out(config, policy.tokenizer, context=policy.context)


def test_outcomes_are_what_the_responses_say(parts):
    """Every number of an outcome again, from the responses as they are saved."""
    config, policy, engine, (held, other) = parts
    assert [problem.answer for problem in other.problems] == [str(i) for i in range(7)]
    with RewardPool.of(config.reward) as pool:
        batches = list(evaluate(policy, engine, held, pool, config, stream=(1, 2)))
    assert [len(outcomes) for outcomes, _ in batches] == [2, 2, 1]
    outcomes = [outcome for some, _ in batches for outcome in some]
    rows = [row for _, some in batches for row in some]
    assert [outcome.problem for outcome in outcomes] == list(range(5))
    assert Counter(row["problem"] for row in rows) == dict.fromkeys(range(5), 4)
    for outcome in outcomes:
        own = [row for row in rows if row["problem"] == outcome.problem]
        texts = [row["response"] for row in own]
        right = [text for text in texts if text and len(text) % 2 == 0]
        assert (outcome.right, outcome.distinct, outcome.reward) == (len(right), len(set(right)), len(right))
        assert outcome.no_verdict == texts.count("")
        assert outcome.others == {"short": sum(len(text) < 4 for text in texts)}
        assert outcome.tokens == sum(row["tokens"] for row in own)
        assert outcome.truncated == sum(row["truncated"] for row in own)
        assert all(row["tokens"] == 6 for row in own if row["truncated"])
        assert outcome.entropy is not None
        assert 0 < outcome.entropy / outcome.tokens < math.log(259)
    assert 0 < sum(outcome.right for outcome in outcomes) < 20


def test_going_on_from_a_batch_gives_the_same(parts):
    config, policy, engine, (held, _) = parts
    with RewardPool.of(config.reward) as pool:
        whole = list(evaluate(policy, engine, held, pool, config, stream=(1, 2)))
        rest = list(evaluate(policy, engine, held, pool, config, stream=(1, 2), first=2))
        other = list(evaluate(policy, engine, held, pool, config, stream=(1, 3), first=2))
        assert list(evaluate(policy, engine, held, pool, config, stream=(1, 2), first=5)) == []
        with pytest.raises(ValueError, match="first=1 does not begin a batch of 2 problems"):
            next(evaluate(policy, engine, held, pool, config, stream=(1, 2), first=1))
    assert rest == whole[1:]
    assert other != whole[1:]


def test_sampling_is_that_of_the_evaluation(parts):
    """At top_k = 1 all responses to a problem are the likeliest one; top_p = 1e-6 says the same in another way."""
    config, policy, engine, (held, _) = parts
    overrides = ["--evaluation.entropy=false", "--evaluation.max_response_tokens=3"]
    found = []
    for setting in ("--evaluation.top_k=1", "--evaluation.top_p=0.000001", "--evaluation.temperature=0.000001"):
        changed = load_config(["--config", str(Path(config.run_dir).parent / "run.yaml"), *overrides, setting])
        assert sampling_settings(changed).max_response_tokens == 3
        with RewardPool.of(config.reward) as pool:
            batches = list(evaluate(policy, engine, held, pool, changed, stream=(0,)))
        responses = [row["response"] for _, rows in batches for row in rows]
        assert len(set(responses[:4])) == 1
        assert all(row["tokens"] <= 3 for _, rows in batches for row in rows)
        assert [outcome.entropy for outcomes, _ in batches for outcome in outcomes] == [None] * 5
        found.append(responses)
    assert found[0] == found[1] == found[2]
    assert engine.config.max_response_tokens == 6  # the engine is as it was


def command(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue()


def test_the_command_on_a_model_stopped_and_resumed(work):
    """Ctrl-C in the third batch: the two before it are kept, and the result is that of an uninterrupted evaluation."""
    common = [work / "model", f"--config={work / 'run.yaml'}", "--reward.name=eval_rewards:stops", "--seed=5"]
    (work / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        command(*common, "--out", work / "cut")
    assert len((work / "cut" / "eval.jsonl").read_text().splitlines()) == 1 + 2
    with (work / "cut" / "eval.jsonl").open("a") as file:
        file.write('[{"problem": 4, "sam')  # as a kill in the middle of a line would leave it
    (work / "stop").unlink()
    code, told = command(*common, "--out", work / "cut")
    assert code == 0
    command(*common, "--out", work / "whole")
    for name in ("results.json", "eval.jsonl", "other.jsonl", "samples.jsonl"):
        assert (work / "cut" / name).read_text() == (work / "whole" / name).read_text(), name
    results = json.loads((work / "cut" / "results.json").read_text())
    assert {name: s["problems"] for name, s in results["sets"].items()} == {"eval": 5, "other": 7}
    for summary in results["sets"].values():
        values = [summary[f"pass_at_{k}"] for k in (1, 2, 4)]
        assert values == sorted(values)
        assert values[0] == pytest.approx(summary["accuracy"])
        assert all(low <= summary[name] <= high for name, (low, high) in summary["intervals"].items())
        assert summary["short_accuracy"] <= 1
    assert (work / "cut" / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")
    assert "other" in told
    assert "mean@n" in told
    assert f"{100 * results['sets']['other']['pass_at_2']:.1f}" in told
    # Again, with everything there: nothing is sampled, the numbers stay; other k need no new responses either.
    calls = work / "stop"
    calls.touch()
    command(*common, "--out", work / "cut", "--pass-at", 3)
    again = json.loads((work / "cut" / "results.json").read_text())
    assert "pass_at_3" in again["sets"]["eval"]
    assert again["sets"]["eval"]["accuracy"] == results["sets"]["eval"]["accuracy"]


def test_the_model_is_loaded_in_the_configured_type_and_only_where_it_computes(work):
    def loaded(*options):
        return load_policy(load_config([f"--config={work / 'run.yaml'}", *options]))

    whole = loaded("--parallel.param_dtype=float32")
    low = loaded("--parallel.param_dtype=bfloat16")
    for name, weight in whole.weights():
        assert torch.equal(dict(low.model.named_parameters())[name], weight.bfloat16()), name
    assert low.low_precision
    stored = loaded("--engine.name=vllm", "--evaluation.entropy=false")
    assert all(parameter.is_meta for parameter in stored.model.parameters())
    expected = dict(whole.weights())
    found = dict(stored.weights())
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    facts = [(p.eos_ids, p.pad_id, p.context, p.vocab_size, p.tokenizer.encode("7 plus")) for p in (stored, whole)]
    assert facts[0] == facts[1]
    scoring = loaded("--engine.name=vllm")
    assert not any(parameter.is_meta for parameter in scoring.model.parameters())


def test_several_processes_are_refused(work, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE = 2: `entrocraft eval` is one process, expected 1"):
        command(work / "model", f"--config={work / 'run.yaml'}", "--out", work / "out")
    assert not (work / "out").exists()


@pytest.mark.parametrize(("training", "evaluation", "most", "context"), [
    (6, None, 999, 38), (6, 4, 999, 38), (6, 20, 999, 52), (6, 20, 40, 40),
])  # fmt: skip
def test_a_sampler_holds_the_longest_response_of_training_or_evaluation(work, training, evaluation, most, context):
    options = [f"--sampling.max_response_tokens={training}"]
    options += [f"--evaluation.max_response_tokens={evaluation}"] if evaluation else []
    assert sampled_context(load_config([f"--config={work / 'run.yaml'}", *options]), most) == context


def test_results_of_other_settings_are_not_mixed(work):
    common = [work / "model", f"--config={work / 'run.yaml'}", "--out", work / "out", "--set", "other"]
    command(*common)
    with pytest.raises(ValueError, match=r"other\.jsonl holds results of other settings \(seed: 0 -> 1\): .*--again"):
        command(*common, "--seed=1")
    with pytest.raises(ValueError, match=r"evaluation\.temperature: 1\.0 -> 0\.5"):
        command(*common, "--temperature=0.5")
    before = (work / "out" / "other.jsonl").read_text()
    for elsewhere in (f"--data={work / 'train.jsonl'}", "--evaluation.pass_at=[2]", "--reward.workers=1"):
        command(*common, elsewhere)  # settings that are none of this set's
    assert (work / "out" / "other.jsonl").read_text() == before
    command(*common, "--seed=1", "--again")
    assert (work / "out" / "other.jsonl.before").read_text() == before
    assert (work / "out" / "other.jsonl").read_text() != before
    with pytest.raises(ValueError, match=r"--set third: no such set; there are \['eval', 'other'\]"):
        command(*common, "--set", "third")
    with pytest.raises(ValueError, match="say with --out DIR where results go"):
        command(work / "model", f"--config={work / 'run.yaml'}")


def test_during_training_and_after_it(work):
    """Each evaluation becomes metrics, a line per set, and samples; a run that goes on repeats none of them."""
    from entrocraft.train.train import main as train

    arguments = [f"--config={work / 'run.yaml'}", "--data.limit=11", "--data.decontaminate=drop"]
    saved = ["--evaluation.saved_samples_every=1", "--entropy.schedule.steps=4", "--entropy.schedule.start=1.0"]
    assert train([*arguments, *saved, "--optimizer.steps=2"]) == 0
    with (work / "run" / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "kind": "training"}\n{"step": 3, "ki')  # a step that was cut off before its checkpoint
    assert train([*arguments, *saved, "--resume=auto"]) == 0
    metrics = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in metrics if "eval_accuracy" in row]
    assert [(row["step"], row["prompts"], row["samples"]) for row in evaluated] == [(2, 4, 8), (4, 8, 16)]
    for row in evaluated:
        assert row["eval_accuracy_low"] <= row["eval_accuracy"] <= row["eval_accuracy_high"]
        assert row["eval_other_pass_at_4"] >= row["eval_other_accuracy"] == pytest.approx(row["eval_other_pass_at_1"])
        assert row["eval_short_accuracy"] >= 0
        assert row["reward_short"] >= 0
    lines = [json.loads(line) for line in (work / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["set"]) for line in lines] == [(s, n) for s in (2, 4) for n in ("eval", "other")]
    assert lines[-1]["accuracy"] == evaluated[-1]["eval_other_accuracy"]
    assert set(lines[0]["intervals"]) == {"accuracy", "short_accuracy", "pass_at_1", "pass_at_2", "pass_at_4"}
    samples = read_samples(work / "run")
    training = Counter((row["step"], row["kind"]) for row in samples if row["kind"] == "training")
    assert training == {(step, "training"): 3 for step in (1, 2, 3, 4)}
    assert sum(row["kind"] == "evaluation" for row in samples) == 2 * 2 * 3
    contamination = json.loads((work / "run" / "contamination.json").read_text())
    assert contamination["sets"]["eval"] == {"problems": 5, "repeated": 1, "training_problems": 1}
    assert contamination["pairs"][0]["text"] == "10 plus 10 is"
    events = [json.loads(line) for line in (work / "run" / "events.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["count"], e["training_problems"]) for e in events] == [("contamination", 1, "dropped")]
    page = (work / "run" / "report.html").read_text()
    assert "count to " in page
    # The run's own folder is where `entrocraft eval` looks for the model and writes to.
    command(work / "run", "--samples", 2, "--set", "eval")
    assert json.loads((work / "run" / "eval" / "results.json").read_text())["sets"]["eval"]["samples"] == 2


def test_repeated_problems_are_counted_or_dropped_and_settings_of_sets_are_their_own(parts, work):
    config, policy, _, _ = parts
    for mode, kept, overlaps in (("off", 12, 0), ("report", 12, 2), ("drop", 10, 2)):
        changed = load_config([f"--config={work / 'run.yaml'}", f"--data.decontaminate={mode}"])
        problems = Problems.load(changed, policy.tokenizer, context=policy.context)
        assert (len(problems.train.problems), len(problems.overlaps)) == (kept, overlaps)
        assert len(problems.train.prompts) == kept
    assert [problem.answer for problem in problems.train.problems] == [str(i) for i in range(10)]
    everything = [f"--data.eval={work / 'train.jsonl'}", "--data.decontaminate=drop", "--data.limit=1"]
    repeated = load_config([f"--config={work / 'run.yaml'}", *everything])
    with pytest.raises(ValueError, match="all 1 training problems repeat held-out ones"):
        Problems.load(repeated, policy.tokenizer, context=policy.context)
    templated = load_config([f"--config={work / 'run.yaml'}", "--data.prompt_template=Q: {prompt}"])
    held, _ = load_held_out(templated, policy.tokenizer, context=policy.context)
    assert (held.problems[0].prompt, held.problems[0].question) == ("Q: 10 plus 10 is", "10 plus 10 is")
    assert config.evaluation.sets["other"].limit is None
