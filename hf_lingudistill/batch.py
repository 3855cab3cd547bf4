"""Rows and batches: the flag that selects rows, images that may be bad, and mixtures whose sources carry a flag each.

TRL collates (chat template, padding, labels); this module stands around it. A batch leaves with one more tensor,
`distill` (B,) bool, and a row that cannot be trained on stops the run with its number and reason, or is skipped and counted.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import (
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
)
from PIL import Image as PILImage
from PIL import ImageOps

logger = logging.getLogger(__name__)

ROW_COLUMN = "lingudistill_row"
IMAGE_COLUMNS = ("images", "image")
AnyDataset: TypeAlias = Dataset | IterableDataset
Row = dict[str, Any]


REASONS = (
    "image missing",
    "image of wrong type",
    "image of zero size",
    "image too large",
    "image unreadable",
    "image column missing",
    "images not a list",
    "image tokens over max_length",
    "empty answer",
    "no label",
    "distill flag not boolean",
    "processor failed",
)
_WORKERS = 65  # the main process, and as many dataloader workers before two share a place


class BadRow(ValueError):
    """A row that cannot be trained on. reason: a short class of failure, one of `REASONS`, for counting."""

    def __init__(self, reason: str, message: str | None = None) -> None:
        if message is None:  # how a dataloader worker's error is raised again in the main process: after its traceback
            message = reason.rsplit(f"{__name__}.BadRow: ", 1)[-1].strip()
        super().__init__(message)
        self.reason = reason


# --------------------------------------------------------------------------------------------------------------------
# Datasets
# --------------------------------------------------------------------------------------------------------------------
def has_images(columns: Sequence[str]) -> bool:
    """Whether these columns make a vision dataset for TRL."""
    return any(column in columns for column in IMAGE_COLUMNS)


def prepare_dataset(dataset: AnyDataset) -> AnyDataset:
    """Number the rows and leave image decoding to the collator, so that a bad image can be named instead of raised.

    A dataset without an image column, or a stream whose columns are not known, is returned as it is.
    """
    columns = dataset.column_names or []
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
    """The same dataset with its images left as `{"bytes", "path"}`."""
    features = dict(dataset.features or {})
    for column in IMAGE_COLUMNS:
        feature = features.get(column)
        if isinstance(feature, Image):
            features[column] = Image(decode=False)
        elif isinstance(getattr(feature, "feature", None), Image):
            features[column] = List(Image(decode=False))
    if features == (dataset.features or {}):
        return dataset
    if isinstance(dataset, IterableDataset):
        for column in set(features) & set(IMAGE_COLUMNS):
            dataset = dataset.cast_column(column, features[column])
        return dataset
    # Not `cast_column`: for a list of images it writes the whole dataset to disk a second time.
    info = dataset.info.copy()
    info.features = Features(features)
    undecoded = Dataset(dataset.data, info=info, split=dataset.split, indices_table=dataset._indices)
    return undecoded.with_format(**dataset.format)


def check_distill_column(dataset: AnyDataset, column: str, *, skip_bad: bool = False) -> tuple[bool, float | None]:
    """Whether the dataset has the flag column, and the share of marked rows (None for a stream or without the column).

    skip_bad: leave rows whose flag is not boolean out of the share; they are dropped later, and counted.

    Raises:
        ValueError: if the column is not boolean, or marks no row at all.
    """
    columns = dataset.column_names or []
    if column not in columns:
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


def decode_image(value: Any) -> PILImage.Image:
    """An RGB image from a PIL image, bytes, a path, or datasets' `{"bytes", "path"}`; EXIF rotation applied.

    Raises:
        BadRow: if it is missing, of another type, unreadable or of zero size.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise BadRow("image missing", "an image is missing (null)")
    try:
        if isinstance(value, str) and "://" in value:  # inside an archive or on the Hub: datasets knows how to open it
            value = Image().decode_example({"bytes": None, "path": value})
        if isinstance(value, bytes):
            image: Any = PILImage.open(io.BytesIO(value))
        elif isinstance(value, str | Path):
            image = PILImage.open(value)
        elif isinstance(value, PILImage.Image):
            image = value
        else:
            raise BadRow("image of wrong type", f"an image was expected, found {type(value).__name__}")
        if 0 in image.size:
            raise BadRow("image of zero size", f"an image has the size {image.size[0]}x{image.size[1]}")
        if image.mode.startswith("I;16"):  # PIL's own conversion clips instead of scaling
            image = image.convert("F").point(lambda p: p / 257.0 + 0.5).convert("L")
        elif image.mode in ("I", "F"):  # 32-bit has no known range: stretched
            image.load()
            low, high = image.getextrema()
            span = float(high - low) or 1.0
            image = image.convert("F").point(lambda p: (p - low) * 255.0 / span).convert("L")
        return ImageOps.exif_transpose(image).convert("RGB")
    except BadRow:
        raise
    except PILImage.DecompressionBombError as error:
        raise BadRow("image too large", f"an image is too large to decode ({error})") from error
    except Exception as error:  # PIL raises a dozen types for a dozen formats
        raise BadRow("image unreadable", f"an image cannot be read ({type(error).__name__}: {error})") from error


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class DistillCollator:
    """TRL's collator with the `distill` flag, decoded images and checks around it.

    inner: the collator that makes `input_ids`, `labels`, ... max_length: truncation, done here so that the length that
    would have been needed can be told. image_token_ids: ids whose truncation would tear an image apart. prefix_lm: whether the
    student reads tokens of type 0 in both directions (PaliGemma): everything from the first label on is then of type 1, which
    TRL's collator leaves at 0, so that no answer is seen before it is predicted.
    """

    inner: Callable[[list[Row]], dict[str, Any]]
    distill_column: str = "distill"
    max_length: int | None = None
    image_token_ids: tuple[int, ...] = ()
    vision: bool = True
    prefix_lm: bool = False
    _image_ids: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._image_ids = torch.tensor(self.image_token_ids, dtype=torch.long)
        if self.vision and hasattr(self.inner, "max_length"):
            self.inner.max_length = None

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Collate rows. Adds `distill` (B,) bool and, where rows are numbered, their numbers (B,) under `ROW_COLUMN`.

        Raises:
            BadRow: a ValueError that names the row, what is wrong with it and what to do.
        """
        distill = torch.tensor([_flag(row, self.distill_column) for row in rows])
        names = [_row_name(row) for row in rows]
        plain = [{k: v for k, v in row.items() if k not in (self.distill_column, ROW_COLUMN)} for row in rows]
        if self.vision:
            plain = [_decoded(row, name) for row, name in zip(plain, names, strict=True)]
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
        if self.prefix_lm:
            batch["token_type_ids"] = ((batch["labels"] != -100).cumsum(dim=1) > 0).long()
        batch["distill"] = distill
        numbers = [row.get(ROW_COLUMN) for row in rows]
        if len(numbers) == len(distill) and None not in numbers:
            batch[ROW_COLUMN] = torch.tensor(numbers)
        return batch

    def _collate(self, rows: list[Row], names: list[str]) -> dict[str, Any]:
        # TRL's collator edits rows in place, so that a second try needs rows of its own.
        try:
            return dict(self.inner([dict(row) for row in rows]))
        except Exception as error:
            for row, name in zip(rows, names, strict=True) if len(rows) > 1 else ():
                self._collate([row], [name])  # raises for the row that is at fault
            if len(rows) > 1:
                raise
            raise BadRow(
                "processor failed", f"{names[0]} cannot be processed ({type(error).__name__}: {error})."
            ) from error

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
                raise BadRow(
                    "no label",
                    f"{name} has no token to train on within max_length={limit}: all labels are masked there. {needed}",
                )
        if limit == length:
            return batch
        return {
            key: value[:, :limit] if isinstance(value, torch.Tensor) and value.shape[:2] == ids.shape else value
            for key, value in batch.items()
        }


def _flag(row: Row, column: str) -> bool:
    value = row.get(column, True)
    if value not in (True, False):
        raise BadRow(
            "distill flag not boolean",
            f"{_row_name(row)}: column {column!r} must be true or false; found {value!r}.",
        )
    return bool(value)


def _row_name(row: Row) -> str:
    if row.get(ROW_COLUMN, -1) not in (None, -1):
        return f"Row {row[ROW_COLUMN]}"
    text = row.get("messages") or row.get("prompt") or row.get("text") or ""
    while isinstance(text, list) and text:
        text = text[0].get("content") or "" if isinstance(text[0], dict) else text[0]
        if isinstance(text, list) and text and isinstance(text[0], dict) and "text" in text[-1]:
            text = text[-1]["text"] or ""
    return f"The row that begins {str(text)[:60]!r}"


def _decoded(row: Row, name: str) -> Row:
    column = next((column for column in IMAGE_COLUMNS if column in row), None)
    if column is None:
        raise BadRow(
            "image column missing",
            f"{name} has no 'images' column, found {sorted(row)}: give every row of a vision dataset one (an empty list for "
            "text-only rows).",
        )
    value = row[column]
    if column == "images" and value is None:
        value = []
    if column == "images" and not isinstance(value, list | tuple):
        raise BadRow(
            "images not a list",
            f"{name}: column 'images' must hold a list of images, found {type(value).__name__}. Rename the column to 'image' "
            "if each row has one image.",
        )
    try:
        decoded = [decode_image(v) for v in value] if column == "images" else decode_image(value)
    except BadRow as error:
        raise BadRow(
            error.reason, f"{name}: {error}. Repair or remove the row, or pass --skip_bad_rows to skip such rows."
        ) from error
    _check_answer(row, name)
    return {**row, column: decoded}


def _check_answer(row: Row, name: str) -> None:
    """Raise BadRow where a completion, or every assistant's turn of a conversation, is empty. Running text has no answer."""
    if "completion" in row:
        answer, what = row["completion"], "completion"
    elif "messages" in row:
        turns = row["messages"] or []
        answer = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "assistant"]
        if turns and not answer:  # a conversation under other names
            return
        what = "answer in its messages"
    else:
        return
    # an assistant that calls a tool says nothing
    calls = isinstance(answer, list) and any(isinstance(turn, dict) and turn.get("tool_calls") for turn in answer)
    if not calls and not (_text_of(answer) or "").strip():
        raise BadRow("empty answer", f"{name} has an empty {what}. Give it an answer, or pass --skip_bad_rows.")


