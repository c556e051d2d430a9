"""Liger's layers in the policy and in a run: the same log-probabilities, entropies and gradients, by its own kernels.

Without a GPU Triton's interpreter stands in, in a process of its own, which one test starts. It shows that what is put
in computes the right numbers; not that it compiles, and no speed.
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.qwen3 import modeling_qwen3

from entrocraft import Rollouts
from entrocraft.kernels.testing import assert_no_worse_than_torch
from entrocraft.train import layers
from entrocraft.train.config import Config, ModelConfig
from entrocraft.train.config_lora import LoraConfig
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.config_parallel import ParallelConfig
from entrocraft.train.config_reader import load_config
from entrocraft.train.loading import load
from entrocraft.train.lora import is_adapter
from entrocraft.train.metrics import depends_on_the_clock, read_metrics
from entrocraft.train.packing import pack
from entrocraft.train.policy import Policy
from entrocraft.train.train import run_training

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = {
    "_rms_norm_forward_kernel", "_rms_norm_backward_kernel", "_triton_rope",
    "_swiglu_forward_kernel", "_swiglu_backward_kernel",
}  # fmt: skip
# No size is a power of two, so every kernel masks; one key-value head for two query heads.
SHAPE = TinyModelConfig(hidden_size=24, layers=2, heads=2, mlp_size=40, context=64)
runs = pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="runs in the process that is started below")


@pytest.mark.skipif(DEVICE.type == "cuda" or INTERPRETED, reason="this process runs them itself")
def test_all_of_this_file_under_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-rs", "-p", "no:xdist", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert re.search(r"\b4 passed, 1 skipped", result.stdout), result.stdout[-2000:]


@pytest.fixture
def seen(monkeypatch):
    """Names of the kernels that ran, where the interpreter runs them. Afterwards transformers is as it was."""
    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):  # what Liger exchanges for the whole process
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))
    if not INTERPRETED:
        return None
    names = set()
    mend_interpreter(monkeypatch, names)
    obstacle = layers._liger_obstacle
    monkeypatch.setattr(layers, "_liger_obstacle", lambda device, kind: obstacle(torch.device("cuda"), kind))
    return names


def mend_interpreter(monkeypatch, names):
    """Two things that a GPU gives a kernel and the interpreter does not; and `names` gets what it runs."""
    import liger_kernel.ops.rms_norm as rms_norm  # pyright: ignore[reportMissingImports]
    import triton.language as tl
    from triton.runtime import interpreter

    convert, call = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def with_floats(value):  # compiled, a Python float arrives as an fp32 scalar; here it stays a float, without `.to`
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    def recorded(self, *args, **kwargs):
        names.add(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))  # CUDA's library of functions gives None here


def make_policy(dtype=torch.float32, **case):
    """A tiny Qwen3 whose norms are not all ones, whose adapters, if any, add something."""
    lora = LoraConfig(rank=case.pop("rank", None))
    shape = dataclasses.replace(SHAPE, layers=case.pop("layers", SHAPE.layers))
    made = ModelConfig(tiny=shape, **case), ParallelConfig(), lora
    model, tokenizer = load(*made, device=torch.device("cpu"), size=1, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or is_adapter(name):
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return Policy(model.to(dtype), tokenizer, temperature=0.7, device=DEVICE)


def make_rollouts():
    """Five ragged responses to three prompts: two micro-batches of several rows, with padding, and a row of two."""
    length_R = torch.tensor([4, 1, 5, 2, 3])
    rollout_T = torch.arange(5).repeat_interleave(length_R)
    generator = torch.Generator().manual_seed(2)
    return Rollouts(
        token_T=torch.randint(3, 259, rollout_T.shape, generator=generator),
        rollout_T=rollout_T,
        mask_T=torch.ones(len(rollout_T), dtype=torch.bool),
        group_R=torch.tensor([0, 0, 1, 1, 2]),
        sample_R=torch.tensor([0, 1, 0, 1, 0]),
        prompts=((5, 6, 7), (9,), (30, 31, 32, 33)),
        truncated_R=torch.zeros(5, dtype=torch.bool),
        weight_version=0,
    )


def learnt(policy, rollouts):
    """Log-probabilities, entropies, and the gradients of a loss in which every token counts differently."""
    policy.model.train()
    found = {}
    for number, batch in enumerate(pack(rollouts, range(rollouts.R), 18)):
        stats = policy.token_stats(batch, rollouts.token_T)
        weight_N = torch.cos(batch.token_N).to(stats.logprob_T)
        ((weight_N * stats.logprob_T).sum() + 0.3 * (weight_N * stats.entropy_T).sum()).backward()
        found |= {f"logprob {number}": stats.logprob_T.detach(), f"entropy {number}": stats.entropy_T.detach()}
    gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.requires_grad}
    assert len(found) == 4
    assert all(float(gradient.abs().max()) > 1e-3 for gradient in gradients.values())
    return found | gradients


@runs
@pytest.mark.parametrize(
    "case", [{}, {"rank": 3, "gradient_checkpointing": True, "layers": 1}], ids=["all", "adapters"]
)
def test_the_policy_says_and_learns_the_same(seen, case):
    """In fp32, against the same model in fp64: Liger's layers may lose twice what transformers' own lose, and 2e-6 of
    the tensor's size, some units in the last place of fp32: sums are taken in another order."""
    rollouts = make_rollouts()
    exact = learnt(make_policy(torch.float64, **case), rollouts)
    own = learnt(make_policy(**case), rollouts)
    policy = make_policy(**case)
    assert layers.use_liger(policy, ModelConfig(tiny=SHAPE, liger="auto"), [5, 6, 7, 8]) is True
    told = dict(layers.description(policy.model, policy.dtype, liger=True))
    assert told["layers"] == "Liger's norm, MLP and rotary embedding, in float32"
    actual = learnt(policy, rollouts)
    for name, value in exact.items():
        floor = 2e-6 * float(value.abs().max())
        assert_no_worse_than_torch(actual[name], own[name], value, floor=floor, name=name)
    assert seen is None or seen >= KERNELS, KERNELS - seen
    if not case:  # that the comparison can fail: a norm whose epsilon is another
        policy.model.base_model.layers[1].post_attention_layernorm.variance_epsilon *= 100
        with torch.no_grad():
            other = policy.token_stats(pack(rollouts, range(5), 18)[0], rollouts.token_T).logprob_T
        with pytest.raises(AssertionError, match="allowed"):
            assert_no_worse_than_torch(other, own["logprob 0"], exact["logprob 0"], floor=2e-5)


