"""Rows that cannot be trained on: the error that names one, and the filters that leave them out and count them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset

AnyDataset: TypeAlias = Dataset | IterableDataset
Row = dict[str, Any]

ROW_COLUMN = "lingudistill_row"
SOURCE_COLUMN = "lingudistill_source"  # of a mixture: where each row came from, as messages name it
REASONS = (
    "image missing",
    "image of wrong type",
    "image of zero size",
    "image too large",
    "image unreadable",
    "image column missing",
    "images not a list",
    "images and placeholders differ",
    "image tokens over max_length",
    "not a conversation",
    "column not read",
    "empty answer",
    "no label",
    "distill flag not boolean",
    "processor failed",
    "unreadable row",
)
_WORKERS = 65  # the main process, and as many dataloader workers before two share a place


class BadRow(ValueError):
    """A row that cannot be trained on. reason: a short class of failure, one of `REASONS`, for counting."""

    def __init__(self, reason: str, message: str | None = None) -> None:
        if message is None:  # how a dataloader worker's error is raised again in the main process: after its traceback
            message = reason.rsplit(f"{__name__}.BadRow: ", 1)[-1].strip()
        super().__init__(message)
        self.reason = reason


def row_name(row: Row) -> str:
    """How a message names a row: by its source and number there, by its number alone, else by how it begins."""
    if row.get(SOURCE_COLUMN):
        return str(row[SOURCE_COLUMN])
    if row.get(ROW_COLUMN, -1) not in (None, -1):
        return f"Row {row[ROW_COLUMN]}"
    text: Any = next((row[key] for key in ("messages", "conversations", "prompt", "text") if row.get(key)), "")
    while isinstance(text, list | dict) and text:
        if isinstance(text, dict):
            text = text.get("content") or text.get("value") or text.get("text") or text.get("user") or ""
        else:
            text = text[-1] if isinstance(text[0], dict) and "type" in text[0] else text[0]
    return f"The row that begins {str(text)[:60]!r}"


def flag_of(row: Row, column: str, name: str | None = None) -> bool:
    """Whether a row is marked for distillation; True without the column. name: how messages name the row.

    Raises:
        BadRow: if the flag is not boolean.
    """
    value = row.get(column, True)
    if value not in (True, False):
        raise BadRow(
            "distill flag not boolean",
            f"{name or row_name(row)}: column {column!r} must be true or false; found {value!r}. Repair it, or pass --skip_bad_rows.",
        )
    return bool(value)


class SharedCounts(Mapping[str, int]):
    """Number of rows by reason, counted by all dataloader workers of a process in memory that they share."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_WORKERS, len(REASONS), dtype=torch.int64).share_memory_()
        self._earlier = torch.zeros_like(self._counts).share_memory_()

    def add(self, reason: str) -> None:
        self._counts[_worker_slot(), REASONS.index(reason)] += 1

    def begin_pass(self) -> None:
        """A stream is read from its start, maybe again: a row that was bad in an earlier epoch is not counted twice."""
        slot = _worker_slot()
        self._earlier[slot] = self._seen()[slot]
        self._counts[slot] = 0

    def _seen(self) -> torch.Tensor:
        return torch.maximum(self._counts, self._earlier)

    def __getitem__(self, reason: str) -> int:
        count = int(self._seen()[:, REASONS.index(reason)].sum()) if reason in REASONS else 0
        if not count:
            raise KeyError(reason)
        return count

    def __iter__(self) -> Iterator[str]:
        return (reason for reason, count in zip(REASONS, self._seen().sum(dim=0).tolist(), strict=True) if count)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def together(some: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
    """Numbers of rows by reason, of two passes over a set."""
    return dict(Counter(some) + Counter(others))


def _worker_slot() -> int:
    """Each dataloader worker has its own place: nothing is lost between two of them."""
    worker = torch.utils.data.get_worker_info()
    return 0 if worker is None else 1 + worker.id % (_WORKERS - 1)


def why_refused(check: Callable[[Row], Any], row: Row) -> str | None:
    """The reason that `check` raises BadRow for; None where it does not."""
    try:
        check(row)
    except BadRow as error:
        return error.reason
    return None


def without_bad_rows(
    dataset: AnyDataset, check: Callable[[Row], Any], num_proc: int | None = None
) -> tuple[AnyDataset, Mapping[str, int]]:
    """Leave out the rows that `check` raises BadRow for. -> (dataset, number of dropped rows by reason).

    A map-style dataset is gone through once, by each process of a run: each finds the same rows, and so does a run that resumes.
    A stream is filtered as it is read: its counts grow during the first pass, and are those of this process and its dataloader
    workers.

    Args:
        num_proc: how many processes share the work on a map-style dataset; None or 1 = this one alone.

    Raises:
        ValueError: if no row of a map-style dataset is left.
    """
    if isinstance(dataset, IterableDataset):
        shared = SharedCounts()

        def usable(row: Row, index: int) -> bool:
            if index == 0:
                shared.begin_pass()
            if (reason := why_refused(check, row)) is not None:
                shared.add(reason)
            return reason is None

        return dataset.filter(usable, with_indices=True), shared

    reasons = _reasons(dataset, check, num_proc)
    dropped = Counter(reason for reason in reasons if reason is not None)
    keep = [index for index, reason in enumerate(reasons) if reason is None]
    if not keep:
        raise ValueError(f"No usable row is left of {len(dataset)}: {dict(dropped)}. Repair the dataset.")
    return (dataset if not dropped else dataset.select(keep)), dropped


def check_rows(dataset: Dataset, check: Callable[[Row], Any], name: str, num_proc: int | None = None) -> None:
    """Go through a whole dataset. name: how messages name it. num_proc: see `without_bad_rows`.

    Raises:
        BadRow: what `check` raises for the first bad row, with the name of the dataset.
    """
    index = next((i for i, why in enumerate(_reasons(dataset, check, num_proc)) if why is not None), None)
    if index is None:
        return
    try:
        check(dataset[index])
    except BadRow as error:
        raise BadRow(error.reason, f"In {name}: {error}") from error
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise BadRow("unreadable row", f"In {name}: Row {index} cannot be read ({why}).") from error


def _reasons(dataset: Dataset, check: Callable[[Row], Any], num_proc: int | None) -> list[str | None]:
    """Why each row is refused; None for those that are not."""

    def judged(_: Row, index: int) -> Row:
        try:
            row = dataset[index]
        except Exception:  # a row that datasets itself cannot read
            return {"reason": "unreadable row"}
        return {"reason": why_refused(check, row)}

    # Over a column of its own, so that the rows are read inside `judged`, and not written again
    numbers = Dataset.from_dict({"reason": [""] * len(dataset)})
    found = numbers.map(
        judged,
        with_indices=True,
        num_proc=num_proc,
        desc="Checking rows",
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint="lingudistill-checked",
    )
    return list(found["reason"])
