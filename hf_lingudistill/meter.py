"""What a run measures: token sums on the device, read once per log."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from ._internals import Head
from .losses import Scores
from .queries import QueryPlan
from .watcher import Watcher

logger = logging.getLogger(__name__)

# In this order, over tokens
_SUMS = (
    "labels",
    "ce",
    "candidates",
    "distilled",
    "kd",
    "teacher_ce",
    "student_ce",
    "agreement",
    "teacher_entropy",
    "anchored",
    "anchor_kl",
)


# Nats per token by which a frozen teacher's log must rise above its best before a warning
LED_ASTRAY = 1.0


class Meter(Watcher):
    """Sums over the tokens of all batches since the last log, for training and evaluation.

    The sums of an optimizer step join those of the log when the step is `accepted`: a step that is skipped leaves no trace.

    accelerator: reduces the sums over processes. distill_tokens: the config's, for a warning about a poor teacher; None
    where labels are the student's own samples. follows_student: whether what the teacher reads is trained, for a warning when it gets
    worse. joins_rows: whether a batch is one row made of several. remedies: what that warning names, of what is not set already.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        distill_tokens: str | None,
        follows_student: bool = False,
        joins_rows: bool = False,
        remedies: Sequence[str] = ("distill_tokens='confident'",),
    ) -> None:
        self.remedies = tuple(remedies)
        self.accelerator, self.distill_tokens, self.follows_student = accelerator, distill_tokens, follows_student
        self.joins_rows = joins_rows
        precision = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self._train = torch.zeros(len(_SUMS), dtype=precision, device=accelerator.device)
        self._step, self._eval = torch.zeros_like(self._train), torch.zeros_like(self._train)
        self.worse_teacher_warned = self.astray_warned = False
        self.best_teacher_ce: float | None = None

    def scored(
        self, inputs: dict[str, Any], plan: QueryPlan, teacher_head: Head, scores: Scores, training: bool
    ) -> None:
        """Count a batch, without reading anything back."""
        ce, chosen = scores.cross_entropy, scores.chosen
        N = chosen.numel()
        counted = torch.ones_like(ce) if training else self._counted(plan).to(ce)
        asked, others = counted[:N], counted[N:][: scores.anchored.numel()]
        sums = torch.stack(
            [
                counted.sum(),
                (ce * counted).sum(),
                asked.sum(),
                (chosen * asked).sum(),
                (scores.divergence * asked).sum(),
                -(scores.teacher_log_prob * asked).sum(),
                (ce[:N] * asked).sum(),
                (scores.agrees * asked).sum(),
                (scores.teacher_entropy * asked).sum(),
                (scores.anchored * others).sum(),
                (scores.anchor_kl * others).sum(),
            ]
        )
        (self._step if training else self._eval).add_(sums)

    def _counted(self, plan: QueryPlan) -> torch.Tensor:
        """(M,) whether each label counts in an evaluation. accelerate fills the last batch of uneven processes with rows that were there
        before; `gather_for_metrics` leaves them out by the same rule."""
        state = self.accelerator.gradient_state
        if (
            self.joins_rows
            or not state.end_of_dataloader
            or state.remainder <= 0
            or self.accelerator.num_processes == 1
        ):
            return torch.ones_like(plan.label_rows, dtype=torch.bool)
        real: torch.Tensor = plan.label_rows + self.accelerator.process_index * plan.batch < state.remainder
        return real

    def begin(self) -> None:
        """A training begins: what one before it has left, that was broken off, is not of it."""
        self._train.zero_()
        self._step.zero_()

    def accepted(self) -> None:
        """The step under way took place."""
        self._train += self._step
        self._step.zero_()

    def dropped(self) -> None:
        """The step under way was skipped."""
        self._step.zero_()

    def reset_evaluation(self) -> None:
        """Begin an evaluation: a prediction leaves sums that nothing reads."""
        self._eval.zero_()

    def read(self, *, training: bool) -> dict[str, float]:
        """Token means over all processes since the last reading; the sums start anew. Called by every process."""
        total = self._train if training else self._eval
        sums = dict(zip(_SUMS, self.accelerator.reduce(total, reduction="sum").tolist(), strict=True))
        total.zero_()
        if sums["labels"] == 0:
            return {}
        metrics = {
            "ce_loss": sums["ce"] / sums["labels"],
            "distilled_tokens": sums["distilled"],
            "answer_tokens": sums["labels"],
        }
        if sums["anchored"] > 0:
            metrics |= {"anchored_tokens": sums["anchored"], "anchor_kl": sums["anchor_kl"] / sums["anchored"]}
        if sums["distilled"] > 0:
            metrics["kd_loss"] = sums["kd"] / sums["distilled"]
        if sums["candidates"] > 0 and self.distill_tokens is None:
            # Of what the student says itself, every other model is the worse judge: that compares no teachers
            metrics["teacher_agreement"] = sums["agreement"] / sums["candidates"]
            metrics["teacher_entropy"] = sums["teacher_entropy"] / sums["candidates"]
        elif sums["candidates"] > 0:
            metrics |= {
                name: sums[total_name] / sums["candidates"]
                for name, total_name in (
                    ("teacher_ce", "teacher_ce"),
                    ("student_ce", "student_ce"),
                    ("teacher_agreement", "agreement"),
                    ("teacher_entropy", "teacher_entropy"),
                    ("confident_share", "distilled"),
                )
            }
            if training:
                self._warn_if_teacher_is_led_astray(metrics["teacher_ce"])
            self._warn_if_teacher_is_worse(metrics["teacher_ce"], metrics["student_ce"])
        return metrics

    def evaluated_ce(self) -> float | None:
        """Mean cross-entropy in nats per token of the evaluation under way, over all processes; the sums stay."""
        labels, ce = self.accelerator.reduce(self._eval[:2].clone(), reduction="sum").tolist()
        return ce / labels if labels else None

    def _warn_if_teacher_is_worse(self, teacher_ce: float, student_ce: float) -> None:
        # Not a few tenths: a student that was trained on such labels is better at them than the teacher that it needs
        if self.worse_teacher_warned or self.distill_tokens != "all" or teacher_ce <= student_ce + 0.5:
            return
        self.worse_teacher_warned = True
        logger.warning(
            "The teacher predicts the labels worse than the student (%.2f against %.2f nats per token): the divergence pulls the "
            "student towards a poorer model. `lingudistill diagnose` measures the pair; what may help: %s.",
            teacher_ce,
            student_ce,
            "; ".join(self.remedies),
        )

    def _warn_if_teacher_is_led_astray(self, teacher_ce: float) -> None:
        """A frozen teacher gets worse only by what it reads of the student: the student then learns its own drift back, faster and
        faster. More than a nat above its best reading: labels of one mixture differ by less."""
        best = self.best_teacher_ce = min(teacher_ce, self.best_teacher_ce or math.inf)
        if not self.follows_student or self.astray_warned or teacher_ce <= best + LED_ASTRAY:
            return
        self.astray_warned = True
        logger.warning(
            "The teacher predicts the labels worse than it did (%.2f nats per token, at best %.2f): it is frozen, so what it reads of the "
            "student has moved too far, and the student learns from it. Start again with kv_source='before', whose keys and values stand "
            "still, or with a lower learning_rate.",
            teacher_ce,
            best,
        )

    def total(self) -> torch.Tensor:
        """The training's sums as they are now, see `state`."""
        return self._train.clone()

    def state(self, total: torch.Tensor | None = None) -> dict[str, Any]:
        """What a checkpoint between two logs keeps. total: the sums of an earlier moment, in place of those of now."""
        return {
            "sums": (self._train if total is None else total).tolist(),
            "worse_teacher_warned": self.worse_teacher_warned,
            "astray_warned": self.astray_warned,
            "best_teacher_ce": self.best_teacher_ce,
        }

    def load(self, state: dict[str, Any]) -> None:
        """What `state` returned, in the run that resumes."""
        kept = torch.tensor(state["sums"], dtype=self._train.dtype)
        self._train[: len(kept)] = kept.to(self._train.device)  # a checkpoint of before the anchor has fewer
        self.worse_teacher_warned = state["worse_teacher_warned"]
        self.astray_warned = state.get("astray_warned", False)
        self.best_teacher_ce = state.get("best_teacher_ce")
