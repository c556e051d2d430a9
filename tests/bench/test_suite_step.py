"""A whole update in TRL's trainer and in ours: loss and gradient of plain fp64 torch; the largest batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import suite_trl_step
from bench_train_step import exact_update
from suite_trl_step import CONTENDERS, Size, build, largest, make_rollouts

BENCH = Path(__file__).parents[2] / "bench"
SIZE = Size("tiny", layers=1, rollouts=6, prompt=5, response=12, microbatch=2)


@pytest.mark.parametrize("name", CONTENDERS[:2])
def test_the_update_is_that_of_plain_fp64_torch(name):
    loss, norm = exact_update(SIZE, "cpu")
    update, model = build(name, SIZE, "cpu")
    before = [value.detach().clone() for value in model.parameters()]
    made = update()
    assert made[0] == pytest.approx(loss, rel=1e-5)
    assert made[1] == pytest.approx(norm, rel=1e-4)
    assert norm > 1e-3
    moved = [float((value.detach() - old).abs().max()) for value, old in zip(model.parameters(), before, strict=True)]
    assert 0 < max(moved) < 1.1e-6  # AdamW's first step is as long as its learning rate


def test_rollouts_are_the_same_in_every_process_and_as_long_as_asked():
    one, two = make_rollouts(SIZE)[0], make_rollouts(SIZE)[0]
    assert one.token_T.equal(two.token_T)
    assert int(one.length_R.max()) == 12
    assert {len(prompt) for prompt in one.prompts} == {5}


@pytest.mark.parametrize("room", [0, 3, 4, 37, 64, 1000])
def test_the_largest_batch_is_found_to_one_part_in_eight(room, monkeypatch):
    tried = []

    def alone(name, size, device, rounds):
        tried.append(size.rollouts)
        assert size.microbatch == size.rollouts
        return {} if size.rollouts <= room else {"reason": "out of memory"}

    monkeypatch.setattr(suite_trl_step, "alone", alone)
    found = largest("trl", SIZE, "cpu", most=256)
    assert found <= min(room, 256)
    assert found % 4 == 0
    if room >= 4:
        assert found >= min(room, 256) - max(4, found // 8)
    assert len(tried) < 16


@pytest.mark.slow
def test_the_script_measures_in_a_process_of_its_own_and_says_why_not(tmp_path):
    arguments = [f"--{name}={value}" for name, value in SIZE._asdict().items()]
    command = [sys.executable, BENCH / "suite_trl_step.py", "--device", "cpu", "--rounds", 1, *arguments]
    run = subprocess.run([*map(str, command), "--only", "entrocraft"], capture_output=True, text=True, timeout=120)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 0
    assert found["grad_norm"] == pytest.approx(exact_update(SIZE, "cpu")[1], rel=1e-4)
    refused = suite_trl_step.alone("entrocraft", SIZE._replace(prompt=0), "cpu", 1)
    assert refused["reason"]
