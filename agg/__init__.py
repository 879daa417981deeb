"""Adaptive Gradient Gating as a loss for any trainer (Yu et al., ACL 2022, arXiv 2109.03127)."""

from agg.vocab_shard import VocabShard

__all__ = ["VocabShard"]
