"""Everything a run holds: what is built once before the first step, and what a checkpoint must bring back."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from entrocraft import Decision, Rollouts, TokenStats
from entrocraft.advantages import build as build_advantage
from entrocraft.advantages import members
from entrocraft.losses import AGGREGATIONS
from entrocraft.methods import Signal, State
from entrocraft.registry import resolve
from entrocraft.train import data_record
from entrocraft.train.checkpoint import CheckpointFolder
from entrocraft.train.checkpoint_files import value_of
from entrocraft.train.config import Config
from entrocraft.train.control import build_controller, build_method, build_rule
from entrocraft.train.data import PromptOrder
from entrocraft.train.drawing import Drawing
from entrocraft.train.engines import build_engine
from entrocraft.train.errors import NonFiniteError, TrainingStopped
from entrocraft.train.evaluation import sampling_settings
from entrocraft.train.layers import use_liger
from entrocraft.train.loading import load
from entrocraft.train.metrics import MetricsLog
from entrocraft.train.mismatch import MismatchWatch, build_importance
from entrocraft.train.parallel import Ranks
from entrocraft.train.policy import Policy, choose_device
from entrocraft.train.problem_sets import Problems
from entrocraft.train.random_states import seed_all
from entrocraft.train.reference import Reference, divergence
from entrocraft.train.rewards import RewardPool
from entrocraft.train.run_folder import RunFolder
from entrocraft.train.spread import SpreadEngine
from entrocraft.train.step import Learning
from entrocraft.waves import Waves

# First entry after the seed of each random stream: what is drawn for one purpose never depends on what another drew.
SAMPLE, EVALUATE = 1, 2


class Run:
    """One training run, as one of its processes holds it. All construct it and call its methods together."""

    def __init__(self, config: Config, ranks: Ranks | None = None, device: torch.device | None = None) -> None:
        if config.data.train is None:
            raise ValueError("data.train is empty: give a JSONL file, e.g. --data.train problems.jsonl")
        self.config = config
        self.ranks = ranks or Ranks()
        self.dir = Path(config.run_dir)
        device = device or choose_device(config.device)
        self.checkpoints = _checkpoints(config, self.ranks, device)
        self.folder = RunFolder(config, self.ranks)
        self.folder.refuse_or_compare(self.checkpoints)
        # Mistakes first, slow things after.
        self.method = build_method(config)
        self.method_state: State = {}
        self.importance = build_importance(config.importance)
        self.mismatch = MismatchWatch(config.mismatch)
        RewardPool.of(config.reward)
        self.advantage = build_advantage(config.loss.advantage, **config.loss.advantage_options)
        build_rule(config)  # once more below; here so that what it refuses is refused before a model is loaded
        seed_all(config.seed)
        model, tokenizer = load(
            config.model, config.parallel, config.lora, device=device, size=self.ranks.size, seed=config.seed
        )
        self.policy = Policy(model, tokenizer, temperature=config.sampling.temperature, device=device, ranks=self.ranks)
        self.reference = Reference.load(config, self.policy, self.ranks, device)
        self.controller, self.aggregation = build_controller(config, vocab_size=self.policy.vocab_size)
        resolve(AGGREGATIONS, self.aggregation, "aggregation (loss.aggregation)")
        self.data = Problems.load(config, self.policy.tokenizer, context=self.policy.context)
        self.problems, self.prompts = self.data.train.problems, self.data.train.prompts
        self.held_out = self.data.held_out
        if self.checkpoints.whole():
            data_record.compare(self.dir, self.data)
        self._check_sizes()
        self.policy.check(self.prompts[0])
        self.liger = use_liger(self.policy, config.model, self.prompts[0][:64])
        self.engine = SpreadEngine(build_engine(config, self.policy), self.policy, ahead=config.engine.overlap)
        self.order = PromptOrder(len(self.problems), config.seed, shuffle=config.data.shuffle)
        self.drawing = _drawing(config, self.engine, self.order, self.prompts)
        self.optimizer = _optimizer(config, self.policy)
        self.waves = _waves(config)
        self.last_direction = 0
        self.step = 0
        self.samples = 0
        self.drawn_now = 0
        self.bad_in_a_row = 0
        self.told_of_rewards = False

    def _check_sizes(self) -> None:
        batch = self.config.batch
        if batch.prompts_per_step > len(self.problems):
            raise ValueError(
                f"batch.prompts_per_step = {batch.prompts_per_step}: {self.config.data.train} has only "
                f"{len(self.problems)} usable problems; lower it or give more"
            )
        scored = {"sampling": (self.prompts, self.config.sampling.max_response_tokens)}
        if self.held_out and self.config.evaluation.entropy:
            prompts = [prompt for held in self.held_out for prompt in held.prompts]
            scored["evaluation"] = (prompts, sampling_settings(self.config).max_response_tokens)
        for name, (prompts, response) in scored.items():
            prompt = max(map(len, prompts))
            if prompt + response - 1 > batch.tokens_per_microbatch:  # the last token of a response is not fed
                raise ValueError(
                    f"batch.tokens_per_microbatch = {batch.tokens_per_microbatch}: the longest prompt of {prompt} "
                    f"tokens and a response of {name}.max_response_tokens = {response} do not fit; expected at least "
                    f"{prompt + response - 1}"
                )

    def resume(self) -> int | None:
        """Loads the newest whole checkpoint, if any, and returns its step."""
        self.engine.rest()  # loading makes gradients and moments, which no step has beside an engine that is awake
        state = self.checkpoints.load_newest(self.policy.model, self.optimizer)
        if state is None:
            return None
        self.step, self.samples, self.bad_in_a_row = state["step"], state["samples"], state["bad_in_a_row"]
        self.order.load_state_dict(state["order"])
        self.controller.load_state_dict(state["controller"])
        self.method_state = state["method"]
        self.drawing.load_state_dict(state.get("drawn"))
        self.mismatch.load_state_dict(state.get("mismatch", {"usual": [], "unusual": []}))
        self.last_direction = state["last_direction"]
        if self.waves is not None:
            self.waves.load_state_dict(state["waves"])
        return self.step

    def begin(self, resumed: int | None) -> None:
        """Takes the run's folder, as `RunFolder.take` does."""
        self.folder.take(resumed, self.checkpoints)
        if self.ranks.main:
            data_record.write(self.dir, self.data)

    def end(self) -> None:
        """Lets go of the engine and of the run's folder, when the last checkpoint is written."""
        self.drawing.close()
        self.engine.close()
        self.checkpoints.close()
        self.folder.release()

    def value(self, row: Mapping[str, Any]) -> float | None:
        """How good the present step is by `checkpoint.best`, from its metrics; None for a step that was left out, which
        may lack it. ValueError for a name they should have and do not."""
        best = self.config.checkpoint.best
        if self.bad_in_a_row and best.removeprefix("-") not in row:
            return None
        return value_of(best, row, evaluated=self.evaluation_due()) if best else None

    def save(self, value: float | None = None) -> Path:
        """Writes a checkpoint of the present state."""
        state: dict[str, Any] = {
            "samples": self.samples,
            "bad_in_a_row": self.bad_in_a_row,
            "order": self.order.state_dict(),
            "controller": self.controller.state_dict(),
            "method": dict(self.method_state),
            "drawn": self.drawing.state_dict(),
            "mismatch": self.mismatch.state_dict(),
            "last_direction": self.last_direction,
            "waves": None if self.waves is None else self.waves.state_dict(),
        }
        return self.checkpoints.save(self.step, self.policy.model, self.optimizer, state, value)

    def set_learning_rate(self) -> float:
        """Sets and returns the learning rate of the present step: linear warm-up from 0, then constant."""
        optimizer = self.config.optimizer
        lr = optimizer.lr * min(1.0, self.step / max(optimizer.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def decide(
        self,
        rollouts: Rollouts,
        stats: TokenStats,
        reward_R: torch.Tensor,
        sampled: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[Decision, Learning]:
        """Advantages, then the method's look at the entropy, then the controller's verdict on every rollout.

        The predicted entropy change uses the gradient of the policy loss that is about to be taken, at the scored
        policy; a penalty to a reference and an entropy bonus are not in it. sampled: as `EntropyController.decide`.
        """
        counted_R = torch.bincount(rollouts.rollout_T[rollouts.mask_T], minlength=rollouts.R)
        advantage_R = self.advantage(reward_R, rollouts.group_R, counted_R)
        entropy = _mean_of(stats.entropy_T, rollouts.mask_T)
        clamped = None if stats.clamped_entropy_T is None else _mean_of(stats.clamped_entropy_T, rollouts.mask_T)
        learning = self._learning(entropy, clamped, members(self.advantage, reward_R, rollouts.group_R))
        members_only = learning.members(rollouts)
        objective = learning.objective(members_only, stats, stats.logprob_T, advantage_R, None)
        decision = self.controller.decide(
            step=self.step,
            stats=stats,
            rollout_T=rollouts.rollout_T,
            group_R=rollouts.group_R,
            advantage_R=advantage_R,
            reward_R=reward_R,
            sampled=sampled,
            mask_T=rollouts.mask_T,
            loss_fn=lambda logprob_T: objective(logprob_T, stats.entropy_T, slice(0, len(logprob_T))),
            temperature=self.config.sampling.temperature,
            sample_R=rollouts.sample_R,
        )
        self.ranks.agree(
            f"the decision of step {self.step}",
            (decision.keep_T, decision.advantage_R, decision.reason, entropy, dict(self.method_state)),
        )
        if self.reference is None:
            return decision, learning
        penalty = self.reference.penalty(members_only, stats, decision, self.config.batch.tokens_per_microbatch)
        metrics = {**decision.metrics, "reference_kl": divergence(penalty, stats, members_only.mask_T)}
        return replace(decision, metrics=metrics), replace(learning, penalty=penalty)

    def _learning(self, entropy: float, clamped_entropy: float | None, member_R: torch.Tensor | None) -> Learning:
        """How this step learns, after the method has seen the entropy, nats."""
        signal = Signal(
            step=self.step - 1,
            steps=self.config.optimizer.steps,
            entropy=entropy,
            target=self.controller.target(self.step + 1, entropy=entropy),
            clamped_entropy=clamped_entropy,
        )
        self.method_state = self.method.observe(self.method_state, signal)
        return Learning(
            method=self.method,
            state=self.method_state,
            aggregation=self.aggregation,
            config=self.config,
            step=self.step,
            member_R=member_R,
            importance=self.importance,
        )

    def count(self, rollouts: int) -> None:
        """Counts the rollouts that the present step sampled, whatever became of them."""
        self.samples, self.drawn_now = self.samples + rollouts, rollouts

    @property
    def prompts_drawn(self) -> int:
        """Training prompts that were sampled so far, those that refilled or oversampled a batch included."""
        return self.samples // self.config.batch.samples_per_prompt

    def evaluation_due(self) -> bool:
        """Whether the present step ends with an evaluation."""
        last = self.step == self.config.optimizer.steps
        before = self.prompts_drawn - self.drawn_now // self.config.batch.samples_per_prompt
        due = last or self.config.evaluation.due(self.step, before, self.prompts_drawn)
        return bool(self.held_out) and due

    def skip_step(self, rollouts: Rollouts, reward_R: torch.Tensor, reason: str, log: MetricsLog) -> None:
        """Leaves the rest of a step out: counts it, writes an event, and the batch to `bad_batches/` for inspection.

        `torch.load(path, weights_only=True)` reads the batch back.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.controller.forget_prediction()  # no gain is learnt from an update that was not made
        self.bad_in_a_row += 1
        if not self.ranks.main:
            return
        path = self.dir / "bad_batches" / f"step_{self.step:06d}.pt"
        path.parent.mkdir(exist_ok=True)
        batch = {name: getattr(rollouts, name) for name in ("token_T", "rollout_T", "mask_T", "group_R", "sample_R")}
        torch.save({**batch, "prompts": rollouts.prompts, "reward_R": reward_R, "reason": reason}, path)
        log.event("step_skipped", step=self.step, reason=reason, batch=str(path))

    def stop_for_bad_steps(self) -> None:
        """Saves, then raises TrainingStopped: too many steps in a row could not be trained on."""
        saved = self.save()
        self.checkpoints.wait()
        raise TrainingStopped(
            f"{self.bad_in_a_row} steps in a row could not be trained on, the last at step {self.step}: a loss, "
            "gradient or score that is not a number, no verdict on any rollout, or no token that counts. Reasons are "
            f"in events.jsonl, batches in {self.dir / 'bad_batches'}; {saved} holds the weights of the last good "
            "update. Look at the data, the reward or optimizer.lr; --resume auto goes on from there"
        )


def _checkpoints(config: Config, ranks: Ranks, device: torch.device) -> CheckpointFolder:
    return CheckpointFolder(
        Path(config.run_dir),
        keep=config.checkpoint.keep,
        ranks=ranks,
        best=bool(config.checkpoint.best),
        asynchronous=config.checkpoint.asynchronous,
        patience_s=config.parallel.timeout_s,
        device=device,
    )


def _drawing(config: Config, engine: SpreadEngine, order: PromptOrder, prompts: Sequence[tuple[int, ...]]) -> Drawing:
    return Drawing(
        engine,
        order,
        prompts,
        samples_per_prompt=config.batch.samples_per_prompt,
        stream=(config.seed, SAMPLE),
        ahead=config.engine.overlap,
    )


def _optimizer(config: Config, policy: Policy) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [parameter for parameter in policy.model.parameters() if parameter.requires_grad],
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
        # On CUDA torch would take all parameters together, and hold a copy of them for it: 16 GB for 4 B parameters.
        foreach=False,
    )


def _waves(config: Config) -> Waves | None:
    if not config.refill.oversample:
        return None
    batch, refill = config.batch, config.refill
    return Waves(
        batch.rollouts_per_step,
        batch.samples_per_prompt,
        max_waves=refill.max_waves,
        max_factor=refill.max_factor,
    )


def check_finite(stats: TokenStats) -> None:
    """Raises NonFiniteError unless all log-probabilities and entropies are numbers."""
    for name, value_T in (("log-probability", stats.logprob_T), ("entropy", stats.entropy_T)):
        bad = int((~torch.isfinite(value_T)).sum())
        if bad:
            raise NonFiniteError(f"the scored {name} of {bad} of {len(value_T)} tokens is not a number")


def _mean_of(nats_T: torch.Tensor, mask_T: torch.Tensor) -> float:
    return float(nats_T[mask_T].double().mean())
