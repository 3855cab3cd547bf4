"""`LinguDistillTrainer`: TRL's `SFTTrainer` with the original LM as a teacher that reads the student's K/V.

One step, in order: the collator marks the rows to distil; `SFTTrainer.compute_loss` calls the (wrapped) student; inside that
one forward the K/V are recorded, the teacher answers at the loss positions, and the divergence joins the per-token
cross-entropy; `SFTTrainer` divides their sum by the number of labels in the global batch.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from ._internals import head_of
from .compatibility import CompatibilityReport, check_compatibility, guess_teacher
from .config import LinguDistillConfig
from .data import ROW_COLUMN, DistillCollator, check_distill_column, drop_bad_rows, has_images, prepare_dataset
from .kv_sharing import QueryPlan, SharedKV, plan_queries, recording, teacher_pass
from .losses import combine, distil, divergence
from .teacher import Teacher, compute_dtype_of, load_teacher_model, prepare_teacher

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


class LinguDistillTrainer(SFTTrainer):
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
    model: Any  # narrower than transformers' declarations, which admit None
    train_dataset: Any
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
        train_dataset: Dataset | IterableDataset | None = None,
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
        self.has_distill_column = False
        self.distill_share: float | None = None
        self.skipped_rows: dict[str, int] = {}

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

        if train_dataset is not None:
            self.has_distill_column, self.distill_share = check_distill_column(train_dataset, args.distill_column)
            _warn_if_grounding_is_at_risk(args, train_dataset)
            packed = args.packing or args.padding_free
            if packed and args.kv_sharing == "none":
                raise ValueError(
                    "kv_sharing='none' cannot keep packed documents apart (the teacher reads compacted rows): use 'prompt' or "
                    "'full', or set packing=False and padding_free=False."
                )
            if args.packing and self.has_distill_column:
                raise ValueError(
                    f"packing joins rows, so that column {args.distill_column!r} has no meaning: drop the column (every row is "
                    "distilled) or set packing=False."
                )
            train_dataset = prepare_dataset(train_dataset)
        if eval_dataset is not None:
            eval_dataset = (
                {name: prepare_dataset(part) for name, part in eval_dataset.items()}
                if isinstance(eval_dataset, dict)
                else prepare_dataset(eval_dataset)
            )
        if isinstance(model, str):
            # SFTConfig owns the mapping; weights load from safetensors only
            args.model_init_kwargs = {"use_safetensors": True, **_as_dict(args.model_init_kwargs)}
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

        student = self._plain_student()
        self.data_collator = DistillCollator(
            self.data_collator,
            distill_column=args.distill_column,
            max_length=args.max_length,
            image_token_ids=self.compatibility.image_token_ids,
            vision=self._is_vision_dataset,
        )
        if args.skip_bad_rows and self._is_vision_dataset:
            self.train_dataset, dropped = drop_bad_rows(self.train_dataset, self.data_collator)
            self.skipped_rows = dropped
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {
                    name: drop_bad_rows(part, self.data_collator)[0] for name, part in self.eval_dataset.items()
                }
            elif self.eval_dataset is not None:
                self.eval_dataset = drop_bad_rows(self.eval_dataset, self.data_collator)[0]
            if dropped:
                logger.warning("Skipped %d rows: %s", sum(dropped.values()), dict(dropped))
        if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) == 0:
            raise ValueError(
                f"No row is left to train on: no answer token lies within max_length={args.max_length}. Raise max_length."
            )
        columns_known = train_dataset is not None and train_dataset.column_names is not None
        if columns_known and not self.has_distill_column and self.accelerator.is_main_process:
            logger.warning("The dataset has no column %r: every row is distilled.", args.distill_column)

        self._compute_dtype = compute_dtype_of(student, bf16=bool(args.bf16), fp16=args.fp16)
        if isinstance(teacher_ref, str):
            lm = load_teacher_model(
                teacher_ref,
                revision=args.teacher_model_revision,
                init_kwargs=_as_dict(args.teacher_model_init_kwargs),
                quantization=args.teacher_quantization,
                dtype=self._compute_dtype,
                device=self.accelerator.device,
                trust_remote_code=args.trust_remote_code,
            )
        else:
            lm = teacher_ref if _is_quantised(teacher_ref) else teacher_ref.to(self.accelerator.device)
        self.teacher: Teacher = prepare_teacher(
            lm,
            student,
            shared_vocab_size=self.compatibility.shared_vocab_size,
            unreadable_token_ids=self.compatibility.image_token_ids,
        )
        logger.info(
            "Teacher %s (%s): %.1f MiB",
            self.teacher_name_or_path,
            args.teacher_quantization,
            self.teacher.footprint / 2**20,
        )
        precision = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        self._sums = {
            mode: torch.zeros(len(_SUMS), dtype=precision, device=self.accelerator.device)
            for mode in ("train", "eval")
        }
        self._worse_teacher_warned = False
        self._quantization_measured = not args.measure_teacher_quantization
        self.teacher_quantization_kl: float | None = None
        self._distil_inside_forward(student)

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
        if plan.empty:
            outputs = fused_forward(*args, **kwargs)
            self._add_sums(labels=outputs.label_mask.sum(), ce=-outputs.log_probs.detach().sum())
            return outputs
        with recording(student) as shared:
            outputs = fused_forward(*args, **kwargs)
        teacher_hidden = teacher_pass(self.teacher.model, shared, plan)
        if not self._quantization_measured:
            self._measure_quantization(shared, plan, teacher_hidden)
        shared.release()

        cross_entropy = -outputs.log_probs  # (B, T - 1), zero where ignored
        rows, positions = plan.loss_rows, plan.loss_positions
        student_ce = cross_entropy[rows, positions].detach()
        hidden = shared.last_hidden_state[rows, positions]  # type: ignore[index]  # (N, H_s), with gradient
        student_head, teacher_head = head_of(student).whole(), self.teacher.head.whole()
        result = distil(
            hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            labels[rows, positions + 1],
            -student_ce,
            margin=config.distill_margin if config.distill_tokens == "confident" else None,
            beta=config.beta,
            temperature=config.temperature,
        )
        per_token = combine(
            cross_entropy,
            result.divergence,
            result.chosen,
            rows,
            positions,
            ce_weight=config.ce_weight,
            distill_weight=config.distill_weight,
        )
        self._add_sums(
            labels=outputs.label_mask.sum(),
            ce=cross_entropy.detach().sum(),
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
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]

    # ----------------------------------------------------------------------------------------------------------------
    # Metrics
    # ----------------------------------------------------------------------------------------------------------------
    def _add_sums(self, **sums: torch.Tensor | int) -> None:
        """Add to the sums of the current mode, on the device and without reading anything back."""
        total = self._sums["train" if self.model.training else "eval"]
        for name, value in sums.items():
            total[_SUMS.index(name)] += value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the distillation metrics (token means over all processes since the last log) to TRL's, then log."""
        mode = "train" if self.model.training else "eval"
        sums = dict(zip(_SUMS, self.accelerator.reduce(self._sums[mode], reduction="sum").tolist(), strict=True))
        self._sums[mode].zero_()
        if sums["labels"] > 0:
            metrics = {"ce_loss": sums["ce"] / sums["labels"], "distilled_tokens": sums["distilled"]}
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
        if not resume_from_checkpoint:
            _check_output_dir(self.args)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _plain_student(self) -> PreTrainedModel:
        return self.model.get_base_model() if is_peft_model(self.model) else self.model  # type: ignore[no-any-return]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]
        for column in (self.args.distill_column, ROW_COLUMN):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def _reject_skip_prepare_without_labels(self, datasets: Any, data_collator: Any) -> None:
        inner = data_collator.inner if isinstance(data_collator, DistillCollator) else data_collator
        super()._reject_skip_prepare_without_labels(datasets, inner)


