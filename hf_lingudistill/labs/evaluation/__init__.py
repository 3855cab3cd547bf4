"""Evaluation: how much language was lost, how much came back, at what cost to vision. `evaluate_models` is the entry."""

from .run import evaluate_models
from .suite import Suite, load_suite

__all__ = ["Suite", "evaluate_models", "load_suite"]
