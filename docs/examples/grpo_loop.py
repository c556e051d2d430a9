"""GRPO written by hand, with the entropy held to a curve: every line that is not the controller's you have already.

    python docs/examples/grpo_loop.py --rule budget

A byte-level model that writes random digits (log 10 = 2.3 nats a token) learns to write even ones, while its entropy is
led down a straight line to 1.9: of the five even digits it keeps all in use.
"""

import argparse
from collections.abc import Sequence

import torch

from entrocraft import EntropyController, PPOClip, advantages, schedules, token_weights
from entrocraft.kernels import FusedHead
from entrocraft.train.config_model import TinyModelConfig
from entrocraft.train.tiny_model import build_tiny_model

PROMPTS, SAMPLES, LENGTH = 8, 8, 6


def reward(text: bytes) -> float:
    """The share of even digits."""
    return sum(byte in b"02468" for byte in text) / LENGTH


def teach_digits(model: torch.nn.Module, prompt_R1: torch.Tensor) -> None:
    """A minute part of pretraining: any digit is as good as any other."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        digits_RL = torch.randint(51, 61, (len(prompt_R1), LENGTH))
        logits_RLV = model(torch.cat([prompt_R1, digits_RL], 1)[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits_RLV.flatten(0, 1), digits_RL.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Trains, and returns the entropy of each step, nats."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rule", default="budget", help="none: what becomes of the entropy without control")
    steps, rule = vars(parser.parse_args(argv)).values()
    torch.manual_seed(0)
    model, _ = build_tiny_model(TinyModelConfig(hidden_size=48, layers=2), seed=0)
    schedule = schedules.measured(lambda entropy: schedules.linear(entropy, 1.9, steps))
    controller = EntropyController(schedule, rule)
    R, T = PROMPTS * SAMPLES, PROMPTS * SAMPLES * LENGTH
    rollout_T, group_R = torch.arange(R).repeat_interleave(LENGTH), torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    prompt_R1, mask_T = 68 + group_R[:, None], torch.ones(T, dtype=torch.bool)  # prompts "A" to "H", by ByT5's offset 3
    teach_digits(model, prompt_R1)
    optimizer, head = torch.optim.AdamW(model.parameters(), lr=1e-3), FusedHead(model)
    # Row r's token t is predicted at position t of [R, 1 + LENGTH], of which the last predicts nothing.
    position_T = torch.arange(R * (1 + LENGTH)).view(R, -1)[:, :-1].flatten()
    entropies = []
    for step in range(steps):
        ids_RL = model.generate(prompt_R1, do_sample=True, min_new_tokens=LENGTH, max_new_tokens=LENGTH, top_k=0)
        rewards_R = torch.tensor([reward(bytes(max(i - 3, 0) % 256 for i in row)) for row in ids_RL[:, 1:].tolist()])
        advantage_R = advantages.grpo(rewards_R, group_R)
        with torch.no_grad():
            old = head(ids_RL[:, 1:].flatten(), position_T, input_ids=ids_RL, collision=True)

        decision = controller.decide(
            step=step, stats=old, rollout_T=rollout_T, group_R=group_R, advantage_R=advantage_R
        )
        weight_T = token_weights(rollout_T, mask_T, group_R, aggregation="token_mean", keep_T=decision.keep_T)

        now = head(ids_RL[:, 1:].flatten(), position_T, input_ids=ids_RL)
        loss_T = PPOClip()(now.logprob_T, old.logprob_T, decision.advantage_R[rollout_T])
        (weight_T * loss_T).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        entropies.append(decision.metrics["entropy"])
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: reward {rewards_R.mean():.2f}; {decision.reason}")
    return entropies


if __name__ == "__main__":
    main()
