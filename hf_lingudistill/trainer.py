"""`LinguDistillTrainer`: TRL's `SFTTrainer` with the original LM as a teacher that reads the student's K/V.

Wiring only. What happens to a batch is in `step.py`: `SFTTrainer.compute_loss` calls the student, the step answers, and `SFTTrainer`
divides the sum by the number of labels in the global batch.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from .bad_rows import ROW_COLUMN
from .cache_mixin import CacheMixin
from .config import LinguDistillConfig
from .data_mixin import DataMixin
from .hub.mixin import PublishingMixin
from .losses import Weights
from .pace import Pace
from .resume import ResumingMixin
from .router import prepare_router
from .step_mixin import StepMixin, check_best_metric
from .weights import only_whole

logger = logging.getLogger(__name__)

_ANOTHER = (
    "The student's forward is no longer this trainer's: another trainer was made with the same student since, or the trainer was given another "
    "model, and the loss would be that one's. Make this trainer anew, or give each trainer a student of its own."
)


class LinguDistillTrainer(DataMixin, StepMixin, CacheMixin, PublishingMixin, ResumingMixin, SFTTrainer):  # type: ignore[override]  # what others set is measured here
    """Distil a VLM's original LM back into it.

    Everything that [`~trl.SFTTrainer`] accepts is accepted here; two arguments are added.

    Args:
        model: the student VLM, or its Hub id or folder.
        args ([`LinguDistillConfig`]): the configuration.
        teacher_model: the frozen LM, or its Hub id or folder; overrides `args.teacher_model_name_or_path`. Of a VLM, the text half
            teaches (with `kv_sharing="images"`, all of it). A model object is not quantised again; it is frozen, and its embeddings grow
            to the student's vocabulary.
        teacher_tokenizer: its tokenizer or processor, for the checks; loaded from the teacher's folder or id where left out.
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
        self.before_init(model, teacher_model, teacher_tokenizer, args, kwargs)
        train_dataset, eval_dataset = self.open_data(train_dataset, eval_dataset, args, kwargs)
        own_values = kwargs.get("compute_metrics") is not None or type(self) is not LinguDistillTrainer
        check_best_metric(args, eval_dataset, computed=own_values)
        # Each process reads its own part of a stream, of the evaluation's too: rows that differ in length cannot be handed out
        loading: Any = args.accelerator_config
        if loading.dispatch_batches is None:
            loading.dispatch_batches = False
        with only_whole():
            super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        # Many VLM classes say that they do not take `num_items_in_batch`, and transformers then counts no labels. The step takes them.
        self.model_accepts_loss_kwargs = True
        prepare_router(self._plain_student())
        self.collate_rows(
            self.compatibility.image_token_ids, prefix_lm=self._plain_student().config.model_type == "paligemma"
        )
        weights = Weights(
            cross_entropy=args.ce_weight,
            divergence=args.distill_weight,
            margin=args.distill_margin if args.distill_tokens == "confident" else None,
            beta=args.beta,
            temperature=args.temperature,
            blind=args.blind_weight or 0.0,
            anchor=args.anchor_weight,
        )
        self.prepare_step(weights)
        if self._is_vision_dataset:
            self.share_towers(self.data_collator.inner)
        elif args.blind_weight and self.accelerator.is_main_process:
            logger.warning("blind_weight=%g changes nothing: the training set has no images.", args.blind_weight)
        self.data_collator.plan = None if self._splits_batches() else self.step.planner
        self.step.install()
        self.prepare_caches()
        self._resuming()
        self.pace = Pace()
        self.add_callback(self.pace)

    # ----------------------------------------------------------------------------------------------------------------
    # The step
    # ----------------------------------------------------------------------------------------------------------------
    def _splits_batches(self) -> bool:
        """Whether one process reads batches and hands each of the others a slice: a plan cannot be sliced."""
        return bool(self.accelerator.dispatch_batches) and self.accelerator.num_processes > 1

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

        Raises:
            ValueError: if another trainer was made with this student since: the loss would be that one's, or plain cross-entropy.
        """
        if "distill" not in inputs:  # a collator or dataloader of the caller's own
            inputs["distill"] = torch.ones(
                inputs["input_ids"].shape[0], dtype=torch.bool, device=inputs["input_ids"].device
            )
        rows = inputs.pop(ROW_COLUMN, None)
        if self._plain_student() is not self.step.student:
            raise ValueError(_ANOTHER)
        self.begin_batch(inputs["input_ids"], rows)
        calls = self.step.calls
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        if self.step.calls == calls:
            raise ValueError(_ANOTHER)
        self.end_batch(model)
        return loss
