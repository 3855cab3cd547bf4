"""`SFTTrainer`'s datasets and collator, for rows as people have them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from trl import SFTTrainer

from .bad_rows import ROW_COLUMN, SOURCE_COLUMN, AnyDataset, BadRow, Row, SharedCounts, together
from .batch import DistillCollator
from .columns import columns_of, first_row, has_images
from .config import LinguDistillConfig
from .conversations import Conversations, no_label_within
from .flags import packs
from .opening import (
    check_evaluation_rows,
    drop_bad_rows,
    each,
    open_datasets,
    open_evaluation,
    said_if_dropped,
)
from .token_rows import (
    answered,
    first_label,
    formatted,
    is_ours,
    label_columns,
    labels_of,
    no_label,
    row_of,
    tokenised,
    within,
)

if TYPE_CHECKING:
    _Trainer = SFTTrainer
else:
    _Trainer = object  # at run time a trainer class stands behind the mixin: `class MyTrainer(DataMixin, SFTTrainer)`

logger = logging.getLogger(__name__)


class DataMixin(_Trainer):
    """Takes datasets of every format of docs/data.md, and labels the assistant's turns of `messages` alone.

    Mixed in before `SFTTrainer`. `open_data` goes before its `__init__`, `collate_rows` after it.

    Attributes:
        has_distill_column: whether rows carry the flag; None where a stream's columns are not known and none was found.
        distill_share: the share of marked rows; None where not all rows were read.
        skipped_rows: number of training rows left out, by reason.
    """

    args: LinguDistillConfig
    train_dataset: Any
    processing_class: Any
    _signature_columns: Any

    has_distill_column: bool | None = False
    distill_share: float | None = None
    skipped_rows: Mapping[str, int] = {}
    _reads_rows = True  # and not a `formatting_func` or a collator of the caller's own

    def open_data(
        self, train: Any, evaluation: Any, args: LinguDistillConfig, kwargs: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        """Training and evaluation sets as `SFTTrainer.__init__` takes them. kwargs: what else that gets.

        Raises:
            ValueError: see `open_datasets`.
        """
        own_reader = kwargs.get("formatting_func") is not None or kwargs.get("data_collator") is not None
        self._reads_rows = not own_reader
        opened = open_datasets(train, evaluation, args, checked=not own_reader)
        if kwargs.get("formatting_func") is not None and has_images(columns_of(opened.train)):
            raise ValueError(
                "formatting_func is not called for rows with images, which TRL reads as they are: apply it to the dataset beforehand, or leave it "
                "out."
            )
        self.has_distill_column, self.distill_share = opened.has_distill_column, opened.distill_share
        self.skipped_rows = opened.skipped_rows
        return opened.train, opened.evaluation

    def collate_rows(self, image_token_ids: tuple[int, ...], *, prefix_lm: bool) -> None:
        """Put our collator around TRL's, and leave bad rows out where that is asked for. See `DistillCollator`."""
        args = self.args
        # A sentence of its own, before TRL's collator fails on a row, which would be blamed for it
        if args.pad_to_multiple_of and self._is_vision_dataset and "prompt" in columns_of(self.train_dataset):
            raise ValueError(
                "pad_to_multiple_of does not go with prompts and completions that have images (TRL joins the two itself): leave it out, or "
                "give the rows as `messages`."
            )
        self.data_collator: Any = DistillCollator(
            self.data_collator,
            distill_column=args.distill_column,
            max_length=args.max_length,
            image_token_ids=image_token_ids,
            vision=self._is_vision_dataset,
            prefix_lm=prefix_lm,
            answers_only=args.answers_only or args.assistant_only_loss,
            completion_only=args.completion_only_loss is not False,
        )
        if args.skip_bad_rows and self._is_vision_dataset:
            drop = partial(drop_bad_rows, collator=self.data_collator, num_proc=args.dataset_num_proc)
            self.train_dataset, dropped = drop(self.train_dataset)
            self.skipped_rows = together(self.skipped_rows, dropped) if self.skipped_rows else dropped
            if self.eval_dataset is not None:
                self.eval_dataset = each(lambda part: said_if_dropped(*drop(part)), self.eval_dataset)
        elif self._is_vision_dataset and self._reads_rows and self.eval_dataset and args.eval_strategy != "no":
            check_evaluation_rows(self.eval_dataset, self.data_collator, args.dataset_num_proc)
        if self.skipped_rows:
            logger.warning("Skipped %d rows: %s", sum(self.skipped_rows.values()), dict(self.skipped_rows))
        if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) == 0:
            raise ValueError(
                f"No row is left to train on: no answer token lies within max_length={args.max_length}. Raise max_length."
            )
        if self.accelerator.is_main_process and self.has_distill_column is False:
            logger.warning("The dataset has no column %r: every row is distilled.", args.distill_column)
        if self.accelerator.is_main_process and self.data_collator.conversations is not None:
            self.data_collator.conversations.say_what_is_labelled(first_row(self.train_dataset, self.skipped_rows))

    # ----------------------------------------------------------------------------------------------------------------
    # SFTTrainer's own
    # ----------------------------------------------------------------------------------------------------------------
    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """`SFTTrainer._prepare_dataset`; conversations come to it as tokens and labels, and what goes wrong names its row."""
        conversations = Conversations(
            processing_class,
            self.chat_template,
            args.answers_only or args.assistant_only_loss,
            completion_only=args.completion_only_loss is not False,
        )
        if formatting_func is not None and "input_ids" not in columns_of(dataset):
            dataset, formatting_func = formatted(dataset, formatting_func, dataset_name, args), None
        given, left_out = dataset, 0
        # The other strategies split what is too long
        cuts = packing and args.packing_strategy == "bfd" and args.max_length is not None
        ours = cuts or not conversations.reads_as_trl
        if formatting_func is None and is_ours(dataset, args.dataset_text_field, any_prompt=ours):
            dataset, dropped = tokenised(
                dataset, conversations, dataset_name, args, self._skipped_of(dataset_name, args)
            )
            self._count(dropped, dataset_name)
            left_out = sum(dropped.values())
            if cuts:
                dataset = self._with_labels(dataset, args, dataset_name, args.max_length)
        elif "input_ids" in columns_of(dataset):
            dataset = given = self._with_labels(dataset, args, dataset_name, None)
        elif formatting_func is None and self._reads_rows and not args.skip_bad_rows:  # else they are gone
            dataset = answered(dataset, dataset_name, args)
        # A stream has no length by which dropped rows could be missed: it is cut here
        cut_here = isinstance(dataset, IterableDataset) and args.max_length is not None and not packing
        how = copy(args) if cut_here else args
        if cut_here:
            how.max_length = None
        only_completions = self.completion_only_loss
        if args.completion_only_loss is None and "completion_mask" in columns_of(dataset):
            # Tokens that came with that mask: TRL looks for a prompt, and else passes it over
            self.completion_only_loss = True
        try:
            prepared = super()._prepare_dataset(dataset, processing_class, how, packing, formatting_func, dataset_name)
        except BadRow:
            raise
        except Exception as error:
            if _is_about_settings(error):
                raise
            if formatting_func is None and "input_ids" not in columns_of(dataset):
                for number, row in enumerate(dataset):
                    conversations.tokens(row, row_of(number, dataset_name, row))  # raises for the row that is at fault
            why = " ".join(str(error).split())[:300]
            raise ValueError(
                f"The {dataset_name} dataset cannot be tokenised ({type(error).__name__}: {why})."
            ) from error
        finally:
            self.completion_only_loss = only_completions
        if cut_here:
            return within(prepared, args, self._skipped_of(dataset_name, args), dataset_name)
        lost = 0 if packing or not isinstance(prepared, Dataset) else len(given) - left_out - len(prepared)
        if lost > 0:
            self._say_what_was_cut(given, lost, conversations, args, dataset_name)
        return prepared

    def _count(self, dropped: Mapping[str, int], dataset_name: str) -> None:
        """Rows that were left out of a set while it was prepared, by reason."""
        if not dropped:
            return
        if dataset_name != "train":
            said_if_dropped(None, dropped)
            return
        for reason, count in dropped.items():
            self.skipped_rows = {**self.skipped_rows, reason: self.skipped_rows.get(reason, 0) + count}

    def _skipped_of(self, dataset_name: str, args: Any) -> Any:
        """Where a stream's bad rows are counted as it is read; None where they are refused."""
        if not args.skip_bad_rows:
            return None
        return self.skipped_rows if dataset_name == "train" else SharedCounts()

    def _with_labels(self, dataset: AnyDataset, args: Any, dataset_name: str, limit: int | None) -> AnyDataset:
        """Rows of tokens; one that has no label before `limit` (where packing cuts it; None: anywhere) is refused, or left out and counted."""
        columns = label_columns(columns_of(dataset))
        if not columns:
            return dataset
        if isinstance(dataset, IterableDataset):
            return within(dataset, args, self._skipped_of(dataset_name, args), dataset_name, kept=slice(limit))

        def has_label(row: Row) -> bool:
            first = first_label(labels_of(row))
            return first is not None and (limit is None or first < limit)

        of_labels = dataset.select_columns(columns)
        usable = of_labels.map(
            lambda row: {"usable": has_label(row)}, remove_columns=columns, num_proc=args.dataset_num_proc
        )["usable"]
        good = [number for number, is_good in enumerate(usable) if is_good]
        lost = len(dataset) - len(good)
        if not lost:
            return dataset
        if not args.skip_bad_rows:
            number = next(number for number, is_good in enumerate(usable) if not is_good)
            name = row_of(number, dataset_name, dataset[number])
            raise no_label(name, first_label(labels_of(of_labels[number])), limit)
        if not good:
            where = "is labelled" if limit is None else f"lies within max_length={limit}. Raise max_length"
            raise ValueError(f"No row of the {dataset_name} dataset is left: no answer token {where}.")
        self._count({"no label": lost}, dataset_name)
        return dataset.select(good)

    def _say_what_was_cut(
        self, dataset: Dataset, lost: int, conversations: Conversations, args: Any, dataset_name: str
    ) -> None:
        """TRL drops rows whose prompt alone fills `max_length`, without a word. Raises for the first of them, or counts them where bad rows
        are skipped. dataset: as it was before."""
        if args.skip_bad_rows:
            self._count({"no label": lost}, dataset_name)
            return
        limit = args.max_length
        for number, row in enumerate(dataset):
            if "labels" not in row and "input_ids" in row:
                break  # its labels come of masks, and which they are is TRL's to know
            labels = row["labels"] if "labels" in row else conversations.tokens(row, "")["labels"]
            first = first_label(labels)
            if first is not None and first >= limit:
                raise no_label_within(row_of(number, dataset_name, row), first, first + 1, limit)
        raise BadRow(
            "no label",
            f"{lost} of the {len(dataset)} rows of the {dataset_name} dataset have no token to train on within max_length={limit}: all labels "
            "are masked there. Raise max_length, or pass --skip_bad_rows.",
        )

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.predict`, for a set of every accepted format, prepared as `evaluate` prepares it."""
        test_dataset = self.open_later(test_dataset)
        if not self._skip_prepare_dataset:
            test_dataset = self._prepare_dataset(
                test_dataset,
                self.processing_class,
                self.args,
                packs(self.args, evaluated=True) is not None,
                self._formatting_func,
                "test",
            )
        return super().predict(test_dataset, *args, **kwargs)

    def open_later(self, dataset: Any) -> Any:
        """Evaluation sets that are given when the trainer is made already. Raises ValueError: see `open_evaluation`."""
        return open_evaluation(
            dataset,
            self.args,
            vision=self._is_vision_dataset,
            has_distill_column=self.has_distill_column,
            checked=self._reads_rows,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]
        columns = [self.args.distill_column, ROW_COLUMN, SOURCE_COLUMN]
        if self._is_vision_dataset:  # TRL's collator does without them; ours reads them
            columns += [self.args.dataset_text_field, "tools", "chat_template_kwargs"]
        if self.args.train_sampling_strategy == "group_by_length":
            columns.append(self.args.length_column_name)  # the sampler looks for it after unused columns are dropped
        for column in columns:
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def _reject_skip_prepare_without_labels(self, datasets: Any, data_collator: Any) -> None:
        inner = data_collator.inner if isinstance(data_collator, DistillCollator) else data_collator
        super()._reject_skip_prepare_without_labels(datasets, inner)


def _is_about_settings(error: Exception) -> bool:
    """Whether an error of the preparation comes from `SFTTrainer` itself, not from a row or a library below it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == SFTTrainer.__module__
