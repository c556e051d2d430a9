"""The rules of the house, each a function from a tree to what is wrong in it, and each shown able to fail."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ("kernels", "entrocraft", "train")
TOP = {
    *(".ci", ".github", ".gitignore", ".pre-commit-config.yaml"),
    *("README.md", "CHANGELOG.md", "LICENSE", "Makefile", "pyproject.toml", "constraints.txt"),
    *(*SOURCE, "bench", "tests", "docs"),
}
MAY_IMPORT = {
    "kernels": ("entrocraft.kernels",),
    "entrocraft": ("entrocraft.kernels", "entrocraft"),
    "train": ("entrocraft.kernels", "entrocraft", "entrocraft.train"),
}
# `python train/train.py` puts train/ first on sys.path: what its files are called hides what others call theirs.
NEIGHBOURS = {"torch", "triton", "transformers", "datasets", "tokenizers", "evaluate", "vllm", "trl", "verl", "kernels"}
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:root|work|Users|home/[a-z]\w*|opt|mnt)/\w")
REGISTRY = re.compile(r"(?:pypi|pythonhosted|download\.pytorch|registry\.npmjs)\.(?:org|com)")


def committed(root: Path) -> list[Path]:
    """Files that git tracks or would: relative paths, links not followed. All files where there is no repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        names = {Path(name) for name in listed.stdout.split("\0") if name}
        return sorted(name for name in names if os.path.lexists(root / name))
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file() or path.is_symlink())


def sources(root: Path, *folders: str) -> Iterator[tuple[Path, str]]:
    for path in committed(root):
        if path.suffix == ".py" and path.parts[0] in folders:
            yield path, (root / path).read_text()


def texts(root: Path) -> Iterator[tuple[Path, str]]:
    for path in committed(root):
        if not (root / path).is_symlink():
            try:
                yield path, (root / path).read_text()
            except UnicodeDecodeError:
                continue


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that may be a module: `from a import b` gives a.b, which is `a` at least."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names)


def part_of(name: str) -> str:
    """Which of the installed packages an imported name belongs to, or its first word."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "entrocraft" and words[1:2] in (["kernels"], ["train"]) else words[0]


def imports_point_one_way(root: Path) -> list[str]:
    wrong = []
    for path, text in sources(root, *SOURCE, "bench", "tests", "docs"):
        for name in imported(ast.parse(text)):
            part = part_of(name)
            if name.startswith("."):
                wrong.append(f"{path} imports {name}: imports are absolute")
            elif part in (*SOURCE[::2], "bench", "tests"):
                wrong.append(f"{path} imports {name}: {part}/ at the top of the tree is not a package")
            elif part.startswith("entrocraft") and part not in MAY_IMPORT.get(path.parts[0], (part,)):
                wrong.append(f"{path} imports {name}: {path.parts[0]} may not depend on {part}")
    return wrong


def files_are_short(root: Path) -> list[str]:
    wrong = []
    for path, text in sources(root, *SOURCE, "bench", "tests", "docs"):
        lines = text.count("\n")
        limit = 30 if path.name == "__init__.py" else 400
        if lines > limit:
            wrong.append(f"{path} has {lines} lines, at most {limit}: split it by meaning")
    return wrong


def kernels_are_short(root: Path) -> list[str]:
    wrong = []
    for path, text in sources(root, *SOURCE):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 80:
                    wrong.append(f"{path}: kernel {node.name} has {lines} lines, at most 80")
    return wrong


def top_holds_only_what_belongs(root: Path) -> list[str]:
    return [f"{name} at the top of the tree: not one of {sorted(TOP)}" for name in _tops(root) - TOP]


def _tops(root: Path) -> set[str]:
    return {path.parts[0] for path in committed(root)}


def train_hides_no_module(root: Path) -> list[str]:
    stems = {
        path.parts[1].removesuffix(".py") for path in committed(root) if path.parts[0] == "train" and path.parts[1:]
    }
    hidden = stems & (sys.stdlib_module_names | NEIGHBOURS) - {"__init__"}
    return [f"train/{stem} would hide the module `{stem}` from scripts in train/" for stem in sorted(hidden)]


def links_are_links(root: Path) -> list[str]:
    wrong = []
    for name in SOURCE[::2]:
        link = root / "entrocraft" / name
        if not link.is_symlink() or os.readlink(link) != f"../{name}":
            wrong.append(
                f"entrocraft/{name} is not a link to ../{name}: git config core.symlinks true; git checkout it"
            )
    return wrong


def no_machine_is_named(root: Path) -> list[str]:
    return [
        f"{path} names {match.group()}: no path of one machine, no host of a package registry"
        for path, text in texts(root)
        for match in (*MACHINE_PATH.finditer(text), *REGISTRY.finditer(text))
    ]


def readme_is_short(root: Path) -> list[str]:
    lines = (root / "README.md").read_text().count("\n")
    return [f"README.md has {lines} lines, at most 200"] if lines > 200 else []


def version_stands_once(root: Path) -> list[str]:
    pattern = re.compile(r"^(?:__version__|version)\s*[:=]+\s*[\"']\d", re.MULTILINE)
    found = [
        str(path) for path, text in texts(root) if path.suffix in (".py", ".toml", ".cfg") and pattern.search(text)
    ]
    return [] if found == ["pyproject.toml"] else [f"the version stands in {found}, not in pyproject.toml alone"]


# A rule, a tree that breaks it, and what it must say of that tree.
RULES: list[tuple[Callable[[Path], list[str]], dict[str, str], str]] = [
    (
        imports_point_one_way,
        {"kernels/a.py": "from entrocraft import train"},
        "kernels may not depend on entrocraft.train",
    ),
    (imports_point_one_way, {"kernels/a.py": "import entrocraft.rules"}, "kernels may not depend on entrocraft"),
    (imports_point_one_way, {"entrocraft/a.py": "def f():\n    import entrocraft.train.run"}, "may not depend on"),
    (imports_point_one_way, {"train/a.py": "from .run import Run"}, "imports are absolute"),
    (
        imports_point_one_way,
        {"tests/a.py": "from kernels import x"},
        "kernels/ at the top of the tree is not a package",
    ),
    (imports_point_one_way, {"train/a.py": "import bench.conftest"}, "bench/ at the top of the tree is not a package"),
    (files_are_short, {"train/a.py": "x = 1\n" * 401}, "train/a.py has 401 lines, at most 400"),
    (files_are_short, {"kernels/__init__.py": "x = 1\n" * 31}, "has 31 lines, at most 30"),
    (kernels_are_short, {"kernels/a.py": "@triton.jit\ndef k(x):\n" + "    x\n" * 80}, "kernel k has 81 lines"),
    (top_holds_only_what_belongs, {"utils/a.py": "", "README.md": ""}, "utils at the top of the tree"),
    (train_hides_no_module, {"train/logging.py": "", "train/run.py": ""}, "train/logging would hide"),
    (train_hides_no_module, {"train/datasets/a.py": ""}, "train/datasets would hide"),
    (links_are_links, {"entrocraft/kernels": "../kernels", "entrocraft/train": "../train"}, "kernels is not a link"),
    (no_machine_is_named, {"docs/a.md": "see " + "/".join(("", "root", "x"))}, "no path of one machine"),
    (no_machine_is_named, {"Makefile": "https://py" + "pi.org/simple"}, "no host of a package registry"),
    (readme_is_short, {"README.md": "x\n" * 201}, "201 lines"),
    (version_stands_once, {"pyproject.toml": 'version = "1.0"', "train/a.py": '__version__ = "1.0"'}, "train/a.py"),
    (version_stands_once, {"pyproject.toml": "[project]"}, "the version stands in []"),
]


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _, _ in RULES), ids=lambda rule: rule.__name__)
def test_the_tree_keeps(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize(
    ("rule", "tree", "complaint"), RULES, ids=[f"{rule.__name__}-{i}" for i, (rule, *_) in enumerate(RULES)]
)
def test_a_broken_tree_is_found_by(
    rule: Callable[[Path], list[str]], tree: dict[str, str], complaint: str, tmp_path: Path
) -> None:
    for name, text in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    wrong = rule(tmp_path)
    assert any(complaint in line for line in wrong), wrong


def fresh_python(code: str, folder: Path) -> str:
    """What a new interpreter prints that starts in `folder` and inherits no PYTHONPATH."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True, check=True
    ).stdout


