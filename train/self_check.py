"""The fused op against plain logits, while training: a few tokens of one rollout a rank, every so many steps.

Both see the same hidden rows and weights; the op's numbers come as they are, neither clamped to log p <= 0 nor to
0 <= H <= log V, so that nothing hides an error of the kind that such bounds would. A kernel that is wrong for a shape
or a driver makes wrong gradients long before it makes NaN; this finds it in the first step that is checked.
"""

from dataclasses import replace

import torch

from entrocraft import Rollouts, TokenStats
from entrocraft.train.errors import TrainingStopped
from entrocraft.train.packing import MicroBatch, pack
from entrocraft.train.run import Run

_NAMES = ("logprob_T", "entropy_T", "lse_T", "p2_T", "p2logp_T")


def due(step: int, every: int) -> bool:
    """Whether a step is checked: the first one, and each `every`-th after it; a function of the step alone."""
    return every > 0 and (step - 1) % every == 0


def some_rows(rollouts: Rollouts, chosen: int, count: int) -> MicroBatch:
    """One rollout by itself, of whose response tokens at most `count` are asked for, spread evenly from first to
    last."""
    (batch,) = pack(rollouts, [chosen], 1 << 60)
    n = len(batch.token_N)
    picked = torch.linspace(0, n - 1, min(count, n)).round().long()
    return replace(batch, source_N=batch.source_N[picked], token_N=batch.token_N[picked])


def differences(fused: TokenStats, reference: TokenStats) -> dict[str, float]:
    """Largest absolute difference of each statistic; infinite where only one of the two is a number."""
    found = {}
    for name in _NAMES:
        a, b = getattr(fused, name).double().cpu(), getattr(reference, name).double().cpu()
        apart = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        found[name] = float(apart.max())
    return found


def self_check(run: Run, rollouts: Rollouts) -> dict[str, float]:
    """Checks a few tokens if the present step is due; returns the largest difference, a metric, or nothing.

    All ranks call it together, each with a rollout of its own. Raises TrainingStopped, on all, when one finds a
    difference beyond `self_check.tolerance`: nothing has been learnt from this step yet.
    """
    config, ranks = run.config.self_check, run.ranks
    if not due(run.step, config.every):
        return {}
    run.policy.model.eval()
    chosen = (run.step * ranks.size + ranks.rank) % rollouts.R
    batch = some_rows(rollouts, chosen, config.rows)
    found = ranks.gather(differences(*run.policy.stats_and_reference(batch, rollouts.token_T)))
    worst = {name: max(part[name] for part in found) for name in _NAMES}
    name = max(worst, key=worst.__getitem__)
    if not worst[name] <= config.tolerance:
        raise TrainingStopped(
            f"self-check of step {run.step}: the fused head gives {name.removesuffix('_T')} that differs by "
            f"{worst[name]:.3g} from that of plain logits (self_check.tolerance = {config.tolerance:g}), so what would "
            f"be learnt is wrong. All differences: {', '.join(f'{n[:-2]} {v:.2g}' for n, v in worst.items())}. Run "
            "`entrocraft doctor`, and report it with versions and device; the newest checkpoint is of a checked past"
        )
    return {"self_check": worst[name]}
