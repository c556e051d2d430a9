"""Every recipe loads and says what its source says. `test_recipe_dry_runs.py` runs them."""

import math
from pathlib import Path

import pytest

import entrocraft.train
from entrocraft.advantages import build as build_advantage
from entrocraft.train.config import Config
from entrocraft.train.config_reader import load_config
from entrocraft.train.control import build_controller, build_method
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
        assert (config.engine.name, config.importance.correct) == ("vllm", False)


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
