"""A user's datasets on their way to TRL: looked at, their flags and columns checked, images left undecoded.

Whether rows have images, and which columns they have, is found by looking: a stream does not always say, and images may stand in the
turns of a conversation. What is found is written into the columns that TRL goes by.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict, List, Value
from datasets.table import InMemoryTable, concat_tables

from .bad_rows import ROW_COLUMN, AnyDataset, BadRow, Row, flag_of, row_name, without_bad_rows
from .config import LinguDistillConfig
from .formats import (
    CONVERSATION_COLUMNS,
    PAYLOADS,
    as_trl_row,
    check_answer,
    embeds_images,
    has_images,
    pairs_column,
)
from .options import DistillOptions
from .sharing import sharing

logger = logging.getLogger(__name__)

LOOKED_AT = 64  # rows of a stream that does not tell its columns
CHECKED_FIRST = 8  # rows whose shape is checked before anything is loaded


@dataclass
class OpenedData:
    """Datasets as the trainer takes them, and what is known of them.

    train: the training set. evaluation: as it was given, one set or several by name. has_distill_column: whether rows carry the
    flag; None where a stream does not tell its columns and the first rows have none. distill_share: share of marked rows; None where they were not all read. skipped_rows: number of left-out training rows by
    reason (those of a stream are counted as it is read).
    """

    train: Any
    evaluation: Any
    has_distill_column: bool | None = False
    distill_share: float | None = None
    skipped_rows: Mapping[str, int] = field(default_factory=dict)


def open_datasets(train: Any, evaluation: Any, args: LinguDistillConfig, *, checked: bool = True) -> OpenedData:
    """Make a training set and evaluation sets ready for `SFTTrainer`.

    Args:
        train: a `Dataset`, an `IterableDataset`, or a list of rows; evaluation: one of them, several by name, or None.
        args: the configuration. checked: whether the first rows must have an accepted shape (not where a `formatting_func` or a
            collator of the caller's own reads them).

    Raises:
        ValueError: for another type, a flag that is not boolean or marks nothing, options that do not go together, or first rows
            that nothing can be made of.
    """
    opened = OpenedData(train, evaluation)
    if train is None:
        return opened
    skipped: dict[str, int] = {}
    train = as_dataset(train, "train_dataset", args, skipped)
    parts = _by_name(evaluation)
    parts = {name: as_dataset(part, _eval_name(name), args, {}) for name, part in parts.items() if part is not None}
    columns = columns_of(train)
    opened.has_distill_column, opened.distill_share = check_distill_column(
        train, args.distill_column, skip_bad=args.skip_bad_rows, columns=columns
    )
    if not opened.has_distill_column and train.column_names is None:
        opened.has_distill_column = None  # a later row may have it
    _check_packing(args, bool(opened.has_distill_column))
    if args.packing and train.column_names is None:
        train = train.map(_refuse_flag(args.distill_column))
    train, *rest = _with_like_columns([train, *parts.values()], args)
    parts = dict(zip(parts, rest, strict=True))
    vision = has_images(columns_of(train))
    if checked:
        for name, part in {"": train, **parts}.items():
            _check_first_rows(part, f" of {_eval_name(name)}" if name else "", args)
    if args.skip_bad_rows and not vision:
        train, dropped = drop_bad_texts(train, args.distill_column, columns_of(train))
        opened.skipped_rows = dropped if not skipped else {**dropped, **skipped}
        parts = {
            name: said_if_dropped(*drop_bad_texts(part, args.distill_column, columns_of(part)))
            for name, part in parts.items()
        }
    elif skipped:
        opened.skipped_rows = skipped
    opened.train = prepare_dataset(train)
    prepared = {name: prepare_dataset(part) for name, part in parts.items()}
    if evaluation is not None:
        opened.evaluation = prepared if isinstance(evaluation, dict) else prepared.get("", None)
    _warn_if_grounding_is_at_risk(args, opened.train)
    return opened


def open_evaluation(evaluation: Any, args: LinguDistillConfig, *, vision: bool) -> Any:
    """Evaluation sets that are given later, for a trainer whose training set is made of images (vision) or of texts.

    Raises:
        ValueError: for another type, or images where the training set has none.
    """
    parts = {name: as_dataset(part, _eval_name(name), args, {}) for name, part in _by_name(evaluation).items()}
    opened = {}
    for name, part in parts.items():
        (part,) = _with_like_columns([part], args, vision=vision)
        if not vision and has_images(columns_of(part)):
            raise ValueError(
                f"{_eval_name(name).capitalize()} has images and the training set has none: pass it as eval_dataset when the trainer is "
                "made."
            )
        if args.skip_bad_rows and not vision:
            part = said_if_dropped(*drop_bad_texts(part, args.distill_column, columns_of(part)))
        opened[name] = prepare_dataset(part)
    return opened if isinstance(evaluation, dict) else opened[""]


def each(change: Callable[[Any], Any], datasets: Any) -> Any:
    """Change one evaluation set, or each of several by name."""
    if isinstance(datasets, dict):
        return {name: change(part) for name, part in datasets.items()}
    return change(datasets)


def said_if_dropped(dataset: Any, dropped: Mapping[str, int]) -> Any:
    """The dataset; how many rows an evaluation set lost is logged."""
    if dropped:
        logger.warning("Skipped %d rows of an evaluation set: %s", sum(dropped.values()), dict(dropped))
    return dataset


def _by_name(evaluation: Any) -> dict[str, Any]:
    return dict(evaluation) if isinstance(evaluation, dict) else {"": evaluation}


def _eval_name(name: str) -> str:
    return f"evaluation set {name!r}" if name else "the evaluation set"


# --------------------------------------------------------------------------------------------------------------------
# What was given
# --------------------------------------------------------------------------------------------------------------------
def _plain_row(row: Row, name: str) -> Row:
    return row if "input_ids" in row else as_trl_row(row, name, chat=False)


def as_dataset(
    data: Any,
    name: str,
    args: DistillOptions,
    skipped: dict[str, int],
    shape: Callable[[Row, str], Row] = _plain_row,
) -> AnyDataset:
    """A dataset; a list of rows becomes one.

    Args:
        name: how messages name it. skipped: counts rows that are left out, by reason. shape: brings a row of a list, with its name,
            into a form whose images stand in a column of their own, which Arrow can hold.
    """
    if isinstance(data, Dataset | IterableDataset):
        return data
    if isinstance(data, DatasetDict | IterableDatasetDict):
        raise ValueError(
            f"{name} must be one split; found {type(data).__name__} with {', '.join(map(repr, data))}. Did you mean to select "
            f"dataset[{next(iter(data), 'train')!r}]?"
        )
    if not (isinstance(data, list | tuple) and data and all(isinstance(row, dict) for row in data)):
        what = "an empty list" if isinstance(data, list | tuple) and not data else type(data).__name__
        raise ValueError(
            f"{name} must be a datasets.Dataset, a datasets.IterableDataset, or a list of rows (dicts); found {what}."
        )
    rows = []
    for number, row in enumerate(data):
        try:
            rows.append(shape(row, f"Row {number}"))
        except BadRow as error:
            if not args.skip_bad_rows:
                raise
            skipped[error.reason] = skipped.get(error.reason, 0) + 1
    if not rows:
        raise ValueError(f"No usable row is left of {len(data)}: {skipped}. Repair the dataset.")
    if any("images" in row for row in rows):
        rows = [{"images": [], **row} for row in rows]
    try:
        return Dataset.from_list(rows, on_mixed_types="use_json")
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name} is a list of rows that differ in their types ({why}): give each column one type."
        ) from error


def columns_of(dataset: AnyDataset) -> list[str]:
    """The columns of a dataset; of a stream that does not tell them, those of its first rows."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(dict.fromkeys(column for row in islice(iter(dataset), LOOKED_AT) for column in row))


def check_distill_column(
    dataset: AnyDataset, column: str, *, skip_bad: bool = False, columns: list[str] | None = None
) -> tuple[bool, float | None]:
    """Whether the dataset has the flag column, and the share of marked rows (None for a stream or without the column).

    skip_bad: leave rows whose flag is not boolean out of the share; they are dropped later, and counted. columns: the dataset's, if
    they are known already.

    Raises:
        ValueError: if the column is not boolean, or marks no row at all.
    """
    if column not in (columns_of(dataset) if columns is None else columns):
        return False, None
    if isinstance(dataset, IterableDataset):
        return True, None
    values = dataset.with_format(None)[column]
    good = [value for value in values if value in (True, False)]
    if len(good) < len(values) and not (skip_bad and good):
        bad = next(value for value in values if value not in (True, False))
        raise ValueError(
            f"Column {column!r} must hold true or false in every row; found {bad!r} in {len(values) - len(good)} of "
            f"{len(values)}. Repair them{'' if skip_bad else ', or pass --skip_bad_rows'}."
        )
    share = sum(bool(value) for value in good) / max(len(good), 1)
    if share == 0.0:
        raise ValueError(
            f"No row is marked for distillation: column {column!r} is false in all {len(good)} rows. Mark the "
            "language-intensive rows true, or train with trl.SFTTrainer."
        )
    return True, share


def _check_packing(args: LinguDistillConfig, has_distill_column: bool) -> None:
    if (args.packing or args.padding_free) and not sharing(args.kv_sharing).keeps_documents_apart:
        raise ValueError(
            f"kv_sharing='{args.kv_sharing}' cannot keep packed documents apart (the teacher makes its own pass over the rows): use "
            "'prompt' or 'full', or set packing=False and padding_free=False."
        )
    if args.packing and has_distill_column:
        raise ValueError(
            f"packing joins rows, so that column {args.distill_column!r} has no meaning: drop the column (every row is "
            "distilled) or set packing=False."
        )


def _refuse_flag(column: str) -> Callable[[Row], Row]:
    def checked(row: Row) -> Row:
        if column in row:
            raise BadRow(
                "distill flag not boolean",
                f"packing joins rows, so that column {column!r} of {row_name(row).lower()} has no meaning: drop the column (every "
                "row is distilled) or set packing=False.",
            )
        return row

    return checked


def _check_first_rows(dataset: AnyDataset, where: str, args: LinguDistillConfig) -> None:
    """Refuse a format that nothing can be made of before models are loaded; single bad rows are left to the collator."""
    refusals = []
    for number, row in enumerate(islice(_undecoded_rows(dataset), CHECKED_FIRST)):
        if "input_ids" in row:
            return
        if args.dataset_text_field in row:
            row = {**row, "text": row[args.dataset_text_field]}
        try:
            as_trl_row(row, f"Row {number}{where}", chat=False)
        except BadRow as error:
            refusals.append(error)
            continue
        return
    if refusals and (refusals[0].reason == "not a conversation"):
        raise refusals[0]


# --------------------------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------------------------
def _with_like_columns(
    datasets: list[AnyDataset], args: LinguDistillConfig, *, vision: bool = False
) -> list[AnyDataset]:
    """Conversations are called `messages`; if any of the sets has images (or `vision` says so), each has an image column.

    The first is the training set, by whose columns TRL collates all of them.
    """
    datasets = [renamed(dataset) for dataset in datasets]
    columns = [columns_of(dataset) for dataset in datasets]
    seeing = [
        has_images(names) or embeds_images_anywhere(dataset, names)
        for dataset, names in zip(datasets, columns, strict=True)
    ]
    if not (vision or any(seeing)):
        return datasets
    if not (vision or seeing[0]) and (args.packing or args.padding_free):
        raise ValueError(
            "The evaluation set has images and the training set has none: packing and padding_free are for texts alone. Set them to "
            "False, or leave the images out."
        )
    return [_with_images(dataset, names) for dataset, names in zip(datasets, columns, strict=True)]


def renamed(dataset: AnyDataset) -> AnyDataset:
    columns = columns_of(dataset)
    if "messages" in columns:
        return dataset
    other = next((column for column in CONVERSATION_COLUMNS if column in columns), None) or pairs_column(columns)
    if other is None:
        return dataset
    if dataset.column_names is not None:
        return dataset.rename_column(other, "messages")
    return dataset.map(
        lambda row: {("messages" if key == other else key): value for key, value in row.items()},
        remove_columns=[other],
    )


def resolved(dataset: AnyDataset) -> AnyDataset:
    """The same dataset with known features: a stream that does not tell them is looked into."""
    return dataset._resolve_features() if dataset.features is None else dataset


def embeds_images_anywhere(dataset: AnyDataset, columns: Sequence[str]) -> bool:
    """Whether turns in any of the columns hold images of their own. Arrow's schema tells; where it holds anything, the first rows
    do."""
    conversations = [column for column in (*CONVERSATION_COLUMNS, "prompt", "completion") if column in columns]
    if any(_names_an_image((dataset.features or {}).get(column)) for column in conversations):
        return True
    rows = list(islice(_undecoded_rows(dataset), LOOKED_AT)) if conversations else []
    return any(embeds_images(row.get(column)) for row in rows for column in conversations)


def _names_an_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(name in PAYLOADS or _names_an_image(value) for name, value in feature.items())
    return isinstance(feature, Image) or (isinstance(feature, List) and _names_an_image(feature.feature))


def _undecoded_rows(dataset: AnyDataset) -> Iterator[Row]:
    dataset = undecoded(dataset)
    return iter(dataset.with_format(None) if isinstance(dataset, Dataset) else dataset)


def _with_images(dataset: AnyDataset, columns: list[str]) -> AnyDataset:
    """The same dataset with an image column; rows without images have an empty list there."""
    if isinstance(dataset, IterableDataset):
        if dataset.column_names is not None and has_images(columns):
            return dataset
        return dataset.map(lambda row: {} if has_images(row) else {"images": []})
    if has_images(columns):
        return dataset
    feature = List(Image(decode=False))
    rows = dataset.data.num_rows  # of the table behind the dataset, which may be a view of it
    offsets = pa.array([0] * (rows + 1), pa.int32())
    empty = pa.ListArray.from_arrays(offsets, pa.array([], Image().pa_type))
    table = concat_tables([dataset.data, InMemoryTable.from_arrays([empty], names=["images"])], axis=1)
    return _of_table(table, dataset, {**dataset.features, "images": feature})


def _of_table(table: Any, dataset: Dataset, features: Mapping[str, Any]) -> Dataset:
    info = dataset.info.copy()
    info.features = Features(dict(features))
    new = Dataset(table, info=info, split=dataset.split, indices_table=dataset._indices)
    form = dict(dataset.format)
    if form.get("columns") is not None:
        form["columns"] = [name for name in features if name in form["columns"] or name not in dataset.column_names]
    return new.with_format(**form)


def prepare_dataset(dataset: AnyDataset) -> AnyDataset:
    """Number the rows and leave image decoding to the collator, so that a bad image can be named instead of raised.

    A dataset without an image column is returned as it is.
    """
    columns = columns_of(dataset)
    if not has_images(columns):
        return dataset
    dataset = undecoded(dataset)
    if ROW_COLUMN in columns:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda _row, index: {ROW_COLUMN: _number(index)}, with_indices=True)
    if dataset._indices is not None:  # numbering a shuffled view would copy every image; its rows are named by content
        return dataset
    return dataset.add_column(ROW_COLUMN, list(range(len(dataset))), feature=Value("int64"))


