"""Every recipe takes a step and evaluates: two layers of its architecture with its real vocabulary, on problems written
here, drawn by transformers' generate."""

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import entrocraft.train
from entrocraft.train.config_reader import load_config
from entrocraft.train.evaluation import evaluate_run
from entrocraft.train.metrics import MetricsLog
from entrocraft.train.model_shapes import SHAPES
from entrocraft.train.rewards import RewardPool
from entrocraft.train.run import Run
from entrocraft.train.train import train_step

CONFIGS = Path(entrocraft.train.__file__).parent / "configs"
# What is no run of its own: it stands below others, or on top of them.
PARTS = {"base", "switch", "long", "numina", "evaluation", "with_soft", "with_hard", "with_budget"}
FILES = {path.stem: path for path in sorted(CONFIGS.rglob("*.yaml"))}
ON_TOP = [
    ("grpo_entrocraft", "with_budget"),
    ("gspo_entrocraft", "with_budget"),
    ("llama31_8b", "with_budget"),
    ("qwen3_14b", "with_soft"),
    ("gspo_entrocraft", "with_hard"),
]
RUNS = [*((name,) for name in FILES if name not in PARTS), *ON_TOP]

CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
SHRUNK = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None,
    "initializer_range": 0.2, "torch_dtype": "float32",
}  # fmt: skip
BYTES = 259
"""Vocabulary of the models that are built on the spot, where a recipe names no other."""
REWARD = "def odd(completion, answer, prompt):\n    return float(len(completion) % 2)\n"


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Of words, with a chat template."""
    words = {"<end>": 0, "<pad>": 1, "<unknown>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = CHAT
    return fast


class Shrunk:
    """Folders of small models, and what was read of them."""

    def __init__(self, places: pytest.TempPathFactory) -> None:
        self.places = places
        self.folders: dict[str, Path] = {}
        self.tokenizers: dict[Path, Any] = {}

    def of(self, name: str) -> Path:
        """Two layers of a published architecture with its vocabulary, tied or not as it is, and random weights."""
        shape = SHAPES[name] | SHRUNK
        key = json.dumps(shape, sort_keys=True)
        if key not in self.folders:
            folder = self.folders[key] = self.places.mktemp("shrunk")
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).save_pretrained(folder)
            tokenizer(shape["vocab_size"]).save_pretrained(folder)
        return self.folders[key]


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    """Made once for each shape: Qwen3 with a tied head and without, Llama."""
    return Shrunk(tmp_path_factory)


@pytest.fixture(autouse=True)
def tokenizers_are_read_once(monkeypatch, shrunk):
    """A tokenizer of 151,936 words takes longer to read than a step to make, and a reference reads it again."""
    read = AutoTokenizer.from_pretrained

    def once(path: str, **options: Any) -> Any:
        if Path(path) not in shrunk.tokenizers:
            shrunk.tokenizers[Path(path)] = read(path, **options)
        return shrunk.tokenizers[Path(path)]

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", once)


def problems(file: Path, first: int, count: int) -> str:
    """Writes problems of nine words each, from word `first` on, under every column name that a recipe asks for."""
    texts = [" ".join(f"w{first + 10 * i + j}" for j in range(9)) for i in range(count)]
    rows = [
        dict.fromkeys(("problem", "question", "prompt"), text) | {"answer": f"#### {i}"} for i, text in enumerate(texts)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """What makes a recipe small: a file to put on top of it. The model is for the test to change."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "recipe_rewards.py").write_text(REWARD)
    settings = {
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "model": {"tiny": {"hidden_size": 16, "layers": 2, "context": 512}},
        "data": {"train": problems(tmp_path / "problems.jsonl", 3, 4), "max_prompt_tokens": 256},
        "batch": {
            "prompts_per_step": 4, "samples_per_prompt": 3, "updates_per_step": 2, "tokens_per_microbatch": 512,
        },
        "sampling": {"max_response_tokens": 3},
        "engine": {"name": "hf"},
        "reward": {"name": "recipe_rewards:odd", "workers": 0},
        "optimizer": {"steps": 1, "lr": 1e-3},
        "evaluation": {
            "samples": 2, "pass_at": [1, 2], "max_response_tokens": 2, "at_prompts": [4], "bootstrap": 10,
            "sets": {"held": {"path": problems(tmp_path / "held_out.jsonl", 203, 2)}}, "rollouts_per_batch": 4,
        },
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "small.yaml"


def one_step(run: Run) -> dict[str, Any]:
    """Metrics of a step and of the evaluation after it; nothing may have been said of trouble."""
    said: list[str] = []
    run.begin(None)
    with (
        contextlib.ExitStack() as at_last,
        RewardPool.of(run.config.reward) as pool,
        MetricsLog(run.dir, resume_step=None) as log,
    ):
        at_last.callback(run.end)
        run.step = 1
        row: dict[str, Any] = dict(train_step(run, pool, log, said.append))
        assert run.evaluation_due()
        row |= evaluate_run(run, pool, log, (run.step,))
    assert said == []
    return row


@pytest.mark.parametrize("names", RUNS, ids="-".join)
def test_dry_run(small, shrunk, names):
    config = load_config([*(f"--config={FILES[name]}" for name in names), f"--config={small}"])
    published, vocabulary = config.model.path, config.model.tiny.vocabulary or BYTES
    if published is not None:
        config = replace(config, model=replace(config.model, path=str(shrunk.of(published))))
        vocabulary = SHAPES[published]["vocab_size"]
    run = Run(config)
    assert run.policy.vocab_size == vocabulary
    assert "w4 w5 w6" in run.policy.tokenizer.decode(run.prompts[0])
    before = torch.cat([p.detach().flatten().clone() for p in run.policy.model.parameters()])
    row = one_step(run)
    after = torch.cat([p.detach().flatten() for p in run.policy.model.parameters()])
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
    assert 1 <= row["updates"] <= 2  # none for a group of equal rewards
    assert row["steps_skipped"] == 0
    assert 0 < row["grad_norm"] < math.inf
    assert -1 <= row["reward"] <= 1
    assert math.log(vocabulary) - 1.5 < row["entropy"] < math.log(vocabulary)
    assert 0 <= row["eval_held_pass_at_1"] <= row["eval_held_pass_at_2"] <= 1
    if "strict_box" in config.reward.also:
        assert row["eval_held_strict_box_accuracy"] == 0
    if config.reference.kl_coefficient:
        assert row["reference_kl"] == 0.0  # of the very model that the run begins with
    if config.entropy.rule in ("switch", "soft", "hard"):  # entropy is far above the band: only right ones count
        assert row["bypassed"] == 0
        assert row["kept_fraction_negative"] < 0.5 or config.entropy.rule == "switch"


def test_every_recipe_is_run():
    """The files that are parts are in some run, by way of `extends` or on top."""
    assert {name for names in RUNS for name in names} == set(FILES) - {"base", "switch", "long", "numina", "evaluation"}
