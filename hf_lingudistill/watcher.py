"""Whoever looks on at a step: the meter, the watch for what is not finite, the checks of the first batch."""

from __future__ import annotations

from typing import Any

import torch

from ._internals import Head
from .losses import Scores
from .queries import QueryPlan
from .student_kv import SharedKV


class Watcher:
    """Told about each batch, in this order. Override only the hooks you need."""

    def answered(self, shared: SharedKV, plan: QueryPlan, teacher_hidden: torch.Tensor) -> None:
        """The teacher has run; the student's keys and values are about to be dropped. teacher_hidden: (N, H_t), or (N,
        2, H_t)."""

    def scored(
        self, inputs: dict[str, Any], plan: QueryPlan, teacher_head: Head, scores: Scores, training: bool
    ) -> None:
        """The loss is known. inputs: the student's, with labels (B, T) and distill (B,)."""
