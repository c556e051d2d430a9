"""FusedHead on real (tiny) transformers models against `model(...).logits`, values and every parameter's gradient."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from entrocraft.kernels import FusedHead, TokenStats, logits_logprob_entropy_reference
from entrocraft.kernels.testing import assert_no_worse_than_torch

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _qwen3(*, tied: bool, device: str) -> Qwen3ForCausalLM:
    config = Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=tied, initializer_range=0.3)
    return Qwen3ForCausalLM(config).to(torch.device(device)).train()  # pyright: ignore[reportArgumentType]


def _logits_stats(model, target_T, position_T, **inputs) -> TokenStats:
    """What a trainer without the op does."""
    logit_TV = model(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, position_T)
    return logits_logprob_entropy_reference(logit_TV, target_T)


def _gradients(model: nn.Module, stats: TokenStats) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (stats.logprob_T.double().mean() + 0.3 * stats.entropy_T.double().mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# A batch of 3 x 17 with padding at the left of one row; 23 of its positions, out of order, one twice.
@pytest.fixture
def batch(device):
    input_ids = torch.randint(0, 131, (3, 17), device=device)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :4] = 0
    position_T = torch.randperm(51, device=device)[:23]
    position_T[5] = position_T[6]
    position_T = torch.where((position_T >= 17) & (position_T < 21), 30, position_T)
    return (
        torch.randint(0, 131, (23,), device=device),
        position_T,
        {"input_ids": input_ids, "attention_mask": attention_mask},
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["fp32", "bf16", "autocast"],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_as_the_models_own_logits(device, batch, tied, dtype, autocast, checkpointing):
    target_T, position_T, inputs = batch
    model = _qwen3(tied=tied, device=device).to(dtype)
    exact_model = copy.deepcopy(model).double()
    if checkpointing:
        model.gradient_checkpointing_enable()
    layer_runs = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: layer_runs.append(1))
    context = torch.autocast(device, dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    results = []
    for run, its_model in ((FusedHead(model), model), (_logits_stats, model), (_logits_stats, exact_model)):
        with context if its_model is model else contextlib.nullcontext():
            stats = (
                run(target_T, position_T, **inputs)
                if isinstance(run, FusedHead)
                else run(its_model, target_T, position_T, **inputs)
            )
        results.append((stats, _gradients(its_model, stats)))
    assert len(layer_runs) == (4 if checkpointing else 2), "checkpointing recomputes a layer in each of two backwards"
    for name in ("logprob_T", "entropy_T", "lse_T"):
        assert_no_worse_than_torch(*[getattr(stats, name) for stats, _ in results], floor=2e-6, name=name)
    assert set(results[0][1]) == set(results[2][1])
    assert ("lm_head.weight" in results[0][1]) != tied
    for name, wanted in results[2][1].items():
        triple = [gradients[name] for _, gradients in results]
        assert_no_worse_than_torch(*triple, floor=4e-6 * float(wanted.abs().max()), name=name)


def test_all_positions_temperature_and_collision(device, batch):
    _, _, inputs = batch
    model = _qwen3(tied=False, device=device)
    target_BS = torch.randint(0, 131, (3, 17), device=device)
    target_BS[0, :3] = -100
    with torch.no_grad():
        stats = FusedHead(model)(target_BS, temperature=0.7, collision=True, **inputs)
        logit_TV = model.double()(**inputs).logits.flatten(0, 1)
    exact = logits_logprob_entropy_reference(logit_TV, target_BS.flatten(), temperature=0.7, collision=True)
    for name in stats.as_dict():
        torch.testing.assert_close(getattr(stats, name).double(), getattr(exact, name), rtol=0, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_options_of_every_call(device, batch, tied):
    target_T, position_T, inputs = batch
    model = _qwen3(tied=tied, device=device)
    results = []
    for options in ({}, {"mode": "cache", "cache_bytes": 1 << 24, "varentropy": True}):
        stats = FusedHead(model, **options)(target_T, position_T, **inputs)
        assert (stats.varentropy_T is None) == (not options)
        results.append((stats.logprob_T.detach(), _gradients(model, stats)))
    (recomputed_T, expected), (cached_T, actual) = results
    torch.testing.assert_close(cached_T, recomputed_T, rtol=0, atol=0)
    for name, wanted in expected.items():
        torch.testing.assert_close(actual[name], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_frozen_head_and_frozen_backbone(device, batch):
    target_T, position_T, inputs = batch
    model = _qwen3(tied=False, device=device)
    full = _gradients(model, FusedHead(model)(target_T, position_T, **inputs))
    for frozen in ("lm_head", "model"):
        model.requires_grad_(True)
        model.get_submodule(frozen).requires_grad_(False)
        some = _gradients(model, FusedHead(model)(target_T, position_T, **inputs))
        assert set(some) == {name for name in full if not name.startswith(frozen + ".")}
        for name, gradient in some.items():
            torch.testing.assert_close(gradient, full[name], rtol=0, atol=1e-6 * float(full[name].abs().max()))


# One model for each thing that is done to logits: a multiplier, a divisor, a softcap; and a head with another layout.
@pytest.mark.parametrize("kind", ["cohere", "granite", "gemma2", "gpt2"])
def test_scales_and_softcaps(device, kind):
    small: dict[str, Any] = SIZES | {"pad_token_id": 0}
    build = {
        "cohere": lambda: CohereForCausalLM(CohereConfig(**small, logit_scale=0.25, initializer_range=0.3)),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**small, logits_scaling=4.0, initializer_range=0.3)),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(**small, head_dim=8, final_logit_softcapping=3.0, initializer_range=0.3)
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=131, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
        ),
    }
    model = build[kind]().to(device).eval()
    input_ids = torch.randint(0, 131, (2, 9), device=device)
    head = FusedHead(model)
    assert (head.scale, head.softcap) == {
        "cohere": (0.25, None),
        "granite": (0.25, None),
        "gemma2": (1.0, 3.0),
        "gpt2": (1.0, None),
    }[kind]
    assert head.check(input_ids) < 1e-5
    target_T = torch.randint(0, 131, (18,), device=device)
    position_T = torch.arange(18, device=device)
    actual = _gradients(model, head(target_T, input_ids=input_ids))
    exact = _gradients(model, _logits_stats(model, target_T, position_T, input_ids=input_ids))
    assert set(actual) == set(exact)
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, exact[name], rtol=0, atol=1e-5 * float(exact[name].abs().max()) + 1e-9)


def _one_and_a_half(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output * 1.5


def test_check_finds_a_head_it_does_not_understand(device):
    model = _qwen3(tied=False, device=device)
    model.lm_head.register_forward_hook(_one_and_a_half)
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM gives log-probabilities .* nats away"):
        FusedHead(model).check(torch.randint(0, 131, (2, 5), device=device))


class LoRALinear(nn.Linear):
    """A head wrapped the way adapter libraries do it: the low-rank part lies beside the weight."""

    def __init__(self) -> None:
        super().__init__(32, 131, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(32, 4, bias=False)})


# The other families that do something to their logits, each by its own name for it.
def test_scales_and_softcaps_under_other_names(device):
    small: dict[str, Any] = SIZES | {"pad_token_id": 0, "initializer_range": 0.3}
    whole = small | {"num_key_value_heads": 4}
    short = {name: size for name, size in small.items() if name not in ("max_position_embeddings", "initializer_range")}
    latent: dict[str, Any] = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    mamba: dict[str, Any] = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    blocks: dict[str, Any] = {"lru_width": 32, "head_dim": 8, "block_types": ("recurrent", "attention")}
    models = {
        (0.5, None): HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**small, logits_scaling=0.5)),
        (4.0, None): MiniCPM3ForCausalLM(MiniCPM3Config(**whole, **latent, v_head_dim=8, dim_model_base=128)),
        (0.25, None): FalconH1ForCausalLM(FalconH1Config(**small, **mamba, mamba_n_groups=1, lm_head_multiplier=0.25)),
        (1.0, 0.5): RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**short, **blocks, logits_soft_cap=0.5)),
    }
    for expected, model in models.items():
        head = FusedHead(model.to(torch.device(device)).eval())
        assert (head.scale, head.softcap) == expected, type(model).__name__
        assert head.check(torch.randint(0, 131, (2, 9), device=device), tolerance=1e-5) < 1e-5


def test_a_layer_between_backbone_and_head_is_refused():
    # BERT transforms the hidden rows before its decoder; without the refusal the answer is off by half a nat.
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    model = BertLMHeadModel(BertConfig(**sizes, is_decoder=True))
    with pytest.raises(ValueError, match=r"BertLMHeadModel has 4 parameters outside.*cls.predictions.transform.dense"):
        FusedHead(model)


def test_what_cannot_be_right_is_refused(device):
    model = _qwen3(tied=False, device=device)
    head = FusedHead(model)
    model.set_output_embeddings(LoRALinear())
    for use in (lambda: FusedHead(model), lambda: head.stats(torch.zeros(1, 32), torch.zeros(1, dtype=torch.int64))):
        with pytest.raises(ValueError, match=r"the head is a LoRALinear with `lora_A`.*merge it first"):
            use()
    with pytest.raises(ValueError, match="model is a Linear without `get_output_embeddings`"):
        FusedHead(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Qwen3Model has no output embedding"):
        FusedHead(_qwen3(tied=False, device=device).model)
    unknown = _qwen3(tied=False, device=device)
    unknown.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match=r"config.logits_scaling is 8.0 in the unknown model type 'qwen3'"):
        FusedHead(unknown)
