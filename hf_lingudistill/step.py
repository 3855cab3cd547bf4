"""The step: one forward of the student, one pass of its teacher, one loss.

It takes the place of the student's forward where TRL calls it for the loss, because there DDP, FSDP and ZeRO see every use of the
student's head; any other call of the student is its own forward, untouched. Used by every trainer that distils.
"""

from __future__ import annotations

import functools
import types
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ._internals import FusedCausalLMOutput, Head, head_of
from .anchor import Before, can_be_cut, first_columns
from .cached import CachedAnswers
from .engines import SameModules, head_unsharded
from .eyes import Eyes, Seen
from .losses import Anchor, Scores, Weights, score
from .queries import Planner, QueryPlan
from .router import ASK, routed, router_loss
from .sharing import MODES, Sharing
from .student_kv import SharedKV, recording
from .teacher import Teacher, on_device
from .watcher import Watcher

# How the teacher reads an answer about a picture a second time
BLIND = MODES["none"]
_OF_THE_STEP = ("labels", "distill", "queries", "cached", ASK)


@dataclass
class DistillStep:
    """Everything that turns a batch into a loss.

    offload: the teacher waits in CPU memory between steps. sharded: it lies in pieces on all processes, so that every one runs it in
    every step. same_modules: likewise for the student's vision tower (see `engines.py`). judge: the VLM before, where it judges
    the rows that are not marked; None = cross-entropy alone does. source: the VLM before, where the teacher reads its keys and values;
    None = the student's. lends: whether its first columns do (`Before.can_lend`), None before the first batch that asks. eyes: what lets it
    and the student look at a picture once (`eyes.py`). compiled: the student's forward is, and each looks for itself: what stands in the place
    of a method for a while would be traced anew in every step. sampled: labels
    are the student's own samples (see `plan_queries`). calls: how often the student's forward was this step.
    """

    student: PreTrainedModel
    teacher: Teacher
    sharing: Sharing
    weights: Weights
    offload: bool = False
    sharded: bool = False
    same_modules: SameModules | None = None
    judge: Before | None = None
    source: Before | None = None
    lends: bool | None = None
    eyes: Eyes | None = None
    compiled: bool = False
    sampled: bool = False
    watchers: list[Watcher] = field(default_factory=list)
    calls: int = 0

    @property
    def planner(self) -> Planner:
        """What says where the teacher is asked about a batch."""
        return Planner(
            self.sharing,
            self.teacher.vocabulary,
            at_least_one=self.sharded,
            any_label=self.sampled,
            blind=BLIND if self.weights.blind > 0.0 else None,
        )

    def install(self) -> None:
        """Let the student's forward be this step where it is called with `fused_lm_head=True` and labels, as TRL does for its
        loss.

        The student does not keep the step: once its trainer is gone, so are the teacher and the VLM before.
        """
        student = self.student
        before = getattr(student.forward, "before_the_step", student.forward)  # of a trainer that was there first
        alive = weakref.ref(self)

        # Keep the original signature: `generate` validates its arguments against it
        @functools.wraps(type(student).forward)
        def forward(
            model: PreTrainedModel,
            *args: Any,
            distill: Any = None,
            queries: Any = None,
            cached: Any = None,
            **kwargs: Any,
        ) -> Any:
            if model is not student:  # a deep copy takes this along, and is a model of its own
                return type(model).forward(model, *args, **kwargs)
            step = alive()
            if step is None or distill is None or not kwargs.get("fused_lm_head"):
                return before(*args, **kwargs)
            kwargs |= {"distill": distill, "queries": queries, "cached": cached, "use_cache": False}
            del kwargs["fused_lm_head"]
            with head_unsharded(student):
                return step.answer(kwargs)

        forward.before_the_step = before  # type: ignore[attr-defined]
        student.forward = types.MethodType(forward, student)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def answer(self, inputs: dict[str, Any]) -> FusedCausalLMOutput:
        """The step, counted: its trainer asks whether it was this one that answered."""
        self.calls += 1
        output: FusedCausalLMOutput = self(inputs)
        return output

    # Not traced itself, its callees are: the record of K/V is a side effect
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, inputs: dict[str, Any]) -> FusedCausalLMOutput:
        """One batch, from the student's inputs to the summed loss of its labelled tokens.

        inputs: the student's own, with labels (B, T), distill (B,) bool, queries, the batch's plan or None, and cached, what was computed
        of it before training, or None.
        """
        training, device = self.student.training, inputs["input_ids"].device
        plan: QueryPlan = (inputs.get("queries") or self.planner(inputs)).to(device)
        plan.check(inputs["labels"], inputs["distill"])
        cached: CachedAnswers = (inputs.get("cached") or CachedAnswers()).to(device)
        queries = cached.live or plan

        seen = self._seen(inputs, plan, queries)
        columns = self._columns(inputs, plan, queries, seen)
        # First, while the student's activations take no memory; not where a few columns do, which need the student's masks
        anchor, shared = self._before(inputs, plan, queries, seen) if columns is None else (None, None)
        if shared is not None:
            taught, teacher_head = self._teach(shared, queries)
            backbone, router_logits = self._backbone(inputs, seen)
        else:
            with self._recording(queries, lent=columns is not None) as shared:
                backbone, router_logits = self._backbone(inputs, seen)
            if columns and self.source is not None:
                with self._sight(seen, first_columns(own_inputs(inputs), columns)):
                    self.source.lend(shared, own_inputs(inputs), columns)
            taught, teacher_head = self._teach(shared, queries)
        teacher_hidden = cached.with_live(taught)

        rows, positions = plan.label_rows, plan.label_positions
        labels = inputs["labels"][rows, positions + 1]
        hidden = backbone.last_hidden_state.flatten(0, 1).index_select(0, rows * plan.length + positions)  # (M, H_s)
        student_head = head_of(self.student).whole()
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
            anchor=cached.as_anchor() or anchor,
        )
        for watcher in self.watchers:
            watcher.scored(inputs, plan, teacher_head, scores, training)
        return self._output(scores, labels, router_loss(self.student, router_logits, inputs.get("attention_mask")))

    def _recording(self, queries: QueryPlan, *, lent: bool) -> AbstractContextManager[SharedKV]:
        """Of the student's forward. lent: keys and values are another's."""
        if lent:
            return recording(self.student, keep_kv=False)
        return self.sharing.recording(self.student) if queries.num_queries > 0 else nullcontext(SharedKV())

    def _columns(self, inputs: dict[str, Any], plan: QueryPlan, queries: QueryPlan, seen: Seen | None) -> int | None:
        """How many columns of the VLM before are enough for the teacher, 0 where it reads none of them; None where the VLM before runs
        over whole rows, or is not asked. seen: where image features are shared; then the student's own come first, whatever is left to
        cut."""
        if (
            self.source is None
            or self.source.sharded
            or not queries.num_queries
            or not self.sharing.records_kv
            or self.sharing.records_inputs
        ):
            return None
        columns = queries.columns_read
        if (columns > 0.9 * plan.length and seen is None) or (self.judge is not None and plan.has_unmarked_labels):
            return None
        if columns and self.lends is None and queries.num_queries > 1:  # a text of one token has nothing to cut
            text = inputs["input_ids"][queries.rows[:16], queries.positions[:16]][None]
            self.lends = self.source.can_lend(own_inputs(inputs), columns, text)
        return columns if not columns or (self.lends and can_be_cut(own_inputs(inputs))) else None

    def _seen(self, inputs: dict[str, Any], plan: QueryPlan, queries: QueryPlan) -> Seen | None:
        """Where the batch's image features are kept, for whichever of the student and the VLM before comes second; None where each looks
        for itself, or where the VLM before is not asked about pictures."""
        judges = self.judge is not None and plan.has_unmarked_labels
        asked = self.judge if judges else self.source if queries.num_queries else None
        if asked is None or asked.sharded or self.compiled or inputs.get("pixel_values") is None:
            return None
        if self.eyes is None:
            self.eyes = Eyes(self.student, asked)
        return self.eyes.open()

    def _sight(self, seen: Seen | None, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Around the forward of the VLM before on these inputs."""
        return nullcontext() if self.eyes is None else self.eyes.of_before(seen, inputs)

    def _before(
        self, inputs: dict[str, Any], plan: QueryPlan, queries: QueryPlan, seen: Seen | None
    ) -> tuple[Anchor | None, SharedKV | None]:
        """What the VLM before says of the rows that are not marked, and what the teacher reads of it; None where nobody asks, or where
        there is nothing to ask, unless it lies in pieces: then it is asked in any case."""
        judge, source = self.judge, self.source
        asked = judge or source
        if asked is None:
            return None, None
        if not asked.sharded:
            judge, source = judge if plan.has_unmarked_labels else None, source if queries.num_queries > 0 else None
            if judge is None and source is None:
                return None, None
        sharing = None if source is None else self.sharing
        with self._sight(seen, own_inputs(inputs)):
            hidden, head, shared = asked.look(own_inputs(inputs), plan.other_rows, plan.other_positions, sharing)
        anchor = Anchor(hidden, head, ~inputs["distill"].bool()[plan.other_rows]) if judge is not None else None
        return anchor, None if source is None else shared

    def _teach(self, shared: SharedKV, plan: QueryPlan) -> tuple[torch.Tensor, Head]:
        """The teacher's hidden states at the loss positions, (N, H_t), or (N, 2, H_t) where it reads some twice, and its head; the record
        is dropped, before the backward pass and before the logits."""
        with on_device(self.teacher, plan.label_rows.device, offload=self.offload) as head:
            hidden = ask_teacher(self.sharing, self.teacher.model, shared, plan)
        for watcher in self.watchers:
            watcher.answered(shared, plan, hidden)
        shared.release()
        return hidden, head.whole()

    def _backbone(self, inputs: dict[str, Any], seen: Seen | None = None) -> tuple[Any, list[torch.Tensor]]:
        """The student without its head. -> its output, `last_hidden_state` (B, T, H_s) with gradient, and its router's logits."""
        own = own_inputs(inputs)
        with (
            nullcontext() if self.same_modules is None else self.same_modules.for_batch(own),
            nullcontext() if self.eyes is None else self.eyes.of_student(seen),
            routed(self.student, asked=bool(inputs.get(ASK))) as router_logits,
        ):
            return self.student.base_model(**own), router_logits

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


def ask_teacher(sharing: Sharing, teacher: PreTrainedModel, shared: SharedKV, plan: QueryPlan) -> torch.Tensor:
    """What a teacher says at the plan's loss positions, as hidden states: (N, H_t); with a blind reading (N, 2, H_t), where rows without
    an image have one reading twice."""
    hidden = sharing.teacher_pass(teacher, shared, plan)
    if plan.blind is None or plan.blind_loss is None:
        return hidden
    alone = BLIND.teacher_pass(teacher, SharedKV(), plan.blind)
    return torch.stack([hidden, hidden.index_copy(0, plan.blind_loss, alone.to(hidden.dtype))], dim=1)


def own_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The student's own inputs, without what belongs to the step."""
    return {name: value for name, value in inputs.items() if name not in _OF_THE_STEP}
