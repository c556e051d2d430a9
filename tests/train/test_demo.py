"""The demo, shortened: the same code, fewer steps; its summary against the metrics it is made from."""

import dataclasses
import json
import math
import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entrocraft.train import demo
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.graders import sum_pair
from entrocraft.train.metrics import read_metrics
from entrocraft.train.warm_start import _demonstration, is_held_out, warm_start, write_problems

SMALL = ["--warm-start-steps=4", "--optimizer.steps=4", "--model.tiny.hidden_size=16", "--model.tiny.layers=1"]
BATCH = ["--batch.prompts_per_step=8", "--batch.samples_per_prompt=4", "--checkpoint.every=2", "--device=cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert demo.main(["--out", str(out), "--seed", "3", *SMALL, *BATCH]) == 0
    return out


def test_summary_holds_what_the_metrics_say(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary["arms"]) == ["none", "soft", "budget"]
    assert summary["seed"] == 3
    assert summary["versions"]["torch"] == torch.__version__
    for name, arm in summary["arms"].items():
        rows = read_metrics(finished / name)
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert arm["entropy"] == [row["entropy"] for row in rows]
        assert arm["target"] == [row["target"] for row in rows]
        late = [abs(row["entropy"] - row["target"]) for row in rows[1:]]  # the first third of four steps is one
        assert arm["tracking_mae"] == pytest.approx(sum(late) / 3)
        assert arm["kept_fraction"] == pytest.approx(sum(row["kept_fraction"] for row in rows) / 4)
        assert (arm["reward"], arm["pass_at_8"]) == (rows[-1]["eval_accuracy"], rows[-1]["eval_pass_at_8"])
        assert arm["distinct_correct"] == rows[-1]["eval_distinct_correct"]
        assert 0 < arm["seconds"] < 600


def test_arms_start_alike_and_differ_in_their_rule(finished):
    arms = json.loads((finished / "summary.json").read_text())["arms"]
    assert len({arm["entropy"][0] for arm in arms.values()}) == 1
    assert arms["none"]["kept_fraction"] == 1
    assert (finished / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "budget" in (finished / "compare.html").read_text()


def test_again_starts_again_and_interrupted_goes_on(finished, monkeypatch):
    command = ["--out", str(finished), "--seed", "3", *SMALL, *BATCH]
    first = read_metrics(finished / "none")
    real = demo.run_training

    def stopped_after_none(config):
        if "soft" in config.run_dir:
            raise KeyboardInterrupt
        return real(config)

    monkeypatch.setattr(demo, "run_training", stopped_after_none)
    with pytest.raises(KeyboardInterrupt):
        demo.main(command)
    again = read_metrics(finished / "none")
    assert [row["entropy"] for row in again] == [row["entropy"] for row in first]
    assert [row["seconds"] for row in again] != [row["seconds"] for row in first]  # a finished demo starts anew
    monkeypatch.undo()
    assert demo.main(command) == 0
    assert read_metrics(finished / "none") == again  # an interrupted one keeps the arm it had, to the last second
    assert [row["step"] for row in read_metrics(finished / "budget")] == [1, 2, 3, 4]


def test_a_folder_of_somebody_else_stays(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"none is not an arm of a demo"):
        demo.main(["--out", str(tmp_path), *SMALL, *BATCH])
    assert (tmp_path / "none" / "thesis.txt").read_text() == "mine"


def test_warm_start_is_a_function_of_its_seed_and_cached(tmp_path):
    shape = TinyModelConfig(hidden_size=16, layers=1, heads=2, mlp_size=32, context=32)
    folder = warm_start(tmp_path, shape, 5, steps=3)
    written = (folder / "model.safetensors").read_bytes()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert warm_start(tmp_path, shape, 5, steps=3) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    torch.rand(3)
    assert (warm_start(tmp_path / "other", shape, 5, steps=3) / "model.safetensors").read_bytes() == written
    assert warm_start(tmp_path, dataclasses.replace(shape, mlp_size=64), 5, steps=3) != folder
    assert (warm_start(tmp_path, shape, 6, steps=3) / "model.safetensors").read_bytes() != written
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "qwen3"


def test_demonstrations_and_problems(tmp_path):
    rng = random.Random(0)
    right = [_demonstration(rng, noisy=False) for _ in range(300)]
    noisy = [_demonstration(rng, noisy=True) for _ in range(1000)]

    def share(texts):
        return sum(sum_pair(t.split("=")[1], str(int(t.split("=")[0])), "") for t in texts) / len(texts)

    assert share(right) == 1
    assert 0.45 < share(noisy) < 0.55
    train, held_out = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in write_problems(tmp_path)
    )
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert len(train) + len(held_out) == 80
    assert all(is_held_out(int(row["answer"])) for row in held_out)
    assert all(int(row["prompt"].rstrip("=")) == int(row["answer"]) for row in train)


def test_the_gpu_recipe_runs_with_a_vocabulary_of_its_own(tmp_path):
    """Its shape in small: 300 rows in the head, of which a text's characters are 97, and no byte-level tokenizer."""
    recipe = demo.CONFIG.with_name("demo_gpu.yaml")
    small = [*SMALL, *BATCH, "--optimizer.steps=1", "--warm-start-steps=60", "--model.tiny.vocabulary=300"]
    assert demo.main(["--out", str(tmp_path), "--recipe", str(recipe), "--arms", "budget", *small]) == 0
    row = read_metrics(tmp_path / "budget")[0]
    assert 0 < row["entropy"] < math.log(300)
    saved = AutoTokenizer.from_pretrained(next((tmp_path / "models").glob("warm_start*")))
    assert saved.decode(saved.encode("47=12+35"), skip_special_tokens=True) == "47=12+35"
    assert saved.encode("4", add_special_tokens=True)[-1:] == [saved.eos_token_id]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "budget" / "model")
    assert model.get_output_embeddings().weight.shape[0] == len(saved) == 300
