"""Make `.venv` hold this checkout and its pinned dependencies; do nothing when it already does.

`make demo`, `make test`, `make lint` and `make bench` begin here. Standard library only, because nothing is
installed yet. The environment is in one of three states:

  whole     its stamp matches the inputs and every installed file is there   -> nothing to do
  behind    sound, but never finished or made from other inputs              -> `pip install` into it
  broken    Python or pip does not start, or files of a package are missing  -> thrown away and made anew

The stamp is written last, so an installation that was cut off never has one.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 14)  # the pinned torch has wheels for these

# Runs inside the environment: what is installed, and which packages lack files that pip put there. Compiled
# files do not count: they come and go. A record is missing when pip was killed while it copied a package.
SURVEY = """
import csv, importlib.metadata, json, os
broken, packages = [], []
for dist in importlib.metadata.distributions():
    name, record = (dist.metadata or {}).get("Name"), dist.read_text("RECORD")
    if not name or not record:
        broken.append(name or str(getattr(dist, "_path", dist)))
        continue
    packages.append(name.lower())
    base = str(dist.locate_file(""))
    files = [row[0] for row in csv.reader(record.splitlines()) if row and not row[0].endswith(".pyc")]
    lost = [file for file in files if not os.path.exists(os.path.join(base, file))]
    if lost:
        broken.append(f"{name} (no {lost[0]})")
if "pip" not in packages:
    broken.append("pip")
print(json.dumps({"broken": sorted(broken), "packages": sorted(packages)}))
"""


class InstallError(Exception):
    """Something that only the user can put right; the message says how."""


def fingerprint(root: Path, python: str = sys.version) -> str:
    """Hash of everything the environment is made from: both files, the interpreter, the place it lies in."""
    digest = hashlib.sha256()
    for part in (root / "pyproject.toml", root / "constraints.txt"):
        digest.update(part.read_bytes())
    digest.update(f"{python}\n{root}".encode())
    return digest.hexdigest()


def clean_environment(environ: dict[str, str]) -> dict[str, str]:
    """The environment without what an activated venv or a pip setting would smuggle into ours."""
    leaks = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_CONSTRAINT")
    return {name: value for name, value in environ.items() if name not in leaks}


def survey(venv: Path) -> dict[str, list[str]]:
    """Packages in the environment and those with missing files; `broken` tells why when it does not start."""
    python = venv / "bin" / "python"
    try:
        done = subprocess.run(
            [python, "-I", "-c", SURVEY],
            capture_output=True,
            text=True,
            timeout=300,
            env=clean_environment(dict(os.environ)),
        )
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return {"broken": [f"{python} does not run ({type(error).__name__})"], "packages": []}


def state(venv: Path, wanted: str) -> tuple[str, str]:
    """("whole" | "behind" | "broken" | "absent", the reason in words)."""
    if not os.path.lexists(venv):
        return "absent", "there is no .venv"
    found = survey(venv)
    if found["broken"]:
        return "broken", f".venv is damaged: {', '.join(found['broken'][:3])}"
    try:
        stamp = json.loads((venv / ".installed").read_text())
        missing = sorted(set(stamp["packages"]) - set(found["packages"]))
        same = stamp["fingerprint"] == wanted
        moved = stamp["root"] != str(venv.parent)
    except (OSError, ValueError, KeyError, TypeError):
        return "behind", "an installation did not finish"
    if moved:
        return "broken", ".venv was made for another folder"
    if missing:
        return "behind", f".venv lost {', '.join(missing[:3])}"
    return ("whole", "") if same else ("behind", "pyproject.toml, constraints.txt or Python changed")


def create(venv: Path) -> None:
    """Make an empty environment, in place of whatever lies there."""
    if importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise InstallError(
            f"{sys.executable} cannot make virtual environments: its module ensurepip is missing. On Debian and "
            f"Ubuntu install it with `apt install python{version}-venv`; or name another Python >= 3.11: "
            "`make PYTHON=/path/to/python3 ...`"
        )
    if venv.is_symlink() or venv.is_file():
        venv.unlink()
    elif venv.exists():
        shutil.rmtree(venv)
    run([sys.executable, "-m", "venv", str(venv)], "making the virtual environment failed")


def run(command: list[str], failure: str) -> None:
    """Run a step with our own clean environment; its output is the user's to see."""
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, env=clean_environment(dict(os.environ)))
    if done.returncode:
        raise InstallError(f"{failure} (exit {done.returncode}); the lines above say why. Run the same again to retry")


def install(venv: Path, wanted: str) -> None:
    """Install the project editable with its pins, check the result, then write the stamp."""
    (venv / ".installed").unlink(missing_ok=True)
    python = str(venv / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "--no-input", "-c", "constraints.txt", "-e", ".[dev]"], "installation failed")
    run([*pip, "check"], "the installed packages do not fit together")
    found = survey(venv)
    if found["broken"]:
        raise InstallError(f"pip finished, yet files are missing: {', '.join(found['broken'])}")
    stamp = {"fingerprint": wanted, "root": str(venv.parent), "packages": found["packages"]}
    (venv / ".installed.new").write_text(json.dumps(stamp))
    os.replace(venv / ".installed.new", venv / ".installed")


def main() -> None:
    """Bring `.venv` into the state "whole", whatever state it is in."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise InstallError(
            f"{sys.executable} is Python {sys.version.split()[0]}; the pinned packages need 3.11 to 3.14. "
            "Name another: `make PYTHON=/path/to/python3.13 ...`"
        )
    venv, wanted = ROOT / ".venv", fingerprint(ROOT)
    with only_one_at_a_time():
        condition, reason = state(venv, wanted)
        if condition == "whole":
            return
        print(f"{reason}: installing (a few minutes the first time)", flush=True)
        if condition in ("absent", "broken"):
            create(venv)
        install(venv, wanted)


@contextlib.contextmanager
def only_one_at_a_time():
    """Two makes at once take turns: the lock lies on this file and goes with the process that holds it."""
    import fcntl

    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        main()
    except InstallError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same again to go on")
