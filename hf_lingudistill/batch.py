"""From rows to a batch: images decoded, conversations rendered, answers labelled, the flag beside them.

TRL collates (padding, images, labels); this module stands around it. A batch leaves with one more tensor, `distill` (B,) bool, and a
row that cannot be trained on stops the run with its number and reason, or is skipped and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ._internals import DataCollatorForVisionLanguageModeling
from .bad_rows import REASONS, ROW_COLUMN, SOURCE_COLUMN, AnyDataset, BadRow, Row, SharedCounts, flag_of, row_name
from .columns import has_images, prepare_dataset, undecoded
from .conversations import Conversations, cannot_be_processed, no_label_within
from .flags import check_distill_column
from .images import IMAGE_COLUMNS, decode_image
from .opening import drop_bad_rows, drop_bad_texts
from .places import column_images
from .rgb import to_rgb
from .row_checks import check_answer

__all__ = [
    "IMAGE_COLUMNS",
    "REASONS",
    "ROW_COLUMN",
    "AnyDataset",
    "BadRow",
    "DistillCollator",
    "Row",
    "SharedCounts",
    "check_distill_column",
    "decode_image",
    "drop_bad_rows",
    "drop_bad_texts",
    "has_images",
    "prepare_dataset",
    "to_rgb",
    "undecoded",
]

_AS_TEXT = "lingudistill_as_text"  # set on a row while it is collated


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class DistillCollator:
    """TRL's collator with the `distill` flag, decoded images and checks around it.

    inner: the collator that makes `input_ids`, `labels`, ... max_length: truncation, done here so that the length that
    would have been needed can be told. image_token_ids: ids whose truncation would tear an image apart. prefix_lm: whether the
    student reads tokens of type 0 in both directions (PaliGemma): everything from the first label on is then of type 1, which
    TRL's collator leaves at 0, so that no answer is seen before it is predicted. answers_only: label the assistant's turns of
    `messages` alone, where the chat template tells them from the others. plan: what the teacher is asked about, planned here
    because counting costs nothing on a CPU; the batch carries it as `queries`. answers: what was computed of a batch before training,
    from the batch and the images of each row; it carries that as `cached`.
    """

    inner: Callable[[list[Row]], dict[str, Any]]
    distill_column: str = "distill"
    max_length: int | None = None
    image_token_ids: tuple[int, ...] = ()
    vision: bool = True
    prefix_lm: bool = False
    answers_only: bool = True
    completion_only: bool = True
    conversations: Conversations | None = field(default=None, init=False, repr=False)
    _of_texts: Callable[[list[Row]], dict[str, Any]] | None = field(default=None, init=False, repr=False)
    plan: Callable[[dict[str, Any]], Any] | None = None
    answers: Callable[[dict[str, Any], list[list[Any]]], Any] | None = None
    _image_ids: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._image_ids = torch.tensor(self.image_token_ids, dtype=torch.long)
        if self.vision and hasattr(
            self.inner, "max_length"
        ):  # a row is cut here, in a copy: the collator may be the caller's own
            self.max_length = min((n for n in (self.max_length, self.inner.max_length) if n is not None), default=None)
            self.inner = copy(self.inner)
            self.inner.max_length = None
        if self.vision and isinstance(self.inner, DataCollatorForVisionLanguageModeling):
            self.conversations = Conversations(
                self.inner.processor,
                self.inner.chat_template,
                self.answers_only,
                self.image_token_ids,
                self.completion_only,
            )
            self._of_texts = replace(
                self.inner, completion_only_loss=False, assistant_only_loss=False, dataset_text_field="text"
            )

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Collate rows. Adds `distill` (B,) bool and, where rows are numbered, their numbers (B,) under `ROW_COLUMN`.

        Raises:
            BadRow: a ValueError that names the row, what is wrong with it and what to do.
        """
        distill = torch.tensor([flag_of(row, self.distill_column) for row in rows])
        names = [row_name(row) for row in rows]
        plain = [
            {k: v for k, v in row.items() if k not in (self.distill_column, ROW_COLUMN, SOURCE_COLUMN)} for row in rows
        ]
        if self.vision:
            plain = [self._read(row, name) for row, name in zip(plain, names, strict=True)]
        batch = self._collate(plain, names)
        if self.vision:
            batch = self._truncate(batch, names)
        elif batch["input_ids"].shape[0] != len(rows):  # padding-free: the rows are joined to one
            if distill.any() != distill.all():
                raise ValueError(
                    f"padding_free joins rows, but column {self.distill_column!r} differs between them: set "
                    "padding_free=False, or drop the column."
                )
            distill = distill[:1]
        if not self.vision and torch.isin(batch["input_ids"], self._image_ids).any():
            raise BadRow(
                "images and placeholders differ",
                "A row of text holds the token that stands for an image, and has no image. Remove that word from the text, or give each "
                "row its images in a column 'images'.",
            )
        if self.prefix_lm:
            batch["token_type_ids"] = ((batch["labels"] != -100).cumsum(dim=1) > 0).long()
        batch["distill"] = distill
        numbers = [row.get(ROW_COLUMN) for row in rows]
        if len(numbers) == len(distill) and None not in numbers:
            batch[ROW_COLUMN] = torch.tensor(numbers)
        if self.plan is not None:
            batch["queries"] = self.plan(batch)
        if self.answers is not None:
            batch["cached"] = self.answers(batch, [_images_of(row) for row in plain])
        return batch

    def _collate(self, rows: list[Row], names: list[str]) -> dict[str, Any]:
        try:
            return (
                self._rendered(rows, names)
                if self._of_texts is not None
                else dict(self.inner([dict(row) for row in rows]))
            )
        except BadRow:
            raise
        except Exception as error:
            for row, name in zip(rows, names, strict=True) if len(rows) > 1 else ():
                self._collate([row], [name])  # raises for the row that is at fault
            if len(rows) > 1:
                raise
            raise cannot_be_processed(names[0], error) from error

    def _read(self, row: Row, name: str) -> Row:
        """The row in TRL's shape, its images decoded."""
        if self.conversations is None:
            check_answer(row, name)
            return _decoded(row, name)
        field = self.inner.dataset_text_field  # type: ignore[attr-defined]
        mixed = row.get("prompt") is not None and "messages" in row
        row = {("text" if key == field else key): value for key, value in row.items()}
        return {**_decoded(self.conversations.read(row, name), name), _AS_TEXT: mixed}

    def _rendered(self, rows: list[Row], names: list[str]) -> dict[str, Any]:
        """Collate rows whose conversations are rendered here: TRL's collator gets texts, of whatever kind each row was.

        A batch of prompts and completions is TRL's case; where rows of a mixture have `messages` as well, each is one text.
        """
        assert self.conversations is not None and self._of_texts is not None
        as_text = any(row[_AS_TEXT] or "prompt" not in row for row in rows)
        rendered = [
            self.conversations.render(row, name, as_text=as_text) for row, name in zip(rows, names, strict=True)
        ]
        texts = [dict(one.row) for one in rendered]  # the collator edits rows in place
        if not as_text:
            return dict(self.inner(texts))
        batch = dict(self._of_texts(texts))
        for one, name, ids, labels, attended in zip(
            rendered, names, batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
        ):
            kept = labels[attended]
            self.conversations.mask(kept, ids[attended], one, name)
            labels[attended] = kept
        return batch

    def _truncate(self, batch: dict[str, Any], names: list[str]) -> dict[str, Any]:
        ids, labels = batch["input_ids"], batch["labels"]
        length = ids.shape[1]
        limit = length if self.max_length is None else min(self.max_length, length)
        positions = torch.arange(length)
        last_image = torch.where(torch.isin(ids, self._image_ids), positions, -1).amax(dim=1)
        # the first token has nothing before it that could predict it
        first_label = torch.where((labels != -100) & (positions > 0), positions, length).amin(dim=1)
        for name, image, label in zip(names, last_image.tolist(), first_label.tolist(), strict=True):
            if label == length:
                raise BadRow(
                    "no label",
                    f"{name} has no token to train on: all labels are masked. Give it a non-empty answer, or pass "
                    "--skip_bad_rows.",
                )
            needed = (
                f"Set max_length to at least {max(image, label) + 1} (more for the whole answer), or to null for no "
                "truncation."
            )
            if image >= limit:
                raise BadRow(
                    "image tokens over max_length",
                    f"{name}: its image tokens end at position {image + 1}, max_length is {limit}. {needed}",
                )
            if label >= limit:
                raise no_label_within(name, label, max(image, label) + 1, limit)
        if limit == length:
            return batch
        return {
            key: value[:, :limit] if isinstance(value, torch.Tensor) and value.shape[:2] == ids.shape else value
            for key, value in batch.items()
        }


def _images_of(row: Row) -> list[Any]:
    """The images of a row that was read."""
    found = next((row[column] for column in IMAGE_COLUMNS if column in row), None)
    return found if isinstance(found, list) else [] if found is None else [found]


def _decoded(row: Row, name: str) -> Row:
    column = next((column for column in IMAGE_COLUMNS if column in row), None)
    if column is None:
        raise BadRow(
            "image column missing",
            f"{name} has no 'images' column, found {sorted(row)}: give every row of a vision dataset one (an empty list for "
            "text-only rows).",
        )
    value = [row[column]] if column == "image" else column_images(row, name)
    try:
        decoded = [decode_image(v) for v in value or []]
    except BadRow as error:
        raise BadRow(
            error.reason, f"{name}: {error}. Repair or remove the row, or pass --skip_bad_rows to skip such rows."
        ) from error
    other = {key: value for key, value in row.items() if key not in IMAGE_COLUMNS}
    return {**other, column: decoded[0] if column == "image" else decoded}
