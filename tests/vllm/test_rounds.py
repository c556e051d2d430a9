"""Train, publish, generate: after every publication the sampler's log-probabilities are the trainer's."""

import threading

import numpy as np
import pytest
import torch
from vllm_kit import ENDS, PROMPTS, learn, make_engine, make_policy

from entrocraft.train import vllm_engine, vllm_worker
from entrocraft.train.config_engine import MismatchConfig
from entrocraft.train.deadline import WaitedTooLong
from entrocraft.train.errors import NonFiniteError, TrainingStopped
from entrocraft.train.lora import is_adapter, without_adapters
from entrocraft.train.mismatch import MismatchWatch, mismatch_metrics
from entrocraft.train.packing import pack
from entrocraft.train.publication import Ledger, PublicationError, check_version

# Both compute in float32, by other kernels: the largest difference seen over these logits is 1e-5 nats.
TOLERANCE = 5e-5


def draw(engine, stream=(0, 1), samples=8, **options):
    return engine.sample(PROMPTS, samples, stream=stream, **options)


def difference(policy, rollouts):
    return float((policy.score(rollouts, 4096).logprob_T - rollouts.sampler_logprob_T).abs().max())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_publication_arrives(published, tied):
    policy, engine = published(tied=tied)
    for version in range(1, 5):
        metrics = engine.publish(version)
        rollouts = draw(engine, (0, version))
        assert rollouts.weight_version == version
        assert check_version(rollouts, version, allowed=0) == 0
        assert (rollouts.R, rollouts.P) == (32, 4)
        assert difference(policy, rollouts) < TOLERANCE
        assert metrics["publish_mib"] == sum(v.numel() * 4 for _, v in policy.weights()) / 2**20
        learn(policy, rollouts)
        # The step was a real one: the same rollouts are scored quite differently now.
        assert difference(policy, rollouts) > 1000 * TOLERANCE


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_skipped_publication_is_caught(published, tied):
    policy, engine = published(tied=tied)
    engine.publish(1)
    learn(policy, draw(engine))
    stale = draw(engine)
    with pytest.raises(PublicationError, match=r"version 1 while the policy is at version 2.*skipped or lost"):
        check_version(stale, 2, allowed=0)
    # And by its numbers, should the version lie.
    metrics = mismatch_metrics(policy.score(stale, 4096).logprob_T, stale)
    with pytest.raises(TrainingStopped, match="what was sampled is not the policy"):
        MismatchWatch(MismatchConfig(stop=0.1)).observe(2, metrics)


def test_a_tied_head_that_stays_stale_would_be_noticed(published, monkeypatch):
    """Without packing the head anew, vLLM's CPU build goes on with its first copy, and no checksum can see it."""
    policy, engine = published(tied=True)
    learn(policy, draw(engine), lr=0.3)
    monkeypatch.setattr(vllm_worker, "repack_heads", lambda model: None)
    engine.publish(1)
    rollouts = draw(engine)
    metrics = mismatch_metrics(policy.score(rollouts, 4096).logprob_T, rollouts)
    assert metrics["mismatch_mean"] > 1000 * TOLERANCE
    with pytest.raises(TrainingStopped, match="a stale head"):
        MismatchWatch(MismatchConfig(stop=0.05)).observe(1, metrics)
    monkeypatch.undo()
    engine.publish(2)
    assert difference(policy, draw(engine)) < TOLERANCE


def test_rollouts_are_a_function_of_weights_prompts_and_stream(published):
    _, engine = published(tied=False)
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    first, again, other = draw(engine), draw(engine), draw(engine, (0, 2))
    engine.publish(0)
    assert torch.equal(first.token_T, again.token_T)
    assert torch.equal(first.sampler_logprob_T, again.sampler_logprob_T)
    assert not torch.equal(first.token_T[:64], other.token_T[:64])
    rows = [tuple(row.tolist()) for row in first.token_T.split(first.length_R.tolist())]
    assert len(set(rows)) > 24  # samples of one prompt have seeds of their own
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == torch.get_num_threads()


def test_layout_and_ends(published):
    policy, engine = published(tied=False)
    assert engine.model.eos_ids == [1, *ENDS]
    rollouts = draw(engine, samples=16)
    assert rollouts.group_R.tolist() == [g for g in range(4) for _ in range(16)]
    assert rollouts.sample_R.tolist() == list(range(16)) * 4
    assert rollouts.prompts == tuple(PROMPTS)
    pieces = rollouts.token_T.split(rollouts.length_R.tolist())
    for piece, truncated in zip(pieces, rollouts.truncated_R.tolist(), strict=True):
        ends = [token in engine.model.eos_ids for token in piece.tolist()]
        assert not any(ends[:-1])
        assert ends[-1] != truncated
        assert len(piece) == 16 or not truncated
    assert 0.1 < rollouts.truncated_R.float().mean() < 0.9
    # Another temperature, as evaluation has it, and the log-probabilities of that temperature.
    cold = draw(engine, temperature=0.2)
    policy.temperature, usual = 0.2, policy.temperature
    try:
        assert difference(policy, cold) < 5 * TOLERANCE  # logits are divided by less
    finally:
        policy.temperature = usual


