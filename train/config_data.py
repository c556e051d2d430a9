"""Settings of the problems: where they are, what their columns mean, how they become prompts."""

from dataclasses import dataclass
from typing import Literal

from entrocraft.train.config_check import require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Problems and how they become prompts."""

    train: str | None = None
    """Training problems: a JSONL file (one object a line), a parquet file, a folder of either, or a data set of the
    Hugging Face hub, `owner/name`. Folders and the hub need `pip install 'entrocraft[data]'`, as parquet does."""
    split: str = "train"
    """Which split of a folder or hub data set."""
    subset: str = ""
    """Which configuration of a hub data set, where it has several."""
    revision: str = ""
    """Which revision (branch, tag, commit) of a hub data set; empty: its newest."""
    eval: str | None = None
    """Held-out problems, in the same columns; for several sets or other columns: `evaluation.sets`. With neither,
    nothing is evaluated."""
    eval_split: str = "test"
    """Which split of `data.eval`, if that is a folder or a hub data set."""
    prompt_field: str = "prompt"
    """Column that holds the problem's text."""
    answer_field: str = "answer"
    """Column that holds the reference answer."""
    # Not `str | None`: the command line reads an optional value as YAML, where a pattern such as #### is a comment.
    answer_pattern: str = ""
    """Regular expression whose one group extracts the answer from `answer_field`, e.g. '####\\s*(.+)$' for GSM8K;
    `boxed`: what its last \\boxed{} holds, for worked solutions; empty: the whole field."""
    prompt_template: str = "{prompt}"
    """Text around the problem; `{prompt}` is replaced."""
    system: str = ""
    """System turn before a training problem; empty: none. Needs `data.chat_template`. Sets of `evaluation.sets` have
    their own."""
    chat_template: bool = False
    """Render the prompt as a user turn with the tokenizer's chat template."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens."""
    on_long: Literal["error", "drop"] = "error"
    """What to do with a longer prompt: stop, or drop the problem and count it."""
    on_missing: Literal["error", "drop"] = "error"
    """What to do with a row that has no text or no answer, as proofs in collections of problems: stop, or drop it and
    count it. A column that is not there at all is always an error."""
    limit: int | None = None
    """Use only the first so many problems of each set."""
    shuffle: bool = True
    """Visit the problems in an order drawn from the seed, another each epoch; off: as they stand."""
    decontaminate: Literal["off", "report", "drop"] = "report"
    """What to do with training problems that repeat a held-out one: nothing, count them, or drop them. They are listed
    in `contamination.json`."""
    contamination_words: int = 8
    """Length of the word sequences by which problems are compared; shorter problems must be equal."""
    contamination_share: float = 0.5
    """A training problem repeats a held-out one if it has at least this share of the held-out one's sequences."""

    def __post_init__(self) -> None:
        require(
            "{prompt}" in self.prompt_template, "data.prompt_template", self.prompt_template, "a text with {prompt}"
        )
        require(
            not self.system or self.chat_template,
            "data.system",
            self.system,
            "nothing without data.chat_template: a raw prompt has no turns",
        )
        require(self.max_prompt_tokens > 0, "data.max_prompt_tokens", self.max_prompt_tokens, "a positive number")
        require(self.limit is None or self.limit > 0, "data.limit", self.limit, "a positive number, or nothing")
        require(self.contamination_words > 1, "data.contamination_words", self.contamination_words, "a number above 1")
        require(
            0 < self.contamination_share <= 1,
            "data.contamination_share",
            self.contamination_share,
            "a number in (0, 1]",
        )
