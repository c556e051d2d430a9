"""Speed, arithmetic and memory of a step's phases, against torch's own counter and by hand; what a run's rows hold."""

import contextlib
import gc
import json
import math
import mmap
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.config_reader import load_config
from entrocraft.train.figures import RUN_PANELS
from entrocraft.train.metrics import MetricsLog
from entrocraft.train.report import write_report
from entrocraft.train.rewards import RewardPool
from entrocraft.train.run import Run
from entrocraft.train.throughput import Clock, ModelCost, Work, resident_bytes
from entrocraft.train.tiny_model import build_tiny_model
from entrocraft.train.train import train_step


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_torch_counts(tied):
    shape = TinyModelConfig(hidden_size=64, layers=2, heads=4, mlp_size=160, context=64, tied=tied)
    model, _ = build_tiny_model(shape, 0)
    rows, length = 3, 40
    ids = torch.randint(3, 200, (rows, length))
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    counted = counter.get_total_flops()
    # It counts the upper triangle of attention too.
    forward = ModelCost.of(model).forward(Work(rows * length, 2 * rows * length**2, rows * length))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    assert forward == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert 3 * forward == pytest.approx(counted, rel=0.05)


def test_a_clock_divides_by_its_seconds_and_ranks():
    model, _ = build_tiny_model(TinyModelConfig(hidden_size=32, layers=2, heads=2, mlp_size=64), 0)
    clock = Clock(model, ranks=4)
    time.sleep(0.02)
    work = Work(1000, 50_000, 600)
    clock.lap("update", tokens=1000, forward=work, passes=3)
    clock.lap("publish")
    found = clock.metrics(600)
    seconds = found["seconds_update"]
    assert seconds >= 0.02
    assert found["tokens_per_second_update"] == 1000 / seconds
    assert found["tflops_update"] == pytest.approx(3 * ModelCost.of(model).forward(work) / seconds / 4e12)
    assert found["seconds"] == pytest.approx(seconds + found["seconds_publish"])
    assert found["tokens_per_second"] == pytest.approx(600 / found["seconds"])
    assert not any(name.startswith(("mfu", "tflops_publish")) for name in found)  # no peak is known of a CPU


def test_memory_is_what_the_process_has():
    gc.collect()  # what earlier tests left must not go between the two measurements
    clock = Clock()
    clock.lap("before")
    held = mmap.mmap(-1, 64 << 20)  # pages of its own: an allocator may have some left over from earlier
    for place in range(0, len(held), mmap.PAGESIZE):
        held[place] = 1
    clock.lap("after")
    found = clock.metrics(1)
    assert found["memory_after"] - found["memory_before"] == pytest.approx(len(held) / 1e9, abs=0.02)
    assert found["memory"] == max(found["memory_before"], found["memory_after"])
    assert abs(resident_bytes() / 1e9 - found["memory_after"]) < 0.05


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Rows of a run of two steps, and its folder."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "throughput_reward.py").write_text("def odd(c, a, p):\n    return float(len(c) % 2)\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": "x" * n, "answer": "1"}) + "\n" for n in (3, 5)))
    config = load_config(
        [
            *(f"--run_dir={tmp_path / 'run'}", f"--data.train={tmp_path / 'p.jsonl'}", "--device=cpu"),
            *("--model.tiny.hidden_size=32", "--model.tiny.layers=2", "--model.tiny.mlp_size=64"),
            *("--batch.prompts_per_step=2", "--batch.samples_per_prompt=4", "--sampling.max_response_tokens=6"),
            *("--reward.name=throughput_reward:odd", "--reward.workers=0", "--entropy.rule=budget"),
            *("--optimizer.steps=2", "--optimizer.lr=1e-3", "--loss.passes=2", "--entropy.min_groups=0"),
        ]
    )
    run = Run(config)
    run.begin(None)
    with (
        contextlib.ExitStack() as at_the_end,
        RewardPool.of(config.reward) as pool,
        MetricsLog(run.dir, resume_step=None) as log,
    ):
        at_the_end.callback(run.end)
        rows = []
        for run.step in (1, 2):
            rows.append(train_step(run, pool, log, print))
            log.log(run.step, rows[-1])
    return rows, run.dir


def test_rows_hold_every_metric_that_control_is_watched_by(finished):
    rows, folder = finished
    for row in rows:
        for name in (
            *("entropy", "entropy_seq_mean", "entropy_p10", "entropy_p50", "entropy_p90", "band_low", "band_high"),
            *("direction", "error", "kept_fraction", "kept_groups", "bypassed", "acceptance_mean", "weight_mean"),
            *("weight_max", "predicted_change_all", "predicted_change", "gain", "kl", "grad_norm", "effective_samples"),
            *("weight_min", "effective_share"),
            *(f"clip_fraction_{side}_{sign}" for side in ("low", "high") for sign in ("positive", "negative")),
            *("response_length", "response_length_max", "update_tokens", "update_rows"),
            *(f"{what}_{phase}" for what in ("tokens_per_second", "tflops") for phase in ("sample", "score", "update")),
            *(f"memory_{phase}" for phase in ("sample", "reward", "score", "update", "publish")),
        ):
            assert math.isfinite(row[name]), name
        assert {"kept_fraction_positive", "kept_fraction_negative", "logprob_positive", "logprob_negative"} <= set(row)
        assert "update_squares" not in row
        lengths = [row["response_length_right"], row["response_length_wrong"]]
        assert row["accuracy"] * lengths[0] + (1 - row["accuracy"]) * lengths[1] == pytest.approx(
            row["response_length"]
        ) or any(map(math.isnan, lengths))
        assert row["tflops_update"] * row["seconds_update"] > row["tflops_score"] * row["seconds_score"] * 0.5
    assert math.isfinite(rows[1]["realised_change"])
    page = write_report(folder).read_text()
    for name in ("clip_fraction_low_positive", "memory_update", "tokens_per_second_score", "gain", "weight_max"):
        assert name in page
    drawn = {name for panel in RUN_PANELS for name, _ in panel.lines}
    assert {"mfu_update", "memory_update", "clip_fraction_high_negative", "gain", "acceptance_mean"} <= drawn


def test_weights_of_a_rule_are_told_apart_from_rejection():
    import numpy as np

    from entrocraft.decision import keep_metrics
    from entrocraft.verdict import Verdict

    batch = SimpleNamespace(
        advantage_R=np.array([1.0, -1.0, 1.0, -1.0]), counted_R=np.array([2, 2, 2, 2]), group_R=np.array([0, 0, 1, 1]),
        entropy_N=np.zeros(8), mask_T=np.ones(8, dtype=bool), rollout_T=np.repeat(np.arange(4), 2),
    )  # fmt: skip
    verdict = Verdict(
        keep_R=np.array([True, True, True, False]),
        advantage_R=batch.advantage_R,
        weight_R=np.array([0.5, 2.0, 0.0, 9.0]),
    )
    found = keep_metrics(batch, verdict)  # type: ignore[arg-type]
    assert (found["weight_min"], found["weight_mean"], found["weight_max"]) == (0.5, 1.25, 2.0)
    assert found["effective_share"] == pytest.approx(2.5**2 / (4 * 4.25), rel=1e-15)
