"""`LinguDistillTrainer`: TRL's `SFTTrainer` with the original LM as a teacher that reads the student's K/V.

Wiring only. What happens to a batch is in `step.py`: `SFTTrainer.compute_loss` calls the student, the step answers, and `SFTTrainer`
divides the sum by the number of labels in the global batch.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from ._internals import keep_image_dtype
from .anchor import make_before
from .bad_rows import ROW_COLUMN
from .compatibility import CompatibilityReport, check_compatibility, guess_teacher
from .config import LinguDistillConfig
from .data_mixin import DataMixin
from .engines import SameModules, blank_image, sharding_of
from .finite import FiniteWatch, StepPolicy
from .first_batch import FirstBatch
from .hub.mixin import PublishingMixin
from .losses import Weights
from .meter import Meter
from .pace import Pace
from .quantization import arithmetic_of, choose_kernels
from .resume import ResumingMixin
from .router import prepare_router
from .sharing import sharing
from .step import DistillStep
from .teacher import Teacher, compute_dtype_of
from .teacher_mixin import TeacherMixin, as_dict, is_quantised

logger = logging.getLogger(__name__)


class LinguDistillTrainer(DataMixin, TeacherMixin, PublishingMixin, ResumingMixin, SFTTrainer):
    """Distil a VLM's original LM back into it.

    Everything that [`~trl.SFTTrainer`] accepts is accepted here; two arguments are added.

    Args:
        model: the student VLM, or its Hub id or folder.
        args ([`LinguDistillConfig`]): the configuration.
        teacher_model: the frozen LM, or its Hub id or folder; overrides `args.teacher_model_name_or_path`. A model object
            is used as it is: it is not quantised again.
        teacher_tokenizer: for the vocabulary check; loaded from the teacher's folder or id where left out.
        **kwargs: everything else goes to `SFTTrainer`.

    Raises:
        ValueError: if student and teacher do not fit (see `check_compatibility`), if no row is marked for distillation, or
            if `output_dir` holds another run.

    Examples:
        >>> trainer = LinguDistillTrainer(
        ...     model="HuggingFaceTB/SmolVLM-256M-Instruct",
        ...     teacher_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        ...     args=LinguDistillConfig(output_dir="smolvlm-fluent"),
        ...     train_dataset=dataset,
        ... )
        >>> trainer.train()
    """

    args: LinguDistillConfig
    train_dataset: Any  # narrower than transformers' declarations, which admit None
    processing_class: Any
    _signature_columns: Any

    _tag_names = ["trl", "sft", "lingudistill", "distillation"]
    _name = "LinguDistill"
    _paper = {
        "title": "LinguDistill",
        "id": "2604.00829",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        args: LinguDistillConfig | None = None,
        *,
        teacher_model: str | PreTrainedModel | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        train_dataset: Dataset | IterableDataset | list[dict[str, Any]] | None = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        args = LinguDistillConfig() if args is None else args
        if not isinstance(args, LinguDistillConfig):
            raise TypeError(f"args must be a LinguDistillConfig, got {type(args).__name__}.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func cannot be combined with distillation: the trainer computes its own loss."
            )
        adapter = kwargs.get("peft_config")
        if not isinstance(model, str) and is_peft_model(model):
            adapter = model.active_peft_config
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"{type(adapter).__name__} puts virtual tokens before the text, which the teacher cannot read: use LoRA "
                "or full fine-tuning."
            )

        # Teacher: who, and does it fit? Configs and tokenizers only, before any weight is loaded.
        teacher_ref = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if teacher_ref is None:
            teacher_ref = guess_teacher(_reference(model))
            if teacher_ref is None:
                raise ValueError(
                    "teacher_model_name_or_path is not set, and the student's config and card do not name its LM. Pass the LM "
                    "that the VLM was built from."
                )
            logger.warning("Teacher guessed from the student's config or card: %s", teacher_ref)
        self.teacher_name_or_path = teacher_ref if isinstance(teacher_ref, str) else _reference(teacher_ref)
        processing_class = kwargs.get("processing_class")
        self.compatibility: CompatibilityReport = check_compatibility(
            model,
            teacher_ref,
            student_tokenizer=getattr(processing_class, "tokenizer", processing_class),
            teacher_tokenizer=teacher_tokenizer,
            trust_remote_code=args.trust_remote_code,
            student_revision=as_dict(args.model_init_kwargs).get("revision") if isinstance(model, str) else None,
            teacher_revision=args.teacher_model_revision,
        )
        self.compatibility.raise_for_misfit()

        train_dataset, eval_dataset = self.open_data(train_dataset, eval_dataset, args, kwargs)
        if isinstance(model, str):
            # SFTConfig owns the mapping; weights load from safetensors only
            args.model_init_kwargs = {"use_safetensors": True, **as_dict(args.model_init_kwargs)}
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if self.is_deepspeed_enabled and args.on_nan == "skip":
            raise ValueError(
                "on_nan='skip' cannot be held under DeepSpeed, whose backward pass ends with the step: use on_nan='stop'."
            )

        student = self._plain_student()
        choose_kernels(student, trained=True)
        keep_image_dtype(student)
        prepare_router(student)
        self.collate_rows(self.compatibility.image_token_ids, prefix_lm=student.config.model_type == "paligemma")
        self._compute_dtype = compute_dtype_of(student, bf16=bool(args.bf16), fp16=args.fp16)
        self._teacher_ref = teacher_ref
        self.step = self._make_step(student)
        self.data_collator.plan = None if self._splits_batches() else self.step.plan
        self.step.install()
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.teacher_arithmetic = arithmetic_of(self.teacher.model, autocast=autocast)
        logger.info(
            "Teacher %s (%s, computed in %s): %.1f MiB",
            self.teacher_name_or_path,
            args.teacher_quantization,
            self.teacher_arithmetic,
            self.teacher.footprint / 2**20,
        )
        self._check_pair(student)
        self._resuming()
        self.pace = Pace()
        self.add_callback(self.pace)

    def _make_step(self, student: PreTrainedModel) -> DistillStep:
        """The step and those who look on at it: `meter`, `policy`, `first_batch`."""
        args, mode, accelerator = self.args, sharing(self.args.kv_sharing), self.accelerator
        is_sharded, offload = self._is_teacher_sharded(), args.teacher_offload == "cpu"
        self.teacher: Teacher = self._make_teacher(student, shard=is_sharded, offload=offload)
        mode.check(student, self.teacher.model)
        offload = offload and not is_sharded  # a sharded teacher's pieces come to the device by themselves
        measured, quantised = args.measure_teacher_quantization, is_quantised(self.teacher.model)
        self.meter = Meter(accelerator, distill_tokens=args.distill_tokens)
        watch = FiniteWatch(accelerator, getattr(self.processing_class, "tokenizer", self.processing_class))
        self.policy = StepPolicy(watch, args.on_nan)
        self.first_batch = FirstBatch(
            mode,
            self.teacher,
            whole_teacher=self._whole_teacher if measured and quantised else None,
            # An extra pass of a sharded teacher would have to be made by all processes at once; packed rows cannot be compacted
            compare_sharing=not (is_sharded or args.packing or args.padding_free),
            offload=offload,
        )
        if measured and not quantised:
            self.first_batch.quantization_kl = 0.0
        self.before = None
        if args.anchor == "before":
            sharded = sharding_of(accelerator) is not None
            self.before = make_before(self.model, student, self._compute_dtype, sharded=sharded)
            if self.has_distill_column is False or self.distill_share == 1.0:
                logger.warning(
                    "anchor='before' changes nothing: it judges rows that are marked false, and there are none."
                )
            logger.info("Anchor: the VLM before, %.1f MiB beside the student", self.before.footprint / 2**20)
        same_modules = None
        if sharding_of(accelerator) is not None and self._is_vision_dataset:
            same_modules = SameModules(student, blank_image(self.data_collator.inner, student), accelerator)
        return DistillStep(
            student,
            self.teacher,
            mode,
            Weights(
                cross_entropy=args.ce_weight,
                divergence=args.distill_weight,
                margin=args.distill_margin if args.distill_tokens == "confident" else None,
                beta=args.beta,
                temperature=args.temperature,
                anchor=args.anchor_weight,
            ),
            offload=offload,
            sharded=is_sharded,
            same_modules=same_modules,
            before=self.before,
            watchers=[self.meter, watch, self.first_batch],
        )

    @property
    def teacher_quantization_kl(self) -> float | None:  # type: ignore[override]  # measured, not set
        """KL(full-precision teacher || quantised teacher) in nats per token, where it was measured."""
        return self.first_batch.quantization_kl

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were left out because something was not finite."""
        return self.policy.skipped_steps

    # ----------------------------------------------------------------------------------------------------------------
    # The step
    # ----------------------------------------------------------------------------------------------------------------
    def _splits_batches(self) -> bool:
        """Whether one process reads batches and hands each of the others a slice: a plan cannot be sliced."""
        return self.accelerator.num_processes > 1 and isinstance(self.train_dataset, IterableDataset)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """`Trainer.get_batch_samples`, which also tells the step whether some process has an image."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.step.same_modules is not None:
            self.step.same_modules.look_at(batches)
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum over tokens of `ce_weight * CE + distill_weight * KD` (distilled), CE (others) or, with an anchor, `(1 - anchor_weight) *
        CE + anchor_weight * KL` (unmarked rows), over the number of labels.

        The number of labels is that of the *global* batch: neither gradient accumulation nor the number of processes
        changes the loss.
        """
        if "distill" not in inputs:  # a collator or dataloader of the caller's own
            inputs["distill"] = torch.ones(
                inputs["input_ids"].shape[0], dtype=torch.bool, device=inputs["input_ids"].device
            )
        rows = inputs.pop(ROW_COLUMN, None)
        if self.model.training:
            self.policy.begin(self, inputs["input_ids"], rows)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        if self.model.training and self.is_deepspeed_enabled:  # its backward pass ends with the step: judged before
            self.policy.judge(self, model)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """`Trainer._get_grad_norm`, which runs once between the backward pass and the optimizer: here the step is judged."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        if not self.is_deepspeed_enabled:
            self.policy.judge(self, model, grad_norm)
        return grad_norm

    # ----------------------------------------------------------------------------------------------------------------
    # Metrics
    # ----------------------------------------------------------------------------------------------------------------
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the distillation metrics (token means over all processes since the last log) to TRL's, then log."""
        training = self.model.training
        metrics = self.meter.read(training=training)
        if metrics and self.skipped_steps:
            metrics["skipped_steps"] = self.skipped_steps
        if metrics and self.teacher_quantization_kl is not None:
            metrics["teacher_quantization_kl"] = self.teacher_quantization_kl
        for name, value in metrics.items():
            self._metrics["train" if training else "eval"][name] = [value]
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.evaluation_loop`, whose result also names the cross-entropy alone: unlike the loss, it does not move with what
        the teacher lets through, so that the best checkpoint is chosen by it."""
        self.meter.reset_evaluation()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if (ce := self.meter.evaluated_ce()) is not None and output.metrics is not None:
            output.metrics[f"{prefix}_ce_loss"] = ce
        return output

    def _plain_student(self) -> PreTrainedModel:
        return self.model.get_base_model() if is_peft_model(self.model) else self.model  # type: ignore[no-any-return]


def _reference(model: Any) -> str:
    """The name or path that a model was loaded from (empty if it was built in memory)."""
    return model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "")