def _number(index: int) -> int:
    """A stream's row number; -1 where several dataloader workers each count their own part of it."""
    worker = torch.utils.data.get_worker_info()
    return index if worker is None or worker.num_workers == 1 else -1


def undecoded(dataset: AnyDataset) -> AnyDataset:
    """The same dataset with its images left as `{"bytes", "path"}`, those in the turns of a conversation too."""
    features = {name: _undecoded_feature(feature) for name, feature in (dataset.features or {}).items()}
    if features == (dataset.features or {}):
        return dataset
    if isinstance(dataset, IterableDataset):
        for column, feature in features.items():
            if feature != dataset.features[column]:
                dataset = dataset.cast_column(column, feature)
        return dataset
    # Not `cast_column`: for a list of images it writes the whole dataset to disk a second time.
    return _of_table(dataset.data, dataset, features)


def _undecoded_feature(feature: Any) -> Any:
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded_feature(value) for name, value in feature.items()}
    if isinstance(feature, List):
        return List(_undecoded_feature(feature.feature), length=feature.length)
    return feature


# --------------------------------------------------------------------------------------------------------------------
# Rows that are left out
# --------------------------------------------------------------------------------------------------------------------
def drop_bad_texts(
    dataset: AnyDataset, distill_column: str = "distill", columns: Sequence[str] | None = None
) -> tuple[AnyDataset, Mapping[str, int]]:
    """Leave out text-only rows whose answer is empty, whose flag is not boolean, or whose turns have another shape than a
    conversation's. -> (dataset, number of dropped rows by reason).

    TRL would train empty answers to say nothing. Rows of running text are left alone. columns: of a stream that does not tell them.

    Raises:
        ValueError: if no row of a map-style dataset is left.
    """
    known = (*CONVERSATION_COLUMNS, "completion", distill_column)
    if not any(column in known for column in columns or dataset.column_names or []):
        return dataset, {}

    def check(row: Row) -> None:
        flag_of(row, distill_column)
        check_answer(row, "The row")
        if "completion" not in row or "prompt" in row:
            check_answer(as_trl_row(row, "The row", chat=False), "The row")

    return without_bad_rows(dataset, check)


