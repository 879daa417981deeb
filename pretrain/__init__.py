"""Pretraining of language models whose rare tokens stay alive."""

__version__ = "0.1.0"
