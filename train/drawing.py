"""Each step's rollouts: drawn when they are wanted or, with `engine.overlap`, while the step before is learnt from.

With overlap, generation of step s + 1 begins as soon as that of step s has been handed over, from the weights that step
s was about to change, and ends before the changed ones are published: rollouts are one version older than the policy
that learns from them, never more, and no batch is drawn from two versions.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from entrocraft import Rollouts
from entrocraft.train.data import PromptOrder
from entrocraft.train.deadline import Caller
from entrocraft.train.publication import check_version
from entrocraft.train.sampling import RolloutEngine


@dataclass(frozen=True, slots=True)
class Drawn:
    """The rollouts of one step and the problems they answer."""

    step: int
    chosen: list[int]
    """Indices of the P problems."""
    rollouts: Rollouts


class Drawing:
    """Draws the batches of a run in the order of its prompts.

    stream: the first entries of every step's random stream. ahead: whether to draw one step ahead.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        order: PromptOrder,
        prompts: Sequence[tuple[int, ...]],
        *,
        samples_per_prompt: int,
        stream: tuple[int, ...],
        ahead: bool,
    ) -> None:
        self.engine, self.order, self.prompts = engine, order, prompts
        self.samples = samples_per_prompt
        self.stream = stream
        self.ahead = ahead
        self._next: Future[Drawn] | None = None
        self._caller: Caller | None = None

    def _draw(self, step: int, chosen: list[int], first_prompt: int = 0) -> Drawn:
        rollouts = self.engine.sample(
            [self.prompts[i] for i in chosen], self.samples, stream=(*self.stream, step), first_prompt=first_prompt
        )
        return Drawn(step, chosen, rollouts)

    def take(self, step: int, *, last: int, prompts: int, first_prompt: int = 0) -> tuple[Drawn, int]:
        """Rollouts to the next `prompts` prompts for this step, and how many versions older than the policy their
        weights are. first_prompt: those that this step has drawn already.

        Begins to draw as many for the next step, up to step `last`, if it draws ahead. Raises PublicationError for a
        version that is too old.
        """
        if self._next is not None:
            drawn = self._next.result()
            assert drawn.step == step, f"drawn for step {drawn.step}, wanted for {step}"
            self._next = None
        else:
            drawn = self._draw(step, self.order.next(prompts), first_prompt)
        age = check_version(drawn.rollouts, step - 1, allowed=int(self.ahead))
        if self.ahead and step < last:
            self._begin(step + 1, prompts)
        return drawn, age

    def rest(self) -> None:
        """Says that this step draws no more: an engine that does not draw ahead may rest."""
        if self._next is None:
            self.engine.rest()

    def _begin(self, step: int, prompts: int) -> None:
        if self._caller is None:
            self._caller = Caller("the trainer", "the drawing of rollouts")
        chosen = self.order.next(prompts)
        self._next = self._caller.start(lambda: self._draw(step, chosen))

    def settle(self) -> None:
        """Waits until nothing is being drawn: before weights are published and before a checkpoint."""
        if self._next is not None:
            self._next.result()  # the engine's own time limit ends it

    def close(self) -> None:
        """Waits for what is being drawn, and draws no more."""
        if self._caller is not None:
            self._caller.close()

    def state_dict(self) -> dict[str, Any] | None:
        """A batch that was drawn ahead, as JSON can hold it; None if there is none."""
        if self._next is None:
            return None
        drawn = self._next.result()
        r = drawn.rollouts
        return {
            "step": drawn.step,
            "chosen": drawn.chosen,
            "length_R": r.length_R.tolist(),
            "truncated_R": r.truncated_R.tolist(),
            "token_T": r.token_T.tolist(),
            "logprob_T": None if r.sampler_logprob_T is None else r.sampler_logprob_T.tolist(),
            "weight_version": r.weight_version,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Goes on from what `state_dict` gave."""
        self._next = None
        if state is None:
            return
        chosen, samples = state["chosen"], self.samples
        length_R, token_T = torch.tensor(state["length_R"]), torch.tensor(state["token_T"])
        rollouts = Rollouts(
            token_T=token_T,
            rollout_T=torch.arange(len(length_R)).repeat_interleave(length_R),
            mask_T=torch.ones_like(token_T, dtype=torch.bool),
            group_R=torch.arange(len(chosen)).repeat_interleave(samples),
            sample_R=torch.arange(samples).repeat(len(chosen)),
            prompts=tuple(tuple(self.prompts[i]) for i in chosen),
            truncated_R=torch.tensor(state["truncated_R"]),
            weight_version=state["weight_version"],
            sampler_logprob_T=None if state["logprob_T"] is None else torch.tensor(state["logprob_T"]),
        )
        self._next = Future()
        self._next.set_result(Drawn(state["step"], chosen, rollouts))
