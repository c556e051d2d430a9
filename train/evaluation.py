"""Evaluation on held-out problems: accuracy, pass@n, and how many different right answers the policy still has."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from entrocraft import Rollouts
from entrocraft.train.data import Problem
from entrocraft.train.policy import Policy
from entrocraft.train.rewards import RewardBatch, RewardPool
from entrocraft.train.sampling import HuggingFaceEngine, RolloutEngine

Prompt = tuple[int, ...]


def completion_texts(rollouts: Rollouts, policy: Policy) -> list[str]:
    """The R responses as text, without their end mark."""
    lengths = rollouts.length_R.tolist()
    rows = [ids.tolist() for ids in rollouts.token_T.split(lengths)]
    return [str(policy.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def grade(rollouts: Rollouts, texts: list[str], problems: Sequence[Problem], pool: RewardPool) -> RewardBatch:
    """Scores the R responses; `problems` are the P problems whose prompts the rollouts answer."""
    asked = [problems[g] for g in rollouts.group_R.tolist()]
    return pool.score(texts, [problem.answer for problem in asked], [problem.prompt for problem in asked])


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Chance that at least one of k draws without replacement is right: 1 - C(n - c, k) / C(n, k).

    Unbiased (Chen et al., arXiv 2107.03374, section 2.1), in a form without large factorials.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass_at_k(correct={correct}, samples={samples}, k={k}): expected 0 <= c <= n, 1 <= k <= n")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


def evaluate(
    policy: Policy,
    engine: RolloutEngine,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    pool: RewardPool,
    *,
    samples: int,
    temperature: float,
    tokens_per_microbatch: int,
    stream: Sequence[int],
) -> dict[str, float]:
    """Draws `samples` responses to every problem and returns, under names that begin with `eval_`:

    accuracy (share of right responses; no verdict counts as not right), reward (mean over verdicts), pass_at_n with n
    = samples, distinct_correct (different right responses among the n, mean over problems), entropy (nats per token,
    at the policy's scoring temperature) and no_verdict (responses without one). A response is right when its reward
    is >= 1.
    """
    rollouts = engine.sample(prompts, samples, stream=stream, temperature=temperature)
    texts = completion_texts(rollouts, policy)
    rewards = grade(rollouts, texts, problems, pool)
    reward_R, right_R = rewards.reward_R, rewards.right_R
    right_by_problem: list[list[str]] = [[] for _ in problems]
    for g, right, text in zip(rollouts.group_R.tolist(), right_R.tolist(), texts, strict=True):
        if right:
            right_by_problem[g].append(text)
    entropy_T = policy.score(rollouts, tokens_per_microbatch).entropy_T
    count = len(problems)
    return {
        "eval_accuracy": right_R.float().mean().item(),
        "eval_reward": reward_R.nanmean().item(),
        f"eval_pass_at_{samples}": sum(pass_at_k(len(r), samples, samples) for r in right_by_problem) / count,
        "eval_distinct_correct": sum(len(set(r)) for r in right_by_problem) / count,
        "eval_entropy": entropy_T.mean().item(),
        "eval_no_verdict": float(torch.isnan(reward_R).sum().item()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """`entrocraft eval RUN_DIR`: evaluates the model a run ended with on held-out problems."""
    from entrocraft.train.config_reader import load_config
    from entrocraft.train.policy import choose_device
    from entrocraft.train.run import load_prompts

    parser = argparse.ArgumentParser(prog="entrocraft eval", description=main.__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a finished run (with config.yaml and model/)")
    parser.add_argument("--data", help="JSONL file of problems; default: the run's data.eval")
    parser.add_argument("--samples", type=int, help="responses per problem; default: the run's evaluation.samples")
    parser.add_argument("--temperature", type=float, help="default: the run's evaluation.temperature")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args(argv)
    if not (options.run_dir / "model").is_dir():
        raise FileNotFoundError(f"{options.run_dir}/model: no such folder; a run writes it when it ends or is stopped")
    overrides = ["--config", str(options.run_dir / "config.yaml"), "--model.path", str(options.run_dir / "model")]
    for name, value in (("data.eval", options.data), ("evaluation.samples", options.samples)):
        overrides += [f"--{name}", str(value)] if value is not None else []
    overrides += ["--evaluation.temperature", str(options.temperature)] if options.temperature is not None else []
    config = load_config(overrides)
    if config.data.eval is None:
        raise ValueError("nothing to evaluate on: the run has no data.eval; give --data FILE.jsonl")
    device = choose_device(config.device)
    policy = Policy.load(config.model, temperature=config.sampling.temperature, device=device, seed=config.seed)
    engine = HuggingFaceEngine(policy.model, config.sampling, eos_ids=policy.eos_ids, pad_id=policy.pad_id)
    problems, prompts, dropped = load_prompts(config.data.eval, policy, config)
    with RewardPool.of(config.reward) as pool:
        result = evaluate(
            policy,
            engine,
            problems,
            prompts,
            pool,
            samples=config.evaluation.samples,
            temperature=config.evaluation.temperature,
            tokens_per_microbatch=config.batch.tokens_per_microbatch,
            stream=(options.seed,),
        )
    asked = {
        "data": config.data.eval,
        "problems": len(problems),
        "dropped_as_too_long": dropped,
        "samples": config.evaluation.samples,
        "temperature": config.evaluation.temperature,
        "seed": options.seed,
    }
    (options.run_dir / "eval.json").write_text(json.dumps({**asked, **result}, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0
