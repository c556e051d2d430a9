"""Sets of problems as a run uses them: read, turned into token ids, and the training set compared with the held-out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrocraft.train.config import Config
from entrocraft.train.config_data import DataConfig
from entrocraft.train.config_evaluation import EvaluationSetConfig
from entrocraft.train.data import drop_long, encode_prompts
from entrocraft.train.decontamination import REPORT_FILE, Overlap, find_overlaps, write_report
from entrocraft.train.metrics import MetricsLog
from entrocraft.train.problems import Problem, RowFormat, read_problems

DEFAULT_SET = "eval"
"""Name of the held-out set that `data.eval` gives; its metrics carry no name."""


@dataclass(frozen=True, kw_only=True)
class ProblemSet:
    """P problems and their prompts, in order."""

    name: str
    problems: list[Problem]
    prompts: list[tuple[int, ...]]
    """Token ids of each problem's prompt."""
    samples: int
    """Responses per problem when it is evaluated; 0 for a training set."""
    too_long: int
    """Problems left out because their prompts were too long."""
    unusable: list[str]
    """What was wrong with each row that was left out for lack of a text or an answer."""

    @property
    def dropped(self) -> int:
        """Rows of the source that are not here."""
        return self.too_long + len(self.unusable)


def load_set(
    name: str, data: DataConfig, tokenizer: Any, *, context: int, response_tokens: int, samples: int = 0
) -> ProblemSet:
    """The set `data.train` describes.

    Args:
        context: most tokens the model can hold.
        response_tokens: of which so many are kept free for the response.

    Raises ValueError when prompt and response cannot both fit into the context, and what `read_problems` and
    `encode_prompts` raise.
    """
    room = context - response_tokens
    if room < 1:
        raise ValueError(
            f"sampling.max_response_tokens = {response_tokens}: the model's context of {context} tokens has no room "
            "left for a prompt; lower it"
        )
    problems, unusable = _read(data)
    limit = min(data.max_prompt_tokens, room)
    try:
        encoded = encode_prompts(
            problems,
            tokenizer,
            chat_template=data.chat_template,
            max_prompt_tokens=limit,
            on_long=data.on_long,
            system=data.system,
        )
    except ValueError as error:
        if limit == data.max_prompt_tokens:
            raise
        raise ValueError(
            f"{error} (the limit is the model's context of {context} tokens less {response_tokens} for the response)"
        ) from None
    kept, prompts, long = drop_long(problems, encoded)
    return ProblemSet(name=name, problems=kept, prompts=prompts, samples=samples, too_long=len(long), unusable=unusable)


def _read(data: DataConfig) -> tuple[list[Problem], list[str]]:
    assert data.train is not None
    row_format = RowFormat(
        prompt_field=data.prompt_field,
        answer_field=data.answer_field,
        prompt_template=data.prompt_template,
        answer_pattern=data.answer_pattern or None,
    )
    return read_problems(
        data.train,
        row_format,
        limit=data.limit,
        on_missing=data.on_missing,
        split=data.split,
        subset=data.subset,
        revision=data.revision,
    )


def held_out_data(data: DataConfig, of: EvaluationSetConfig) -> DataConfig:
    """How to read one of `evaluation.sets`: as the training data, but for what it says itself."""
    own = ("prompt_field", "answer_field", "answer_pattern", "prompt_template")
    given = {name: getattr(of, name) for name in own if getattr(of, name) is not None}
    return dataclasses.replace(
        data,
        train=of.path,
        split=of.split,
        subset=of.subset,
        revision=of.revision,
        system=of.system,
        limit=of.limit,
        **given,
    )


