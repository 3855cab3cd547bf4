"""A user's datasets on their way to TRL: looked at, their flags and columns checked, images left undecoded.

Whether rows have images, and which columns they have, is found by looking: a stream does not always say, and images may stand in the
turns of a conversation. What is found is written into the columns that TRL goes by.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from PIL import Image as PILImage

from .bad_rows import SOURCE_COLUMN, AnyDataset, BadRow, Row, check_rows, flag_of, row_name, together, without_bad_rows
from .columns import (
    as_python,
    check_named_column,
    columns_of,
    embeds_images_anywhere,
    has_images,
    prepare_dataset,
    undecoded_rows,
    with_images,
    with_messages,
)
from .config import LinguDistillConfig
from .flags import capital, check_distill_column, check_evaluation_flags, check_joining, packs, refuse_flag
from .formats import as_trl_row
from .images import decode_image
from .options import DistillOptions
from .row_checks import check_answer, check_not_json_turns, check_text
from .turns import CONVERSATION_COLUMNS

logger = logging.getLogger(__name__)

CHECKED_OF_EACH = 512  # rows of each evaluation set that are prepared before the first step
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
    train = as_dataset(train, "train_dataset", args, skipped, raw=not checked)
    parts = {
        name: _evaluation_dataset(part, name, args, checked)
        for name, part in by_name(evaluation).items()
        if part is not None
    }
    columns = columns_of(train)
    opened.has_distill_column, opened.distill_share = check_distill_column(
        train, args.distill_column, skip_bad=args.skip_bad_rows, columns=columns
    )
    if not opened.has_distill_column and train.column_names is None:
        opened.has_distill_column = None  # a later row may have it
    elif not opened.has_distill_column:
        check_named_column(args.distill_column, train, source="train_dataset")
    check_joining(args, opened.distill_share, flagged=bool(opened.has_distill_column))
    if args.packing and train.column_names is None:
        train = train.map(refuse_flag(args.distill_column, "packing"))
    parts = _with_checked_flags(parts, args, opened.has_distill_column)
    train, *rest = _with_like_columns([train, *parts.values()], args)
    parts = dict(zip(parts, rest, strict=True))
    vision = has_images(columns_of(train))
    if checked:
        for name, part in {"": train, **parts}.items():
            _check_first_rows(part, f" of {eval_name(name)}" if name else "", args)
    text_column = args.dataset_text_field if checked else None
    if args.skip_bad_rows and not vision:
        train, dropped = drop_bad_texts(train, args.distill_column, columns_of(train), text_column)
        opened.skipped_rows = dropped if not skipped else together(dropped, skipped)
        parts = {
            name: said_if_dropped(*drop_bad_texts(part, args.distill_column, columns_of(part), text_column))
            for name, part in parts.items()
        }
    elif skipped:
        opened.skipped_rows = skipped
    opened.train = prepare_dataset(train)
    prepared = {name: prepare_dataset(part) for name, part in parts.items()}
    if evaluation is not None:
        opened.evaluation = prepared if isinstance(evaluation, dict) else prepared.get("", None)
    _warn_if_grounding_is_at_risk(args, opened.train)
    _check_lengths(args, opened.train)
    return opened


def open_evaluation(
    evaluation: Any,
    args: LinguDistillConfig,
    *,
    vision: bool,
    has_distill_column: bool | None = None,
    checked: bool = True,
) -> Any:
    """Evaluation sets that are given later, for a trainer whose training set is made of images (vision) or of texts, and has the flag
    column or not. checked: see `open_datasets`.

    Raises:
        ValueError: for another type, a flag that is not boolean, options that do not go together, or images where the training set has
            none.
    """
    parts = {name: _evaluation_dataset(part, name, args, checked) for name, part in by_name(evaluation).items()}
    parts = _with_checked_flags(parts, args, has_distill_column)
    opened, text_column = {}, args.dataset_text_field if checked else None
    for name, part in parts.items():
        (part,) = _with_like_columns([part], args, vision=vision)
        if not vision and has_images(columns_of(part)):
            raise ValueError(
                f"{capital(eval_name(name))} has images and the training set has none: pass it as eval_dataset when the trainer is "
                "made."
            )
        if args.skip_bad_rows and not vision:
            part = said_if_dropped(*drop_bad_texts(part, args.distill_column, columns_of(part), text_column))
        opened[name] = prepare_dataset(part)
    return opened if isinstance(evaluation, dict) else opened[""]


def check_evaluation_rows(evaluation: Any, collator: Callable[[list[Row]], Any], num_proc: int | None = None) -> None:
    """Go through evaluation sets before training: a bad row would stop the run at its first evaluation, when steps have been made. Of a long
    set, `CHECKED_OF_EACH` rows from everywhere: to prepare all images would take as long as an evaluation. Streams are checked as they are read.

    Raises:
        BadRow: for the first row that the collator refuses, with the name of its set.
    """
    for name, part in by_name(evaluation).items():
        if isinstance(part, Dataset):
            if len(part) > CHECKED_OF_EACH:
                part = part.select([index * len(part) // CHECKED_OF_EACH for index in range(CHECKED_OF_EACH)])
            check_rows(part, lambda row: collator([row]), eval_name(name), num_proc)


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


def _with_checked_flags(
    parts: dict[str, AnyDataset], args: LinguDistillConfig, trained: bool | None
) -> dict[str, AnyDataset]:
    """The same evaluation sets, their flags checked; those of a stream that is packed are as it is read."""
    shares = check_evaluation_flags(parts, args, trained, name_of=eval_name)
    for name in parts:
        check_joining(args, shares.get(name), flagged=name in shares, evaluated=eval_name(name))
    if (option := packs(args, evaluated=True)) is None:
        return parts
    refuse = refuse_flag(args.distill_column, option)
    return {name: part.map(refuse) if part.column_names is None else part for name, part in parts.items()}


def by_name(evaluation: Any) -> dict[str, Any]:
    """Evaluation sets by their names; the name of the only one is empty."""
    return {str(name): part for name, part in evaluation.items()} if isinstance(evaluation, dict) else {"": evaluation}


def eval_name(name: str) -> str:
    """How messages name one of several evaluation sets, or the only one."""
    return f"evaluation set {name!r}" if name else "the evaluation set"


# --------------------------------------------------------------------------------------------------------------------
# What was given
# --------------------------------------------------------------------------------------------------------------------
def _plain_row(row: Row, name: str) -> Row:
    return row if "input_ids" in row else as_trl_row(row, name, chat=False)


def _evaluation_dataset(part: Any, name: str, args: DistillOptions, checked: bool) -> AnyDataset:
    skipped: dict[str, int] = {}
    return said_if_dropped(as_dataset(part, eval_name(name), args, skipped, raw=not checked), skipped)


_FORMS = {*CONVERSATION_COLUMNS, "prompt", "completion", "text", "input_ids"}


def as_dataset(
    data: Any,
    name: str,
    args: DistillOptions,
    skipped: dict[str, int],
    shape: Callable[[Row, str], Row] = _plain_row,
    *,
    raw: bool = False,
) -> AnyDataset:
    """A dataset; a list of rows becomes one.

    Args:
        name: how messages name it. skipped: counts rows that are left out, by reason. shape: brings a row of a list, with its name,
            into a form whose images stand in a column of their own, which Arrow can hold. raw: leave a dataset in its format (numpy,
            torch, ...), for a reader of the caller's own.
    """
    if isinstance(data, Dataset | IterableDataset):
        if isinstance(data, Dataset) and len(data) == 0:
            raise ValueError(f"{name} has no rows: pass one that has some.")
        if isinstance(data, Dataset) and not raw and data.format["type"] == "custom":
            made = [column for column in data[0] if column not in data.column_names]
            if made:
                raise ValueError(
                    f"{name} makes its column {made[0]!r} when a row is read (set_transform), and columns must be there before: make "
                    "it with `dataset.map`, or pass a datasets.IterableDataset."
                )
        data = data if raw else as_python(data)
        if isinstance(data, IterableDataset) and not raw and next(iter(data), None) is None:
            raise ValueError(f"{name} is a stream without rows: pass one that has some.")
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
    rows, field = [], getattr(args, "dataset_text_field", "text")
    for number, row in enumerate(data):
        own_text = shape is _plain_row and field in row and not _FORMS & {*row}
        try:
            known_as = f"Row {number}" if name == "train_dataset" else f"Row {number} of {name}"
            shaped = shape({**row, "text": row[field]} if own_text else row, known_as)
            if images := shaped.get("images"):
                shaped = {**shaped, "images": [_as_seen(image, known_as) for image in images]}
            rows.append({**shaped, field: row[field]} if own_text else shaped)
        except BadRow as error:
            if not args.skip_bad_rows:
                raise
            skipped[error.reason] = skipped.get(error.reason, 0) + 1
    if not rows:
        raise ValueError(f"No usable row is left of {len(data)}: {skipped}. Repair the dataset.")
    # Of the columns, `from_list` takes those of the first row alone
    absent: Row = {
        column: [] if column == "images" else None for column in dict.fromkeys(key for row in rows for key in row)
    }
    rows = _with_texts_kept([{**absent, **row} for row in rows])
    try:
        return Dataset.from_list(rows, on_mixed_types="use_json")
    except OSError as error:
        raise ValueError(
            f"{name} is a list of rows with an image that cannot be held in a dataset ({error}): give it in RGB."
        ) from error
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name} is a list of rows that differ in their types ({why}): give each column one type."
        ) from error


def _as_seen(image: Any, name: str) -> Any:
    """A picture in memory as its pixels: Arrow would write it anew, without its rotation, and a JPEG with new losses. Raises BadRow for
    one that is missing."""
    if image is not None and not isinstance(image, PILImage.Image):
        return image
    try:
        return decode_image(image)
    except BadRow as error:
        raise BadRow(error.reason, f"{name}: {error}") from error


def _with_texts_kept(rows: list[Row]) -> list[Row]:
    """Rows whose turns are texts in some and lists of parts in others, with their conversations as JSON text: Arrow would keep such contents as
    JSON of their own, and read an answer that looks like it (`42`, `["cat"]`) as what it looks like."""
    kinds = {
        type(turn.get("content"))
        for row in rows
        for turn in (row["messages"] if isinstance(row.get("messages"), list) else ())
        if isinstance(turn, dict) and turn.get("content") is not None
    }
    if len(kinds) < 2:
        return rows
    try:
        return [
            {**row, "messages": json.dumps(row["messages"], ensure_ascii=False)} if row.get("messages") else row
            for row in rows
        ]
    except (TypeError, ValueError):  # something else than texts in a turn
        return rows


def _check_first_rows(dataset: AnyDataset, where: str, args: LinguDistillConfig) -> None:
    """Refuse a format that nothing can be made of before models are loaded; single bad rows are left to the collator."""
    refusals = []
    for number, row in enumerate(islice(undecoded_rows(dataset), CHECKED_FIRST)):
        if "input_ids" in row:
            return
        if args.dataset_text_field in row:
            row = {**row, "text": row[args.dataset_text_field]}
        try:
            as_trl_row(row, row_name(row) if row.get(SOURCE_COLUMN) else f"Row {number}{where}", chat=False)
        except BadRow as error:
            refusals.append(error)
            continue
        return
    if refusals and refusals[0].reason in ("not a conversation", "column not read"):
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
    datasets = [with_messages(dataset) for dataset in datasets]
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
    return [with_images(dataset, names) for dataset, names in zip(datasets, columns, strict=True)]


# --------------------------------------------------------------------------------------------------------------------
# Rows that are left out
# --------------------------------------------------------------------------------------------------------------------
def drop_bad_texts(
    dataset: AnyDataset,
    distill_column: str = "distill",
    columns: Sequence[str] | None = None,
    text_column: str | None = "text",
) -> tuple[AnyDataset, Mapping[str, int]]:
    """Leave out text-only rows whose answer is empty, whose flag is not boolean, whose turns have another shape than a
    conversation's, or that have no text. -> (dataset, number of dropped rows by reason).

    TRL would train empty answers to say nothing. columns: of a stream that does not tell them. text_column: where running text stands;
    None = that is not looked at.

    Raises:
        ValueError: if no row of a map-style dataset is left.
    """
    known = (*CONVERSATION_COLUMNS, "completion", distill_column, text_column)
    # A stream's tokens are looked at later, and counted with these
    looked_for = (*known, "input_ids") if isinstance(dataset, IterableDataset) else known
    if not any(column in looked_for for column in columns or dataset.column_names or []):
        return dataset, {}

    def check(row: Row) -> None:
        flag_of(row, distill_column)
        if "input_ids" in row:
            return
        if text_column in row and not any(row.get(column) is not None for column in known[:-2]):
            check_text(row, "The row", text_column)
            return
        check_answer(row, "The row")
        check_not_json_turns(row, "The row")
        if "completion" not in row or "prompt" in row:
            check_answer(as_trl_row(row, "The row", chat=False), "The row")

    return without_bad_rows(dataset, check)


def drop_bad_rows(
    dataset: AnyDataset, collator: Callable[[list[Row]], Any], num_proc: int | None = None
) -> tuple[AnyDataset, Mapping[str, int]]:
    """Leave out the rows that the collator refuses, see `without_bad_rows`. -> (dataset, number of dropped rows by reason)."""
    return without_bad_rows(dataset, lambda row: collator([row]), num_proc)


def _warn_if_grounding_is_at_risk(args: LinguDistillConfig, dataset: AnyDataset) -> None:
    """KL alone, on every answer about an image, erases what a blind teacher does not know, and hands on what another one misses."""
    if args.ce_weight > 0 or args.distill_tokens != "all" or args.kv_sharing == "images":
        return
    if not has_images(columns_of(dataset)):
        return
    if isinstance(dataset, Dataset):
        column = "images" if "images" in dataset.column_names else "image"
        flags = dataset[args.distill_column] if args.distill_column in dataset.column_names else [True] * len(dataset)
        if not any(flag and images for flag, images in zip(flags, dataset[column], strict=True)):
            return
    blind = args.kv_sharing == "none"
    logger.warning(
        "ce_weight=0 and distill_tokens='all', and rows with images are marked for distillation: the divergence alone erases "
        "what the student knows about images, because the teacher %s. Use distill_tokens='confident', or ce_weight > 0, or mark "
        "%s.",
        "cannot see them" if blind else "sees only what it reads of the VLM, and nothing else says what they show",
        "only text rows" if blind else "the short answers false",
    )


def _check_lengths(args: LinguDistillConfig, dataset: AnyDataset) -> None:
    """`group_by_length` needs to know how long a row is: transformers asks the processor, whose rows begin with pixels.

    Raises:
        ValueError: if no column says so.
    """
    columns, name = columns_of(dataset), args.length_column_name
    if args.train_sampling_strategy == "group_by_length" and name not in columns:
        raise ValueError(
            f"train_sampling_strategy='group_by_length' needs the length of every row in a column {name!r} (tokens or characters; "
            f"`length_column_name` names another); found {', '.join(columns)}. Add it, or leave the option out."
        )
