"""`OnPolicyLinguDistillTrainer`: the same step on answers that the student samples itself.

TRL's `DistillationTrainer` samples (transformers or vLLM, buffered over an accumulation) and asks `_compute_loss` about what was
sampled. Here `DistillStep` answers: rows marked for language are judged by the LM, which reads the student's keys and values, the others
by the VLM as it was before training. Nothing is a label: both judges compare whole distributions, at every sampled token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DistillationTrainer

from ._internals import DataCollatorForVisionLanguageModeling, RepeatSampler, is_vllm_available
from .bad_rows import ROW_COLUMN
from .config import OnPolicyLinguDistillConfig
from .engines import gathered_for_sampling, head_unsharded, sharding_of
from .hub.mixin import PublishingMixin
from .losses import Weights
from .opening import check_evaluation_rows
from .pace import Pace
from .prompts import PromptCollator, drop_bad_prompts, open_prompts
from .resume import ResumingMixin
from .step_mixin import StepMixin, all_marked, check_best_metric
from .teacher_mixin import as_dict
from .weights import only_whole

logger = logging.getLogger(__name__)

# Of what TRL hands to `_compute_loss`, all else is for the student's forward
_NOT_OF_THE_STUDENT = {
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "num_items_in_batch"),
    *("num_images", "num_tiles", ROW_COLUMN),
}
_OF_TOKENS = ("input_ids", "attention_mask", "labels", "distill", "token_type_ids", "mm_token_type_ids")


def check_student(student: PreTrainedModel) -> None:
    """Raise ValueError for a student whose sampled answers would be judged wrongly, and warn of a loss that is left out."""
    if student.config.model_type == "paligemma":
        raise ValueError(
            "PaliGemma reads a prompt in both directions and an answer in one, and tells them apart by token types that sampled answers "
            "do not have here: train on given answers (LinguDistillTrainer)."
        )
    if getattr(student.config.get_text_config(), "output_router_logits", False):
        logger.warning("The router's load-balancing loss is left out on-policy: watch how evenly experts are used.")


class OnPolicyLinguDistillTrainer(StepMixin, PublishingMixin, ResumingMixin, DistillationTrainer):  # type: ignore[override]  # what others set is measured here
    """Distil a VLM's original LM back into it, on the VLM's own answers: prompts are enough.

    Everything that [`~trl.DistillationTrainer`] accepts is accepted here; `teacher_tokenizer` is added.

    Args:
        model: the student VLM, or its Hub id or folder.
        args ([`OnPolicyLinguDistillConfig`]): the configuration.
        teacher_model: the frozen LM, or its Hub id or folder; overrides `args.teacher_model_name_or_path`. A model object is not
            quantised again; it is frozen, and its embeddings grow to the student's vocabulary.
        teacher_tokenizer: for the vocabulary check; loaded from the teacher's folder or id where left out.
        train_dataset: rows with `prompt` (a text or turns) or `messages`, whose last answer is left out; `images` or `image`; and
            `distill`, by which the judge is chosen.
        eval_dataset: likewise, one set or several by name.
        **kwargs: everything else goes to `DistillationTrainer`.

    Raises:
        ValueError: if student and teacher do not fit (see `check_compatibility`), if a row asks nothing or nobody judges its answer,
            if the LM does not know how the student ends an answer, or if `output_dir` holds another run.
        ImportError: if `use_vllm` is set and vLLM is not installed.

    Examples:
        >>> trainer = OnPolicyLinguDistillTrainer(
        ...     model="HuggingFaceTB/SmolVLM-256M-Instruct",
        ...     teacher_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        ...     args=OnPolicyLinguDistillConfig(output_dir="smolvlm-fluent"),
        ...     train_dataset=prompts,
        ... )
        >>> trainer.train()
    """

    args: OnPolicyLinguDistillConfig
    train_dataset: Any  # narrower than transformers' declarations, which admit None
    processing_class: Any

    _tag_names = ["trl", "on-policy", "lingudistill", "distillation"]

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        args: OnPolicyLinguDistillConfig | None = None,
        *,
        teacher_model: str | PreTrainedModel | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        train_dataset: Dataset | IterableDataset | list[dict[str, Any]] | None = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = OnPolicyLinguDistillConfig()
        if not isinstance(args, OnPolicyLinguDistillConfig):
            raise TypeError(f"args must be an OnPolicyLinguDistillConfig, got {type(args).__name__}.")
        if args.use_vllm and not is_vllm_available():
            raise ImportError(
                "use_vllm=True needs the package vllm, which is not installed (or not in a release that TRL takes): `pip install "
                "trl[vllm]`, or leave use_vllm out to sample with transformers."
            )
        self.before_init(model, teacher_model, teacher_tokenizer, args, kwargs)
        opened, vision = open_prompts(train_dataset, eval_dataset, args)
        self.has_distill_column, self.distill_share = opened.has_distill_column, opened.distill_share
        check_best_metric(args, opened.evaluation, computed=kwargs.get("compute_metrics") is not None, more=True)
        if args.anchor == "none" and self.distill_share not in (None, 1.0):
            raise ValueError(
                f"anchor='none' leaves {1 - self.distill_share:.0%} of the rows without a judge, those that column "
                f"{args.distill_column!r} marks false: leave anchor out, or mark every row true."
            )
        if (
            args.ddp_find_unused_parameters is None
        ):  # as TRL 1.16: a batch of texts leaves the vision tower without gradients
            args.ddp_find_unused_parameters = not as_dict(args.gradient_checkpointing_kwargs).get("use_reentrant")
        with only_whole():
            super().__init__(
                model=model, args=args, train_dataset=opened.train, eval_dataset=opened.evaluation, **kwargs
            )
        if args.torch_compile and self.accelerator.num_processes > 1 and sharding_of(self.accelerator) is None:
            raise ValueError(
                "torch_compile on-policy on several processes needs an engine that shards weights: TRL's loss goes past a compiled DDP, which "
                "then does not join the gradients of the processes. Leave torch_compile out, or train under FSDP2."
            )
        check_student(self._plain_student())
        self.data_collator: Any = PromptCollator(
            args.distill_column,
            getattr(self.processing_class, "image_token", None),
            vision=vision,
            judged=args.anchor != "none",
        )
        if args.skip_bad_rows and opened.train is not None:
            opened = drop_bad_prompts(opened, self.data_collator)
            self.train_dataset, self.eval_dataset = opened.train, opened.evaluation
        elif opened.evaluation is not None and args.eval_strategy != "no":
            check_evaluation_rows(self.eval_dataset, self.data_collator)
        self.skipped_rows = opened.skipped_rows
        if self.skipped_rows:
            logger.warning("Skipped %d rows: %s", sum(self.skipped_rows.values()), dict(self.skipped_rows))
        if self.accelerator.is_main_process and self.has_distill_column is False:
            logger.warning("The dataset has no column %r: the language model judges every row.", args.distill_column)
        weights = Weights(
            cross_entropy=0.0,
            divergence=args.distill_weight,
            beta=args.beta,
            temperature=args.temperature,
            blind=args.blind_weight or 0.0,
            anchor=1.0,
            anchor_beta=args.beta,
            anchor_temperature=args.temperature,
            unjudged=0.0,
        )
        self.prepare_step(weights, sampled=True)
        if vision:
            self.share_towers(DataCollatorForVisionLanguageModeling(self.processing_class))
        self._check_ends()
        self._suppress_placeholders()
        self._resuming()
        self.pace = Pace()
        self.add_callback(self.pace)

    def _check_ends(self) -> None:
        """The LM must know how the student ends an answer: judged by one that does not, the student learns never to stop."""
        vocabulary, ids = self.teacher.vocabulary, torch.tensor(sorted(set(self.eos_token_ids)))
        known = vocabulary.scorable(ids)
        spoken_for = {theirs for _, theirs in vocabulary.aliases}
        unknown = [repr(self._tokenizer.convert_ids_to_tokens(i)) for i in ids[~known].tolist() if i not in spoken_for]
        if not known.any():
            raise ValueError(
                f"The student ends an answer with {', '.join(unknown)}, which the language model does not know: judged by it, the student "
                "would learn never to stop. Use the instruct LM that the VLM was built from, whose chat template says how it ends a turn."
            )
        if unknown:
            logger.warning(
                "Of the tokens that end an answer, the language model does not know %s: on rows that it judges, the student will end its "
                "answers with the others.",
                ", ".join(unknown),
            )

    def _suppress_placeholders(self) -> None:
        """No sampled token may stand for an image that is not there. vLLM has no such option."""
        if self.use_vllm:
            return
        given = self.generation_kwargs.get("suppress_tokens") or []
        ids = sorted({*given, *self.compatibility.image_token_ids})
        self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens = ids or None

    # ----------------------------------------------------------------------------------------------------------------
    # Sampling
    # ----------------------------------------------------------------------------------------------------------------
    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        """TRL's sampler, with an order that depends on seed and epoch alone: a resumed run may begin in a later one."""
        return _EpochOrder.of(super()._get_train_sampler(dataset))

    def open_later(self, dataset: Any) -> Any:
        """Evaluation sets that are given when the trainer is made already.

        Raises:
            ValueError: see `open_prompts`; for images where the training set has none, and rows that nobody judges.
        """
        opened, vision = open_prompts(None, dataset, self.args, has_distill_column=self.has_distill_column)
        if vision and not self.data_collator.vision:
            raise ValueError(
                "The evaluation set has images and the training set has none: pass it as eval_dataset when the trainer is made."
            )
        if self.args.anchor == "before" and self.step.judge is None:
            if not all_marked(opened.evaluation, self.args.distill_column):
                raise ValueError(
                    f"The evaluation set has rows that column {self.args.distill_column!r} marks false, and no VLM before is there to judge "
                    "them, since the training set has none: pass it as eval_dataset when the trainer is made."
                )
        return opened.evaluation

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, in the arithmetic in which the answers are judged; where FSDP2 splits the student, with all of it on every process."""
        whole = nullcontext() if self.use_vllm else gathered_for_sampling(self.model_wrapped)  # vLLM has its own copy
        with self.accelerator.autocast(), whole:
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _generate(self, prompts: list[Any]) -> Any:
        """TRL's, where a row of text has an empty list of images: processors take no None."""
        prompt_ids, completion_ids, tool_mask, images, tool_images = super()._generate(prompts)
        images = None if images is None else [of_row or [] for of_row in images]
        return prompt_ids, completion_ids, tool_mask, images, tool_images

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's sampling of one answer per row, which travels with the row's mark and number."""
        with _left_padded(self._tokenizer):
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        device = self.accelerator.device
        output["distill"] = torch.tensor([row["distill"] for row in inputs], device=device)
        output[ROW_COLUMN] = torch.tensor([row[ROW_COLUMN] for row in inputs], device=device)
        pixels = output.get("pixel_values")
        if pixels is not None and pixels.ndim == 5:
            # (B, images, C, H, W) goes with the rows. TRL tells that by B != number of images, which is no sign
            output.pop("num_images", None)
        return output

    # ----------------------------------------------------------------------------------------------------------------
    # The step
    # ----------------------------------------------------------------------------------------------------------------
    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's, which samples; it also tells the step whether some process has an image."""
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self.step.same_modules is not None:
            sampled = self._buffered_inputs if self.model.training else None  # of the whole optimizer step
            self.step.same_modules.look_at(sampled or [inputs])
        return inputs

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum over sampled tokens of `distill_weight * D(LM, student)` (marked rows) or `D(VLM before, student)` (the others), over the
        number of sampled tokens of the *global* batch. Tokens of marked rows after one that the LM cannot read have no loss."""
        self.begin_batch(inputs["prompt_ids"], inputs.get(ROW_COLUMN))
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        self.end_batch(model)
        return loss

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In place of TRL's, inside the wrapped student's forward. -> loss, sum of the student's entropies, number of tokens."""
        with self.accelerator.autocast(), head_unsharded(self.step.student):
            output = self.step(self._batch(inputs))
        count = output.label_mask.sum()
        items = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return -output.log_probs / items, output.entropy.sum().detach(), count

    def _batch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What TRL sampled, as the step takes it: labels (B, T) are the sampled tokens, -100 at prompts, padding and what tools said."""
        prompt, answer = inputs["prompt_ids"], inputs["completion_ids"]
        sampled = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            sampled &= inputs["tool_mask"].bool()
        batch = {
            name: value for name, value in inputs.items() if name not in _NOT_OF_THE_STUDENT and value is not None
        }
        batch["input_ids"] = torch.cat([prompt, answer], dim=1)
        batch["attention_mask"] = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        batch["labels"] = torch.cat([torch.full_like(prompt, -100), answer.masked_fill(~sampled, -100)], dim=1)
        placeholders = torch.tensor(self.compatibility.image_token_ids, device=prompt.device)
        if not torch.isin(batch["input_ids"], placeholders).any():  # an accumulation's part without an image
            return {name: batch[name] for name in _OF_TOKENS if name in batch}
        return batch


class _EpochOrder(RepeatSampler):
    """TRL's sampler draws an epoch's order after that of the epoch before; this one from seed and epoch."""

    epoch = 0

    @classmethod
    def of(cls, sampler: Any) -> _EpochOrder:
        sampler.__class__ = cls
        assert isinstance(sampler, cls)
        return sampler

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + self.epoch)
        return iter(super().__iter__())  # type: ignore[no-untyped-call]


@contextmanager
def _left_padded(tokenizer: Any) -> Iterator[None]:
    """TRL takes the processor's token types as they are, beside prompts that it pads on the left itself."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side
