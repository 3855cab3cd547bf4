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
    """Three questions, each asked once: the two above, and whether rows begin as the tokenizer begins a text.

    whole_teacher: loads the unquantised teacher; None where its quantisation is not to be measured. compare_sharing: whether the
    teacher may be run once more without sharing: not where it is sharded (all processes would have to at once) or where
    rows are packed. offload: the teacher waits in CPU memory. leading: the token that the tokenizer puts before a text, if any: its text and
    id.
    """

    def __init__(
        self,
        mode: Sharing,
        teacher: Teacher,
        *,
        whole_teacher: Callable[[], Teacher] | None,
        compare_sharing: bool,
        offload: bool = False,
        leading: tuple[str, int] | None = None,
    ) -> None:
        self.mode, self.teacher, self.offload, self.leading = mode, teacher, offload, leading
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
        self._look_at_the_beginning(inputs)
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

    def _look_at_the_beginning(self, inputs: dict[str, Any]) -> None:
        """LLaVA-1.5's chat template writes no <s>, TRL adds none, and transformers' processor does: a model trained without it is then asked
        with it."""
        if self.leading is None:
            return
        (text, token), self.leading = self.leading, None
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        first = torch.zeros_like(ids[:, 0]) if mask is None else mask.long().argmax(dim=1)
        if not (ids.gather(1, first[:, None]) == token).any():
            logger.warning(
                "No row begins with %s, which the tokenizer puts before a text: the chat template does not write it, and TRL adds nothing to "
                "what the template writes. transformers' processors add it when the model is asked. Write {{ bos_token }} into the chat "
                "template (chat_template_path) if both models have learned with it.",
                text,
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


def leading_token(processing: Any) -> tuple[str, int] | None:
    """The token that a tokenizer, or a processor's, puts before every text, as (text, id); None if it puts none."""
    tokenizer = getattr(processing, "tokenizer", processing)
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None or list(tokenizer("a")["input_ids"])[:1] != [token]:
        return None
    return str(tokenizer.bos_token), int(token)
