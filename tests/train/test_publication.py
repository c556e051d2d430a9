"""Checksums and versions: what they tell apart, what they are blind to on purpose, and what a refusal says."""

import dataclasses

import pytest
import torch

from entrocraft import Rollouts
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.export import named_weights
from entrocraft.train.publication import (
    Ledger,
    PublicationError,
    block_of,
    check_version,
    checksum,
    hexadecimal,
    one_version,
)
from entrocraft.train.tiny_model import build_tiny_model

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("ordered", [False, True], ids=["any-order", "ordered"])
def test_every_element_counts(dtype, ordered):
    value = torch.randint(-100, 100, (7, 5)).to(dtype)
    found = checksum(value, ordered=ordered)
    assert 0 <= found < 1 << 64
    assert found == checksum(value.clone(), ordered=ordered)
    for i in range(value.numel()):
        other = value.clone()
        other.view(-1)[i] += 1
        assert checksum(other, ordered=ordered) != found


def test_order_counts_where_it_should():
    value = torch.randn(64, 48)
    shuffled = value.view(-1)[torch.randperm(value.numel())]
    padded = torch.cat([value, torch.zeros(16, 48)])
    fused = sum(checksum(part, ordered=False) for part in value.split([16, 40, 8])) % (1 << 64)
    assert checksum(value, ordered=False) == checksum(shuffled, ordered=False) == fused
    assert checksum(value, ordered=False) == checksum(value.t(), ordered=False) == checksum(padded, ordered=False)
    assert checksum(value, ordered=True) != checksum(shuffled, ordered=True)
    assert checksum(value, ordered=True) != checksum(value.t(), ordered=True)


def test_two_errors_do_not_cancel():
    """As they would in a plain sum of bits: one element up, another down; signs exchanged; all bits turned over."""
    value = torch.arange(1, 9, dtype=torch.int32)
    for i, j in ((0, 4), (2, 7)):
        other = value.clone()
        other[i] += 1
        other[j] -= 1
        assert checksum(other, ordered=False) != checksum(value, ordered=False)
    numbers = torch.tensor([1.0, -2.0])
    assert checksum(-numbers, ordered=False) != checksum(numbers, ordered=False)
    assert checksum(~value, ordered=False) != checksum(value, ordered=False)


def test_a_large_tensor_is_the_sum_of_its_chunks(monkeypatch):
    value = torch.randn(1000)
    whole = [checksum(value, ordered=ordered) for ordered in (False, True)]
    monkeypatch.setattr("entrocraft.train.publication._CHUNK", 64)
    assert [checksum(value, ordered=ordered) for ordered in (False, True)] == whole
    assert checksum(torch.empty(0), ordered=True) == 0


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.mlp.up_proj.weight", "layers.3"),
        ("model.language_model.layers.3.mlp.experts.7.w1", "layers.3"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("model.norm.weight", "norm"),
        ("scale", "scale"),
    ],
)
def test_blocks(name, block):
    assert block_of(name) == block


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_each_weight_once(tied):
    shape = TinyModelConfig(hidden_size=16, layers=2, heads=2, mlp_size=32, context=64, tied=tied)
    model, _ = build_tiny_model(shape, 0)
    model.model.register_buffer("kept", torch.ones(3))
    model.model.register_buffer("derived", torch.ones(3), persistent=False)
    weights = dict(named_weights(model))
    assert ("lm_head.weight" in weights) != tied
    assert "model.kept" in weights
    assert "model.derived" not in weights
    assert sum(v.numel() for v in weights.values()) == sum(p.numel() for p in model.parameters()) + 3
    assert not any(v.requires_grad for v in weights.values())


def weights():
    generator = torch.Generator().manual_seed(0)
    names = ("model.embed_tokens.weight", "model.layers.0.a.weight", "model.layers.0.b.weight", "lm_head.weight")
    return {name: torch.randn(4, 6, generator=generator) for name in names}


def ledger(values=None, version=3, dtype=torch.bfloat16):
    made = Ledger(version)
    list(made.passing((values or weights()).items(), dtype))
    return made


