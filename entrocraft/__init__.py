"""Entropy control for RL of language models: schedules, predicted entropy change, rejection rules, controller."""

from entrocraft import advantages, bands, losses, rules, schedules
from entrocraft.bands import Band
from entrocraft.controller import EntropyController, EntropyScheduleWarning
from entrocraft.decision import Decision
from entrocraft.kernels.token_stats import TokenStats
from entrocraft.losses import PPOClip, token_weights
from entrocraft.objective import PolicyObjective
from entrocraft.policy_losses import CISPO, GSPO
from entrocraft.prediction import entropy_discriminator, predicted_entropy_change
from entrocraft.rollouts import Rollouts

__all__ = [
    "CISPO", "GSPO", "Band", "Decision", "EntropyController", "EntropyScheduleWarning", "PPOClip", "PolicyObjective",
    "Rollouts", "TokenStats", "advantages", "bands", "entropy_discriminator", "losses", "predicted_entropy_change",
    "rules", "schedules", "token_weights",
]  # fmt: skip
