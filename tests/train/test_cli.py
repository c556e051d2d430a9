"""The console script: dispatch, help, and one line for a user's mistake."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from entrocraft.train import cli

ROOT = Path(cli.__file__).resolve().parent.parent


def test_help_names_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert command.__doc__
        assert f"  {name} " in shown
        assert command.__doc__ in shown


def test_unknown_command_is_an_error_that_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["trian"])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert "trian" in message
    assert all(name in message for name in cli.COMMANDS)


def test_a_command_gets_what_follows_it_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def command(argv):
        seen.append(list(argv))
        return 7

    monkeypatch.setitem(cli.COMMANDS, "train", command)
    assert cli.main(["train", "--config", "a.yaml", "--data.train", "-", "--help"]) == 7
    assert cli.main(["--traceback", "train", "eval"]) == 7
    assert cli.main(["train", "--traceback", "--seed", "3"]) == 7
    assert seen == [["--config", "a.yaml", "--data.train", "-", "--help"], ["eval"], ["--seed", "3"]]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("lr = -1: expected > 0"), 2, "error: lr = -1: expected > 0"),
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), 2, "'a.yaml'"),
        (ModuleNotFoundError("No module named 'torch'"), 1, "`entrocraft doctor`"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_mistakes_become_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        raise error

    assert cli.report_errors(run) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert line in shown.err
    assert shown.err.count("\n") == 1


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    def run() -> int:
        raise AssertionError("kept tokens exceed all tokens")

    with pytest.raises(AssertionError, match="kept tokens"):
        cli.report_errors(run)


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_traceback_on_request(way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        raise ValueError("lr = -1")

    if way == "environment":
        monkeypatch.setenv("ENTROCRAFT_TRACEBACK", "1")
    assert cli.report_errors(run, show_traceback=way == "flag") == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.endswith("error: lr = -1\n")


def test_compare_wants_two_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["compare", "runs/a"])
    assert exit_info.value.code == 2
    assert "one run given, runs/a" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_run_that_is_not_there_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = [str(tmp_path / "nowhere"), str(tmp_path / "gone")]
    assert cli.main([command, *missing]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "nowhere" in shown


def test_the_console_script_and_the_file_say_the_same(tmp_path: Path) -> None:
    script = Path(sysconfig.get_path("scripts")) / "entrocraft"
    outputs = [
        subprocess.run([*start, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for start in ([script], [sys.executable, ROOT / "train" / "cli.py"])
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("usage: entrocraft")
