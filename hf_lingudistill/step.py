"""The step: one forward of the student, one pass of its teacher, one loss.

It takes the place of the student's forward where TRL calls it for the loss, because there DDP, FSDP and ZeRO see every use of the
student's head; any other call of the student is its own forward, untouched. Used by every trainer that distils.
"""

from __future__ import annotations

import functools
import types
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ._internals import FusedCausalLMOutput, head_of
from .anchor import Before
from .engines import SameModules, head_unsharded
from .losses import Anchor, Scores, Weights, score
from .queries import QueryPlan, plan_queries
from .router import ASK, routed, router_loss
from .sharing import Sharing
from .student_kv import SharedKV
from .teacher import Teacher, on_device
from .watcher import Watcher


@dataclass
class DistillStep:
    """Everything that turns a batch into a loss.

    offload: the teacher waits in CPU memory between steps. sharded: it lies in pieces on all processes, so that every one runs it in
    every step. same_modules: likewise for the student's vision tower (see `engines.py`). before: the VLM before, which judges the rows
    that are not marked; None = cross-entropy alone does. sampled: labels are the student's own samples (see `plan_queries`).
    """

    student: PreTrainedModel
    teacher: Teacher
    sharing: Sharing
    weights: Weights
    offload: bool = False
    sharded: bool = False
    same_modules: SameModules | None = None
    before: Before | None = None
    sampled: bool = False
    watchers: list[Watcher] = field(default_factory=list)

    def plan(self, batch: dict[str, Any]) -> QueryPlan:
        """The queries of a batch, from its `input_ids`, `labels`, `distill` and `attention_mask` (each (B, T), or (B,))."""
        plan: QueryPlan = plan_queries(
            batch["input_ids"],
            batch["labels"],
            batch.get("distill"),
            sharing=self.sharing,
            vocabulary=self.teacher.vocabulary,
            attention_mask=batch.get("attention_mask"),
            at_least_one=self.sharded,
            any_label=self.sampled,
        )
        return plan

    def install(self) -> None:
        """Let the student's forward be this step where it is called with `fused_lm_head=True` and labels, as TRL does for its
        loss."""
        student, before = self.student, self.student.forward

        # Keep the original signature: `generate` validates its arguments against it
        @functools.wraps(type(student).forward)
        def forward(_: PreTrainedModel, *args: Any, distill: Any = None, queries: Any = None, **kwargs: Any) -> Any:
            if distill is None or not kwargs.get("fused_lm_head"):
                return before(*args, **kwargs)
            kwargs |= {"distill": distill, "queries": queries, "use_cache": False}
            del kwargs["fused_lm_head"]
            with head_unsharded(student):
                return self(kwargs)

        student.forward = types.MethodType(forward, student)

    # Not traced itself, its callees are: the record of K/V is a side effect
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, inputs: dict[str, Any]) -> FusedCausalLMOutput:
        """One batch, from the student's inputs to the summed loss of its labelled tokens.

        inputs: the student's own, with labels (B, T), distill (B,) bool, and queries, the batch's plan or None.
        """
        training, device = self.student.training, inputs["input_ids"].device
        plan: QueryPlan = (inputs.get("queries") or self.plan(inputs)).to(device)
        plan.check(inputs["labels"], inputs["distill"])

        anchor = self._anchor(inputs, plan)  # first, while the student's activations do not take memory yet
        asked = plan.num_queries > 0
        recording = self.sharing.recording(self.student) if asked else nullcontext(SharedKV())
        with recording as shared, routed(self.student, asked=bool(inputs.get(ASK))) as router_logits:
            backbone = self._backbone(inputs)
        with on_device(self.teacher, device, offload=self.offload) as teacher_head:
            teacher_hidden = self.sharing.teacher_pass(self.teacher.model, shared, plan)
        for watcher in self.watchers:
            watcher.answered(shared, plan, teacher_hidden)
        shared.release()  # before the backward pass, and before the logits

        rows, positions = plan.label_rows, plan.label_positions
        labels = inputs["labels"][rows, positions + 1]
        hidden = backbone.last_hidden_state.flatten(0, 1).index_select(0, rows * plan.length + positions)  # (M, H_s)
        student_head, teacher_head = head_of(self.student).whole(), teacher_head.whole()
        if student_head.weight is None:  # an adapter on the head: whatever it does, it does itself
            hidden = self.student.get_output_embeddings()(hidden)
        scores = score(
            hidden,
            student_head,
            labels,
            teacher_hidden,
            teacher_head,
            self.weights,
            marked=inputs["distill"][plan.loss_rows],
            anchor=anchor,
        )
        for watcher in self.watchers:
            watcher.scored(inputs, plan, teacher_head, scores, training)
        return self._output(scores, labels, router_loss(self.student, router_logits, inputs.get("attention_mask")))

    def _anchor(self, inputs: dict[str, Any], plan: QueryPlan) -> Anchor | None:
        """What the VLM before says of the rows that are not marked; None where nobody asks, or where there are none."""
        if self.before is None or not plan.has_unmarked_labels:
            return None
        hidden, head = self.before.answers(_own(inputs), plan.other_rows, plan.other_positions)
        return Anchor(hidden, head, ~inputs["distill"].bool()[plan.other_rows])

    def _backbone(self, inputs: dict[str, Any]) -> Any:
        """The student without its head. -> its output, `last_hidden_state` (B, T, H_s) with gradient."""
        own = _own(inputs)
        with nullcontext() if self.same_modules is None else self.same_modules.for_batch(own):
            return self.student.base_model(**own)

    @staticmethod
    def _output(scores: Scores, labels: torch.Tensor, aux_loss: torch.Tensor | None) -> FusedCausalLMOutput:
        """What TRL's `compute_loss` reads: it sums `-log_probs` and divides by the number of labels in the global batch. The summed
        loss has to bear that name; the metrics bear their own."""
        return FusedCausalLMOutput(
            loss=scores.total,
            log_probs=-scores.total,
            entropy=scores.entropy,
            is_top1=scores.is_top1,
            label_mask=labels != -100,
            aux_loss=aux_loss,
        )


def _own(inputs: dict[str, Any]) -> dict[str, Any]:
    """The student's own inputs, without what belongs to the step."""
    return {name: value for name, value in inputs.items() if name not in ("labels", "distill", "queries", ASK)}