@runs
def test_layers_that_say_something_else_are_refused(seen, monkeypatch):
    from liger_kernel.transformers import LigerRMSNorm  # pyright: ignore[reportMissingImports]

    forward = LigerRMSNorm.forward
    monkeypatch.setattr(LigerRMSNorm, "forward", lambda self, hidden: 1.01 * forward(self, hidden))
    with pytest.raises(ValueError, match=r"Liger's layers change .* qwen3 model by 0\.0.*model.liger = 'off'"):
        layers.use_liger(make_policy(), ModelConfig(tiny=SHAPE, liger="on"), [5, 6, 7, 8])


def settings(folder: Path, liger: str) -> Config:
    """One step that samples, scores and learns, with one layer: the interpreter is slow."""
    places = f"--run_dir={folder / liger} --data.train={folder / 'train.jsonl'} --device={DEVICE.type}"
    model = f"--model.liger={liger} --model.tiny.layers=1" + "".join(
        f" --model.tiny.{name}={getattr(SHAPE, name)}" for name in ("hidden_size", "heads", "mlp_size", "context")
    )
    batch = "--batch.prompts_per_step=2 --batch.samples_per_prompt=2 --sampling.max_response_tokens=2"
    rest = "--optimizer.steps=1 --optimizer.lr=0.01 --entropy.rule=none --logging.report=false"
    reward = "--reward.name=liger_rewards:remainder --reward.workers=0"
    return load_config(f"{places} {model} {batch} {rest} {reward}".split())


@runs
def test_a_run_with_liger_is_the_run_without_and_says_so(seen, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")  # of the table that a run begins with
    reward = "def remainder(said, answer, prompt): return float(sum(map(ord, said)) % 5)\n"
    (tmp_path / "liger_rewards.py").write_text(reward)
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "7", "answer": "7"}\n')
    without = run_training(settings(tmp_path, "off"))
    assert "transformers' own, in float32" in capsys.readouterr().out
    assert not (seen or set()) & KERNELS
    liger = run_training(settings(tmp_path, "on"))
    assert "Liger's norm, MLP and rotary embedding, in float32" in capsys.readouterr().out
    assert seen is None or seen >= KERNELS
    (expected,), (actual,) = (read_metrics(tmp_path / name) for name in ("off", "on"))
    assert expected["updates"] == 1
    assert expected["grad_norm"] > 0.01
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if not depends_on_the_clock(name):
            near = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            assert actual[name] == near, name
    after, other = (run.policy.hidden_of([5, 6, 7]) for run in (without, liger))
    assert float((other - after).abs().max()) < 1e-3 * float(after.abs().max())  # Adam makes steps of rounding
