"""Every setting of a run, as frozen dataclasses.

The line under each field is its documentation and its `--help`. Nothing overwrites a given value later; derived
numbers are properties. `config_reader.py` fills these from files and the command line.
"""

from dataclasses import dataclass, field
from typing import Literal

from entrocraft.train.config_check import require
from entrocraft.train.config_checkpoint import CheckpointConfig, SelfCheckConfig
from entrocraft.train.config_data import DataConfig
from entrocraft.train.config_engine import EngineConfig, ImportanceConfig, MismatchConfig, SamplingConfig
from entrocraft.train.config_evaluation import EvaluationConfig
from entrocraft.train.config_logging import LoggingConfig
from entrocraft.train.config_lora import LoraConfig
from entrocraft.train.config_model import ModelConfig
from entrocraft.train.config_parallel import ParallelConfig
from entrocraft.train.config_reference import ReferenceConfig
from entrocraft.train.config_refill import RefillConfig


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The four batch numbers. There are no others; what follows from them is printed when a run starts."""

    prompts_per_step: int = 32
    """P: prompts sampled each step."""
    samples_per_prompt: int = 8
    """G: rollouts per prompt. R = P x G rollouts a step."""
    updates_per_step: int = 1
    """Optimizer updates made from one step's rollouts; each takes an equal share of the prompts."""
    tokens_per_microbatch: int = 16384
    """Most tokens (prompt, response and padding) in one forward and backward pass. Changes memory and speed, never
    results."""

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "samples_per_prompt", "updates_per_step", "tokens_per_microbatch"):
            require(getattr(self, name) > 0, f"batch.{name}", getattr(self, name), "a positive number")
        require(
            self.prompts_per_step % self.updates_per_step == 0,
            "batch.updates_per_step",
            self.updates_per_step,
            f"a divisor of batch.prompts_per_step = {self.prompts_per_step}, so that all updates weigh the same",
        )

    @property
    def rollouts_per_step(self) -> int:
        """R, rollouts a step."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def rollouts_per_update(self) -> int:
        """Rollouts that one optimizer update sees in one pass."""
        return self.rollouts_per_step // self.updates_per_step


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How a rollout is scored."""

    name: str = "math_verify"
    """The reward that decides what is right: `math_verify`, `strict_box`, `sum_pair`, or the import path
    `package.module:function` of your own `(completion, answer, prompt) -> float | None`, `async` or not."""
    weight: float = 1.0
    """What that reward is multiplied by in the sum with those of `also`."""
    also: dict[str, float] = field(default_factory=dict)
    """Further rewards by name or import path, with their weights: `{my_rewards:brief: 0.1, strict_box: 0}`; 0 records a
    score without counting it."""
    workers: int = 2
    """Processes that score; each can be killed. 0 scores in this process, without a time limit."""
    timeout_s: float = 10.0
    """Seconds one rollout may take; then its worker is killed and the rollout has no verdict."""
    signed: bool = False
    """Map scores 0..1 of `name` to -1..+1; the rule `switch` needs -1/+1."""
    overlong_buffer: int = 0
    """Tokens before `sampling.max_response_tokens` that cost reward, the more the nearer to it (DAPO); 0 is off."""
    overlong_factor: float = 1.0
    """What a response at the limit loses by that; of an advantage that sees no more than the sign of a reward, as
    `raft`, and of the rule `switch`, a penalty is refused."""
    truncated: Literal["keep", "mask", "no_verdict"] = "keep"
    """Responses that the limit cut off: `keep` what the reward says; `mask` their tokens out of the loss, of its
    denominators and of the entropy that is controlled, their reward still counting in the mean of its group (DAPO's
    overlong filtering); `no_verdict` for an advantage of 0 and no part in its group's statistics, its tokens staying in
    denominators and in the entropy."""

    def __post_init__(self) -> None:
        require(self.workers >= 0, "reward.workers", self.workers, "0 or more")
        require(self.timeout_s > 0, "reward.timeout_s", self.timeout_s, "a number of seconds above 0")
        require(self.overlong_buffer >= 0, "reward.overlong_buffer", self.overlong_buffer, "0 or more tokens")
        finite = 0 <= self.overlong_factor < float("inf")
        require(finite, "reward.overlong_factor", self.overlong_factor, "a finite number >= 0, such as 1.0")
        unread = not self.overlong_buffer and self.overlong_factor != RewardConfig.overlong_factor
        require(not unread, "reward.overlong_factor", self.overlong_factor, "nothing where reward.overlong_buffer is 0")
        require(self.name not in self.also, "reward.also", self.also, f"rewards other than reward.name = {self.name}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Advantages, policy loss and how it is averaged."""

    advantage: str = "grpo"
    """How rewards become advantages: `grpo`, `dr_grpo`, `rloo`, ... (`entrocraft.advantages`), or an import path
    `package.module:function`."""
    advantage_options: dict[str, float] = field(default_factory=dict)
    """Arguments of the advantage estimator, such as `{weight: 0.1}`."""
    policy: str = "ppo_clip"
    """The loss of a token: `ppo_clip`, `gspo`, `cispo`, ... (`entrocraft.policy_losses`), or an import path. The three
    clips below are those of `ppo_clip`."""
    policy_options: dict[str, float | None] = field(default_factory=dict)
    """Arguments of another policy loss, such as `{clip_low: 3e-4}` for `gspo`."""
    method: str = "plain"
    """What else the loss is made of: `plain` for nothing, `entropy_bonus`, `entropic`, `clip_cov`, ...
    (`entrocraft.methods`), or an import path."""
    method_options: dict[str, float | str | bool | None] = field(default_factory=dict)
    """Arguments of the method, such as `{coefficient: 0.003}`; a target that is not given is the schedule's."""
    clip_low: float = 0.2
    """PPO: probability ratios below 1 - clip_low stop counting for negative advantages."""
    clip_high: float = 0.2
    """PPO: ratios above 1 + clip_high stop counting for positive advantages."""
    dual_clip: float | None = 3.0
    """Bound on the loss of a negative advantage, as a multiple of it; empty is off."""
    aggregation: str | None = None
    """What the loss is divided by: `token_mean` (the default), `seq_mean_token_sum`, `seq_mean_token_mean`,
    `seq_mean_token_sum_norm`, `fixed`, `kept_tokens`, `eq5`, or `package.module:name`, a function of a
    `losses.Layout`. An `entropy.preset` brings its own."""
    passes: int = 1
    """Times each rollout is used; above 1 clipping comes into play."""

    def __post_init__(self) -> None:
        require(self.passes > 0, "loss.passes", self.passes, "a positive number")
        require(
            not self.policy_options or self.policy != "ppo_clip",
            "loss.policy_options",
            self.policy_options,
            "nothing beside loss.policy = 'ppo_clip', whose clips are loss.clip_low, clip_high and dual_clip",
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The entropy curve to follow, in nats per token."""

    kind: str = "linear"
    """`constant`, `linear`, `cosine`, `exponential`, `piecewise`, `oscillate`, or `package.module:function`, called
    with the number of steps, which returns a function from step, 0 to one past the last, to nats."""
    start: float | Literal["measured"] = "measured"
    """Entropy at step 0; `measured` takes what the model has when training starts."""
    end: float = 0.5
    """Entropy at `steps` and after."""
    steps: int | None = None
    """Steps the curve takes; empty: the whole run."""
    points: list[tuple[int, float]] = field(default_factory=list)
    """`piecewise`: [step, nats] corners."""
    period: int = 100
    """`oscillate`: steps of one full wave around the straight line from start to end."""
    amplitude: float = 0.1
    """`oscillate`: height of the wave, nats."""


@dataclass(frozen=True, kw_only=True)
class EntropyConfig:
    """Entropy control."""

    preset: str | None = None
    """`paper_v1`, `paper_v2` or `paper_code`: sets rule and aggregation as the source has them. Excludes
    `entropy.rule`."""
    rule: str | None = None
    """`none`, `soft`, `hard`, `switch`, `first_order`, `budget`, ... (`entrocraft.rules`), or an import path."""
    rule_options: dict[str, float | str | bool | dict[str, float | str | bool]] = field(default_factory=dict)
    """Further arguments of the rule, such as `{max_weight: 4}` for `budget`; of `group_scale` and `tempered`, the rule
    they wrap: `{rule: {name: soft, gamma: 5}}`."""
    level: Literal["sequence", "token"] = "sequence"
    """`first_order` and `budget`: reject whole rollouts or single tokens."""
    gamma: float | None = None
    """`soft` and `soft_expected`: steepness of the acceptance probability; 10 when empty."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The curve."""
    width: float = 0.1
    """Width of the band around the curve, nats; inside it the sign rules do nothing."""
    warmup_steps: int = 0
    """Steps at the start without control."""
    min_kept_fraction: float = 0.02
    """Fewer rollouts kept than this fraction: the step goes uncontrolled, visibly."""
    min_authority: float = 0.02
    """Fewer rollouts with an advantage than this fraction: the step goes uncontrolled, visibly. With this and the two
    limits around it at 0, only a step that would keep nothing at all goes uncontrolled."""
    min_groups: int = 8
    """Fewer prompts kept than this (or a quarter of the batch's, if less): the step goes uncontrolled, visibly."""
    release: bool = True
    """Control lets go, visibly, when reward falls under it or when it stays far out of reach of its curve."""
    release_share: float = 0.8
    """Reward below this share of its best, both above the lowest, has fallen; 0: it never has."""
    release_patience: int = 5
    """Steps of fallen reward under control until control lets go."""

    def __post_init__(self) -> None:
        require(
            self.preset is None or self.rule is None,
            "entropy.rule",
            self.rule,
            f"nothing beside entropy.preset = {self.preset!r}",
        )
        require(
            self.width >= 0,
            "entropy.width",
            self.width,
            "0 or more, so that the band's low end is not above its high end",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the length of the run."""

    steps: int = 100
    """Training steps: one batch of rollouts each."""
    lr: float = 1e-6
    """Learning rate after warm-up, constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    max_bad_steps: int = 3
    """Stop after so many steps in a row that could not be trained on: loss, gradient or score not finite, or no verdict
    on any rollout, or no token that counts."""

    def __post_init__(self) -> None:
        require(self.steps > 0, "optimizer.steps", self.steps, "a positive number")
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            require(0 < value < float("inf"), f"optimizer.{name}", value, "a finite number above 0")
        for name in ("warmup_steps", "weight_decay"):
            require(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "0 or more")
        require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "two numbers in [0, 1)")
        require(self.max_bad_steps > 0, "optimizer.max_bad_steps", self.max_bad_steps, "a positive number")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run_dir: str = "runs/default"
    """Folder of everything this run writes."""
    resume: Literal["auto", "never"] = "never"
    """`auto` goes on from the newest whole checkpoint in `run_dir`, or starts; `never` refuses a folder that has
    one."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA where there is one."""
    model: ModelConfig = ModelConfig()
    refill: RefillConfig = RefillConfig()
    lora: LoraConfig = LoraConfig()
    reference: ReferenceConfig = ReferenceConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    importance: ImportanceConfig = ImportanceConfig()
    mismatch: MismatchConfig = MismatchConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    entropy: EntropyConfig = EntropyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    self_check: SelfCheckConfig = SelfCheckConfig()
    logging: LoggingConfig = LoggingConfig()

    def __post_init__(self) -> None:
        refills = self.refill.oversample or self.refill.zero_variance == "refill"
        require(
            not (self.engine.overlap and refills),
            "engine.overlap",
            self.engine.overlap,
            "false beside refill.oversample and refill.zero_variance = 'refill': how many prompts a step draws is not "
            "known a step ahead",
        )
        require(
            self.refill.zero_variance == "keep" or self.batch.samples_per_prompt > 1,
            "refill.zero_variance",
            self.refill.zero_variance,
            "'keep' at batch.samples_per_prompt = 1, where the rewards of no prompt can differ",
        )
        longest = self.sampling.max_response_tokens
        require(
            self.reward.overlong_buffer <= longest,
            "reward.overlong_buffer",
            self.reward.overlong_buffer,
            f"at most sampling.max_response_tokens = {longest}, of which it is the last part",
        )
        if self.entropy.preset is not None:  # what is saved with the run must be what ran
            for name, value in (("loss.aggregation", self.loss.aggregation), ("entropy.gamma", self.entropy.gamma)):
                require(value is None, name, value, f"nothing: entropy.preset = {self.entropy.preset!r} brings its own")
