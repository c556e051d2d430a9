"""Configuration: precedence, round trip, and errors that name the setting and the nearest right one."""

import dataclasses

import pytest

from entrocraft.train.config import BatchConfig, Config
from entrocraft.train.config_reader import build_parser, differences, field_names, load_config, save_config, to_dict


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return f"--config={path}"


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    file = write(tmp_path, "batch: {prompts_per_step: 6, samples_per_prompt: 4}\noptimizer: {lr: 1e-4}\n")
    config = load_config([file, "--batch.prompts_per_step=12", "--entropy.schedule.start", "1.5"])
    assert config.batch.prompts_per_step == 12
    assert config.batch.samples_per_prompt == 4
    assert config.batch.updates_per_step == BatchConfig().updates_per_step
    assert config.optimizer.lr == 1e-4
    assert config.entropy.schedule.start == 1.5
    assert config.batch.rollouts_per_step == 48


def test_a_pattern_that_looks_like_a_yaml_comment_survives(tmp_path):
    pattern = r"####\s*(.+)$"
    for config in (
        load_config([f"--data.answer_pattern={pattern}"]),
        load_config([write(tmp_path, f"data: {{answer_pattern: '{pattern}'}}\n")]),
    ):
        assert config.data.answer_pattern == pattern
        save_config(config, tmp_path / "saved.yaml")
        assert load_config([f"--config={tmp_path / 'saved.yaml'}"]) == config


