"""Every recipe loads, says what its source says, and runs: two layers of its architecture, one of them with the real
vocabulary, on problems written here."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import entrocraft.train
from entrocraft.advantages import build as build_advantage
from entrocraft.train.config import Config
from entrocraft.train.config_reader import load_config
from entrocraft.train.control import build_controller, build_method
from entrocraft.train.metrics import MetricsLog
from entrocraft.train.rewards import RewardPool

CONFIGS = Path(entrocraft.train.__file__).parent / "configs"
PAPER = CONFIGS / "paper"

# (band in the first step, band in the last, kind of the schedule, steps), as the released scripts give them: bound s is
# b0 + (b1 - b0) s / S from step 1 on, so the first step's is a little below b0.
BANDS = {
    "grpo_entrocraft": ((0.6, 0.7), (0.4, 0.5), "linear", 101),
    "gspo_entrocraft": ((0.6, 0.7), (0.2, 0.3), "linear", 101),
    "long_cosine": ((0.6, 0.7), (0.1, 0.2), "cosine", 444),
    "long_linear": ((0.6, 0.7), (0.1, 0.2), "linear", 444),
    "long_fixed": ((0.5, 0.5), (0.5, 0.5), "constant", 444),
    "fixed_band": ((0.6, 0.7), (0.6, 0.7), "constant", 101),
    "qwen3_8b": ((0.4, 0.5), (0.4, 0.5), "constant", 101),
    "qwen3_14b": ((0.4, 0.5), (0.1, 0.2), "cosine", 101),
    "llama31_8b": ((0.9, 1.0), (0.1, 0.2), "cosine", 101),
}
# What a baseline changes: advantage, policy loss, method, and one number of it.
BASELINES = {
    "grpo": ("grpo", "ppo_clip", "plain", None),
    "grpo_entropy_bonus": ("grpo", "ppo_clip", "entropy_bonus", ("coefficient", 0.003)),
    "grpo_clip_higher": ("grpo", "ppo_clip", "plain", None),
    "grpo_clip_cov": ("grpo", "ppo_clip", "clip_cov", ("fraction", 2e-4)),
    "gspo": ("grpo", "gspo", "plain", None),
    "gspo_entropy_bonus": ("grpo", "gspo", "entropy_bonus", ("coefficient", 0.003)),
    "gspo_clip_higher": ("grpo", "gspo", "plain", None),
    "gspo_clip_cov": ("grpo", "gspo", "clip_cov", ("fraction", 2e-4)),
    "w_reinforce": ("w_reinforce", "ppo_clip", "plain", None),
    "entropic": ("reinforce", "ppo_clip", "entropic_parity", ("target", 0.5)),
    "constant_target": ("grpo", "ppo_clip", "adaptive_bonus", ("target", 0.5)),
}
OVERLAYS = {"with_soft": "soft", "with_hard": "hard", "with_budget": "budget"}
PARTS = {"base", "switch", "long", *OVERLAYS}


def recipe(*names: str) -> Config:
    return load_config([f"--config={PAPER / name}.yaml" for name in names])


def test_no_recipe_is_forgotten():
    assert {path.stem for path in PAPER.glob("*.yaml")} == {*BANDS, *BASELINES, *PARTS}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {
        *("demo", "demo_gpu", "gsm8k_tiny", "numina", "evaluation", "qwen3_4b")
    }


def test_the_page_names_every_recipe():
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    missing = [path.stem for path in CONFIGS.rglob("*.yaml") if f"`{path.stem}" not in page]
    assert missing == ["base"], "which stands below all others"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_gives_a_run_that_could_begin(path):
    config = load_config([f"--config={path}"])
    build_method(config)
    build_controller(config, vocab_size=151_936)
    build_advantage(config.loss.advantage, **config.loss.advantage_options)
    RewardPool.of(config.reward)
    if path.parent == PAPER and path.stem not in PARTS:
        assert config.run_dir == f"runs/paper/{path.stem}"
        assert config.optimizer.lr == 1e-6
        assert (config.batch.prompts_per_step, config.batch.samples_per_prompt, config.batch.updates_per_step) == (
            *(1024, 8, 4),
        )
        assert config.reward.signed


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_bands_are_those_of_the_released_scripts(name, overlay):
    config = recipe(name, *([overlay] if overlay else []))
    first, last, kind, steps = BANDS[name]
    assert config.entropy.rule == (OVERLAYS[overlay] if overlay else "switch")
    assert (config.entropy.schedule.kind, config.optimizer.steps) == (kind, steps)
    controller, aggregation = build_controller(config, vocab_size=151_936)
    progress = {"linear": 1 / steps, "cosine": (1 - math.cos(math.pi / steps)) / 2, "constant": 0.0}[kind]
    for step, share in ((1, progress), (steps, 1.0)):
        middle, half = controller.target(step, entropy=0.7), config.entropy.width / 2
        for edge, at in zip((middle - half, middle + half), range(2), strict=True):
            assert edge == pytest.approx(first[at] + (last[at] - first[at]) * share, abs=1e-9)
    assert aggregation == (
        "eq5" if overlay in ("with_soft", "with_hard")
        else "seq_mean_token_mean" if name == "gspo_entrocraft" else "token_mean"
    )  # fmt: skip
    guarded = overlay == "with_budget"
    assert (config.entropy.release, config.entropy.min_groups > 0) == (guarded, guarded)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_those_of_the_released_scripts(name):
    config = recipe(name)
    advantage, policy, method, number = BASELINES[name]
    assert (config.loss.advantage, config.loss.policy, config.loss.method) == (advantage, policy, method)
    assert config.entropy.rule is None
    if number is not None:
        assert config.loss.method_options[number[0]] == number[1]
    clips = {"clip_higher": (0.2, 0.28), "clip_cov": (1.0, 1.0)}.get(name[5:], (0.2, 0.2))
    own = config.loss.policy_options or {"clip_low": config.loss.clip_low, "clip_high": config.loss.clip_high}
    assert (own["clip_low"], own["clip_high"]) == clips


def test_evaluations_come_at_100k_200k_300k_and_400k_prompts():
    config = recipe("long_linear")
    P = config.batch.prompts_per_step
    steps = [step for step in range(1, 445) if config.evaluation.due(step, P * (step - 1), P * step)]
    assert steps == [math.ceil(n * 100_000 / 1024) for n in (1, 2, 3, 4)]
    assert recipe("grpo", "long").optimizer.steps == 444
    evaluation = config.evaluation
    assert (evaluation.samples, evaluation.temperature, evaluation.top_p, evaluation.top_k) == (32, 0.6, 0.95, 20)
    assert list(evaluation.sets) == ["math500", "amc23", "aime24", "aime25", "aime26"]


CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "eos_token_id": 0, "pad_token_id": 1,
    "bos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
REWARD = "def odd(completion, answer, prompt):\n    return float(len(completion) % 2)\n"


def shrunk(folder: Path, architecture: str, vocabulary: int, *, tied: bool) -> Path:
    """Two layers of an architecture with random weights, and a tokenizer of words with a chat template."""
    words = {"<end>": 0, "<pad>": 1, "<unknown>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    kind, settings = {"qwen3": (Qwen3ForCausalLM, Qwen3Config), "llama": (LlamaForCausalLM, LlamaConfig)}[architecture]
    kind(settings(vocab_size=vocabulary, tie_word_embeddings=tied, **SHAPE)).save_pretrained(folder)
    return folder


@pytest.fixture
def small(tmp_path, monkeypatch):
    """What makes a recipe small: a file to put on top of it. Model and steps are for the test to add."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "recipe_rewards.py").write_text(REWARD)
    rows = [{"problem": " ".join(f"w{10 * i + j}" for j in range(3, 12)), "answer": str(i)} for i in range(8)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = {"path": str(tmp_path / "problems.jsonl"), "limit": 2}
    settings = {
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "data": {"train": str(tmp_path / "problems.jsonl")},
        "batch": {"prompts_per_step": 4, "samples_per_prompt": 4, "tokens_per_microbatch": 512},
        "sampling": {"max_response_tokens": 6},
        "reward": {"name": "recipe_rewards:odd", "workers": 0},
        "optimizer": {"steps": 2, "lr": 1e-3},
        "evaluation": {
            "samples": 2, "pass_at": [1, 2], "max_response_tokens": 4, "at_prompts": [4], "sets": {"held": held},
            "bootstrap": 10,
        },
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    yield tmp_path / "small.yaml"
    import sys

    sys.modules.pop("recipe_rewards", None)


# The real vocabulary once; between them, every rule, method and policy loss of the recipes, both architectures, tied
# (Qwen3-4B) and untied heads. Small groups of the dry run would trip the guard of `budget`, as they should.
DRY_RUNS = [
    (("grpo_entrocraft", "with_budget"), "qwen3", 151_936, True),
    (("gspo_entrocraft",), "qwen3", 300, True),
    (("llama31_8b", "with_soft"), "llama", 300, False),
    (("qwen3_14b", "with_hard"), "qwen3", 300, False),
    (("grpo_entropy_bonus",), "qwen3", 300, True),
    (("grpo_clip_cov",), "qwen3", 300, True),
    (("gspo_clip_cov",), "qwen3", 300, True),
    (("w_reinforce",), "qwen3", 300, True),
    (("entropic",), "qwen3", 300, True),
    (("constant_target",), "qwen3", 300, True),
]


@pytest.mark.parametrize(
    ("names", "architecture", "vocabulary", "tied"), DRY_RUNS, ids=["-".join(row[0]) for row in DRY_RUNS]
)
def test_dry_run(small, tmp_path, names, architecture, vocabulary, tied):
    from entrocraft.train.evaluation import evaluate_run
    from entrocraft.train.run import Run
    from entrocraft.train.train import train_step

    model = shrunk(tmp_path / "model", architecture, vocabulary, tied=tied)
    files = [f"--config={PAPER / name}.yaml" for name in names]
    run = Run(load_config([*files, f"--config={small}", f"--model.path={model}", "--evaluation.rollouts_per_batch=4"]))
    before = torch.cat([p.detach().flatten().clone() for p in run.policy.model.parameters()])
    assert run.policy.vocab_size == vocabulary
    prompt = run.policy.tokenizer.decode(run.prompts[0])
    assert "w4 w5 w6" in prompt
    run.begin(None)
    said: list[str] = []
    with (
        contextlib.ExitStack() as at_last,
        RewardPool.of(run.config.reward) as pool,
        MetricsLog(run.dir, resume_step=None) as log,
    ):
        at_last.callback(run.end)
        for run.step in (1, 2):
            row: dict[str, Any] = dict(train_step(run, pool, log, said.append))
            assert run.evaluation_due()
            row |= evaluate_run(run, pool, log, (run.step,))
            log.log(run.step, row)
    assert said == []
    assert 1 <= row["updates"] <= 4  # none for a group of equal rewards
    assert row["steps_skipped"] == 0
    assert math.isfinite(row["grad_norm"])
    assert row["grad_norm"] > 0
    assert -1 <= row["reward"] <= 1
    assert math.log(vocabulary) - 1.5 < row["entropy"] < math.log(vocabulary)
    assert 0 <= row["eval_held_pass_at_1"] <= row["eval_held_pass_at_2"] <= 1
    assert row["eval_held_strict_box_accuracy"] == 0
    after = torch.cat([p.detach().flatten() for p in run.policy.model.parameters()])
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
    rule = run.config.entropy.rule
    if rule in ("switch", "soft", "hard"):  # entropy stands far above the band: right answers alone are learnt from
        assert row["bypassed"] == 0
        assert row["kept_fraction_negative"] < 0.5 or rule == "switch"
