"""One batch for two trainers, on the same tiny Qwen3: TRL's GRPOTrainer and this package's own step.

TRL pads prompts on the left and completions on the right, and answers through its `_compute_loss`. Ours goes through
`pack` and `accumulate`, as a training step does, in several micro-batches. The model is fp64, and so is our head; TRL's
head sums in fp32 whatever it is given, and a log-probability of -6 is known to 5e-7 then: hence the tolerances.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOConfig, GRPOTrainer

from entrocraft import PolicyObjective, Rollouts
from entrocraft.methods import Method, State, Tokens, make_objective
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.policy import Policy
from entrocraft.train.step import Share, accumulate
from entrocraft.train.tiny_model import build_tiny_model

sys.path.insert(0, str(Path(__file__).parent))  # for loss_types

EXPECTED = 100
PROMPTS, SAMPLES, LONGEST = 4, 4, 16
TEMPERATURE = 0.7
TOKENS_PER_MICROBATCH = 128

torch.set_num_threads(1)  # the model is so small that threads only wait for each other


def pytest_sessionfinish(session, exitstatus):
    """Fail a run that skipped a test here, and one of the whole folder that passed more or fewer than there are."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed, skipped = (
        sum(report.nodeid.startswith("tests/trl/") for report in reporter.stats.get(name, []))
        for name in ("passed", "skipped")
    )
    whole = not session.config.option.keyword
    if exitstatus == 0 and (skipped or (whole and passed != EXPECTED)):
        reporter.write_line(f"tests/trl: {passed} passed and {skipped} skipped; expected {EXPECTED} and 0", red=True)
        session.exitstatus = 1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rollouts and what a loss needs to know of them; mask_T is False where a tool wrote, within the response."""

    rollouts: Rollouts
    old_logprob_T: Tensor
    advantage_T: Tensor
    advantage_R: Tensor | None  # None: advantages of single tokens
    importance_T: Tensor | None = None
    ref_logprob_T: Tensor | None = None

    def padded(self, value_T: Tensor) -> Tensor:
        """[R, L], zeros behind each response."""
        return pad_sequence(value_T.split(self.rollouts.length_R.tolist()), batch_first=True)

    def take(self, first: int, last: int) -> "Batch":
        """Rollouts first to last - 1, as a micro-batch of TRL's."""
        chosen_R = (torch.arange(self.rollouts.R) >= first) & (torch.arange(self.rollouts.R) < last)
        index = {"T": chosen_R[self.rollouts.rollout_T], "R": chosen_R}
        parts = {
            field.name: None if (value := getattr(self, field.name)) is None else value[index[field.name[-1]]]
            for field in fields(self)
            if field.name != "rollouts"
        }
        return Batch(rollouts=self.rollouts.select(chosen_R), **parts)

    def inputs(self, items: int) -> dict[str, Tensor]:
        """What TRL's sampling would have handed to its loss; items: tokens that count in the generation batch."""
        rollouts = self.rollouts
        prompts = [torch.tensor(rollouts.prompts[group]) for group in rollouts.group_R.tolist()]
        left = partial(pad_sequence, batch_first=True, padding_side="left")
        inputs = {
            "prompt_ids": left(prompts),
            "prompt_mask": left([torch.ones_like(prompt) for prompt in prompts]),
            "completion_ids": self.padded(rollouts.token_T),
            "completion_mask": self.padded(torch.ones_like(rollouts.token_T)),
            "tool_mask": self.padded(rollouts.mask_T.long()),
            "old_per_token_logps": self.padded(self.old_logprob_T),
            "advantages": self.padded(self.advantage_T) if self.advantage_R is None else self.advantage_R,
            "num_items_in_batch": torch.tensor(items),
        }
        extras = {"importance_sampling_ratio": self.importance_T, "ref_per_token_logps": self.ref_logprob_T}
        return inputs | {name: self.padded(value_T) for name, value_T in extras.items() if value_T is not None}


@dataclass(frozen=True)
class Result:
    """A loss, its gradient in every parameter of the model, and what was seen on the way."""

    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]
    size: float = 0.0  # what the rollouts' shares of the loss add up to without their signs

    def assert_same(self, other: "Result") -> None:
        """Loss and gradient within 1e-6 of their sizes; the gradient of each parameter alone within 2e-6.

        The weights of tokens are fp32 numbers on both sides, rounded in other orders: up to 1.1e-6 of one parameter's
        gradient, where terms of both signs leave little of it.
        """
        assert self.gradients.keys() == other.gradients.keys()
        for name, gradient in self.gradients.items():
            assert float(gradient.norm()) > 1e-6, name
            error = float((gradient - other.gradients[name]).norm() / gradient.norm())
            assert error < 2e-6, f"the gradient of {name} is {error:.2g} of its norm away"
        assert self.distance(other) < 1e-6
        error = abs(self.loss - other.loss) / self.size
        assert error < 1e-6, f"the losses {self.loss} and {other.loss} are {error:.2g} of what they add up apart"

    def distance(self, other: "Result") -> float:
        """How far the gradients are apart, all parameters together, as a share of this one's norm."""
        away = sum(float((mine - other.gradients[name]).square().sum()) for name, mine in self.gradients.items())
        return (away / sum(float(mine.square().sum()) for mine in self.gradients.values())) ** 0.5


