"""What is measured once, on the first batches: what quantisation costs the teacher, and whether sharing makes it worse."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ._internals import Head
from .losses import Scores, divergence, label_nll
from .queries import QueryPlan, plan_queries
from .sharing import Sharing, sharing
from .student_kv import SharedKV
from .teacher import Teacher, on_device
from .watcher import Watcher

logger = logging.getLogger(__name__)

# After so many batches without a text-only row there are none to compare on, and nobody looks any further
DEADLINE = 64


class FirstBatch(Watcher):
    """Two questions, each asked once.

    whole_teacher: loads the unquantised teacher; None where its quantisation is not to be measured. compare_sharing: whether the
    teacher may be run once more without sharing: not where it is sharded (all processes would have to at once) or where
    rows are packed. offload: the teacher waits in CPU memory.
    """

    def __init__(
        self,
        mode: Sharing,
        teacher: Teacher,
        *,
        whole_teacher: Callable[[], Teacher] | None,
        compare_sharing: bool,
        offload: bool = False,
    ) -> None:
        self.mode, self.teacher, self.offload = mode, teacher, offload
        self.whole_teacher = whole_teacher
        self.quantization_kl: float | None = None
        self.quantization_measured = whole_teacher is None
        self.ce_unshared: float | None = None
        self.batches_to_compare = DEADLINE if compare_sharing and mode.reads_student else 0

    @torch.no_grad()
    def answered(self, shared: SharedKV, plan: QueryPlan, teacher_hidden: torch.Tensor) -> None:
        """Mean KL(full-precision teacher || quantised teacher) in nats, while the student's K/V are still there.

        teacher_hidden: (N, H_t) of the quantised teacher, or (N, 2, H_t), whose second reading is left aside.
        """
        if self.quantization_measured or self.whole_teacher is None or not plan.num_loss:
            return
        self.quantization_measured = True
        whole = self.whole_teacher()
        first = teacher_hidden if teacher_hidden.dim() == 2 else teacher_hidden[:, 0]
        kl = divergence(first, self.teacher.head, self.mode.teacher_pass(whole.model, shared, plan), whole.head)
        self.quantization_kl = float(kl.mean())
        logger.info("KL(full-precision teacher || quantised teacher) = %.4f nats per token", self.quantization_kl)

    @torch.no_grad()
    def scored(
        self, inputs: dict[str, Any], plan: QueryPlan, teacher_head: Head, scores: Scores, training: bool
    ) -> None:
        """Does the student's K/V make its teacher worse? On the first batch with text-only rows to distil.

        A student whose language has collapsed drags the teacher that reads it along, and then learns its own collapse back.
        The teacher is still better than such a student, so that `teacher_ce` against `student_ce` does not show it; the same
        teacher without sharing does.
        """
        if not self.batches_to_compare:
            return
        self.batches_to_compare -= 1
        if not plan.has_text_loss:
            return
        self.batches_to_compare = 0
        labels, text_only = inputs["labels"], plan.text_only.to(inputs["labels"].device)
        alone = plan_queries(
            inputs["input_ids"],
            labels,
            inputs["distill"] & text_only,
            sharing=sharing("none"),
            vocabulary=self.teacher.vocabulary,
            attention_mask=inputs.get("attention_mask"),
        )
        if not alone.num_loss:
            return
        with on_device(self.teacher, labels.device, offload=self.offload):
            hidden = sharing("none").teacher_pass(self.teacher.model, SharedKV(), alone)
        wanted = labels[alone.loss_rows, alone.loss_positions + 1]
        self.ce_unshared = float(label_nll(hidden, teacher_head, wanted).mean())
        shared_ce = float(-scores.teacher_log_prob[text_only[plan.loss_rows]].mean())
        if shared_ce > self.ce_unshared + 0.5:
            logger.warning(
                "Reading the student's keys and values makes the teacher worse (%.2f against %.2f nats per token without, on the "
                "text rows of the first batch): the student's language has drifted so far that it misleads its teacher, and "
                "the divergence alone would teach it its own collapse. Use kv_sharing='vision' or 'none', or keep ce_weight "
                "above 0.",
                shared_ce,
                self.ce_unshared,
            )

    def state(self) -> dict[str, Any]:
        """What a resumed run must not measure again."""
        return {
            "quantization_kl": self.quantization_kl,
            "quantization_measured": self.quantization_measured,
            "ce_unshared": self.ce_unshared,
            "batches_to_compare": self.batches_to_compare,
        }

    def load(self, state: dict[str, Any]) -> None:
        """What `state` returned."""
        for name, value in state.items():
            setattr(self, name, value)
