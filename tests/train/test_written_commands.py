"""Every command of train.py that README and docs print fits the devices it is printed for: 80 GB unless it says so."""

import json
import re
import shlex
from pathlib import Path

import pytest

from entrocraft.train import plan_command
from entrocraft.train.config_reader import load_config
from entrocraft.train.plan_sizes import Known

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/recipes.md", "docs/scale.md")
SCRIPT = "train/train.py"


def commands(page: str) -> list[str]:
    """The commands of a page's code blocks that start train.py, each as one line without its comment."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if SCRIPT in line and "--help" not in line]


def world_size(words: list[str]) -> int:
    """Processes that torchrun would start, over all nodes; one without it."""
    number = {name: int(words[words.index(name) + 1]) for name in ("--nproc-per-node", "--nnodes") if name in words}
    return number.get("--nproc-per-node", 1) * number.get("--nnodes", 1)


def planned(command: str, folder: Path) -> list[str]:
    """The arguments of `--plan` for a command; files that a reader would have made are made in `folder`."""
    words = command.split()
    place = next(i for i, word in enumerate(words) if word.endswith(SCRIPT))
    options = [str(ROOT / word) if word.startswith("train/configs/") else word for word in words[place + 1 :]]
    shape = folder / "config.json"
    shape.write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 500}))
    options = [str(shape) if word.endswith("path/to/config.json") else word for word in options]
    for i, word in enumerate(options):
        if word.endswith("/config.yaml"):  # that of a run, which a recipe with its name began
            recipe = next(ROOT.glob(f"train/configs/**/{Path(word).parent.name}.yaml"))
            assert load_config([f"--config={recipe}"]).run_dir == str(Path(word).parent)
            options[i] = str(recipe)
    if "--plan" in options:
        return options
    return ["--plan", "--world-size", str(world_size(words[:place])), *options]


ALL = [(page, command) for page in PAGES for command in commands(page)]


KNOWN = Known()  # models and traces, which most of the commands share


@pytest.mark.parametrize("command", dict.fromkeys(command for _, command in ALL))
def test_fits(command, tmp_path, capsys):
    code = plan_command.main(planned(command, tmp_path), known=KNOWN)
    assert code == 0, f"{command}\n{capsys.readouterr().out}"


def test_none_is_overlooked():
    """Pages and sizes that the commands are about; 32 processes are four nodes of eight."""
    assert {page for page, _ in ALL} == set(PAGES)
    assert len(ALL) >= 14
    sizes = {world_size(command.split(SCRIPT)[0].split()) for _, command in ALL}
    assert sizes >= {1, 6, 8, 32}