@dataclass(frozen=True)
class Pair:
    """The model, and both ways to a loss of it."""

    policy: Policy
    folder: Path

    def batch(self, seed: int, *, spread: float = 0.4, by_token: bool = False) -> Batch:
        """Random rollouts, whose old log-probabilities lie `spread` nats around the present ones."""
        generator = torch.Generator().manual_seed(seed)
        R = PROMPTS * SAMPLES
        length_R = torch.randint(1, LONGEST + 1, (R,), generator=generator)
        length_R[0] = LONGEST
        T = int(length_R.sum())
        mask_T = torch.rand(T, generator=generator) < 0.85
        mask_T[length_R.cumsum(0) - 1] = True  # no rollout without a token: that difference has its own test
        rollouts = Rollouts(
            token_T=torch.randint(3, 259, (T,), generator=generator),
            rollout_T=torch.arange(R).repeat_interleave(length_R),
            mask_T=mask_T,
            group_R=torch.arange(R) // SAMPLES,
            sample_R=torch.arange(R) % SAMPLES,
            prompts=tuple(tuple(range(50, 53 + 2 * number)) for number in range(PROMPTS)),
            truncated_R=length_R == LONGEST,
            weight_version=0,
        )
        now_T = self.policy.score(rollouts, TOKENS_PER_MICROBATCH).logprob_T
        advantage = torch.randn(T if by_token else R, generator=generator)
        return Batch(
            rollouts=rollouts,
            old_logprob_T=(now_T + spread * torch.randn(T, generator=generator)).float(),
            advantage_T=advantage if by_token else advantage[rollouts.rollout_T],
            advantage_R=None if by_token else advantage,
        )

    def trainer(self, loss_type: str, *, microbatches: int = 1, **config: Any) -> GRPOTrainer:
        """TRL's trainer of this model, whose optimizer update is made of so many micro-batches."""
        arguments = GRPOConfig(
            output_dir=str(self.folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS * SAMPLES // microbatches, gradient_accumulation_steps=microbatches,
            num_generations=SAMPLES, max_completion_length=LONGEST, temperature=TEMPERATURE, loss_type=loss_type,
            **config,
        )  # fmt: skip
        return GRPOTrainer(
            model=self.policy.model, processing_class=self.policy.tokenizer, args=arguments,
            reward_funcs=lambda **_: [0.0], train_dataset=Dataset.from_dict({"prompt": ["a"] * PROMPTS}),
        )  # fmt: skip

    def entropy(self, batch: Batch) -> float:
        """Mean over the tokens that count, nats."""
        stats = self.policy.score(batch.rollouts, TOKENS_PER_MICROBATCH)
        return float(stats.entropy_T[batch.rollouts.mask_T].mean())

    def theirs(self, trainer: GRPOTrainer, *parts: Batch, backward: bool = True) -> Result:
        """TRL's loss of one optimizer update, its micro-batches summed as its training loop sums their gradients."""
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.current_gradient_accumulation_steps = len(
            parts
        )  # the training loop sets this, and below sync_gradients
        trainer._metrics["train"].clear()
        items, total = sum(int(part.rollouts.mask_T.sum()) for part in parts), 0.0
        for number, part in enumerate(parts, start=1):
            trainer.accelerator.gradient_state._set_sync_gradients(number == len(parts))
            with torch.set_grad_enabled(backward):
                loss = trainer.compute_loss(trainer.model, part.inputs(items))
            if backward:
                loss.backward()
            total += loss.item()
        metrics = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
        return Result(total, self._gradients() if backward else {}, metrics)

    def ours(
        self,
        method: Method,
        batch: Batch,
        aggregation: str,
        *,
        state: State | None = None,
        keep_T: Tensor | None = None,
        change: Callable[[PolicyObjective], PolicyObjective] = lambda objective: objective,
    ) -> Result:
        """The loss of this package. change: what a test does to the objective before it is used."""
        rollouts = batch.rollouts
        stats = self.policy.score(rollouts, TOKENS_PER_MICROBATCH)
        tokens = Tokens(
            stats=stats, old_logprob_T=batch.old_logprob_T, advantage_T=batch.advantage_T, mask_T=rollouts.mask_T,
            rollout_T=rollouts.rollout_T, group_R=rollouts.group_R, keep_T=keep_T, importance_T=batch.importance_T,
        )  # fmt: skip
        scale = float(rollouts.R * LONGEST) if aggregation == "fixed" else None
        objective = change(make_objective(method, tokens, state or {}, aggregation=aggregation, scale=scale))
        self.policy.model.train()
        self.policy.model.zero_grad()
        sums = accumulate(self.policy, Share(rollouts=rollouts, objective=objective), TOKENS_PER_MICROBATCH)
        metrics = {name: sums[name] / sums["tokens"] for name in ("low", "high", "dual")}
        metrics["entropy"] = float(stats.entropy_T[rollouts.mask_T].mean())
        ends = [0, *rollouts.length_R.cumsum(0).tolist()]
        runs = [slice(start, end) for start, end in pairwise(ends)]
        shares = [float(objective(stats.logprob_T[run], stats.entropy_T[run], run)) for run in runs]
        return Result(sums["loss"], self._gradients(), metrics, sum(map(abs, shares)))

    def _gradients(self) -> dict[str, Tensor]:
        return {name: value.grad.clone() for name, value in self.policy.model.named_parameters()}


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    """A tiny Qwen3 whose head shares the embedding; parametrize indirectly with False for a head of its own."""
    shape = TinyModelConfig(
        hidden_size=32, layers=2, heads=2, mlp_size=64, context=64, tied=getattr(request, "param", True)
    )
    model, tokenizer = build_tiny_model(shape, seed=0)
    model.double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)  # random weights alone are next to uniform
    return Pair(Policy(model, tokenizer, temperature=TEMPERATURE, device=torch.device("cpu")), tmp_path)
