"""Checkpoints: exact, whole or ignored, and never another model's; in the background, and the best one kept."""

import json
import random
import resource
import shutil
import threading

import numpy as np
import pytest
import torch

from entrocraft.train.checkpoint import CheckpointFolder
from entrocraft.train.checkpoint_files import is_whole, value_of
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.errors import TrainingStopped
from entrocraft.train.random_states import seed_all
from entrocraft.train.tiny_model import build_tiny_model

SHAPE = TinyModelConfig(hidden_size=16, layers=1, heads=2, mlp_size=32, context=32)


def make(seed, shape=SHAPE):
    model, _ = build_tiny_model(shape, seed)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def learn(model, optimizer, steps):
    for _ in range(steps):
        ids = torch.randint(3, 259, (4, 8))
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_training_goes_on_bit_for_bit(tmp_path, tied):
    shape = TinyModelConfig(hidden_size=16, layers=1, heads=2, mlp_size=32, context=32, tied=tied)
    model, optimizer = make(0, shape)
    learn(model, optimizer, 3)
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(3, model, optimizer, {"samples": 12, "gain": 0.1})
    learn(model, optimizer, 3)  # its random data come from the global stream, which the checkpoint holds
    other, other_optimizer = make(7, shape)
    torch.manual_seed(99)
    state = folder.load_newest(other, other_optimizer)
    assert state is not None
    assert (state["step"], state["samples"], state["gain"]) == (3, 12, 0.1)
    assert not equal(model, other)
    learn(other, other_optimizer, 3)
    assert equal(model, other)


def draws():
    """Of everything that draws without asking; an odd number of normals leaves one in either's pocket."""
    return random.random(), random.gauss(0, 1), np.random.random(), np.random.standard_normal(), torch.rand(1).item()


def test_every_random_stream_goes_on(tmp_path):
    model, optimizer = make(0)
    folder = CheckpointFolder(tmp_path, keep=1)
    draws()
    folder.save(1, model, optimizer, {})
    expected = [draws() for _ in range(3)]
    for seed in (None, 7):  # half-way through the pairs of normals, and not
        if seed is not None:
            seed_all(seed)
        folder.load_newest(*make(7))
        assert [draws() for _ in range(3)] == expected


def test_the_accelerators_random_state_is_kept_and_one_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    """A stand-in for the state of the device that the run computes on."""
    device, put = torch.device("cuda", 3), []
    held = torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda d: held.clone() if d == device else None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, d: put.append((state.clone(), d)))
    CheckpointFolder(tmp_path, keep=1, device=device).save(1, *make(0), {})
    held += 1
    CheckpointFolder(tmp_path, keep=1, device=device).load_newest(*make(7))
    ((state, where),) = put
    assert (state.tolist(), where) == (list(range(16)), device)
    CheckpointFolder(tmp_path, keep=1).load_newest(*make(7))  # goes on without it
    assert len(put) == 1
    assert capsys.readouterr().err == ""
    CheckpointFolder(tmp_path, keep=1).save(2, *make(0), {})
    CheckpointFolder(tmp_path, keep=1, device=device).load_newest(*make(7))
    assert "step_000002 holds no random state of cuda: it was written by an older" in capsys.readouterr().err


def test_a_folder_without_checkpoints_gives_none(tmp_path):
    assert CheckpointFolder(tmp_path, keep=1).load_newest(*make(0)) is None


def damage_mark(folder):
    (folder / "COMPLETE.json").unlink()


def damage_size(folder):
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])


def damage_file(folder):
    next(folder.glob("*.distcp")).unlink()


def damage_name(folder):
    folder.rename(folder.with_name(folder.name + ".writing-1-2"))


def damage_json(folder):
    (folder / "COMPLETE.json").write_text('{"bytes": ')


