"""Methods in a state in which each acts, with constants by which it finds tokens to act on in a small batch."""

from entrocraft.methods import State

STATES: dict[str, State] = {
    "adaptive_bonus": {"used": 0.2},
    "aent": {"coefficient": 0.2},
    "entropic": {"alpha": 0.5},
    "entropic_parity": {"alpha": 0.5},
    "repo_r": {"zeta": 0.03},
    "polarity": {"phase": 0.7},
    "adaptive_clip": {"clip_high": 0.1},
    "flexible_clip": {"upper_share": 0.4, "lower_share": 0.7},
}
OPTIONS: dict[str, dict[str, float]] = {
    "entropy_bonus": {"coefficient": 0.3},
    "entropic": {"threshold": 0.2},
    "clip_cov": {"fraction": 0.1, "lower": 0.05},
    "kl_cov": {"fraction": 0.2},
    "clip_b": {"mu": 0.3},
    "clip_v": {"mu": 1.0, "most": 0.1},
}
