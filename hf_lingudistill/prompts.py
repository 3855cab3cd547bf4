"""Prompts without answers: the rows of an on-policy run, whose answers the student samples.

A row is what is asked (`prompt`, or a conversation up to its last answer), with images, and the flag that says who judges the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset

from .bad_rows import ROW_COLUMN, AnyDataset, BadRow, Row, flag_of, row_name, without_bad_rows
from .columns import columns_of, embeds_images_anywhere, has_images, prepare_dataset, undecoded
from .config import OnPolicyLinguDistillConfig
from .flags import check_distill_column, check_evaluation_flags
from .formats import as_prompt_row
from .images import decode_image
from .opening import (
    CHECKED_FIRST,
    OpenedData,
    as_dataset,
    by_name,
    each,
    eval_name,
    said_if_dropped,
)

logger = logging.getLogger(__name__)


@dataclass
class PromptCollator:
    """Rows as TRL's on-policy trainers read them: `prompt` (turns) and, with vision, `images` (a list, decoded); `distill`, who judges,
    and the number of the row under `ROW_COLUMN` (-1 where unknown).

    image_token: the text that the student's processor takes for an image. vision: whether any row of the run has images. judged:
    whether somebody judges rows that are marked false.
    """

    distill_column: str = "distill"
    image_token: str | None = None
    vision: bool = True
    judged: bool = True

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Raises:
        BadRow: a ValueError that names the row, what is wrong with it and what to do.
        """
        return [self._read(row) for row in rows]

    def _read(self, row: Row) -> Row:
        name, flag = row_name(row), flag_of(row, self.distill_column)
        if not flag and not self.judged:
            raise BadRow(
                "distill flag not boolean",
                f"{name} is marked false in column {self.distill_column!r}, and with anchor='none' nobody judges it: mark it true, or set "
                "anchor='before'.",
            )
        if row.get("tools"):
            raise BadRow(
                "not a conversation",
                f"{name} has tools of its own, which on-policy training does not pass on: remove the column, or pass `tools` to the trainer.",
            )
        asked = as_prompt_row(row, name, self.image_token)
        images = asked.get("images") or []
        if images and not self.vision:
            raise BadRow("image column missing", f"{name} has an image, and the first rows of the dataset have none.")
        new: Row = {"prompt": asked["prompt"], "distill": flag, ROW_COLUMN: row.get(ROW_COLUMN, -1)}
        try:  # all rows have images, or none has: TRL looks at the first
            return {**new, "images": [decode_image(image) for image in images]} if self.vision else new
        except BadRow as error:
            raise BadRow(
                error.reason, f"{name}: {error}. Repair or remove the row, or pass --skip_bad_rows to skip such rows."
            ) from error


def open_prompts(
    train: Any, evaluation: Any, args: OnPolicyLinguDistillConfig, *, has_distill_column: bool | None = None
) -> tuple[OpenedData, bool]:
    """Make prompts ready for TRL's on-policy trainer. -> the datasets and what is known of them, and whether any has images.

    Args:
        train: a `Dataset`, an `IterableDataset`, or a list of rows, or None; evaluation: one of them, several by name, or None.
        has_distill_column: of a training set that was opened before.

    Raises:
        ValueError: for another type, a flag that is not boolean or marks nothing, rows that nobody judges, or first rows that ask
            nothing.
    """
    opened, skipped = OpenedData(train, evaluation), {}  # type: tuple[OpenedData, dict[str, int]]
    sees: list[bool] = []

    def open_one(data: Any, where: str) -> AnyDataset:
        dataset = as_dataset(data, where, args, skipped, shape=as_prompt_row)
        columns = columns_of(dataset)
        sees.append(has_images(columns) or embeds_images_anywhere(dataset, columns))
        dataset = undecoded(dataset)
        _check_first_rows(dataset, "" if where == "train_dataset" else f" of {where}")
        return prepare_dataset(dataset)

    if train is not None:
        opened.train = open_one(train, "train_dataset")
        opened.has_distill_column, opened.distill_share = check_distill_column(
            opened.train, args.distill_column, skip_bad=args.skip_bad_rows, columns=columns_of(opened.train)
        )
        if not opened.has_distill_column and opened.train.column_names is None:
            opened.has_distill_column = None  # a later row may have it
        opened.skipped_rows = skipped
    if evaluation is not None:
        parts = {name: open_one(part, eval_name(name)) for name, part in by_name(evaluation).items()}
        check_evaluation_flags(parts, args, has_distill_column or opened.has_distill_column, name_of=eval_name)
        opened.evaluation = parts if isinstance(evaluation, dict) else parts[""]
    vision = any(sees)
    if vision and train is not None:
        _warn_if_sight_is_at_risk(args, opened)
    return opened, vision


def drop_bad_prompts(
    opened: OpenedData, collator: Callable[[list[Row]], Any], num_proc: int | None = None
) -> OpenedData:
    """The same datasets without the rows that the collator refuses; those of the training set are counted."""

    def drop(dataset: AnyDataset) -> Any:
        return without_bad_rows(dataset, lambda row: collator([row]), num_proc)

    train, dropped = drop(opened.train)
    evaluation = opened.evaluation
    if evaluation is not None:
        evaluation = each(lambda part: said_if_dropped(*drop(part)), evaluation)
    skipped = {**opened.skipped_rows, **dropped} if opened.skipped_rows else dropped
    return OpenedData(train, evaluation, opened.has_distill_column, opened.distill_share, skipped)


def _check_first_rows(dataset: AnyDataset, where: str) -> None:
    """Refuse a format without questions before models are loaded; single bad rows are left to the collator."""
    refusals = []
    rows = dataset.with_format(None) if isinstance(dataset, Dataset) else dataset
    for number, row in enumerate(islice(iter(rows), CHECKED_FIRST)):
        try:
            as_prompt_row(row, f"Row {number}{where}")
        except BadRow as error:
            refusals.append(error)
            continue
        return
    if refusals:
        raise refusals[0]


def _warn_if_sight_is_at_risk(args: OnPolicyLinguDistillConfig, opened: OpenedData) -> None:
    """The LM is blind: of images it knows what it reads of the student (docs/on_policy.md)."""
    column = args.distill_column
    if isinstance(opened.train, Dataset) and has_images(columns_of(opened.train)):
        images = opened.train["images" if "images" in opened.train.column_names else "image"]
        flags = opened.train[column] if opened.has_distill_column else [True] * len(opened.train)
        if not any(flag and image for flag, image in zip(flags, images, strict=True)):
            return
    if args.kv_sharing == "none":
        logger.warning(
            "kv_sharing='none', and rows with images are marked for the language model, which does not see them: judged by it, the student "
            "unlearns what it says about images. Mark those rows false in column %r (the VLM before judges them), or use kv_sharing='vision'.",
            column,
        )
        return
    logger.warning(
        "Rows with images are marked for the language model: of an image it knows only what it reads of the student (kv_sharing=%r), and "
        "`lingudistill diagnose` measures how much that is. Rows marked false in column %r are judged by the VLM before.",
        args.kv_sharing,
        column,
    )
