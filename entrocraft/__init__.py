"""Entropy control for RL of language models: schedules, predicted entropy change, rejection rules, controller."""

from entrocraft import advantages, bands, losses, methods, rules, schedules, surrogates
from entrocraft.bands import Band
from entrocraft.controller import EntropyController, EntropyScheduleWarning
from entrocraft.decision import Decision
from entrocraft.importance import ImportanceWeights
from entrocraft.kernels.token_stats import TokenStats
from entrocraft.kl import kl
from entrocraft.losses import PPOClip, token_weights
from entrocraft.methods import Signal, Tokens, make_objective
from entrocraft.objective import PolicyObjective
from entrocraft.overlong import handle_truncated, overlong_penalty
from entrocraft.peak_keeper import PeakKeeper
from entrocraft.policy_losses import CISPO, GSPO
from entrocraft.prediction import entropy_discriminator, predicted_entropy_change
from entrocraft.rollouts import Rollouts
from entrocraft.surrogates import GPG, SAPO, GeoMean
from entrocraft.theorem import theorem_condition
from entrocraft.waves import Waves

__all__ = [
    "CISPO", "GPG", "GSPO", "SAPO", "Band", "Decision", "EntropyController", "EntropyScheduleWarning", "GeoMean",
    "ImportanceWeights", "PPOClip", "PeakKeeper", "PolicyObjective", "Rollouts", "Signal", "TokenStats", "Tokens",
    "Waves", "advantages", "bands", "entropy_discriminator", "handle_truncated", "kl", "losses", "make_objective",
    "methods", "overlong_penalty", "predicted_entropy_change", "rules", "schedules", "surrogates", "theorem_condition",
    "token_weights",
]  # fmt: skip
