"""A schedule and a rule of one's own, in a controller: anything callable is a schedule, any such value a rule.

    python docs/examples/own_rule.py

The rule keeps, of each prompt, its best and its worst rollout besides whatever the schedule would keep by `hard`; the
schedule falls by a tenth every hundred steps. In a configuration file the two are named by import path,
`entropy.rule: my_module:keep_extremes` and `entropy.schedule.kind: my_module:staircase` (called with the number of
steps).
"""

from dataclasses import dataclass

import numpy as np
import torch

from entrocraft import EntropyController, TokenStats, advantages
from entrocraft.verdict import RuleInputs, Verdict


def staircase(steps: int):
    """0.8 nats, times 0.9 for every hundred steps."""
    return lambda step: 0.8 * 0.9 ** (step // 100)


@dataclass(frozen=True)
class keep_extremes:
    """Accept where `m A >= 0`, and the `count` best and worst of every prompt whatever their sign."""

    count: int = 1

    def __call__(self, inputs: RuleInputs) -> Verdict:
        keep_R = inputs.direction * inputs.advantage_R >= 0
        for group in np.unique(inputs.group_R):
            members = np.flatnonzero(inputs.group_R == group)
            order = members[np.argsort(inputs.advantage_R[members], kind="stable")]
            keep_R[order[: self.count]] = keep_R[order[-self.count :]] = True
        return Verdict(keep_R=keep_R, advantage_R=inputs.advantage_R)


def main() -> list[bool]:
    """Decides on one batch far above its band; returns what is kept."""
    torch.manual_seed(0)
    group_R = torch.arange(2).repeat_interleave(4)
    reward_R = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 0.2, 0.1, 1.0])
    rollout_T = torch.arange(8).repeat_interleave(3)
    logp_TV = torch.randn(24, 50).log_softmax(1)  # what a trainer has from its model: about 3.5 nats
    entropy_T = -(logp_TV.exp() * logp_TV).sum(1)
    stats = TokenStats(logprob_T=logp_TV[:, 0], entropy_T=entropy_T, lse_T=torch.zeros(24))
    controller = EntropyController(staircase(1000), keep_extremes(count=1), width=0.1, min_groups=1)
    advantage_R = advantages.grpo(reward_R, group_R)
    decision = controller.decide(step=0, stats=stats, rollout_T=rollout_T, group_R=group_R, advantage_R=advantage_R)
    print(decision.reason)
    print("advantages", [round(a, 2) for a in advantage_R.tolist()], "kept", decision.keep_R.tolist())
    return decision.keep_R.tolist()


if __name__ == "__main__":
    main()