def test_saved_configuration_reads_back_equal(tmp_path):
    points = "entropy: {schedule: {kind: piecewise, points: [[0, 1.0], [10, 0.5]]}}\nloss: {dual_clip: null}\n"
    config = load_config([write(tmp_path, points), "--optimizer.betas=[0.8,0.9]"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config([f"--config={tmp_path / 'saved.yaml'}"]) == config
    assert config.entropy.schedule.points == [(0, 1.0), (10, 0.5)]
    assert config.loss.dual_clip is None


def test_later_files_win_name_by_name_and_mappings_are_replaced(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "batch: {prompts_per_step: 6, samples_per_prompt: 4}\nseed: 1\nreward: {also: {strict_box: 0, sum_pair: 1}}\n"
        "entropy: {schedule: {kind: cosine, end: 0.3}}\n"
    )
    (tmp_path / "b.yaml").write_text(
        "batch: {samples_per_prompt: 2}\nreward: {also: {sum_pair: 2}}\nentropy: {schedule: {end: 0.2}}\n"
    )
    (tmp_path / "empty.yaml").write_text("")
    files = [f"--config={tmp_path / name}.yaml" for name in ("a", "empty")]
    config = load_config([*files, "--config", str(tmp_path / "b.yaml"), "--seed=3"])
    assert (config.batch.prompts_per_step, config.batch.samples_per_prompt, config.seed) == (6, 2, 3)
    assert config.reward.also == {"sum_pair": 2.0}
    assert (config.entropy.schedule.kind, config.entropy.schedule.end) == ("cosine", 0.2)
    assert load_config([f"--config={tmp_path / 'b.yaml'}", *files]).batch.samples_per_prompt == 4


def test_a_file_stands_on_those_it_extends(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "base.yaml").write_text("seed: 1\noptimizer: {lr: 0.5, steps: 7}\n")
    (tmp_path / "parts" / "method.yaml").write_text("optimizer: {lr: 0.25}\nloss: {passes: 2}\n")
    (tmp_path / "middle.yaml").write_text("extends: parts/base.yaml\nseed: 2\n")
    (tmp_path / "run.yaml").write_text("extends: [middle.yaml, parts/method.yaml]\nloss: {passes: 3}\n")
    config = load_config([f"--config={tmp_path / 'run.yaml'}"])
    assert (config.seed, config.optimizer.lr, config.optimizer.steps, config.loss.passes) == (2, 0.25, 7, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nowhere.yaml", "nowhere.yaml: no such file (extended by"),
        ("extends: run.yaml", "run.yaml: extends itself, by way of run.yaml"),
        ("extends: {a: b}", "extends is {'a': 'b'}: expected a path, or a list of them"),
    ],
)
def test_what_cannot_be_extended(tmp_path, text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=r".") as caught:
        load_config([write(tmp_path, text)])
    assert message in str(caught.value)


def test_held_out_sets_survive_the_round_trip(tmp_path):
    text = (
        "evaluation: {sets: {amc: {path: math-ai/amc23, prompt_field: question}, own: {path: x.jsonl, samples: 4}}}\n"
    )
    config = load_config([write(tmp_path, text)])
    assert config.evaluation.sets["amc"].prompt_field == "question"
    assert config.evaluation.sets["own"].samples == 4
    save_config(config, tmp_path / "saved.yaml")
    assert load_config([f"--config={tmp_path / 'saved.yaml'}"]) == config


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--batch.prompt_per_step=3", "did you mean `batch.prompts_per_step`?"),
        ("--lr=0.1", "did you mean `optimizer.lr`?"),
        ("--entropy.schedul.start=1", "did you mean `entropy.schedule.start`?"),
    ],
)
def test_unknown_option_names_the_nearest(argument, named):
    with pytest.raises(ValueError, match="unknown setting") as caught:
        load_config([argument])
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch: {prompts: 3}", "unknown setting `batch.prompts`: did you mean `batch.prompts_per_step`?"),
        ("bach: {prompts_per_step: 3}", "unknown setting `bach`: did you mean `batch`?"),
        ("model: 3", "model is 3: expected settings"),
        ("evaluation: {sets: {a: {pth: x}}}", "evaluation.sets.a has no `pth`; did you mean `path`?"),
        ("evaluation: {sets: {a: 3}}", "evaluation.sets.a is 3: expected settings"),
        ("[1, 2", "not valid YAML"),
        ("seed: abc", "setting `seed` has a wrong type or value"),
        ("batch: {prompts_per_step: many}", "setting `batch.prompts_per_step` has a wrong type or value"),
        ("entropy: {level: word}", "setting `entropy.level` has a wrong type or value"),
    ],
    ids=[
        "unknown-leaf",
        "unknown-group",
        "group-as-number",
        "unknown-in-set",
        "set-as-number",
        "broken-yaml",
        "text-seed",
        "text-count",
        "level",
    ],
)
def test_bad_file_is_an_error_that_helps(tmp_path, text, message):
    with pytest.raises(ValueError, match=r".") as caught:
        load_config([write(tmp_path, text)])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--sampling.temperature=0", "sampling.temperature = 0.0: expected a number above 0"),
        ("--sampling.temperature=-1", "sampling.temperature = -1.0"),
        ("--batch.updates_per_step=5", "a divisor of batch.prompts_per_step = 32"),
        ("--entropy.width=-0.1", "the band's low end is not above its high end"),
        ("--data.prompt_template=Solve", "a text with {prompt}"),
        ("--optimizer.steps=0", "optimizer.steps = 0: expected a positive number"),
        ("--model.tiny.hidden_size=50", "a multiple of 2 x model.tiny.heads = 8"),
        ("--reward.timeout_s=0", "reward.timeout_s = 0.0"),
        ("--sampling.top_p=1.5", "sampling.top_p = 1.5: expected a number in (0, 1]"),
    ],
)
def test_value_out_of_range(argument, message):
    with pytest.raises(ValueError, match=r".") as caught:
        load_config([argument])
    assert message in str(caught.value)


def test_preset_and_rule_exclude_each_other():
    with pytest.raises(ValueError, match=r"entropy.rule = 'hard': expected nothing beside entropy.preset = 'paper_v1'"):
        load_config(["--entropy.preset=paper_v1", "--entropy.rule=hard"])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml: no such file"):
        load_config(["--config", str(tmp_path / "nowhere.yaml")])


def test_help_explains_every_setting():
    shown = " ".join(build_parser().format_help().split())
    groups = {name.rsplit(".", 1)[0] for name in field_names(Config) if "." in name}
    for name in field_names(Config):
        assert f"--{name}" in shown

    def documented(cls, prefix=""):
        for entry in dataclasses.fields(cls):
            yield prefix + entry.name
            if dataclasses.is_dataclass(entry.default):
                yield from documented(type(entry.default), prefix + entry.name + ".")

    undocumented = [
        name
        for name in documented(Config)
        if name not in groups and f"--{name} {name.rsplit('.', 1)[-1].upper()} (type" in shown
    ]
    assert undocumented == []


def test_differences_lists_changed_settings_only():
    old, new = load_config([]), load_config(["--optimizer.lr=0.5", "--seed=3"])
    assert differences(to_dict(old), to_dict(new)) == ["seed: 0 -> 3", "optimizer.lr: 1e-06 -> 0.5"]
    assert differences(to_dict(old), to_dict(old)) == []
