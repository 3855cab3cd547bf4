"""`SFTTrainer`'s datasets and collator, for rows as people have them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset, List, Value
from trl import SFTTrainer

from .bad_rows import ROW_COLUMN, SOURCE_COLUMN, AnyDataset, BadRow, Row, SharedCounts, flag_of, row_name
from .batch import DistillCollator
from .columns import columns_of, first_row, has_images, names_an_image, undecoded_rows
from .config import LinguDistillConfig, shown
from .conversations import Conversations, no_label_within
from .flags import packs
from .formats import CONVERSATION_COLUMNS, check_answer, check_columns, check_not_json_turns, check_text, may_be_media
from .opening import (
    check_evaluation_rows,
    drop_bad_rows,
    each,
    open_datasets,
    open_evaluation,
    said_if_dropped,
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
            self.skipped_rows = {**self.skipped_rows, **dropped} if self.skipped_rows else dropped
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
            dataset, formatting_func = _formatted(dataset, formatting_func, dataset_name, args), None
        given, left_out = dataset, 0
        # The other strategies split what is too long
        cuts = packing and args.packing_strategy == "bfd" and args.max_length is not None
        ours = cuts or not conversations.reads_as_trl
        if formatting_func is None and _is_ours(dataset, args.dataset_text_field, any_prompt=ours):
            dataset, dropped = _tokenised(
                dataset, conversations, dataset_name, args, self._skipped_of(dataset_name, args)
            )
            self._count(dropped, dataset_name)
            left_out = sum(dropped.values())
            if cuts:
                dataset = self._with_labels(dataset, args, dataset_name, args.max_length)
        elif "input_ids" in columns_of(dataset):
            dataset = given = self._with_labels(dataset, args, dataset_name, None)
        elif formatting_func is None and self._reads_rows and not args.skip_bad_rows:  # else they are gone
            dataset = _answered(dataset, dataset_name, args)
        # A stream has no length by which dropped rows could be missed: it is cut here
        cut_here = isinstance(dataset, IterableDataset) and args.max_length is not None and not packing
        how = copy(args) if cut_here else args
        if cut_here:
            how.max_length = None
        only_completions = self.completion_only_loss
        if args.completion_only_loss is None and "completion_mask" in columns_of(dataset):
            self.completion_only_loss = (
                True  # tokens that came with that mask: TRL looks for a prompt, and else passes it over
            )
        try:
            prepared = super()._prepare_dataset(dataset, processing_class, how, packing, formatting_func, dataset_name)
        except BadRow:
            raise
        except Exception as error:
            if _is_about_settings(error):
                raise
            if formatting_func is None and "input_ids" not in columns_of(dataset):
                for number, row in enumerate(dataset):
                    conversations.tokens(row, _name(number, dataset_name, row))  # raises for the row that is at fault
            why = " ".join(str(error).split())[:300]
            raise ValueError(
                f"The {dataset_name} dataset cannot be tokenised ({type(error).__name__}: {why})."
            ) from error
        finally:
            self.completion_only_loss = only_completions
        if cut_here:
            return _within(prepared, args, self._skipped_of(dataset_name, args), dataset_name)
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
        columns = _label_columns(columns_of(dataset))
        if not columns:
            return dataset
        if isinstance(dataset, IterableDataset):
            return _within(dataset, args, self._skipped_of(dataset_name, args), dataset_name, kept=slice(limit))

        def has_label(row: Row) -> bool:
            first = _first_label(_labels_of(row))
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
            name = _name(number, dataset_name, dataset[number])
            raise _no_label(name, _first_label(_labels_of(of_labels[number])), limit)
        if not good:
            within = "is labelled" if limit is None else f"lies within max_length={limit}. Raise max_length"
            raise ValueError(f"No row of the {dataset_name} dataset is left: no answer token {within}.")
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
            first = _first_label(labels)
            if first is not None and first >= limit:
                raise no_label_within(_name(number, dataset_name, row), first, first + 1, limit)
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


_BAD = "__bad_row"  # why a row is left out; gone before training
_MADE_BY_TRL = ("labels", "assistant_masks", "completion_mask", "attention_mask", "seq_lengths", "position_ids")


def _is_about_settings(error: Exception) -> bool:
    """Whether an error of the preparation comes from `SFTTrainer` itself, not from a row or a library below it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == SFTTrainer.__module__


