"""What a memory plan holds in each phase beside the model that learns: the engine awake, a reference, other ranks."""

import pytest

from entrocraft.train.config_reader import load_config
from entrocraft.train.plan import GB, advise, make_plan
from entrocraft.train.plan_sizes import Known

KNOWN = Known()
BASE = ("--model.path=Qwen/Qwen3-8B", "--model.gradient_checkpointing=true")
N, V, H = 8_190_735_360, 151_936, 4096
VLLM, SERVER = "--engine.name=vllm", "--engine.name=vllm_server"
REFERENCE = "--reference.kl_coefficient=0.01"


def plan(*extra, world=16):
    return make_plan(load_config([*BASE, *extra]), world, known=KNOWN)


def phases(made):
    return {phase.name: phase.parts for phase in made.phases}


def awake_in(made):
    """Phases in which vLLM holds its share, which is always 32 GB here."""
    shares = {name: parts["vLLM"] for name, parts in phases(made).items() if "vLLM" in parts}
    assert set(shares.values()) == {32 * GB}
    return list(shares)


def test_an_engine_that_sleeps_and_one_that_does_not():
    asleep = plan(VLLM, "--engine.memory=0.4")
    assert awake_in(asleep) == ["sample", "publish"]
    for kept_awake in ("--engine.sleep=off", "--engine.overlap=true"):
        awake = plan(VLLM, "--engine.memory=0.4", kept_awake)
        assert awake_in(awake) == ["sample", "score", "update", "optimizer", "publish"]
    # 32 GB less 16.4 GB of weights; 36 layers x 2 x 8 heads x 128 x 2 bytes a token.
    assert asleep.cache_tokens == (32 * GB - 2 * N) // (36 * 4096)
    assert not plan(VLLM, "--engine.memory=0.2").fits(80 * GB)


def test_scores_that_are_taken_beside_an_engine_that_is_awake():
    """Between waves of samples, where they decide whether there is another; and in an evaluation, which goes on with
    the same weights."""
    waves = plan(VLLM, "--engine.memory=0.4", "--refill.oversample=true", REFERENCE)
    assert awake_in(waves) == ["sample", "score", "score the reference", "publish"]
    refilled = plan(VLLM, "--engine.memory=0.4", "--refill.zero_variance=refill", REFERENCE)
    assert awake_in(refilled) == ["sample", "publish"]
    held_out = "--data.eval=held_out.jsonl"
    evaluated = plan(VLLM, "--engine.memory=0.4", held_out)
    assert awake_in(evaluated) == ["sample", "publish", "evaluate"]
    found = phases(evaluated)
    assert found["evaluate"] == {**found["score"], "vLLM": 32 * GB}
    assert evaluated.peak >= sum(found["score"].values()) + 32 * GB
    drawn_only = phases(plan(VLLM, "--engine.memory=0.4", held_out, "--evaluation.entropy=false"))
    assert drawn_only["evaluate"] == drawn_only["sample"]
    assert "evaluate" not in phases(plan(VLLM))


def test_longer_answers_in_an_evaluation_by_the_model_itself():
    cut = ["--sampling.rollouts_per_batch=64", "--data.eval=held_out.jsonl", "--sampling.max_response_tokens=1024"]
    longer = phases(plan(*cut, "--evaluation.max_response_tokens=7168", "--data.max_prompt_tokens=1024", world=2))
    for phase, tokens in (("sample", 2 * 1024), ("evaluate", 8 * 1024)):
        assert longer[phase]["KV cache"] == 36 * 4096 * 64 * (tokens - 1)
    # 3 problems of 8 responses on 2 ranks: 16 on the first.
    few = phases(plan(*cut, "--evaluation.rollouts_per_batch=24", world=2))
    assert few["evaluate"]["logits"] == few["sample"]["logits"] / 4 == 2 * 4 * 16 * V  # two fp32 copies


def test_a_reference_on_the_device_or_in_host_memory():
    plain, on_device = plan(SERVER), plan(SERVER, REFERENCE)
    shard = phases(plain)["score"]["weights"]
    assert shard == pytest.approx(4 * N / 16, rel=1e-3)
    assert all(parts["reference"] == shard for parts in phases(on_device).values())
    assert (plain.host_bytes, on_device.host_bytes) == (0, 0)
    away = plan(SERVER, REFERENCE, "--reference.offload=true")
    assert all("reference" not in parts for parts in phases(away).values())
    assert away.host_bytes == shard
    offloaded = plan(SERVER, REFERENCE, "--parallel.cpu_offload=true")
    assert all("reference" not in parts and "weights" not in parts for parts in phases(offloaded).values())
    own = sum(phases(plain)["update"][name] for name in ("weights", "optimizer", "gradients"))
    assert offloaded.host_bytes == own + shard
    assert plan(SERVER, "--parallel.cpu_offload=true").host_bytes == own
    adapters = ("--lora.rank=4", "--reference.offload=true")  # the reference is the model without them
    assert plan(SERVER, REFERENCE, *adapters).host_bytes == 0


def test_a_reference_of_one_process_in_float32_comes_to_score_and_goes():
    one = phases(plan(SERVER, REFERENCE, "--reference.offload=true", "--parallel.param_dtype=float32", world=1))
    assert {name for name, parts in one.items() if "reference" in parts} == {"score the reference"}
    assert one["score the reference"]["reference"] == 4 * N


def test_a_reference_can_be_advised_away():
    config = load_config([*BASE, VLLM, REFERENCE, "--engine.memory=0.5", "--data.eval=held_out.jsonl"])
    before = make_plan(config, 2, known=KNOWN)
    advice = {a.change: a for a in advise(config, 2, gpu_bytes=80 * GB, shape=None, known=KNOWN)}
    assert advice["reference.offload = true"].peak == before.peak - phases(before)["score"]["reference"]


def test_copies_of_the_model_and_a_vocabulary_in_parts():
    plain, copies = plan(SERVER), plan(SERVER, "--parallel.shard_ranks=8")
    assert phases(copies)["sample"]["weights"] == 2 * phases(plain)["sample"]["weights"]
    by_vocabulary = plan(SERVER, "--parallel.vocab_parallel_head=true")
    less = [phases(made)["score"]["gathered weights"] for made in (plain, by_vocabulary)]
    assert less[0] - less[1] == 2 * V * H * 15 // 16  # its own rows of the head alone
    assert phases(by_vocabulary)["score"]["hidden rows"] == 17 * phases(plain)["score"]["hidden rows"]
    with pytest.raises(ValueError, match=r"parallel.shard_ranks = 5.*divisor of --world-size = 16"):
        plan("--parallel.shard_ranks=5")