def drop_bad_rows(
    dataset: AnyDataset, collator: Callable[[list[Row]], Any], num_proc: int | None = None
) -> tuple[AnyDataset, Mapping[str, int]]:
    """Leave out the rows that the collator refuses, see `without_bad_rows`. -> (dataset, number of dropped rows by reason)."""
    return without_bad_rows(dataset, lambda row: collator([row]), num_proc)


def _warn_if_grounding_is_at_risk(args: LinguDistillConfig, dataset: AnyDataset) -> None:
    """KL alone on answers about an image erases grounding: the teacher cannot see (docs/method.md)."""
    if args.ce_weight > 0 or args.distill_tokens != "all" or not has_images(columns_of(dataset)):
        return
    if isinstance(dataset, Dataset):
        column = "images" if "images" in dataset.column_names else "image"
        flags = dataset[args.distill_column] if args.distill_column in dataset.column_names else [True] * len(dataset)
        if not any(flag and images for flag, images in zip(flags, dataset[column], strict=True)):
            return
    logger.warning(
        "ce_weight=0 and distill_tokens='all', and rows with images are marked for distillation: the divergence alone erases "
        "what the student knows about images, because the teacher cannot see them. Use distill_tokens='confident', or "
        "ce_weight > 0, or mark only text rows."
    )