def _name(number: int, dataset_name: str, row: Row) -> str:
    if row.get(SOURCE_COLUMN):
        return row_name(row)
    return f"Row {number}" if dataset_name == "train" else f"Row {number} of dataset {dataset_name!r}"


def _first_label(labels: list[int]) -> int | None:
    return next((place for place, label in enumerate(labels) if label != -100), None)


def _within(
    dataset: IterableDataset, args: Any, skipped: Any, name: str, kept: slice | None = None
) -> IterableDataset:
    """A stream of tokens and labels, cut to `max_length` as TRL cuts (`kept`: as packing does); a row without a label there is refused, or
    left out and counted in skipped."""
    limit = args.max_length
    if kept is None:
        kept = slice(-limit, None) if args.truncation_mode == "keep_end" else slice(limit)

    def usable(row: Row, index: int) -> bool:
        labels = _labels_of(row)
        if _first_label(labels[kept]) is not None:
            return True
        if isinstance(skipped, SharedCounts):
            skipped.add("no label")
        elif skipped is None:
            raise _no_label(_name(index, name, row), _first_label(labels), limit)
        return False

    def cut(row: Row) -> Row:
        return {column: row[column][kept] for column in ("input_ids", *_label_columns(row))}

    return dataset.filter(usable, with_indices=True).map(cut)


def _label_columns(columns: Iterable[str]) -> list[str]:
    """The columns that say which tokens of a row are trained on; none where all are."""
    names = set(columns)
    return (
        ["labels"] if "labels" in names else [mask for mask in ("completion_mask", "assistant_masks") if mask in names]
    )


def _labels_of(row: Row) -> list[int]:
    """A row's labels; of masks, 0 for what is trained on."""
    columns = _label_columns(row)
    if columns == ["labels"]:
        return list(row["labels"])
    return [0 if all(bits) else -100 for bits in zip(*(row[column] for column in columns), strict=False)]


def _no_label(name: str, first: int | None, limit: int | None) -> BadRow:
    if first is None or limit is None:
        return BadRow("no label", f"{name} has no token to train on: all of its labels are masked.")
    return no_label_within(name, first, first + 1, limit)


def _formatted(dataset: AnyDataset, formatting_func: Any, name: str, args: Any) -> AnyDataset:
    """What `formatting_func` makes of each row, alone: TRL would read the conversation that it was made of in its stead."""

    def text(row: Row, index: int) -> Row:
        made = formatting_func(row)
        if not isinstance(made, str):
            raise ValueError(
                f"formatting_func gave {type(made).__name__} {shown(made)} for {_name(index, name, row)}: expected a text."
            )
        return {args.dataset_text_field: made}

    read = {*CONVERSATION_COLUMNS, "prompt", "completion", args.dataset_text_field, "tools", "chat_template_kwargs"}
    gone = [column for column in columns_of(dataset) if column in read]
    options: Row = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
    return dataset.map(text, with_indices=True, remove_columns=gone, **options)


