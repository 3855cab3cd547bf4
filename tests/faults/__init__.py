"""The faults of `planted_faults.py`: one line of the core each, and the tests that must find it. One module per part of a step."""

from __future__ import annotations

from . import caches, data, given, keys_and_values, losses, measures, plan, saving, step, teacher
from .fault import Fault

__all__ = ["FAULTS", "Fault"]

FAULTS = tuple(
    fault
    for part in (plan, keys_and_values, losses, step, teacher, data, saving, caches, measures, given)
    for fault in part.FAULTS
)
