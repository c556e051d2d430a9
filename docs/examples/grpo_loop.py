"""GRPO written by hand, with the entropy held to a curve: every line that is not the controller's you have already.

    python docs/examples/grpo_loop.py --rule budget

A small Qwen3 that writes random digits (log 10 = 2.3 nats a token) learns to write even ones, while its entropy is led
down a straight line to 1.9: of the five even digits it keeps all in use.
"""

import argparse
from collections.abc import Sequence

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from entrocraft import EntropyController, PPOClip, advantages, schedules, token_weights
from entrocraft.kernels import FusedHead

PROMPTS, SAMPLES, LENGTH = 8, 8, 6
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Trains, and returns the entropy of each step, nats."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rule", default="budget", help="none: what becomes of the entropy without control")
    steps, rule = vars(parser.parse_args(argv)).values()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=10, hidden_size=64, intermediate_size=128, **SIZES))
    optimizer, head = torch.optim.AdamW(model.parameters(), lr=1.5e-3), FusedHead(model)
    controller = EntropyController(schedules.measured(lambda start: schedules.linear(start, 1.9, steps)), rule)
    group_R = torch.arange(PROMPTS).repeat_interleave(SAMPLES)  # also the prompt, one digit
    rollout_T = torch.arange(len(group_R)).repeat_interleave(LENGTH)
    mask_T = torch.ones_like(rollout_T, dtype=torch.bool)
    # Token t of row r is predicted at position t of [R, 1 + LENGTH], of which the last predicts nothing.
    position_T = torch.arange(len(group_R) * (1 + LENGTH)).view(-1, 1 + LENGTH)[:, :-1].flatten()
    entropies = []
    for step in range(steps):
        ids_RL = model.generate(group_R[:, None], do_sample=True, max_new_tokens=LENGTH, top_k=0)
        token_T, reward_R = ids_RL[:, 1:].flatten(), (ids_RL[:, 1:] % 2 == 0).float().mean(1)
        with torch.no_grad():
            old = head(token_T, position_T, input_ids=ids_RL, collision=True)
        decision = controller.decide(
            step=step, stats=old, rollout_T=rollout_T, group_R=group_R, advantage_R=advantages.grpo(reward_R, group_R)
        )
        weight_T = token_weights(rollout_T, mask_T, group_R, aggregation="token_mean", keep_T=decision.keep_T)
        now = head(token_T, position_T, input_ids=ids_RL)
        loss_T = PPOClip()(now.logprob_T, old.logprob_T, decision.advantage_R[rollout_T])
        (weight_T * loss_T).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        entropies.append(decision.metrics["entropy"])
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: reward {reward_R.mean():.2f}; {decision.reason}")
    return entropies


if __name__ == "__main__":
    main()
