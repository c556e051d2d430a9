"""Drawing ahead: which weights, which prompts, and what a checkpoint brings back. The engine is the real one that
samples from the module, given its versions as a separate sampler would have them."""

import dataclasses
import json
import threading
from concurrent.futures import Future

import pytest
import torch

from entrocraft.train.config import SamplingConfig
from entrocraft.train.config_engine import EngineConfig
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.data import PromptOrder
from entrocraft.train.drawing import Drawing
from entrocraft.train.publication import PublicationError
from entrocraft.train.sampling import HuggingFaceEngine
from entrocraft.train.tiny_model import build_tiny_model

PROMPTS = [(i, i + 1) for i in range(3, 15)]


def make(*, ahead):
    model, _ = build_tiny_model(TinyModelConfig(hidden_size=16, layers=1, heads=2, mlp_size=32, context=32), 0)
    engine = HuggingFaceEngine(model, SamplingConfig(max_response_tokens=4), eos_ids=[1], pad_id=0)
    drawing = Drawing(
        engine,
        PromptOrder(len(PROMPTS), 0),
        PROMPTS,
        samples_per_prompt=2,
        stream=(0, 1),
        ahead=ahead,
    )
    return engine, drawing


def steps(engine, drawing, first, last, end):
    """The batches of some steps, each followed by a publication."""
    found = []
    engine.publish(first - 1)
    for step in range(first, last + 1):
        drawn, age = drawing.take(step, last=end, prompts=3)
        drawing.settle()
        engine.publish(step)
        found.append((step, drawn.chosen, drawn.rollouts.weight_version, age, drawn.rollouts.token_T.tolist()))
    return found


def test_in_turn():
    found = steps(*make(ahead=False), 1, 4, 4)
    assert [(version, age) for _, _, version, age, _ in found] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert sorted(i for _, chosen, *_ in found for i in chosen) == list(range(12))


def test_ahead_is_one_version_older_and_of_the_same_prompts():
    in_turn, ahead = (steps(*make(ahead=ahead), 1, 4, 4) for ahead in (False, True))
    assert [(version, age) for _, _, version, age, _ in ahead] == [(0, 0), (0, 1), (1, 1), (2, 1)]
    # The module does not change here, so the same prompts in the same random streams give the same tokens.
    assert [(step, chosen, tokens) for step, chosen, _, _, tokens in ahead] == [
        (step, chosen, tokens) for step, chosen, _, _, tokens in in_turn
    ]


def test_a_step_that_draws_again_gets_other_prompts_and_other_random_numbers():
    engine, drawing = make(ahead=False)
    engine.publish(0)
    first, _ = drawing.take(1, last=1, prompts=4)
    more, age = drawing.take(1, last=1, prompts=2, first_prompt=4)
    assert (more.step, more.rollouts.P, age) == (1, 2, 0)
    assert not set(first.chosen) & set(more.chosen)
    # In one go the six prompts get the same responses.
    engine, drawing = make(ahead=False)
    engine.publish(0)
    whole, _ = drawing.take(1, last=1, prompts=6)
    assert whole.chosen == first.chosen + more.chosen
    assert whole.rollouts.token_T.tolist() == first.rollouts.token_T.tolist() + more.rollouts.token_T.tolist()


def test_an_engine_rests_unless_it_draws_ahead():
    rested = []
    for ahead in (False, True):
        engine, drawing = make(ahead=ahead)
        engine.publish(0)
        engine.rest = lambda: rested.append(1)
        drawing.take(1, last=2, prompts=3)
        assert rested == ([] if not ahead else [1])
        drawing.rest()
        drawing.settle()
        assert rested == [1]
        drawing.close()


def test_nothing_is_drawn_beyond_the_last_step():
    engine, drawing = make(ahead=True)
    steps(engine, drawing, 1, 2, 2)
    assert drawing.state_dict() is None
    drawing.close()


def test_it_is_drawn_while_the_caller_goes_on():
    engine, drawing = make(ahead=True)
    engine.publish(0)
    sample, begun, go_on = engine.sample, threading.Event(), threading.Event()
    drawing.take(1, last=1, prompts=3)

    def slowly(*args, **kwargs):
        begun.set()
        assert go_on.wait(20)
        return sample(*args, **kwargs)

    engine.sample = slowly
    drawing._begin(2, 3)
    assert begun.wait(20)  # it is under way, and this thread is here
    go_on.set()
    drawing.settle()
    assert drawing.take(2, last=2, prompts=3)[1] == 1
    drawing.close()


def test_a_version_that_is_too_old_is_refused():
    engine, drawing = make(ahead=True)
    engine.publish(0)
    drawing.take(1, last=9, prompts=3)
    drawing.settle()
    engine.publish(1)
    drawing.take(2, last=9, prompts=3)
    drawing.settle()  # step 3 has been drawn from version 1, and version 2 is never published
    drawing.take(3, last=9, prompts=3)
    drawing.settle()
    with pytest.raises(PublicationError, match="version 1 while the policy is at version 3: expected at most 1 older"):
        drawing.take(4, last=9, prompts=3)
    drawing.close()


def test_a_checkpoint_brings_back_what_was_drawn():
    engine, drawing = make(ahead=True)
    whole = steps(engine, drawing, 1, 4, 4)
    engine, drawing = make(ahead=True)
    steps(engine, drawing, 1, 2, 4)
    saved = json.loads(json.dumps({"drawn": drawing.state_dict(), "order": drawing.order.state_dict()}))
    engine, drawing = make(ahead=True)
    drawing.order.load_state_dict(saved["order"])
    drawing.load_state_dict(saved["drawn"])
    assert steps(engine, drawing, 3, 4, 4) == whole[2:]
    drawing.close()


def test_numbers_survive_the_checkpoint_to_the_last_bit():
    engine, drawing = make(ahead=True)
    engine.publish(0)
    drawn, _ = drawing.take(1, last=1, prompts=3)
    exact = torch.randn(drawn.rollouts.T)
    future = Future()
    rollouts = dataclasses.replace(drawn.rollouts, sampler_logprob_T=exact)
    future.set_result(dataclasses.replace(drawn, step=2, rollouts=rollouts))
    drawing._next = future
    other = make(ahead=True)[1]
    other.load_state_dict(json.loads(json.dumps(drawing.state_dict())))
    again = other.take(2, last=2, prompts=3)[0].rollouts
    assert again.sampler_logprob_T is not None
    assert torch.equal(again.sampler_logprob_T, exact)
    for name in ("token_T", "rollout_T", "mask_T", "group_R", "sample_R", "truncated_R"):
        assert torch.equal(getattr(again, name), getattr(rollouts, name)), name
    assert again.prompts == rollouts.prompts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": True}, "engine.overlap = True: expected false beside engine.name = 'hf'"),
        ({"name": "vllm", "overlap": True, "sleep": "on"}, "engine.sleep = 'on'"),
        ({"memory": 1.5}, "engine.memory = 1.5"),
        ({"sample_timeout_s": 0}, "engine.sample_timeout_s = 0"),
        ({"url": "localhost:8000"}, "engine.url = 'localhost:8000': expected an address such as http://host:8000"),
    ],
    ids=["hf", "asleep", "memory", "time", "url"],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)
