"""`LinguDistillTrainer`: TRL's `SFTTrainer` with the original LM as a teacher that reads the student's K/V.

One step, in order: the collator marks the rows to distil; `SFTTrainer.compute_loss` calls the (wrapped) student; inside that
one forward the K/V are recorded, the teacher answers at the loss positions, and the divergence joins the per-token
cross-entropy; `SFTTrainer` divides their sum by the number of labels in the global batch.
"""

from __future__ import annotations

import functools
import logging
import math
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from ._internals import head_of
from .bad_rows import ROW_COLUMN
from .checkpoints import (
    STATE,
    check_output_dir,
    put_back,
    read_measured,
    rotate,
    staged,
    start_afresh,
    to_resume,
    write_measured,
)
from .compatibility import CompatibilityReport, check_compatibility, guess_teacher
from .config import LinguDistillConfig
from .data_mixin import DataMixin
from .engines import blank_image, head_unsharded, is_teacher_sharded, shard_teacher, sharding_of, vision_on
from .finite import IN_A_ROW, FiniteWatch, NotFinite, Problem
from .hub.mixin import PublishingMixin
from .kv_sharing import QueryPlan, SharedKV, placeholder_plan, plan_queries, recording, teacher_pass
from .losses import combine, distil, divergence, label_nll
from .quantization import arithmetic_of, choose_kernels
from .teacher import Teacher, compute_dtype_of, load_teacher_model, on_device, prepare_teacher

logger = logging.getLogger(__name__)

# Sums over tokens that are kept on the device and reduced once per log, in this order.
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
)


# What happens once in a run, and what is counted over all of it
_ONCE = (
    "skipped_steps",
    "teacher_quantization_kl",
    "teacher_ce_unshared",
    "_sharing_compared",
    "_quantization_measured",
    "_worse_teacher_warned",
)


