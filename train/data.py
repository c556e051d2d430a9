"""The seeded order in which problems are visited, and their prompts as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from entrocraft.train.problems import Problem, RowFormat, load_problems, read_problems

__all__ = ["Problem", "PromptOrder", "RowFormat", "drop_long", "encode_prompts", "load_problems", "read_problems"]


class PromptOrder:
    """Which problems each step uses: one seeded permutation an epoch, or the order they stand in, without end.

    Epoch e visits the permutation drawn from `SeedSequence([seed, e])`, so the order needs no stored random
    state: epoch and position are enough to go on exactly where a run stopped. A batch may span the end of an
    epoch.
    """

    def __init__(self, size: int, seed: int, *, shuffle: bool = True) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.position = 0
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, self.epoch]))
        return generator.permutation(self.size).tolist()

    def next(self, n: int) -> list[int]:
        """Return the next n indices. ValueError unless 1 <= n <= size."""
        if not 1 <= n <= self.size:
            raise ValueError(
                f"n={n} prompts asked for at once, expected between 1 and the {self.size} there are; "
                "lower prompts_per_step or give more data"
            )
        taken = self._order[self.position : self.position + n]
        self.position += len(taken)
        if self.position == self.size:
            self.epoch += 1
            self._order = self._permutation()
            self.position = n - len(taken)
            taken += self._order[: self.position]
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved state. ValueError if it cannot belong to a data set of this size."""
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < self.size:
            raise ValueError(
                f"state {state} does not fit {self.size} problems (position must be below it); "
                "the run was started on other data"
            )
        self.epoch, self.position = epoch, position
        self._order = self._permutation()


def encode_prompts(
    problems: Sequence[Problem],
    tokenizer: Any,
    *,
    chat_template: bool,
    max_prompt_tokens: int,
    on_long: Literal["error", "drop"] = "error",
    system: str = "",
) -> list[tuple[int, ...]]:
    """Token ids of every prompt, aligned with `problems`.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: True sends the prompt as one user turn through the tokenizer's chat template; False
            encodes it as it stands, with the special tokens the tokenizer puts in front (a closing
            end-of-text token is left out, since the model is to continue from here).
        max_prompt_tokens: longest prompt allowed, in tokens.
        on_long: "error" raises at the first longer prompt; "drop" gives it the empty tuple, which no other
            prompt has. `drop_long` takes those out and says which they were.
        system: text of a system turn before the user's; empty: none.

    Raises:
        ValueError: a prompt over the limit (with "error"), a prompt that encodes to nothing, no prompt left,
            a tokenizer without a chat template, or a system turn without a template.
    """
    if on_long not in ("error", "drop"):
        raise ValueError(f"on_long={on_long!r} must be 'error' or 'drop'")
    if max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens={max_prompt_tokens} must be at least 1")
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"chat_template=True, but the tokenizer {type(tokenizer).__name__} has none; "
            "set chat_template to false for a raw prompt, or use a tokenizer that has one"
        )
    if system and not chat_template:
        raise ValueError(f"system={system!r} needs chat_template=True: a raw prompt has no turns")
    texts = [problem.prompt for problem in problems]
    encoded: list[tuple[int, ...]] = []
    for problem, ids in zip(
        problems, _all_ids(texts, tokenizer, chat_template=chat_template, system=system), strict=True
    ):
        if not ids:
            raise ValueError(f"problem {problem.index} ({problem.prompt[:60]!r}) encodes to no tokens")
        if len(ids) <= max_prompt_tokens:
            encoded.append(tuple(ids))
        elif on_long == "drop":
            encoded.append(())
        else:
            raise ValueError(
                f"problem {problem.index} ({problem.prompt[:60]!r}...) is {len(ids)} tokens long, the limit "
                f"max_prompt_tokens is {max_prompt_tokens}; raise the limit or set on_long='drop' to leave "
                "such problems out"
            )
    if not any(encoded):
        raise ValueError(f"none of {len(problems)} prompts fits into max_prompt_tokens={max_prompt_tokens}; raise it")
    return encoded


def _all_ids(prompts: list[str], tokenizer: Any, *, chat_template: bool, system: str) -> list[list[int]]:
    """Token ids of every prompt, in one call: half a million one by one take minutes."""
    if chat_template:
        before = [{"role": "system", "content": system}] if system else []
        turns = [[*before, {"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # The template has already written the special tokens into the text.
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    encoded: list[list[int]] = tokenizer(prompts)["input_ids"]
    eos = getattr(tokenizer, "eos_token_id", None)
    closed = [at for at, ids in enumerate(encoded) if ids and ids[-1] == eos]
    if closed:
        bare = tokenizer([prompts[at] for at in closed], add_special_tokens=False)["input_ids"]
        for at, ids in zip(closed, bare, strict=True):
            if ids[-1:] != [eos]:
                encoded[at].pop()
    return encoded


def drop_long(
    problems: Sequence[Problem], encoded: Sequence[tuple[int, ...]]
) -> tuple[list[Problem], list[tuple[int, ...]], list[Problem]]:
    """Split what `encode_prompts(on_long="drop")` gave: kept problems, their prompts, dropped problems."""
    pairs = list(zip(problems, encoded, strict=True))
    kept = [(problem, ids) for problem, ids in pairs if ids]
    dropped = [problem for problem, ids in pairs if not ids]
    return [problem for problem, _ in kept], [ids for _, ids in kept], dropped
