"""The README's promises that a machine can check: its example runs, its files and commands exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_import_example_runs_and_learns_something():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    check = "\nassert decision.keep_R.any() and 0 < float(hidden_TH.grad.norm()) < 100\n"
    done = subprocess.run([sys.executable, "-c", example + check], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"entropy \d\.\d+ nats", done.stdout)


def test_linked_files_and_make_targets_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert {"demo", "test"} <= commands
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
    for path in re.findall(r"train/configs/\w+\.yaml|train/\w+\.py", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.skipif("ENTROCRAFT_GSM8K" not in os.environ, reason="set ENTROCRAFT_GSM8K to GSM8K's test file (JSONL)")
def test_every_gold_answer_of_gsm8k_is_graded_as_correct():
    """Loaded, rendered and graded with the shipped configuration: 1,319 of 1,319."""
    from entrocraft.train.config_reader import load_config
    from entrocraft.train.data import encode_prompts, load_problems
    from entrocraft.train.rewards import RewardPool
    from entrocraft.train.tiny_model import build_tiny_model

    config = load_config([f"--config={ROOT / 'train/configs/gsm8k_tiny.yaml'}"])
    data = config.data
    path = os.environ["ENTROCRAFT_GSM8K"]

    def load(pattern):
        return load_problems(
            path,
            prompt_field=data.prompt_field,
            answer_field=data.answer_field,
            prompt_template=data.prompt_template,
            answer_pattern=pattern,
        )

    problems = load(data.answer_pattern)
    solutions = [row.answer for row in load(None)]
    _, tokenizer = build_tiny_model(config.model.tiny, 0)
    prompts = encode_prompts(problems, tokenizer, chat_template=False, max_prompt_tokens=4096)
    with RewardPool(config.reward.name, workers=2, timeout_s=10) as pool:
        answers, texts = [p.answer for p in problems], [p.prompt for p in problems]
        for completions in (solutions, [rf"so \boxed{{{answer}}}." for answer in answers]):
            scores = pool.score(completions, answers, texts).reward_R
            assert [problems[i].answer for i in (scores != 1).nonzero()[:, 0].tolist()] == []
    assert len(problems) == len(prompts) == 1319


def demo_table() -> str:
    """The README's table of the demo, made from the committed summaries of its three seeds."""
    summaries = [json.loads((ROOT / f"bench/results/demo_seed{seed}.json").read_text()) for seed in (1, 2, 3)]
    lines = [
        "| arm | entropy, nats | error against the target | held-out reward | pass@8 | distinct right answers of 8 |",
        "|---|---|---|---|---|---|",
    ]
    for name in summaries[0]["arms"]:
        arms = [summary["arms"][name] for summary in summaries]

        def spread(key: str, digits: int, arms: list[dict] = arms) -> str:
            return " / ".join(f"{arm[key]:.{digits}f}" for arm in arms)

        ends = f"{arms[0]['entropy_start']:.2f} to {spread('entropy_end', 2)}"
        cells = (spread("tracking_mae", 3), spread("reward", 2), spread("pass_at_8", 2), spread("distinct_correct", 1))
        lines.append(f"| `{name}` | {ends} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_table_of_the_demo_is_what_was_measured():
    assert demo_table() in README, f"put this into README.md:\n{demo_table()}"


def test_what_is_said_of_the_grader_is_what_was_measured():
    measured = json.loads((ROOT / "bench/results/grader_accuracy.json").read_text())
    sets = measured["sets"]
    assert (measured["disagree"], list(sets)) == (0, ["gsm8k_test", "aime24", "amc23"])
    assert measured["graded"] == sum(found["graded"] for found in sets.values())
    readme, evaluation = (" ".join(text.split()) for text in (README, (ROOT / "docs/evaluation.md").read_text()))
    assert f"of {measured['graded']:,} answers written as models write them" in readme
    assert "GSM8K, AIME-24 and AMC-23, it misjudges none" in readme
    problems = [f"{found['problems']:,}" for found in sets.values()]
    assert (
        f"test set ({problems[0]} problems), AIME-24 with its reference solutions ({problems[1]}) and AMC-23 "
        f"({problems[2]}), {measured['graded']:,} completions were graded and none wrongly"
    ) in evaluation