def _answered(dataset: AnyDataset, name: str, args: Any) -> AnyDataset:
    """Prompts and completions, or running text, that TRL tokenises; an empty completion, what is no text, media that nobody reads, and a
    flag that is not boolean are refused with the row's name."""
    columns, text_column = columns_of(dataset), args.dataset_text_field
    column = "completion" if "completion" in columns else text_column
    if column not in columns or "input_ids" in columns:
        return dataset
    # TRL would take a column of such a name for what it makes itself
    if taken := [name for name in _MADE_BY_TRL if name in columns]:
        dataset = dataset.remove_columns(taken)
        columns = [name for name in columns if name not in taken]

    def check(row: Row, index: int) -> None:
        known_as = _name(index, name, row)
        flag_of(row, args.distill_column, known_as)
        check_columns(row, known_as)
        if column == "completion":
            check_answer(row, known_as)
            check_not_json_turns(row, known_as)
        else:
            check_text(row, known_as, column)

    if isinstance(dataset, Dataset):
        looked_at = [
            column,
            *(["prompt"] if column == "completion" and "prompt" in columns else []),
            *(
                other
                for other in columns
                if other == SOURCE_COLUMN or may_be_media(other) or names_an_image(dataset.features[other])
            ),
        ]
        for number, row in enumerate(undecoded_rows(dataset.select_columns(looked_at))):
            check(row, number)
        return dataset

    def checked(row: Row, index: int) -> Row:
        check(row, index)
        return row

    return dataset.map(checked, with_indices=True, features=dataset.features)


def _tokenised(
    dataset: AnyDataset, conversations: Conversations, name: str, args: Any, skipped: Any
) -> tuple[AnyDataset, Mapping[str, int]]:
    """Tokens and labels of every row. -> (dataset, number of rows that were left out by reason); those of a stream are counted in `skipped`
    as it is read."""
    leaves_out = args.skip_bad_rows

    def tokens(row: Row, index: int) -> Row:
        row = {("text" if key == args.dataset_text_field else key): value for key, value in row.items()}
        known_as = _name(index, name, row)
        try:
            flag_of(row, args.distill_column, known_as)
            found = conversations.tokens(row, known_as)
        except BadRow as error:
            if not leaves_out:
                raise
            return {"input_ids": [], "labels": [], _BAD: error.reason}
        return {**found, _BAD: ""} if leaves_out else found

    state = PartialState()
    if state.is_main_process and name == "train":
        conversations.say_what_is_labelled(first_row(dataset))
    # a stream knows neither option
    options: Row = (
        {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {name} dataset"}
        if isinstance(dataset, Dataset)
        else {}
    )
    with state.main_process_first():
        dataset = dataset.map(tokens, with_indices=True, **options)
        if not leaves_out:
            return dataset, {}
        if isinstance(dataset, IterableDataset):

            def usable(reason: str) -> bool:
                if reason:
                    skipped.add(reason)
                return not reason

            return dataset.filter(usable, input_columns=[_BAD]).remove_columns(_BAD), {}
        reasons = dataset[_BAD]
        good = [number for number, reason in enumerate(reasons) if not reason]
        dropped = Counter(reason for reason in reasons if reason)
        if not good:
            raise ValueError(f"No usable row is left of {len(reasons)}: {dict(dropped)}. Repair the dataset.")
        dataset = dataset.remove_columns(_BAD)
        return (dataset.select(good) if dropped else dataset), dropped


def _is_ours(dataset: AnyDataset, text_column: str, *, any_prompt: bool = False) -> bool:
    """Whether rows are conversations, or prompts and completions of mixed types or beside running text (`any_prompt`: of any): all else, TRL
    tokenises alone."""
    columns = columns_of(dataset)
    if "input_ids" in columns:
        return False
    if any(column in columns for column in CONVERSATION_COLUMNS):
        return True
    if not {"prompt", "completion"} <= set(columns):
        return False
    if text_column in columns or any_prompt:
        return True
    kinds = {_kind((dataset.features or {}).get(column)) for column in ("prompt", "completion")}
    return len(kinds) > 1 or None in kinds


def _kind(feature: Any) -> str | None:
    """`text` and `turns` as TRL takes them; None for what may be anything."""
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return "text"
    if isinstance(feature, List) and isinstance(feature.feature, dict):
        turn = feature.feature
        if set(turn) == {"role", "content"} and all(_kind(value) == "text" for value in turn.values()):
            return "turns"
    return None