def loaded_by(module: str, folder: Path) -> set[str]:
    code = f"import json, sys, {module}; print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    return set(json.loads(fresh_python(code, folder)))


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("entrocraft", {"triton", "vllm", "transformers"}), ("entrocraft.kernels", {"triton", "vllm", "transformers"})],
)
def test_importing_stays_light(module: str, unwanted: set[str], tmp_path: Path) -> None:
    loaded = loaded_by(module, tmp_path)
    assert "entrocraft" in loaded
    assert loaded & unwanted == set()


def test_a_heavy_import_would_be_seen(tmp_path: Path) -> None:
    assert {"tokenizers", "json"} <= loaded_by("tokenizers", tmp_path)


def test_top_level_names_are_unfindable_from_outside(tmp_path: Path) -> None:
    code = """
import importlib.util, json, entrocraft.kernels.token_stats
specs = {name: importlib.util.find_spec(name) for name in ("kernels", "train", "bench", "tests", "entrocraft")}
places = {name: [spec.origin or "", *(spec.submodule_search_locations or [])] for name, spec in specs.items() if spec}
print(json.dumps(places))
"""
    found = json.loads(fresh_python(code, tmp_path))
    ours = {
        name for name, places in found.items() if any(Path(place).resolve().is_relative_to(ROOT) for place in places)
    }
    assert ours == {"entrocraft"}  # a `kernels` elsewhere is Hugging Face's, and welcome


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built offline from a copy of the committed files."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for path in committed(ROOT):
        target = copy / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_symlink():
            target.symlink_to(os.readlink(ROOT / path))
        else:
            target.write_bytes((ROOT / path).read_bytes())
    fresh_python(f"import setuptools.build_meta as backend; backend.build_wheel({str(out)!r})", copy)
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_the_wheel_holds_one_package_with_everything_in_it(wheel: list[str]) -> None:
    assert {name.split("/")[0].partition("-")[0] for name in wheel} == {"entrocraft"}
    for path in committed(ROOT):
        if path.parts[0] in SOURCE and not (ROOT / path).is_symlink() and path.suffix != ".md":
            place = path if path.parts[0] == "entrocraft" else Path("entrocraft") / path
            assert place.as_posix() in wheel, f"{path} is not in the wheel: name it in [tool.setuptools.package-data]"
    assert "entrocraft/py.typed" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
