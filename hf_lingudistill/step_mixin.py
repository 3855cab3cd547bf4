"""A distilling trainer's step: made with its teacher and those who look on, judged before the optimizer, measured; as a mixin."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from ._internals import keep_image_dtype
from .anchor import Before, make_before
from .bad_rows import BadRow
from .engines import SameModules, blank_image, sharding_of
from .finite import FiniteWatch, StepPolicy
from .first_batch import FirstBatch, leading_token
from .losses import Weights
from .meter import Meter
from .opening import eval_name
from .quantization import arithmetic_of, choose_kernels
from .sharing import sharing
from .step import DistillStep
from .teacher import Teacher, compute_dtype_of
from .teacher_mixin import TeacherMixin, is_quantised
from .vision import adapted, freeze_vision, thaw_vision

logger = logging.getLogger(__name__)

# The step is made of these, and of their values at that time
MADE_OF = (
    *("kv_sharing", "kv_source", "anchor", "distill_tokens", "distill_margin"),
    *("ce_weight", "distill_weight", "anchor_weight", "blind_weight", "beta", "temperature", "on_nan"),
    *("freeze_vision", "distill_column", "answers_only", "completion_only_loss", "max_length", "skip_bad_rows"),
    *("anchor_cache", "anchor_cache_k", "teacher_cache", "teacher_offload", "teacher_quantization"),
)


class StepMixin(TeacherMixin):
    """A trainer whose loss is a `DistillStep`. Mixed in before a trainer class of TRL's, on whose `_metrics` it relies.

    `before_init` goes before its `__init__`, `prepare_step` after it; `begin_batch` and `end_batch` around the loss.

    Attributes:
        step: the step. teacher, before: its frozen models. meter, policy, first_batch: those who look on.
        decided: `freeze_vision` and `kv_source` as they are in this run, whose options may leave them to the pair.
        has_distill_column, distill_share: what is known of the rows' marks.
    """

    meter: Meter
    policy: StepPolicy
    teacher_arithmetic: str | None
    has_distill_column: bool | None
    distill_share: float | None
    decided: dict[str, Any]
    # An evaluation set that is given when the trainer is made already, as the trainer class takes it
    open_later: Callable[[Any], Any]
    _made_of: dict[str, Any]
    _step_at_work: int | None = None
    _is_opened = False  # what `evaluate` is given: transformers evaluates several sets by calling it for each
    _evaluated = "eval"  # the evaluation set at work, as transformers names it: `eval`, or `eval_NAME`

    def prepare_step(self, weights: Weights, *, sampled: bool = False) -> None:
        """Make the step, and check that the pair can share.

        Args:
            weights: of the loss. sampled: labels are the student's own samples.

        Raises:
            ValueError: if the engine, the pair, or the VLM before cannot be had as the options ask.
        """
        args = self.args
        if self.is_deepspeed_enabled and args.on_nan == "skip":
            raise ValueError(
                "on_nan='skip' cannot be held under DeepSpeed, whose backward pass ends with the step: use on_nan='stop'."
            )
        student = self._plain_student()
        # Kept here and not in `args`, which may be another trainer's as well
        self.decided = {"freeze_vision": args.freeze_vision, "kv_source": args.kv_source}
        if args.freeze_vision is None:
            self.decided["freeze_vision"] = adapted(student) is None
        if self.decided["freeze_vision"]:
            freeze_vision(student)
            logger.info("Vision tower and projector stay as they are (freeze_vision)")
        elif adapted(student) is None and not is_peft_model(self.model) and not thaw_vision(student):
            logger.warning(
                "freeze_vision=False, and the vision tower and projector stay as they are: their requires_grad is False. Set it to True for "
                "what is to be trained."
            )
        choose_kernels(student, trained=True)
        keep_image_dtype(student)
        self._compute_dtype = compute_dtype_of(student, bf16=bool(args.bf16), fp16=args.fp16)
        self.step = self._make_step(student, weights, sampled=sampled)
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.teacher_arithmetic = arithmetic_of(self.teacher.model, autocast=autocast)
        logger.info(
            "Teacher %s (%s, computed in %s): %.1f MiB",
            self.teacher_title,
            args.teacher_quantization,
            self.teacher_arithmetic,
            self.teacher.footprint / 2**20,
        )
        self._check_pair(student)
        self._made_of = self._asked_now()

    def _asked_now(self) -> dict[str, Any]:
        return {name: getattr(self.args, name) for name in MADE_OF if hasattr(self.args, name)}

    def _make_step(self, student: PreTrainedModel, weights: Weights, *, sampled: bool) -> DistillStep:
        """The step and those who look on at it: `meter`, `policy`, `first_batch`."""
        args, mode, accelerator = self.args, sharing(self.args.kv_sharing), self.accelerator
        is_sharded, offload = self._is_teacher_sharded(), args.teacher_offload == "cpu"
        self.teacher: Teacher = self._make_teacher(student, shard=is_sharded, offload=offload)
        mode.check(student, self.teacher.model)
        offload = offload and not is_sharded  # a sharded teacher's pieces come to the device by themselves
        self.before = self._make_before(student, sampled=sampled)
        packed = bool(getattr(args, "packing", False) or getattr(args, "padding_free", False))
        measured, quantised = args.measure_teacher_quantization, is_quantised(self.teacher.model)
        self.meter = Meter(
            accelerator,
            distill_tokens=None if sampled else args.distill_tokens,
            # Of samples, the teacher's loss says as much about the student as about the teacher
            follows_student=mode.reads_student and self.decided["kv_source"] == "student" and not sampled,
            joins_rows=packed,
            remedies=_remedies(args),
        )
        watch = FiniteWatch(accelerator, getattr(self.processing_class, "tokenizer", self.processing_class))
        self.policy = StepPolicy(watch, args.on_nan)
        self.first_batch = FirstBatch(
            mode,
            self.teacher,
            whole_teacher=self._whole_teacher if measured and quantised else None,
            # An extra pass of a sharded teacher would have to be made by all processes at once; packed rows cannot be compacted
            compare_sharing=not (is_sharded or packed or sampled or args.teacher_cache),
            offload=offload,
            leading=leading_token(self.processing_class),
        )
        if measured and not quantised:
            self.first_batch.quantization_kl = 0.0
        judged = args.anchor == "before" and not args.anchor_cache and not (sampled and self._lm_judges_all)
        return DistillStep(
            student,
            self.teacher,
            mode,
            weights,
            offload=offload,
            sharded=is_sharded,
            judge=self.before if judged else None,
            source=self.before if self.decided["kv_source"] == "before" and not args.teacher_cache else None,
            compiled=bool(args.torch_compile),
            sampled=sampled,
            watchers=[self.meter, watch, self.first_batch],
        )

    @property
    def _all_marked(self) -> bool:
        return self.has_distill_column is False or self.distill_share == 1.0

    @property
    def _lm_judges_all(self) -> bool:
        """On-policy: whether neither training nor evaluation has rows that are left to the VLM before."""
        return self._all_marked and all_marked(self.eval_dataset, self.args.distill_column)

    def _make_before(self, student: PreTrainedModel, *, sampled: bool) -> Before | None:
        """The VLM before, where `anchor` or `kv_source` asks for it."""
        args = self.args
        asking = [name for name in ("kv_source", "anchor") if getattr(args, name) == "before"]
        if sampled and self._lm_judges_all and "anchor" in asking:
            asking.remove("anchor")  # there it is the default, for whatever rows are not marked
        if self._all_marked and "anchor" in asking and not sampled:
            logger.warning(
                "anchor='before' changes nothing: it judges rows that are marked false, and there are none."
            )
        if "kv_source" in asking and args.teacher_cache and args.kv_source_left_out:
            try:  # asked before training alone
                self._before_of(student, asked_by="kv_source", kept=False)
            except ValueError as error:
                self._give_way(error)
                asking.remove("kv_source")
        # What is computed before training asks the student itself (`cache_mixin.py`)
        asking = [name for name in asking if not (args.anchor_cache if name == "anchor" else args.teacher_cache)]
        if not asking:
            return None
        try:
            before = self._before_of(student, asked_by=asking[0], speaks="anchor" in asking)
        except ValueError as error:
            if asking != ["kv_source"] or not args.kv_source_left_out:
                raise
            self._give_way(error)
            return None
        logger.info("The VLM before (%s): %.1f MiB beside the student", " and ".join(asking), before.footprint / 2**20)
        return before

    def _before_of(self, student: PreTrainedModel, **how: Any) -> Before:
        """`make_before` of this run. how: more of its arguments."""
        return make_before(
            self.model, student, self._compute_dtype, accelerator=self.accelerator, adapted=self.came_adapted, **how
        )

    def _give_way(self, error: ValueError) -> None:
        """There is no VLM before to read, and nobody asked for it."""
        logger.warning("The teacher reads the student's own keys and values, which training moves: %s", error)
        self.decided["kv_source"] = "student"

    def share_towers(self, collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]]) -> None:
        """Where the engine shards, let every process run the vision towers in each step in which another one does.

        collate: TRL's vision collator.
        """
        if sharding_of(self.accelerator) is None:
            return
        student, before = self.step.student, self.before
        image = blank_image(collate, student)
        self.step.same_modules = SameModules(student, image, self.accelerator)
        if before is not None:
            before.same_modules = SameModules(before.model, image, self.accelerator)

    @property
    def teacher_quantization_kl(self) -> float | None:
        """KL(full-precision teacher || quantised teacher) in nats per token, where it was measured."""
        return self.first_batch.quantization_kl

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were left out because something was not finite."""
        return self.policy.skipped_steps

    def begin_batch(self, input_ids: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Tell the watch about a batch of a training step. input_ids: (B, T). rows: (B,) row numbers, -1 where unknown.

        Raises:
            ValueError: if an option that the step was made of has another value by now.
        """
        now = self._asked_now()
        if moved := [name for name, value in self._made_of.items() if now[name] != value]:
            name = moved[0]
            raise ValueError(
                f"args.{name} was {self._made_of[name]!r} when the trainer was made and is {now[name]!r} now, which would change nothing: "
                "set it before, and make the trainer anew."
            )
        if self.model.training:
            self._step_at_work = self.state.global_step
            self.policy.begin(self, input_ids, rows)

    def end_batch(self, model: Any) -> None:
        """The loss of a batch is known: under DeepSpeed, whose backward pass ends with the step, it is judged here."""
        if self.model.training and self.is_deepspeed_enabled:
            self.policy.judge(self, model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """`Trainer._get_grad_norm`, which runs once between the backward pass and the optimizer: here the step is judged."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        if not self.is_deepspeed_enabled:
            self.policy.judge(self, model, grad_norm)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the distillation metrics (token means over all processes since the last log) to TRL's, then log.

        To the trainer's own logs, that is, which every process makes: what a callback logs, maybe on one process, is logged as it is.
        """
        # The model does not tell: it is still in evaluation mode where an evaluation ended with the last step before this log
        of_training = "loss" in logs or "total_flos" in logs
        of_evaluation = not of_training and any(name.endswith("_runtime") for name in logs)
        if not (of_training or of_evaluation):
            super().log(logs, start_time)
            return
        mode = "train" if of_training else "eval"
        metrics: dict[str, Any] = self.meter.read(training=of_training)
        if metrics and self.skipped_steps:
            metrics["skipped_steps"] = self.skipped_steps
        if metrics and self.teacher_quantization_kl is not None:
            metrics["teacher_quantization_kl"] = self.teacher_quantization_kl
        # What TRL would add, under the name of the evaluation set that it is of
        metrics = {**{name: _mean(of) for name, of in self._metrics[mode].items()}, **metrics}
        self._metrics[mode].clear()
        logs.update(metrics if of_training else {f"{self._evaluated}_{name}": of for name, of in metrics.items()})
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.evaluate`, for evaluation sets of every accepted format."""
        is_opened = self._is_opened
        if eval_dataset is not None and not isinstance(eval_dataset, str) and not is_opened:
            eval_dataset = self.open_later(eval_dataset)
        self._is_opened = True
        try:
            return super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            self._is_opened = is_opened

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.evaluation_loop`, whose result also names the cross-entropy alone: unlike the loss, it does not move with what
        the teacher lets through, so that the best checkpoint is chosen by it."""
        self.meter.reset_evaluation()
        self._metrics["eval"].clear()  # of a prediction, or an evaluation that broke off
        self._evaluated = prefix = kwargs.get("metric_key_prefix", "eval")
        try:
            output = super().evaluation_loop(*args, **kwargs)
        except BadRow as error:
            known = prefix == "eval" or prefix.startswith("eval_")
            what = eval_name(prefix[len("eval_") :]) if known else f"the rows of {prefix!r}"
            raise BadRow(error.reason, f"In {what}, at step {self.state.global_step}: {error}") from error
        if (ce := self.meter.evaluated_ce()) is not None and output.metrics is not None:
            output.metrics[f"{prefix}_ce_loss"] = ce
        return output

    def _plain_student(self) -> PreTrainedModel:
        return self.model.get_base_model() if is_peft_model(self.model) else self.model  # type: ignore[no-any-return]


def _mean(values: Sequence[float]) -> float | None:
    """The mean of what is a number, as TRL's on-policy trainer logs it; None where nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None


def _remedies(args: Any) -> list[str]:
    """What may help where the teacher is worse than the student, of what these options do not say already, likeliest first."""
    found = [] if args.ce_weight > 0 else ["ce_weight > 0, for the label beside the teacher"]
    own = "the teacher's own keys and values of text, if the student's language has collapsed"
    reads_text = args.kv_sharing in ("full", "prompt")
    found += [f"kv_sharing='vision' or 'none', {own}"] if reads_text else []
    return [*found, "distill_tokens='confident', where the teacher is unsure"]


def all_marked(given: Any, column: str) -> bool:
    """Whether every row of one set, or of several by name, is known to be marked. A stream that has the column, or does not tell its
    columns, is not."""
    sets = given.values() if isinstance(given, dict) else [] if given is None else [given]
    return all(
        column not in (one.column_names or [column]) or (hasattr(one, "__len__") and all(one[column])) for one in sets
    )


# What an evaluation gives without `compute_metrics`: TRL's, then ours
EVALUATED = (
    *(
        "loss",
        "entropy",
        "mean_token_accuracy",
        "num_tokens",
        "aux_loss",
        "runtime",
        "model_preparation_time",
        "samples_per_second",
        "steps_per_second",
    ),
    *(
        "ce_loss",
        "kd_loss",
        "teacher_ce",
        "student_ce",
        "teacher_agreement",
        "teacher_entropy",
        "confident_share",
        "anchor_kl",
    ),
    *("distilled_tokens", "anchored_tokens", "answer_tokens"),
)


def check_best_metric(args: Any, evaluation: Any, *, computed: bool, more: bool = False) -> None:
    """What the best checkpoint is chosen by: a value that an evaluation gives, and of several evaluation sets that of one.

    Args:
        evaluation: one set, several by name, or None. computed: whether `compute_metrics` or a subclass gives values that are
            not known here. more: an evaluation gives others than `EVALUATED` as well; then what is near one of those is taken for it, misspelt.

    Raises:
        ValueError: if `metric_for_best_model` names none.
    """
    metric = args.metric_for_best_model or ("loss" if args.load_best_model_at_end else None)
    if metric is None or not evaluation:
        return
    if not isinstance(evaluation, dict):
        plain = metric.removeprefix("eval_")
        if not computed and plain not in EVALUATED:
            near = difflib.get_close_matches(plain, EVALUATED, n=1, cutoff=0.8 if more else 0.6)
            if more and not near:
                return
            meant = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(EVALUATED)}."
            raise ValueError(
                f"metric_for_best_model={metric!r} is none of the values that an evaluation gives: {meant}"
            )
        return
    named = [metric.removeprefix("eval_").removeprefix(f"{name}_") for name in evaluation]
    if not any(of != metric.removeprefix("eval_") and (computed or more or of in EVALUATED) for of in named):
        raise ValueError(
            f"metric_for_best_model={metric!r}{' (the default)' if metric == 'ce_loss' else ''} names none of the evaluation sets {', '.join(map(repr, evaluation))}, each of which has a "
            f"value of its own: set it to {next(iter(evaluation)) + '_ce_loss'!r}, say."
        )
