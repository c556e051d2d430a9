"""`.ci/install.py` notices what state .venv is in, and mends it. The environments here are real ones, without pip's
downloads: packages are laid out as pip leaves them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / ".ci" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment with two packages, pip and spam, and the stamp of a finished installation."""
    folder = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = site_packages(folder)
    for name in ("pip", "spam"):
        (site / f"{name}.py").write_text("")
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n")
        (info / "RECORD").write_text(
            f"{name}.py,,\n{name}-1.0.dist-info/METADATA,,\n__pycache__/{name}.cpython-311.pyc,,\n"
        )
    stamp = {"fingerprint": "now", "root": str(tmp_path), "packages": ["pip", "spam"]}
    (folder / ".installed").write_text(json.dumps(stamp))
    return folder


def site_packages(venv: Path) -> Path:
    return next((venv / "lib").glob("python3*")) / "site-packages"


def test_a_whole_environment_is_left_alone(install: ModuleType, venv: Path) -> None:
    assert install.state(venv, "now") == ("whole", "")  # though its compiled files are not there


def test_no_environment(install: ModuleType, tmp_path: Path) -> None:
    assert install.state(tmp_path / ".venv", "now") == ("absent", "there is no .venv")


def test_changed_inputs(install: ModuleType, venv: Path) -> None:
    assert install.state(venv, "later") == ("behind", "pyproject.toml, constraints.txt or Python changed")


@pytest.mark.parametrize("stamp", [None, "", '{"fingerp', "[]", '{"fingerprint": "now"}'])
def test_an_installation_that_did_not_finish(stamp: str | None, install: ModuleType, venv: Path) -> None:
    (venv / ".installed").unlink()
    if stamp is not None:
        (venv / ".installed").write_text(stamp)
    assert install.state(venv, "now") == ("behind", "an installation did not finish")


def test_a_package_that_was_uninstalled(install: ModuleType, venv: Path) -> None:
    (site_packages(venv) / "spam.py").unlink()
    shutil.rmtree(site_packages(venv) / "spam-1.0.dist-info")
    assert install.state(venv, "now") == ("behind", ".venv lost spam")


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ("spam.py", "spam (no spam.py)"),  # deleted by hand
        ("spam-1.0.dist-info/RECORD", "spam"),  # pip was killed while it copied
        ("pip-1.0.dist-info", "pip"),
    ],
)
def test_a_package_with_missing_files(lost: str, reason: str, install: ModuleType, venv: Path) -> None:
    path = site_packages(venv) / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert install.state(venv, "now") == ("broken", f".venv is damaged: {reason}")


@pytest.mark.parametrize("damage", ["empty", "dangling", "absent", "liar"])
def test_an_interpreter_that_does_not_start(damage: str, install: ModuleType, venv: Path) -> None:
    python = venv / "bin" / "python"
    python.unlink()  # a link to the real one
    if damage == "empty":
        python.write_text("")
        python.chmod(0o755)
    elif damage == "dangling":
        python.symlink_to(venv / "gone")
    elif damage == "liar":
        python.write_text("#!/bin/sh\necho fine\n")
        python.chmod(0o755)
    condition, reason = install.state(venv, "now")
    assert condition == "broken"
    assert f"{python} does not run" in reason


def test_an_environment_that_was_moved(install: ModuleType, venv: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.move(venv, tmp_path / "elsewhere"))
    assert install.state(moved, "now") == ("broken", ".venv was made for another folder")


def test_the_fingerprint_covers_every_input(install: ModuleType, tmp_path: Path) -> None:
    trees = []
    for i, (project, pins) in enumerate([("a", "b"), ("a2", "b"), ("a", "b2"), ("a", "b")]):
        tree = tmp_path / str(i)
        tree.mkdir()
        (tree / "pyproject.toml").write_text(project)
        (tree / "constraints.txt").write_text(pins)
        trees.append(tree)
    prints = {install.fingerprint(tree) for tree in trees} | {install.fingerprint(trees[0], "3.99")}
    assert len(prints) == 5
    assert install.fingerprint(trees[0]) == install.fingerprint(trees[0])


@pytest.mark.slow
def test_creating_replaces_whatever_lies_there(install: ModuleType, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine").write_text("")
    link = tmp_path / ".venv"
    link.symlink_to(kept)
    install.create(link)
    assert (kept / "mine").exists()  # the link went, not what it led to
    assert not link.is_symlink()
    assert (link / "bin" / "python").exists()
    found = install.survey(link)
    assert found["broken"] == []
    assert "pip" in found["packages"]


def test_without_ensurepip_the_message_says_what_to_install(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(install.InstallError, match=r"apt install python3\.\d+-venv"):
        install.create(tmp_path / ".venv")
    assert not (tmp_path / ".venv").exists()


def test_an_outer_environment_does_not_leak(install: ModuleType) -> None:
    outer = {"PATH": "p", "PYTHONPATH": "x", "VIRTUAL_ENV": "x", "PIP_TARGET": "x", "PIP_USER": "1", "PIP_CERT": "c"}
    assert install.clean_environment(outer) == {"PATH": "p", "PIP_CERT": "c"}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_without_a_python_says_so(tmp_path: Path) -> None:
    for tool in ("make", "env", "sh"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / tool).symlink_to(os.path.realpath(found))
    done = subprocess.run(
        [tmp_path / "make", "-C", ROOT, "install"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no Python 3.11 to 3.14 found" in done.stderr