def _text_of(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_text_of(v.get("content", v.get("text")) if isinstance(v, dict) else v) or "" for v in value)
    return None


class SharedCounts(Mapping[str, int]):
    """Number of rows by reason, counted by all dataloader workers of a process in memory that they share."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_WORKERS, len(REASONS), dtype=torch.int64).share_memory_()

    def add(self, reason: str) -> None:
        worker = torch.utils.data.get_worker_info()
        slot = (
            0 if worker is None else 1 + worker.id % (_WORKERS - 1)
        )  # each its own: nothing is lost between two of them
        self._counts[slot, REASONS.index(reason)] += 1

    def __getitem__(self, reason: str) -> int:
        count = int(self._counts[:, REASONS.index(reason)].sum()) if reason in REASONS else 0
        if not count:
            raise KeyError(reason)
        return count

    def __iter__(self) -> Iterator[str]:
        return (reason for reason, count in zip(REASONS, self._counts.sum(dim=0).tolist(), strict=True) if count)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def drop_bad_texts(dataset: AnyDataset, distill_column: str = "distill") -> tuple[AnyDataset, Mapping[str, int]]:
    """Leave out text-only rows whose answer is empty or whose flag is not boolean. -> (dataset, number of dropped rows by reason).

    TRL would train such answers to say nothing. Rows of running text are left alone.

    Raises:
        ValueError: if no row of a map-style dataset is left.
    """
    columns = [name for name in ("completion", "messages", distill_column) if name in (dataset.column_names or [])]
    if not columns:
        return dataset, {}
    dropped = SharedCounts()

    def usable(*values: Any) -> bool:
        row = dict(zip(columns, values, strict=True))
        try:
            _flag(row, distill_column)
            _check_answer(row, "The row")
        except BadRow as error:
            dropped.add(error.reason)
            return False
        return True

    if isinstance(dataset, IterableDataset):
        return dataset.filter(usable, input_columns=columns), dropped
    rows = zip(*(dataset.with_format(None)[column] for column in columns), strict=True)
    keep = [index for index, values in enumerate(rows) if usable(*values)]
    if not keep:
        raise ValueError(f"No usable row is left of {len(dataset)}: {dict(dropped)}. Repair the dataset.")
    return (dataset if len(keep) == len(dataset) else dataset.select(keep)), dropped


@dataclass
class _Checks(torch.utils.data.Dataset[str | None]):
    """For each row, why the collator refuses it; None where it does not."""

    dataset: Dataset
    collator: DistillCollator

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str | None:
        try:
            row = self.dataset[index]
        except Exception as error:  # a row that datasets itself cannot read
            return f"unreadable row ({type(error).__name__})"
        return _why_refused(self.collator, row)


def _why_refused(collator: DistillCollator, row: Row) -> str | None:
    try:
        collator([row])
    except BadRow as error:
        return error.reason
    return None


def drop_bad_rows(
    dataset: AnyDataset, collator: DistillCollator, num_proc: int | None = None
) -> tuple[AnyDataset, Mapping[str, int]]:
    """Leave out the rows that the collator refuses. -> (dataset, number of dropped rows by reason).

    A map-style dataset is gone through once, with a progress bar, by each process of a run: each finds the same rows, and so does
    a run that resumes. A stream is filtered as it is read: its counts grow during training, by one each time a bad row is read,
    and are those of this process and its dataloader workers.

    Args:
        num_proc: how many processes share the work on a map-style dataset; None or 1 = this one alone.

    Raises:
        ValueError: if no row of a map-style dataset is left.
    """
    from tqdm.auto import tqdm

    if isinstance(dataset, IterableDataset):
        shared = SharedCounts()

        def usable(row: Row) -> bool:
            if (reason := _why_refused(collator, row)) is not None:
                shared.add(reason)
            return reason is None

        return dataset.filter(usable), shared
    workers = num_proc if num_proc is not None and num_proc > 1 else 0
    batches = torch.utils.data.DataLoader(
        _Checks(dataset, collator),
        batch_size=32,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # the seed for its workers is not drawn from the run's random numbers
    )
    dropped: Counter[str] = Counter()
    keep: list[int] = []
    with tqdm(total=len(dataset), desc="Checking rows", unit="row") as progress:
        for reasons in batches:
            keep += [progress.n + offset for offset, reason in enumerate(reasons) if reason is None]
            dropped.update(reason for reason in reasons if reason is not None)
            progress.update(len(reasons))
    if not keep:
        raise ValueError(f"No usable row is left of {len(dataset)}: {dict(dropped)}. Repair the dataset.")
    return (dataset if not dropped else dataset.select(keep)), dropped