class LinguDistillTrainer(DataMixin, PublishingMixin, SFTTrainer):
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

    Example:
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
        if args is None:
            args = LinguDistillConfig()
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
            student_revision=_as_dict(args.model_init_kwargs).get("revision") if isinstance(model, str) else None,
            teacher_revision=args.teacher_model_revision,
        )
        self.compatibility.raise_for_misfit()

        train_dataset, eval_dataset = self.open_data(train_dataset, eval_dataset, args, kwargs)
        if isinstance(model, str):
            # SFTConfig owns the mapping; weights load from safetensors only
            args.model_init_kwargs = {"use_safetensors": True, **_as_dict(args.model_init_kwargs)}
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if self.is_deepspeed_enabled and args.on_nan == "skip":
            raise ValueError(
                "on_nan='skip' cannot be held under DeepSpeed, whose backward pass ends with the step: use on_nan='stop'."
            )

        student = self._plain_student()
        choose_kernels(student, trained=True)
        self.collate_rows(self.compatibility.image_token_ids, prefix_lm=student.config.model_type == "paligemma")
        self._compute_dtype = compute_dtype_of(student, bf16=bool(args.bf16), fp16=args.fp16)
        self._sharding = sharding_of(self.accelerator)
        self.teacher: Teacher = self._make_teacher(teacher_ref, student)
        # Under an engine that shards, every process runs every module in every step, on placeholders if need be
        self._blank_image: dict[str, Any] | None = None
        if self._sharding is not None and self._is_vision_dataset:
            self._blank_image = blank_image(self.data_collator.inner, student)
        self._images_in_step = True
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.teacher_arithmetic = arithmetic_of(self.teacher.model, autocast=autocast)
        logger.info(
            "Teacher %s (%s, computed in %s): %.1f MiB",
            self.teacher_name_or_path,
            args.teacher_quantization,
            self.teacher_arithmetic,
            self.teacher.footprint / 2**20,
        )
        precision = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        self._sums = {
            mode: torch.zeros(len(_SUMS), dtype=precision, device=self.accelerator.device)
            for mode in ("train", "eval")
        }
        # of the optimizer step under way: they join the sums when it is known to be finite
        self._step_sums = torch.zeros_like(self._sums["train"])
        self._metrics_before: dict[str, int] = {}
        self._watch = FiniteWatch(self.accelerator, getattr(self.processing_class, "tokenizer", self.processing_class))
        self.skipped_steps = self._skipped_in_a_row = 0
        self._worse_teacher_warned = False
        # An extra pass of a sharded teacher would have to be made by all processes at once; packed rows cannot be compacted
        self._sharing_compared = (
            args.kv_sharing == "none" or self._is_teacher_sharded or args.packing or args.padding_free
        )
        self._quantization_measured = not args.measure_teacher_quantization
        self.teacher_quantization_kl: float | None = None
        self.teacher_ce_unshared: float | None = None
        self._staging: str | None = None
        self._resumed_from: Path | None = None
        self.add_callback(_Restore(self))
        self._distil_inside_forward(student)

    def _make_teacher(self, reference: str | PreTrainedModel, student: PreTrainedModel) -> Teacher:
        """Load the teacher (or take the object) and put it where `teacher_sharding` and `teacher_offload` say."""
        args, device = self.args, self.accelerator.device
        quantised = args.teacher_quantization != "none" if isinstance(reference, str) else _is_quantised(reference)
        shard = is_teacher_sharded(args.teacher_sharding, quantised=quantised, sharding=self._sharding)
        offload = args.teacher_offload == "cpu"
        self._is_teacher_sharded, self._is_teacher_offloaded = shard, offload and not shard
        if isinstance(reference, str):
            lm = load_teacher_model(
                reference,
                revision=args.teacher_model_revision,
                init_kwargs=_as_dict(args.teacher_model_init_kwargs),
                quantization=args.teacher_quantization,
                dtype=self._compute_dtype,
                # pieces are cut on the CPU: the whole teacher may not fit a device
                device="cpu" if shard else device,
                trust_remote_code=args.trust_remote_code,
            )
        else:
            choose_kernels(reference)
            lm = reference if quantised else reference.to("cpu" if shard else device)  # type: ignore[arg-type]
        teacher = prepare_teacher(
            lm,
            student,
            shared_vocab_size=self.compatibility.shared_vocab_size,
            unreadable_token_ids=self.compatibility.image_token_ids,
            exact_vocab=shard or offload,
        )
        if shard:
            return shard_teacher(teacher, self.accelerator, offload=offload)
        with on_device(teacher, device, offload=offload):  # leaving it parks the teacher
            return teacher

    # ----------------------------------------------------------------------------------------------------------------
    # The step
    # ----------------------------------------------------------------------------------------------------------------
    def _distil_inside_forward(self, student: PreTrainedModel) -> None:
        """Let the student's own forward, called by SFTTrainer with the fused head, return the combined per-token loss.

        Inside the forward, because there DDP, FSDP and ZeRO see every use of the student's head.
        """
        fused_forward = student.forward

        # Keep the original signature: `generate` validates its arguments against it
        @functools.wraps(type(student).forward)
        def forward(_self: PreTrainedModel, *args: Any, distill: torch.Tensor | None = None, **kwargs: Any) -> Any:
            if distill is None or not kwargs.get("fused_lm_head"):
                return fused_forward(*args, **kwargs)
            with head_unsharded(student):
                return self._distilling_forward(fused_forward, student, distill, *args, **kwargs)

        student.forward = types.MethodType(forward, student)

    # Not traced itself, its callees are: the record of K/V is a side effect
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _distilling_forward(
        self,
        fused_forward: Callable[..., Any],
        student: PreTrainedModel,
        distill: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The student's forward, the teacher's pass and the divergence. Returns TRL's fused output with `log_probs`
        replaced by the negative combined loss per token, which is what `SFTTrainer.compute_loss` sums."""
        config = self.args
        labels = kwargs["labels"]
        plan = plan_queries(
            kwargs["input_ids"],
            labels,
            distill,
            kv_sharing=config.kv_sharing,
            shared_vocab_size=self.teacher.shared_vocab_size,
            unreadable_token_ids=self.teacher.unreadable_token_ids,
            attention_mask=kwargs.get("attention_mask"),
        )
        nothing_to_distil = plan.empty
        if nothing_to_distil and self._is_teacher_sharded:
            plan = placeholder_plan(plan)
        if plan.empty:
            with self._same_modules(student, kwargs):
                outputs = fused_forward(*args, **kwargs)
            self._watch.judge_loss(outputs.log_probs)
            self._add_sums(labels=outputs.label_mask.sum(), ce=-outputs.log_probs.detach().sum())
            return outputs
        with recording(student) as shared, self._same_modules(student, kwargs):
            outputs = fused_forward(*args, **kwargs)
        with on_device(self.teacher, plan.input_ids.device, offload=self._is_teacher_offloaded) as teacher_head:
            teacher_hidden = teacher_pass(self.teacher.model, shared, plan)
        if not self._quantization_measured and not nothing_to_distil:
            self._measure_quantization(shared, plan, teacher_hidden)
        shared.release()

        cross_entropy = -outputs.log_probs  # (B, T - 1), zero where ignored
        rows, positions = plan.loss_rows, plan.loss_positions
        student_ce = cross_entropy[rows, positions].detach()
        hidden = shared.last_hidden_state[rows, positions]  # type: ignore[index]  # (N, H_s), with gradient
        margin = config.distill_margin if config.distill_tokens == "confident" else None
        result = distil(
            hidden,
            head_of(student).whole(),
            teacher_hidden,
            teacher_head.whole(),
            labels[rows, positions + 1].clamp(min=0),  # a placeholder may have no label
            -student_ce,
            margin=math.inf if nothing_to_distil else margin,
            beta=config.beta,
            temperature=config.temperature,
        )
        if not (self._sharing_compared or nothing_to_distil):
            self._compare_with_unshared(plan, labels, distill, kwargs.get("attention_mask"), result.teacher_log_prob)
        per_token = combine(
            cross_entropy,
            result.divergence,
            result.chosen,
            rows,
            positions,
            ce_weight=config.ce_weight,
            distill_weight=config.distill_weight,
        )
        if not nothing_to_distil:
            self._watch.judge_teacher(result.teacher_log_prob, rows)
        self._watch.judge_loss(cross_entropy, per_token)
        self._add_sums(labels=outputs.label_mask.sum(), ce=cross_entropy.detach().sum())
        if not nothing_to_distil:
            self._add_sums(
                candidates=plan.num_loss,
                distilled=result.chosen.sum(),
                kd=result.divergence.detach().sum(),
                teacher_ce=-result.teacher_log_prob.sum(),
                student_ce=student_ce.sum(),
                agreement=result.agrees.sum(),
                teacher_entropy=result.teacher_entropy.sum(),
            )
        outputs.log_probs = -per_token
        return outputs

    def _same_modules(self, student: PreTrainedModel, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Where the engine shards and another process may have an image: run the vision tower without one as well."""
        needed = self._images_in_step or not self.model.training
        if self._blank_image is None or not needed or inputs.get("pixel_values") is not None:
            return nullcontext()
        return vision_on(self._blank_image, student)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """`Trainer.get_batch_samples`, and whether any process has an image in this optimizer step: without one, the
        vision tower gets no gradient at all, as on a single process."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._blank_image is not None:
            seen = torch.tensor(any("pixel_values" in batch for batch in batches), dtype=torch.int32, device=device)
            self._images_in_step = bool(self.accelerator.reduce(seen, reduction="sum"))
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum over tokens of `ce_weight * CE + distill_weight * KD` (distilled) or CE (others), over the number of labels.

        The number of labels is that of the *global* batch: neither gradient accumulation nor the number of processes
        changes the loss.
        """
        if "distill" not in inputs:  # a collator or dataloader of the caller's own
            inputs["distill"] = torch.ones(
                inputs["input_ids"].shape[0], dtype=torch.bool, device=inputs["input_ids"].device
            )
        numbers = inputs.pop(ROW_COLUMN, None)
        if self.model.training:
            if self._watch.starts_step:
                self._metrics_before = {name: len(values) for name, values in self._metrics["train"].items()}
            self._watch.open(inputs["input_ids"], numbers)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        if self.model.training and self.is_deepspeed_enabled:  # its backward pass ends with the step: judged before
            self._judge_step(model)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """`Trainer._get_grad_norm`, which runs once between the backward pass and the optimizer: here the step is judged."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        if not self.is_deepspeed_enabled:
            self._judge_step(model, grad_norm)
        return grad_norm

    def _judge_step(self, model: Any, grad_norm: Any = None) -> None:
        """Let a finite step pass; skip another, or stop, as `on_nan` says."""
        problem = self._watch.verdict(model, grad_norm)
        if problem is None:
            self._sums["train"] += self._step_sums
            self._step_sums.zero_()
            self._skipped_in_a_row = 0
            return
        self._step_sums.zero_()
        known = self._metrics["train"]
        for name in list(known):
            if kept := known[name][: self._metrics_before.get(name, 0)]:
                known[name] = kept
            else:
                del known[name]
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)  # without gradients the optimizer leaves weights and moments alone
        self._skipped_in_a_row += 1
        if self.args.on_nan == "stop" or problem.in_weights or self._skipped_in_a_row > IN_A_ROW:
            self._stop(model, problem)
        self.skipped_steps += 1
        logger.warning("Step %d skipped: %s.", self.state.global_step + 1, problem)

    def _stop(self, model: Any, problem: Problem) -> None:
        step = self.state.global_step
        message = f"Training stopped in step {step + 1}: {problem}. "
        if problem.in_weights:
            raise NotFinite(message + "Go back to a checkpoint from before, or load another model.")
        saved = self.args.save_strategy != "no" and step > 0
        if saved:
            self._save_checkpoint(model, trial=None)
        message += f"The weights are those of step {step}{f', saved in checkpoint-{step}' if saved else ''}. "
        persists = self._skipped_in_a_row > IN_A_ROW
        if persists:
            message += f"The {IN_A_ROW} steps before it were skipped as well. "
        if problem.teacher and not problem.loss:
            message += "Try teacher_quantization='none', or bf16"
        elif problem.loss and not persists:
            message += "Repair or remove what is named"
        else:
            message += "Lower learning_rate, or use bf16 in place of fp16"
        raise NotFinite(message + ("." if persists else ", or pass --on_nan skip to leave such steps out."))

    # ----------------------------------------------------------------------------------------------------------------
    # Metrics
    # ----------------------------------------------------------------------------------------------------------------
    def _add_sums(self, **sums: torch.Tensor | int) -> None:
        """Add to the sums of the current mode, on the device and without reading anything back."""
        total = self._step_sums if self.model.training else self._sums["eval"]
        for name, value in sums.items():
            total[_SUMS.index(name)] += value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the distillation metrics (token means over all processes since the last log) to TRL's, then log."""
        mode = "train" if self.model.training else "eval"
        sums = dict(zip(_SUMS, self.accelerator.reduce(self._sums[mode], reduction="sum").tolist(), strict=True))
        self._sums[mode].zero_()
        if sums["labels"] > 0:
            metrics = {"ce_loss": sums["ce"] / sums["labels"], "distilled_tokens": sums["distilled"]}
            metrics["answer_tokens"] = sums["labels"]
            if sums["distilled"] > 0:
                metrics["kd_loss"] = sums["kd"] / sums["distilled"]
            if sums["candidates"] > 0:
                metrics |= {
                    "teacher_ce": sums["teacher_ce"] / sums["candidates"],
                    "student_ce": sums["student_ce"] / sums["candidates"],
                    "teacher_agreement": sums["agreement"] / sums["candidates"],
                    "teacher_entropy": sums["teacher_entropy"] / sums["candidates"],
                    "confident_share": sums["distilled"] / sums["candidates"],
                }
                self._warn_if_teacher_is_worse(metrics["teacher_ce"], metrics["student_ce"])
            if self.skipped_steps:
                metrics["skipped_steps"] = self.skipped_steps
            if self.teacher_quantization_kl is not None:
                metrics["teacher_quantization_kl"] = self.teacher_quantization_kl
            for name, value in metrics.items():
                self._metrics[mode][name] = [value]
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.evaluation_loop` with sums of its own: `predict` leaves some that nothing logs."""
        self._sums["eval"].zero_()
        return super().evaluation_loop(*args, **kwargs)

    def _warn_if_teacher_is_worse(self, teacher_ce: float, student_ce: float) -> None:
        if self._worse_teacher_warned or self.args.distill_tokens != "all" or teacher_ce <= student_ce + 0.1:
            return
        self._worse_teacher_warned = True
        logger.warning(
            "The teacher predicts the labels worse than the student (%.2f against %.2f nats a token): the divergence pulls the "
            "student towards a poorer model. Use distill_tokens='confident', or ce_weight > 0; if the student's language has "
            "collapsed, kv_sharing='none' or 'vision' gives the teacher its own keys and values.",
            teacher_ce,
            student_ce,
        )

    @torch.no_grad()
    def _compare_with_unshared(
        self,
        plan: QueryPlan,
        labels: torch.Tensor,
        distill: torch.Tensor,
        attention_mask: torch.Tensor | None,
        shared_log_prob: torch.Tensor,
    ) -> None:
        """Once, on the first distilled batch with text-only rows: does the student's K/V make its teacher worse?

        A student whose language has collapsed drags the teacher that reads it along, and then learns its own collapse back.
        The teacher is still better than such a student, so that `teacher_ce` against `student_ce` does not show it; the same
        teacher without sharing does.

        shared_log_prob: (N,) nats, the labels' log-probability under the teacher at the plan's loss positions.
        """
        unreadable = (plan.input_ids >= self.teacher.shared_vocab_size) | torch.isin(
            plan.input_ids, torch.tensor(list(self.teacher.unreadable_token_ids), device=plan.input_ids.device)
        )
        if attention_mask is not None:
            unreadable &= attention_mask.bool()
        text_only = ~unreadable.any(dim=1)
        compared = text_only[plan.loss_rows]
        if not compared.any():
            return
        self._sharing_compared = True
        alone = plan_queries(
            plan.input_ids,
            labels,
            distill.bool() & text_only,
            kv_sharing="none",
            shared_vocab_size=self.teacher.shared_vocab_size,
            unreadable_token_ids=self.teacher.unreadable_token_ids,
            attention_mask=attention_mask,
        )
        with on_device(self.teacher, plan.input_ids.device, offload=self._is_teacher_offloaded) as head:
            hidden = teacher_pass(self.teacher.model, SharedKV(), alone)
            wanted = labels[alone.loss_rows, alone.loss_positions + 1]
            alone_ce = label_nll(hidden, head.whole(), wanted).mean()
        self.teacher_ce_unshared = float(alone_ce)
        shared_ce = float(-shared_log_prob[compared].mean())
        if shared_ce > self.teacher_ce_unshared + 0.5:
            logger.warning(
                "Reading the student's keys and values makes the teacher worse (%.2f against %.2f nats a token without, on the "
                "text rows of the first batch): the student's language has drifted so far that it misleads its teacher, and "
                "the divergence alone would teach it its own collapse. Use kv_sharing='vision' or 'none', or keep ce_weight "
                "above 0.",
                shared_ce,
                self.teacher_ce_unshared,
            )

    def _measure_quantization(self, shared: SharedKV, plan: QueryPlan, quantised_hidden: torch.Tensor) -> None:
        """Mean KL(full-precision teacher || quantised teacher) in nats on the first distilled batch."""
        self._quantization_measured = True
        if self.args.teacher_quantization == "none" or not _is_quantised(self.teacher.model):
            self.teacher_quantization_kl = 0.0
            return
        whole = prepare_teacher(
            load_teacher_model(
                self.teacher_name_or_path,
                revision=self.args.teacher_model_revision,
                init_kwargs=_as_dict(self.args.teacher_model_init_kwargs),
                quantization="none",
                dtype=self._compute_dtype,
                device=self.accelerator.device,
                trust_remote_code=self.args.trust_remote_code,
            ),
            self._plain_student(),
            shared_vocab_size=self.teacher.shared_vocab_size,
            unreadable_token_ids=self.teacher.unreadable_token_ids,
        )
        with torch.no_grad():
            kl = divergence(quantised_hidden, self.teacher.head, teacher_pass(whole.model, shared, plan), whole.head)
        self.teacher_quantization_kl = float(kl.mean())
        logger.info(
            "KL(full-precision teacher || %s) = %.4f nats",
            self.args.teacher_quantization,
            self.teacher_quantization_kl,
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Around the step
    # ----------------------------------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, after checking that `output_dir` does not hold another run (unless this resumes it)."""
        resume_from_checkpoint = resume_from_checkpoint or self.args.resume_from_checkpoint
        self._resumed_from = None
        if str(resume_from_checkpoint).lower() == "false":
            resume_from_checkpoint = None
        if resume_from_checkpoint:
            if self.accelerator.is_local_main_process:
                put_back(str(self.args.output_dir))
            self.accelerator.wait_for_everyone()
            resume_from_checkpoint = to_resume(resume_from_checkpoint, str(self.args.output_dir))
            self._resumed_from = Path(resume_from_checkpoint)
        else:
            check_output_dir(str(self.args.output_dir), overwrite=self.args.overwrite_output_dir)
            if self.accelerator.is_local_main_process:
                start_afresh(str(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        """`Trainer._get_output_dir`; while a checkpoint is written, the folder beside its place."""
        return self._staging or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """`Trainer._save_checkpoint`, whose folder appears whole or not at all; older ones are removed after it has.

        Raises:
            CheckpointError: if it could not be written; the message names the last good one.
        """
        run, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with staged(run, name, self.accelerator) as self._staging:
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
                written = Path(self._staging) / name
                write_measured(written, self.accelerator, self._measured())
                if self.state.best_model_checkpoint == str(written):
                    self.state.best_model_checkpoint = str(Path(run) / name)
                    if self.args.should_save:
                        self.state.save_to_json(str(written / STATE))
            finally:
                self._staging = None
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _measured(self) -> dict[str, Any]:
        """What this process has measured since the last log, and what it does only once: a checkpoint between two logs holds it,
        so that the run that resumes from it logs what the whole run would have."""
        return {
            "sums": self._sums["train"].tolist(),
            "metrics": dict(self._metrics["train"]),
            "tokens": self._total_train_tokens,
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            **{name: getattr(self, name) for name in _ONCE},
        }

    def _restore_measured(self) -> None:
        if self._resumed_from is None or (kept := read_measured(self._resumed_from, self.accelerator)) is None:
            return
        self._sums["train"].copy_(torch.tensor(kept["sums"], dtype=self._sums["train"].dtype))
        self._metrics["train"].update(kept["metrics"])
        self._total_train_tokens = kept["tokens"]
        self._tr_loss += kept["loss"]
        self._total_loss_scalar -= kept[
            "loss"
        ]  # of steps before this call of `train`, whose mean loss leaves them out
        self._globalstep_last_logged = kept["last_logged"]
        for name in _ONCE:
            setattr(self, name, kept[name])

    def _plain_student(self) -> PreTrainedModel:
        return self.model.get_base_model() if is_peft_model(self.model) else self.model  # type: ignore[no-any-return]


class _Restore(TrainerCallback):
    """Gives a resumed run what its checkpoint had measured, after `Trainer` has begun its own sums at zero."""

    def __init__(self, trainer: LinguDistillTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._restore_measured()


def _reference(model: Any) -> str:
    """The name or path that a model was loaded from (empty if it was built in memory)."""
    return model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "")


def _as_dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _is_quantised(model: PreTrainedModel) -> bool:
    return getattr(model, "hf_quantizer", None) is not None