@pytest.mark.parametrize("damage", [damage_mark, damage_size, damage_file, damage_name, damage_json])
def test_a_half_written_checkpoint_is_ignored_and_the_last_whole_one_used(tmp_path, damage):
    model, optimizer = make(0)
    learn(model, optimizer, 1)
    folder = CheckpointFolder(tmp_path, keep=5)
    folder.save(1, model, optimizer, {})
    first = [p.detach().clone() for p in model.parameters()]
    learn(model, optimizer, 1)
    damage(folder.save(2, model, optimizer, {}))
    assert [path.name for path in folder.whole()] == ["step_000001"]
    assert len(folder.broken()) == 1
    fresh, fresh_optimizer = make(5)
    state = folder.load_newest(fresh, fresh_optimizer)
    assert state is not None
    assert state["step"] == 1
    assert all(torch.equal(p, q) for p, q in zip(first, fresh.parameters(), strict=True))


def test_another_model_is_refused(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    model, optimizer = make(0)
    learn(model, optimizer, 1)
    folder.save(1, model, optimizer, {})
    wider = TinyModelConfig(hidden_size=32, layers=1, heads=2, mlp_size=32, context=32)
    with pytest.raises(ValueError, match=r"step_000001 holds another model .* choose another run_dir"):
        folder.load_newest(*make(0, wider))


def test_saving_an_unused_optimizer_leaves_it_unused(tmp_path):
    model, optimizer = make(0)
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(1, model, optimizer, {})
    assert len(optimizer.state) == 0
    other, other_optimizer = make(7)
    folder.load_newest(other, other_optimizer)
    assert equal(model, other)
    assert len(other_optimizer.state) == 0
    learn(model, optimizer, 2)
    torch.manual_seed(0)  # the stream at the time of the checkpoint
    folder.load_newest(other, other_optimizer)
    learn(other, other_optimizer, 2)
    assert equal(model, other)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    (folder.root / "step_000003.writing-1-2").mkdir(parents=True)
    assert len(folder.broken()) == 1
    folder.tidy()
    assert folder.broken() == []


def test_only_the_newest_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    model, optimizer = make(0)
    for step in range(1, 5):
        learn(model, optimizer, 1)
        folder.save(step, model, optimizer, {})
    assert [path.name for path in folder.whole()] == ["step_000003", "step_000004"]


def test_a_failed_write_leaves_the_older_checkpoint_and_no_rubbish(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    model, optimizer = make(0)
    learn(model, optimizer, 1)
    whole = folder.save(1, model, optimizer, {})
    before = json.loads((whole / "COMPLETE.json").read_text())
    with pytest.raises(TypeError):
        folder.save(2, model, optimizer, {"not JSON": object()})
    assert [path.name for path in folder.root.iterdir()] == ["step_000001"]
    assert is_whole(whole)
    assert json.loads((whole / "COMPLETE.json").read_text()) == before
    shutil.rmtree(whole)
    assert folder.whole() == []


def test_the_best_is_kept_beside_the_newest(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1, best=True)
    model, optimizer = make(0)
    kept = []
    for step, value in enumerate([None, 0.5, 0.9, 0.2, None, 0.9, 1.5], start=1):
        folder.save(step, model, optimizer, {}, value)
        kept.append([int(path.name[-6:]) for path in folder.whole()])
    assert kept == [[1], [2], [3], [3, 4], [3, 5], [3, 6], [7]]
    newer = CheckpointFolder(tmp_path, keep=1, best=True)  # as after a restart: it is in the checkpoints themselves
    newer.save(8, model, optimizer, {}, 0.1)
    assert [int(path.name[-6:]) for path in newer.whole()] == [7, 8]


def test_what_is_best_is_looked_up_in_the_metrics():
    row = {"step": 3, "reward": 0.5, "eval_reward": None, "entropy": 2.0}
    assert value_of("reward", row, evaluated=False) == 0.5
    assert value_of("-entropy", row, evaluated=False) == -2.0
    assert value_of("eval_reward", row, evaluated=True) is None
    assert value_of("reward", {"reward": float("nan")}, evaluated=False) is None
    assert value_of("eval_accuracy", {"reward": 0.5}, evaluated=False) is None  # not a step with an evaluation
    with pytest.raises(ValueError, match=r"checkpoint.best = 'rewrd': a step has no such metric; it has .*reward"):
        value_of("rewrd", row, evaluated=False)
    with pytest.raises(ValueError, match="eval_acuracy"):
        value_of("-eval_acuracy", row, evaluated=True)


def test_in_the_background_what_is_saved_is_what_was(tmp_path, monkeypatch):
    """The thread is held back until weights, moments and state have moved on."""
    model, optimizer = make(0)
    learn(model, optimizer, 2)
    folder = CheckpointFolder(tmp_path, keep=2, asynchronous=True)
    go, write = threading.Event(), folder._write

    def late(*arguments):
        assert go.wait(60)
        write(*arguments)

    monkeypatch.setattr(folder, "_write", late)
    before = [p.detach().clone() for p in model.parameters()]
    state = {"order": [1]}
    folder.save(2, model, optimizer, state)
    learn(model, optimizer, 2)
    state["order"].append(2)
    assert folder.whole() == []
    assert not folder.failed
    go.set()
    folder.wait()
    fresh, fresh_optimizer = make(5)
    loaded = CheckpointFolder(tmp_path, keep=2).load_newest(fresh, fresh_optimizer)
    assert loaded is not None
    assert (loaded["step"], loaded["order"]) == (2, [1])
    assert all(torch.equal(p, q) for p, q in zip(before, fresh.parameters(), strict=True))
    learn(fresh, fresh_optimizer, 2)  # the random state is that of the time, so these are the same two updates
    assert equal(model, fresh)
    folder.close()


def save_and_wait(folder, step, model, optimizer):
    folder.save(step, model, optimizer, {})
    folder.wait()


@pytest.mark.parametrize("asynchronous", [True, False], ids=["background", "waited for"])
def test_a_write_that_fails_is_raised_once_and_leaves_the_older_one(tmp_path, asynchronous):
    folder = CheckpointFolder(tmp_path, keep=2, asynchronous=asynchronous)
    model, optimizer = make(0)
    learn(model, optimizer, 1)
    folder.save(1, model, optimizer, {})
    folder.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # what a quota or a full disk does to a write
    try:
        with pytest.raises(TrainingStopped, match=r"02 could not be written: .*File too large.*step_000001 is"):
            save_and_wait(folder, 2, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder.wait()
    assert [path.name for path in folder.root.iterdir()] == ["step_000001"]
    folder.save(3, model, optimizer, {})
    folder.wait()
    assert [path.name for path in folder.whole()] == ["step_000001", "step_000003"]
    folder.close()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_is_found_and_the_one_before_taken(tmp_path):
    model, optimizer = make(0)
    folder = CheckpointFolder(tmp_path, keep=5)
    for step in (1, 2, 3):
        learn(model, optimizer, 1)
        folder.save(step, model, optimizer, {})
    one, two, three = folder.whole()
    flip(next(three.glob("*.distcp")))
    flip(two / "state.json")
    assert folder.whole() == [one, two, three]  # sizes do not tell
    state = folder.load_newest(*make(5))
    assert state is not None
    assert state["step"] == 1
    assert list(folder.damaged) == [three, two]
    assert "state.json is not what was written" in folder.damaged[two]
    assert folder.whole() == [one]
    folder.tidy()
    assert folder.whole() == CheckpointFolder(tmp_path, keep=5).whole() == [one]
    assert sorted(path.name.split("-")[0] for path in folder.root.iterdir()) == [
        *("step_000001", "step_000002.damaged", "step_000003.damaged"),
    ]
    flip(one / ".metadata")
    with pytest.raises(ValueError, match=r"every checkpoint of .* is damaged: the content of .metadata"):
        CheckpointFolder(tmp_path, keep=5).load_newest(*make(5))
