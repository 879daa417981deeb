"""Adaptive Gradient Gating as a loss for any trainer (Yu et al., ACL 2022, arXiv 2109.03127)."""

from agg.decayed_frequency import DecayedTokenFrequency
from agg.frequency import TokenFrequency
from agg.gating import Gates, alpha_of_rare_fraction, rarity_gates
from agg.linear_cross_entropy import gated_linear_cross_entropy
from agg.module import AdaptiveGradientGating
from agg.probe import GatedShare, LossProbe
from agg.reference import reference_gated_cross_entropy
from agg.vocab_shard import VocabShard

__all__ = [
    "AdaptiveGradientGating",
    "DecayedTokenFrequency",
    "GatedShare",
    "Gates",
    "LossProbe",
    "TokenFrequency",
    "VocabShard",
    "alpha_of_rare_fraction",
    "gated_linear_cross_entropy",
    "rarity_gates",
    "reference_gated_cross_entropy",
]
