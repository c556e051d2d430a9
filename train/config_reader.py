"""Fills a `Config` from YAML files and dotted command-line overrides, and writes it back.

Precedence, lowest first: the defaults of `config.py`; each file given by `--config`, later ones winning; the overrides
after them. A file may stand on others: `extends: base.yaml` or `extends: [model.yaml, method.yaml]`, by paths relative
to its own folder, which are read before it. Groups of settings are merged name by name; a setting that is itself a
mapping (`loss.method_options`, `evaluation.sets`) is replaced as a whole.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from entrocraft.train.config import Config
from entrocraft.train.config_evaluation import EvaluationSetConfig


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


def _content(path: str, within: tuple[Path, ...] = ()) -> dict:
    """What a YAML file sets, on top of the files it extends.

    Refuses a key that is no setting, before the parser sees it, to name the nearest right one.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        by = f" (extended by {within[-1]})" if within else ""
        raise FileNotFoundError(f"--config {path}: no such file{by}")
    if place.resolve() in within:
        raise ValueError(f"--config {path}: extends itself, by way of {', '.join(file.name for file in within)}")
    try:
        content = yaml.safe_load(place.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML: {error}") from None
    content = {} if content is None else content
    bases = content.pop("extends", []) if isinstance(content, dict) else []
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ValueError(f"--config {path}: extends is {bases!r}: expected a path, or a list of them")
    _check_names(path, content)
    merged: dict = {}
    for base in bases:
        merged = _merge(merged, _content(str(place.parent / base), (*within, place.resolve())))
    return _merge(merged, content)


def _check_names(path: str, content: object) -> None:
    known = field_names(Config)
    groups = {name.rsplit(".", 1)[0] for name in known if "." in name}

    def mapping(node: object, name: str) -> dict:
        if not isinstance(node, dict):
            raise ValueError(
                f"--config {path}: {name or 'the file'} is {node!r}: expected settings, one `name: value` a line"
            )
        return node

    def walk(node: object, prefix: str) -> None:
        for key, value in mapping(node, prefix).items():
            name = f"{prefix}.{key}" if prefix else str(key)
            if name not in known:
                raise _unknown(name)
            if name in groups:
                walk(value, name)
            elif name == "evaluation.sets":
                for held, settings in mapping(value, name).items():
                    _check_set(path, held, mapping(settings, f"{name}.{held}"))

    walk(content, "")


def _check_set(path: str, held: str, settings: dict) -> None:
    known = field_names(EvaluationSetConfig)
    for key in settings:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean `{close[0]}`?" if close else f"; there are {', '.join(known)}"
            raise ValueError(f"--config {path}: evaluation.sets.{held} has no `{key}`{hint}")


def _merge(below: dict, above: dict, prefix: str = "") -> dict:
    """Settings of two files as one: groups name by name, anything else as a whole."""
    groups = {name.rsplit(".", 1)[0] for name in field_names(Config) if "." in name}
    merged = dict(below)
    for key, value in above.items():
        name = f"{prefix}{key}"
        both = name in groups and isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value, f"{name}.") if both else value
    return merged


def _expanded(argv: Sequence[str]) -> list[str]:
    """The arguments with the content of each file in the place of its path: the parser takes either."""
    arguments: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            path = word.removeprefix("--config=") if "=" in word else next(words, "")
            content = _content(path)
            if content:
                arguments.append("--config=" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        else:
            arguments.append(word)
    return arguments


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


@functools.cache  # half a second of reading the source for the documentation of its fields
def build_parser() -> ArgumentParser:
    """The command line of train.py: `--config FILE` and one dotted option per setting."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="train.py",
        description="RL of a language model along an entropy curve. Example: "
        "train.py --config train/configs/gsm8k_tiny.yaml --data.train gsm8k_train.jsonl --optimizer.steps 20. "
        "With --verify-resume, or --verify-resume=N, it trains 8 or N steps, again the second half in a fresh process, "
        "and compares everything instead. With --plan it predicts memory instead of training: train.py --plan --help.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file; may be repeated, later files and the options after them override its values.",
    )
    parser.add_class_arguments(Config, None)
    return parser


def load_config(argv: Sequence[str]) -> Config:
    """Parses `--config FILE --dotted.key value ...` into a `Config`.

    Raises ValueError for an unknown setting (with the nearest right name), a wrong type, or a value outside its range;
    FileNotFoundError for a missing file. `--help` prints every setting with its meaning and exits.
    """
    parser = build_parser()
    try:
        values = parser.instantiate(parser.parse_args(_expanded(argv)))
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
