"""The whole loop with vLLM: the demo, a skipped publication, drawing ahead, a resumed run, two ranks."""

import shutil

import pytest

from entrocraft.train.config_reader import load_config
from entrocraft.train.demo import CONFIG, main
from entrocraft.train.lora import without_adapters
from entrocraft.train.metrics import depends_on_the_clock, read_events, read_metrics
from entrocraft.train.publication import PublicationError
from entrocraft.train.train import run_training
from entrocraft.train.vllm_engine import VLLMEngine
from entrocraft.train.warm_start import write_problems

SHAPE = [f"--model.tiny.{name}={value}" for name, value in
         {"hidden_size": 64, "layers": 2, "heads": 2, "mlp_size": 128}.items()]  # fmt: skip
VLLM = ["--engine.name=vllm", "--engine.memory=0.02"]


def settings(folder, *extra):
    train, held_out = write_problems(folder / "data")
    return load_config(
        [
            *(f"--config={CONFIG}", f"--run_dir={folder / 'run'}", f"--data.train={train}", f"--data.eval={held_out}"),
            *(
                *SHAPE,
                *VLLM,
                "--batch.prompts_per_step=8",
                "--batch.samples_per_prompt=4",
                "--batch.updates_per_step=2",
            ),
            *("--resume=auto", "--optimizer.steps=6", "--checkpoint.every=3", "--checkpoint.keep=2"),
            "--reward.name=vllm_kit:odd",
            *("--entropy.rule=none", "--batch.updates_per_step=2", "--loss.passes=2", *extra),
        ]
    )


def rows(folder):
    return [{k: v for k, v in row.items() if not depends_on_the_clock(k)} for row in read_metrics(folder / "run")]


def test_the_demo_with_vllm(tmp_path):
    few = ["--optimizer.steps=6", "--evaluation.every=3", "--evaluation.samples=2"]
    arguments = ["--out", str(tmp_path), "--arms", "budget", "--warm-start-steps", "120", *SHAPE, *VLLM, *few]
    assert main(arguments) == 0
    table = read_metrics(tmp_path / "budget")
    assert len(table) == 6
    for row in table:
        assert row["staleness"] == 0
        assert row["mismatch_max"] < 5e-5  # float32 on both sides
        assert row["mismatch_kl"] < 1e-9
        assert row["mismatch_ratio_p99"] == pytest.approx(1, abs=1e-4)
        assert row["importance_ess"] == pytest.approx(1, abs=1e-6)
        assert row["importance_outside"] == row["mismatch_alarm"] == 0
        assert row["publish_mib"] > 0.1
        assert row["updates"] == 1
    # It is the demo's task that is learnt: half-taught answers, of which some are right.
    assert 0 < table[0]["reward"] < 1
    assert table[0]["entropy"] != table[-1]["entropy"]
    assert {"eval_accuracy", "eval_entropy"} <= set(table[-1])
    assert not [event for event in read_events(tmp_path / "budget") if event["kind"] == "mismatch_alarm"]


def test_a_run_with_adapters(tmp_path):
    run = run_training(settings(tmp_path, "--lora.rank=4", "--optimizer.lr=0.02", "--optimizer.steps=3"))
    table = rows(tmp_path)
    assert [row["updates"] for row in table] == [4, 4, 4]
    for row in table:
        assert row["staleness"] == 0
        assert row["mismatch_max"] < 5e-5  # float32 on both sides, merged on one
    adapted = run.policy.hidden_of([5, 6, 7])
    with without_adapters(run.policy.model):
        base = run.policy.hidden_of([5, 6, 7])
    assert float((adapted - base).abs().max()) > 0.05


def test_a_skipped_publication_stops_the_run(tmp_path, monkeypatch):
    publish = VLLMEngine.publish
    monkeypatch.setattr(VLLMEngine, "publish", lambda self, v: {} if v == 2 else publish(self, v))
    with pytest.raises(PublicationError, match="weight version 1 while the policy is at version 2"):
        run_training(settings(tmp_path))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
def test_resumed_equals_uninterrupted(tmp_path, ahead):
    """To the last bit: seeds, cursor, weights, and the batch that was drawn ahead, are all brought back.

    Drawing ahead is one version stale, never two.
    """
    config = settings(tmp_path, f"--engine.overlap={str(ahead).lower()}")
    run_training(config)
    whole = rows(tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000006")  # as if it had been killed after step 3
    run_training(config)
    assert rows(tmp_path) == whole
    assert [row["updates"] for row in whole] == [4] * 6  # there was something to learn
    assert [row["staleness"] for row in whole] == ([0, 1, 1, 1, 1, 1] if ahead else [0] * 6)
    for row in whole[1:]:
        assert (row["mismatch_max"] > 1e-3) == ahead  # older weights show
        assert (row["importance_ess"] < 1 - 1e-6) == ahead