def attested(values=None, **changes):
    """What a worker says that got these weights and loaded them, the two matrices of the layer fused into one."""
    values = {name: value.bfloat16() for name, value in (values or weights()).items()}
    fused = {
        "model.embed_tokens.weight": values["model.embed_tokens.weight"],
        "model.layers.0.ab.weight": torch.cat([values[f"model.layers.0.{name}.weight"] for name in "ab"]).t(),
        "lm_head.weight": values["lm_head.weight"],
    }
    return {
        "received": {name: hexadecimal(checksum(value, ordered=True)) for name, value in values.items()},
        "held": {block_of(name): hexadecimal(checksum(value, ordered=False)) for name, value in fused.items()},
        "error": None,
        "shards": 1,
    } | changes


def test_what_is_sent_is_cast_counted_and_recognised():
    made = Ledger(3)
    passed = dict(made.passing({**weights(), "model.count": torch.tensor([3])}.items(), torch.bfloat16))
    assert passed["lm_head.weight"].dtype == torch.bfloat16
    assert passed["model.count"].dtype == torch.int64
    assert made.bytes == 4 * 24 * 2 + 8
    ledger().compare(attested(), "the sampler", check="held")


def altered(name):
    values = weights()
    values[name][1, 2] *= 1.1
    return values


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            attested(altered("lm_head.weight")),
            "version 3 to the sampler failed: of 4 weights 0 did not arrive and 1",
        ),
        (attested(received={}), "of 4 weights 4 did not arrive and 0 arrived as others: lm_head.weight, model.emb"),
        (attested(received=attested()["received"] | {"x": "0"}), "1 arrived as others: x"),
        (
            attested(held=attested(altered("model.layers.0.a.weight"))["held"]),
            "1 of 3 blocks.*: layers.0. If this",
        ),
        (attested(held=attested()["held"] | {"visual": "0"}), "hold other values: visual"),
        (attested(error="7 parameters of the sampler got no new value: a"), "failed: 7 parameters"),
    ],
    ids=["altered", "lost", "foreign", "held", "foreign-block", "their-error"],
)
def test_a_refusal_says_what_differs(answer, reason):
    with pytest.raises(PublicationError, match=reason):
        ledger().compare(answer, "the sampler", check="held")


def test_what_cannot_be_seen_is_not_compared():
    other = attested(altered("model.layers.0.a.weight"))["held"]
    ledger().compare(attested(held=other), "the sampler", check="received")
    ledger().compare(attested(held=other, shards=2), "the sampler", check="held")
    ledger().compare(attested(held=attested()["held"] | {"layers.0": None}), "the sampler", check="held")


def rollouts(version):
    return Rollouts(
        token_T=torch.tensor([1, 2]),
        rollout_T=torch.tensor([0, 0]),
        mask_T=torch.ones(2, dtype=torch.bool),
        group_R=torch.tensor([0]),
        sample_R=torch.tensor([0]),
        prompts=((5,),),
        truncated_R=torch.tensor([False]),
        weight_version=version,
        sampler_logprob_T=torch.tensor([-1.0, -2.0]),
    )


@pytest.mark.parametrize(
    ("version", "present", "allowed", "age"), [(4, 4, 0, 0), (4, 4, 1, 0), (3, 4, 1, 1), (0, 0, 0, 0)]
)
def test_versions_that_may_be_learnt_from(version, present, allowed, age):
    assert check_version(rollouts(version), present, allowed=allowed) == age


@pytest.mark.parametrize(("version", "present", "allowed"), [(3, 4, 0), (2, 4, 1), (5, 4, 0), (5, 4, 1)])
def test_versions_that_may_not(version, present, allowed):
    with pytest.raises(PublicationError, match=f"version {version} while the policy is at version {present}"):
        check_version(rollouts(version), present, allowed=allowed)


def test_one_batch_is_of_one_version():
    assert one_version(["12", "12"], "it") == 12
    for labels in (["12", "13"], ["default"], [], ["12", "default"]):
        with pytest.raises(PublicationError, match="expected one that this trainer published"):
            one_version(labels, "it")


def test_rollouts_keep_their_version_and_the_samplers_numbers():
    kept = rollouts(7).select(torch.tensor([True]))
    assert kept.weight_version == 7
    assert kept.sampler_logprob_T is not None
    assert kept.sampler_logprob_T.tolist() == [-1.0, -2.0]
    assert dataclasses.replace(kept, weight_version=8).weight_version == 8