def load_held_out(config: Config, tokenizer: Any, *, context: int) -> list[ProblemSet]:
    """Every held-out set of a configuration: `data.eval` first, then `evaluation.sets`. Raises what `load_set` does."""
    data, evaluation = config.data, config.evaluation
    response = evaluation.max_response_tokens or config.sampling.max_response_tokens
    sources: list[tuple[str, DataConfig, int]] = []
    if data.eval is not None:
        if DEFAULT_SET in evaluation.sets:
            raise ValueError(f"evaluation.sets has a set {DEFAULT_SET!r}, as data.eval is called; rename it")
        sources.append(
            (DEFAULT_SET, dataclasses.replace(data, train=data.eval, split=data.eval_split), evaluation.samples)
        )
    for name, of in evaluation.sets.items():
        sources.append((name, held_out_data(data, of), of.samples or evaluation.samples))
    return [
        load_set(name, source, tokenizer, context=context, response_tokens=response, samples=samples)
        for name, source, samples in sources
    ]


def compare(train: ProblemSet, held_out: Sequence[ProblemSet], data: DataConfig) -> tuple[ProblemSet, list[Overlap]]:
    """The training set, without what repeats a held-out problem if `data.decontaminate` is "drop"; and what did.

    Raises ValueError when nothing is left.
    """
    if data.decontaminate == "off" or not held_out:
        return train, []
    overlaps = find_overlaps(
        _questions(train.problems),
        {held.name: _questions(held.problems) for held in held_out},
        length=data.contamination_words,
        share=data.contamination_share,
    )
    if data.decontaminate == "report" or not overlaps:
        return train, overlaps
    repeated = {found.train for found in overlaps}
    kept = [at for at in range(len(train.problems)) if at not in repeated]
    if not kept:
        raise ValueError(
            f"data.decontaminate = 'drop': all {len(train.problems)} training problems repeat held-out ones; give "
            "other data, or set it to 'report'"
        )
    clean = dataclasses.replace(
        train, problems=[train.problems[at] for at in kept], prompts=[train.prompts[at] for at in kept]
    )
    return clean, overlaps


@dataclass(frozen=True, kw_only=True)
class Problems:
    """All problems of a run."""

    train: ProblemSet
    """What is trained on."""
    held_out: list[ProblemSet]
    """What is evaluated on; may be empty."""
    overlaps: list[Overlap]
    """Training problems that repeat a held-out one, by their places in `compared`."""
    compared: ProblemSet
    """The training problems before those were dropped, if they were."""

    @classmethod
    def load(cls, config: Config, tokenizer: Any, *, context: int) -> Problems:
        """Reads, encodes and compares what a configuration names. Raises what `load_set` and `compare` do."""
        response = config.sampling.max_response_tokens
        whole = load_set("train", config.data, tokenizer, context=context, response_tokens=response)
        held_out = load_held_out(config, tokenizer, context=context)
        train, overlaps = compare(whole, held_out, config.data)
        return cls(train=train, held_out=held_out, overlaps=overlaps, compared=whole)

    def report(self, run_dir: Path, log: MetricsLog, say: Callable[[str], None], data: DataConfig) -> None:
        """Writes events for what was left out, and `contamination.json`; tells the user of repeated problems."""
        for problems in (self.train, *self.held_out):
            if problems.too_long:
                log.event("prompts_dropped", set=problems.name, count=problems.too_long, limit=data.max_prompt_tokens)
            if problems.unusable:
                log.event("rows_dropped", set=problems.name, count=len(problems.unusable), first=problems.unusable[0])
        if data.decontaminate == "off" or not self.held_out:
            return
        questions = {held.name: _questions(held.problems) for held in self.held_out}
        write_report(run_dir / REPORT_FILE, self.overlaps, _questions(self.compared.problems), questions)
        if self.overlaps:
            count, done = len(self.overlaps), "dropped" if data.decontaminate == "drop" else "kept"
            sets = ", ".join(sorted({found.held_out_set for found in self.overlaps}))
            log.event("contamination", count=count, sets=sets, training_problems=done)
            say(
                f"{count} training problems repeat held-out ones of {sets} and were {done}; see "
                f"{run_dir / REPORT_FILE}" + ("" if done == "dropped" else ", or set data.decontaminate to 'drop'")
            )


def _questions(problems: Iterable[Problem]) -> list[str]:
    return [problem.question for problem in problems]