def _reference(model: Any) -> str:
    """The name or path that a model was loaded from (empty if it was built in memory)."""
    return model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "")


def _as_dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _is_quantised(model: PreTrainedModel) -> bool:
    return getattr(model, "hf_quantizer", None) is not None


def _check_output_dir(args: LinguDistillConfig) -> None:
    folder = Path(str(args.output_dir))
    marks = ("trainer_state.json", "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    held = [name for name in marks if (folder / name).exists()] + sorted(p.name for p in folder.glob("checkpoint-*"))
    if held and not args.overwrite_output_dir:
        raise ValueError(
            f"output_dir {str(folder)!r} holds another run ({held[0]}): choose another folder, continue it with "
            "--resume_from_checkpoint PATH/checkpoint-N, or pass --overwrite_output_dir."
        )


def _warn_if_grounding_is_at_risk(args: LinguDistillConfig, dataset: Dataset | IterableDataset) -> None:
    """KL alone on answers about an image erases grounding: the teacher cannot see (docs/method.md)."""
    if args.ce_weight > 0 or args.distill_tokens != "all" or not has_images(dataset.column_names or []):
        return
    if isinstance(dataset, Dataset):
        column = "images" if "images" in dataset.column_names else "image"
        raw = prepare_dataset(dataset)
        flags = raw[args.distill_column] if args.distill_column in raw.column_names else [True] * len(raw)
        if not any(flag and images for flag, images in zip(flags, raw[column], strict=True)):
            return
    logger.warning(
        "ce_weight=0 and distill_tokens='all', and rows with images are marked for distillation: the divergence alone erases "
        "what the student knows about images, because the teacher cannot see them. Use distill_tokens='confident', or "
        "ce_weight > 0, or mark only text rows."
    )