def test_merged_adapters_are_what_is_sampled_from():
    """vLLM knows nothing of adapters: what is published is their sum with the frozen weights."""
    policy = make_policy(tied=True, lora=4)
    engine = make_engine(policy)
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert all(map(is_adapter, trained))
    first = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    for version in range(3):
        engine.publish(version)
        rollouts = draw(engine, (0, version))
        assert rollouts.weight_version == version
        assert difference(policy, rollouts) < TOLERANCE
        with without_adapters(policy.model):
            from_base = difference(policy, rollouts)
        # New adapters add nothing. Learnt ones make another model, and it is not the base that was sampled from.
        assert from_base < TOLERANCE if version == 0 else from_base > 1000 * TOLERANCE
        for batch in pack(rollouts, range(rollouts.R), 4096):
            (-policy.token_stats(batch, rollouts.token_T).logprob_T.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, first[name]) for name, p in trained.items())  # every A and every B


def test_what_arrives_changed_is_refused(published, monkeypatch):
    policy, engine = published(tied=False)
    whole = vllm_engine.parcels

    def tampered(weights, mib):
        for parcel in whole(weights, mib):
            yield [
                (name, value + 1e-7 if name.endswith("layers.1.mlp.up_proj.weight") else value)
                for name, value in parcel
            ]

    monkeypatch.setattr(vllm_engine, "parcels", tampered)
    with pytest.raises(
        PublicationError, match=r"version 3 .* 0 did not arrive and 1 arrived as others: model.layers.1"
    ):
        engine.publish(3)
    monkeypatch.setattr(vllm_engine, "parcels", lambda weights, mib: [p[:-2] for p in whole(weights, mib)])
    with pytest.raises(PublicationError, match="got no new value"):
        engine.publish(4)
    monkeypatch.undo()
    engine.publish(5)
    assert difference(policy, draw(engine)) < TOLERANCE


def test_what_changes_after_loading_is_found(published):
    policy, engine = published(tied=False)
    ledger = Ledger(0)
    assert len(list(ledger.passing(policy.weights(), torch.float32))) == len(ledger.received)
    (attested,) = engine.llm.collective_rpc("entrocraft_attest")
    ledger.compare(attested, "vLLM", check="held")
    assert attested["held"]["embed_tokens"] is not None
    assert attested["held"]["norm"] is not None
    head = engine.llm.apply_model(lambda model: model.model.embed_tokens.weight.data[3].mul_(1 + 1e-6) is None)
    assert head == [False]
    (attested,) = engine.llm.collective_rpc("entrocraft_attest")
    ledger.compare(attested, "vLLM", check="received")
    with pytest.raises(PublicationError, match=r"after loading 1 of .* hold other values: embed_tokens"):
        ledger.compare(attested, "vLLM", check="held")


def test_broken_weights_are_named():
    policy = make_policy(tied=False)
    engine = make_engine(policy)
    engine.publish(0)
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(torch.nan)
    engine.publish(1)
    with pytest.raises(NonFiniteError, match="weight version 1"):
        draw(engine)


def test_it_sleeps_while_the_policy_learns():
    """The CPU build frees nothing, but it goes through the same calls, refuses to work asleep and forgets its cache."""
    policy = make_policy(tied=True)
    engine = make_engine(policy, sleep="on")
    for version in range(3):
        engine.publish(version)
        rollouts = draw(engine)
        assert difference(policy, rollouts) < TOLERANCE
        engine.rest()
        with pytest.raises(AssertionError, match="asleep"):
            draw(engine)
        learn(policy, rollouts)


def test_a_wait_ends_and_says_who_waited_for_whom():
    policy = make_policy(tied=False)
    engine = make_engine(policy, publish_timeout_s=0.5)
    hang = threading.Event()

    def stuck():
        hang.wait(20)
        yield from policy.weights()

    object.__setattr__(engine.model, "weights", stuck)
    with pytest.raises(
        WaitedTooLong, match=r"rank 0 of the trainer waited 0.5 s for vLLM .* take over weight version 7"
    ):
        engine.publish(7)
    with pytest.raises(WaitedTooLong, match="still has not done: take over weight version 7"):
        draw(engine)
    hang.set()


def test_a_sampler_in_bfloat16_is_near(published):
    policy = make_policy(tied=False)
    engine = make_engine(policy, dtype="bfloat16")
    engine.publish(0)
    rollouts = draw(engine, samples=16)
    metrics = mismatch_metrics(policy.score(rollouts, 4096).logprob_T, rollouts)
    assert 1e-4 < metrics["mismatch_mean"] < 0.05
    assert metrics["mismatch_kl"] < 0.01
    assert 0.8 < metrics["mismatch_ratio_p01"] < metrics["mismatch_ratio_p50"] < metrics["mismatch_ratio_p99"] < 1.25


def test_heads_without_a_kernel_are_refused():
    from entrocraft.train.config_model import TinyModelConfig
    from entrocraft.train.policy import Policy
    from entrocraft.train.tiny_model import build_tiny_model

    model, tokenizer = build_tiny_model(TinyModelConfig(hidden_size=32, layers=1, heads=2, context=64), 0)
    policy = Policy(model, tokenizer, temperature=1.0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="attention heads of 16 dimensions"):
        make_engine(policy)
