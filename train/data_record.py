"""What a run was trained on, by content: `data.json`, written when it begins and compared when it goes on.

A data cursor is a place in a list: of another list it would go on as silently as of this one. What is compared are the
problems as the run uses them (texts, answers, token ids), so that a file may be moved, touched or written anew, and a
changed tokenizer, template or hub revision is noticed as a changed file is.
"""

import hashlib
import json
from array import array
from pathlib import Path

from entrocraft.train.durable_files import write_text
from entrocraft.train.problem_sets import Problems, ProblemSet

DATA_FILE = "data.json"


def digest(problems: ProblemSet) -> str:
    """sha256 of a set's problems, in order."""
    total = hashlib.sha256()
    for problem, ids in zip(problems.problems, problems.prompts, strict=True):
        texts = [text.encode("utf-8", "surrogatepass") for text in (problem.prompt, problem.answer)]
        for content in (*texts, array("q", ids).tobytes()):
            total.update(len(content).to_bytes(8, "little"))  # else "ab" + "c" were "a" + "bc"
            total.update(content)
    return total.hexdigest()


def _content(data: Problems) -> dict[str, dict[str, object]]:
    return {
        problems.name: {"problems": len(problems.problems), "sha256": digest(problems)}
        for problems in (data.train, *data.held_out)
    }


def write(run_dir: Path, data: Problems) -> None:
    """Records what is trained and evaluated on."""
    aside = run_dir / (DATA_FILE + ".writing")
    write_text(aside, json.dumps(_content(data), indent=1))
    aside.replace(run_dir / DATA_FILE)


def compare(run_dir: Path, data: Problems) -> None:
    """Raises ValueError when the training problems are not those the run began with. Held-out sets may change, as all
    of `evaluation` may."""
    try:
        began = json.loads((run_dir / DATA_FILE).read_text())[data.train.name]
    except FileNotFoundError:
        return  # written when the run is taken over
    now = _content(data)[data.train.name]
    if now != began:
        raise ValueError(
            f"cannot resume {str(run_dir)!r} with other training problems: it began with {began['problems']} of sha256 "
            f"{began['sha256'][:16]}..., and data.train now gives {now['problems']} of {str(now['sha256'])[:16]}... "
            "Texts, answers or the tokenizer changed. Restore them, or choose another run_dir"
        )
