"""Fills a `Config` from a YAML file and dotted command-line overrides, and writes it back.

Precedence, lowest first: the defaults of `config.py`, the file given by `--config`, the overrides after it.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from entrocraft.train.config import Config


def field_names(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a configuration class, e.g. `batch.prompts_per_step`."""
    names = []
    for entry in dataclasses.fields(cls):
        names.append(prefix + entry.name)
        if dataclasses.is_dataclass(entry.default):
            names.extend(field_names(type(entry.default), prefix + entry.name + "."))
    return names


def _nearest(name: str) -> str:
    known = field_names(Config)
    leaves = {full.rsplit(".", 1)[-1]: full for full in known}
    close = [leaves[name]] if name in leaves else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # right leaf, wrong group: `train.lr` for `optimizer.lr`
        close = [leaves[leaf] for leaf in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.5)]
    return f"did you mean `{close[0]}`? " if close else ""


def _unknown(name: str) -> ValueError:
    return ValueError(f"unknown setting `{name}`: {_nearest(name)}`--help` lists all.")


def _check_file(path: str) -> None:
    """Refuses a YAML file with a key that is no setting, before the parser sees it, to name the nearest right one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config {path}: no such file")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML: {error}") from None
    known = field_names(Config)
    groups = {name.rsplit(".", 1)[0] for name in known if "." in name}

    def walk(node: object, prefix: str) -> None:
        if not isinstance(node, dict):
            raise ValueError(
                f"--config {path}: {prefix or 'the file'} is {node!r}: expected settings, one `name: value` a line"
            )
        for key, value in node.items():
            name = f"{prefix}.{key}" if prefix else str(key)
            if name not in known:
                raise _unknown(name)
            if name in groups:
                walk(value, name)

    walk(content if content is not None else {}, "")


def _explain(message: str) -> ValueError:
    """Turns the parser's message into one that names the setting, or the nearest right one."""
    stray = re.search(r"unrecognized arguments: ([^-\s]\S*)", message)
    if stray:
        return ValueError(f"unexpected `{stray[1]}`: settings begin with --; for a file, write --config {stray[1]}")
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", message)
    if unknown:
        return _unknown(unknown[1])
    wrong = re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL)
    if wrong:
        return ValueError(f"setting `{wrong[1]}` has a wrong type or value. {' '.join(wrong[2].split())}")
    return ValueError(message)


def build_parser() -> ArgumentParser:
    """The command line of train.py: `--config FILE` and one dotted option per setting."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="train.py",
        description="RL of a language model along an entropy curve. Example: "
        "train.py --config train/configs/gsm8k_tiny.yaml --data.train gsm8k_train.jsonl --optimizer.steps 20",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; options after it override its values.")
    parser.add_class_arguments(Config, None)
    return parser


def load_config(argv: Sequence[str]) -> Config:
    """Parses `--config FILE --dotted.key value ...` into a `Config`.

    Raises ValueError for an unknown setting (with the nearest right name), a wrong type, or a value outside its range;
    FileNotFoundError for a missing file. `--help` prints every setting with its meaning and exits.
    """
    for flag, value in zip(argv, [*argv, ""][1:], strict=True):
        if flag == "--config":
            _check_file(value)
        elif flag.startswith("--config="):
            _check_file(flag.removeprefix("--config="))
    parser = build_parser()
    try:
        values = parser.instantiate(parser.parse_args(list(argv)))
    except ArgumentError as error:
        raise _explain(str(error)) from None
    return Config(**{entry.name: values[entry.name] for entry in dataclasses.fields(Config)})


def to_dict(config: Config) -> dict:
    """The configuration as nested plain values, as YAML and JSON can hold them."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    result = plain(dataclasses.asdict(config))
    assert isinstance(result, dict)
    return result


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration as YAML that `--config` reads back unchanged."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Settings in which two configurations (as from `to_dict`) differ, as `name: old -> new`."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines.extend(differences(a, b, f"{prefix}{key}."))
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
