"""A whole update in TRL's trainer and in ours: loss and gradient of plain fp64 torch; the largest batch."""

import math
import sys

import pytest
import suite_step_search
import suite_trl_step
from bench_train_step import exact_update
from suite_step_search import Size, alone, best, disagreements, fits, largest, search, sweep
from suite_trl_step import CONTENDERS, build, make_rollouts

SIZE = Size("tiny", layers=1, rollouts=6, prompt=5, response=12, microbatch=2)


@pytest.mark.parametrize("name", CONTENDERS[:4])
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


@pytest.mark.parametrize("name", CONTENDERS[:4])
def test_with_checkpointing_and_only_then_a_layer_runs_twice(name):
    update, model = build(name, SIZE, "cpu")
    calls = []
    # Before, not after it: computing again ends as soon as the last tensor that the backward wants is there.
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(name))
    update()
    assert len(calls) == 3 * (2 if name.endswith("_checkpointed") else 1)  # micro-batches
    assert model.is_gradient_checkpointing == name.endswith("_checkpointed")


@pytest.mark.parametrize("room", [0, 3, 4, 37, 64, 255, 256, 1000])
def test_the_largest_batch_is_found_to_one_part_in_eight_and_the_end_of_the_search_is_told(room):
    tried = []
    found, capped = largest(lambda rollouts: tried.append(rollouts) or rollouts <= room, most=256)
    assert found <= min(room, 256)
    assert found % 4 == 0
    assert capped == (room >= 256)
    if room >= 4:
        assert found >= min(room, 256) - max(4, found // 8)
    assert len(tried) == len(set(tried)) < 16
    assert max(tried) <= 256


def test_a_failure_of_something_else_than_memory_ends_the_search_with_its_reason(monkeypatch):
    def alone(name, size, device, *options):
        return {"reason": "KeyError: 'x'", "no_room": False} if size.rollouts > 8 else {"fits": True}

    monkeypatch.setattr(suite_step_search, "alone", alone)
    found = search("trl", SIZE, "cpu", 256, None)
    assert found == {
        "largest_batch_reason": "trl with 16 rollouts failed, and not of memory: KeyError: 'x'",
    }


def test_the_fastest_micro_batch_is_kept_and_said():
    made = {one: [{"seconds": seconds, "loss": 1.0}] for one, seconds in ((2, 3.0), (4, 1.0), (8, 2.0))}
    found = best({**made, 16: [{"reason": "out of memory", "no_room": True}]})
    assert (found["best_microbatch"], found["seconds"]) == (4, 1.0)
    assert found["tried"] == {"2": 3.0, "4": 1.0, "8": 2.0, "16": "out of memory"}
    assert best({8: made[8]}) == {"seconds": 2.0, "loss": 1.0}


def test_several_processes_take_turns_and_their_median_counts(monkeypatch):
    seconds = {("trl", 4): [5.0, 1.0, 4.0], ("trl", 8): [2.0, 3.0, 9.0], ("ours", 4): [1.0, 1.0, 1.0]}
    order = []

    def alone(name, size, device, *options):
        order.append(name)
        left = seconds.get((name, size.microbatch))
        return {"seconds": left.pop(0)} if left else {"reason": "out of memory", "no_room": True}

    monkeypatch.setattr(suite_step_search, "alone", alone)
    found = dict(sweep(["trl", "ours"], SIZE, "cpu", 5, [4, 8], 3))
    assert order == ["trl"] * 2 + ["ours"] * 4 + ["trl"] * 4 + ["ours"] * 2
    assert found["trl"] == {
        **{"seconds": 3.0, "processes": 3, "seconds_range": [2.0, 9.0]},
        **{"best_microbatch": 8, "tried": {"4": 4.0, "8": 3.0}},
    }
    assert (found["ours"]["seconds"], found["ours"]["tried"]["8"]) == (1.0, "out of memory")


def test_first_updates_that_disagree_are_named_and_fail_the_run(monkeypatch, capsys):
    ours = {"loss": 0.5, "grad_norm": 2.0, "seconds": 1.0}
    near = {**ours, "loss": 0.5 * (1 + 5e-6), "grad_norm": 2.0 * (1 + 5e-5)}
    assert disagreements({"entrocraft": ours, "trl": near}, "cpu") == []
    far = {**ours, "loss": 0.5 * (1 + 2e-5)}
    (line,) = disagreements({"entrocraft": ours, "trl": far, "trl_liger": {"reason": "no GPU"}}, "cpu")
    assert line == "trl: loss 0.50001, ours 0.5: 2.0e-05 > 1e-05"
    assert disagreements({"entrocraft": ours, "trl": far}, "cuda") == []
    assert len(disagreements({"entrocraft": ours, "trl": {**far, "loss": math.nan}}, "cuda")) == 1
    monkeypatch.setattr(suite_step_search, "alone", lambda name, *rest: far if name == "trl" else ours)
    assert suite_trl_step.main(["--device", "cpu"]) == 1
    assert "error: first updates disagree: trl: loss 0.50001, ours 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", "0"), "argument --rounds: '0' is no count: expected a whole number of at least 1"),
        (("--rollouts", "0"), "argument --rollouts: '0' is no count"),
        (("--microbatch", "4", "0"), "argument --microbatch: '0' is no count"),
        (("--limit-gb", "0"), "--limit-gb 0: expected more than 0, such as 4"),
        (("--largest",), "--largest on a CPU needs a limit, such as --limit-gb 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        suite_trl_step.main(["--device", "cpu", *options])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_measures_in_a_process_of_its_own_and_says_why_not():
    found = alone("entrocraft", SIZE, "cpu", "--rounds=1")
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 0
    assert found["grad_norm"] == pytest.approx(exact_update(SIZE, "cpu")[1], rel=1e-4)
    wrong = alone("entrocraft", SIZE._replace(head="nosuch"), "cpu", "--rounds=1")
    assert "invalid choice: 'nosuch'" in wrong["reason"]
    assert wrong["no_room"] is False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold a process to RLIMIT_DATA")
def test_under_a_limit_of_memory_a_small_batch_fits_and_a_large_one_does_not():
    """One tensor of 64 rollouts' logits is 0.27 GB in fp32, of which TRL's CPU path has several."""
    size = Size("small", layers=1, rollouts=4, prompt=32, response=128, microbatch=4)
    assert fits("trl", size, "cpu", 0.5)
    assert not fits("trl", size._replace(rollouts=64, microbatch=64), "cpu", 0.5)
