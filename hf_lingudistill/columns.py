"""The columns of a dataset: which there are, what they are called, and images in them left undecoded. No table is copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset, Features, Image, IterableDataset, LargeList, List, Value
from datasets.table import InMemoryTable, concat_tables

from .bad_rows import ROW_COLUMN, AnyDataset, Row
from .formats import pairs_column
from .images import IMAGE_COLUMNS
from .options import DistillOptions
from .turns import CONVERSATION_COLUMNS, PAYLOADS, embeds_images

LOOKED_AT = 64  # rows of a stream that does not tell its columns


def columns_of(dataset: AnyDataset) -> list[str]:
    """The columns of a dataset; of a stream that does not tell them, those of its first rows."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(dict.fromkeys(column for row in islice(iter(dataset), LOOKED_AT) for column in row))


def check_named_column(name: str, *parts: AnyDataset, source: str) -> None:
    """Check that a flag column that somebody named (it is not the default) is in one of these.

    Raises:
        ValueError: naming the column, and those that are there.
    """
    found = {column for part in parts for column in part.column_names or ()}
    if name != DistillOptions.distill_column and name not in found:
        raise ValueError(
            f"distill_column={name!r} names no column of the data ({source}), found {', '.join(sorted(found))}: name the column that "
            "holds the flags, or leave distill_column out."
        )


def as_python(dataset: AnyDataset) -> AnyDataset:
    """The same dataset with rows of plain Python values, where it makes arrays of them; a transform of the caller's own stays."""
    if isinstance(dataset, IterableDataset):
        return dataset if dataset._formatting is None else dataset.with_format(None)
    form = dataset.format
    if form["type"] in (None, "python", "custom"):
        return dataset
    return dataset.with_format(None, columns=form["columns"], output_all_columns=form["output_all_columns"])


def first_row(dataset: AnyDataset, skipped: Mapping[str, int] | None = None) -> Row:
    """The first row. skipped: those that were left out on the way to it, by reason.

    Raises:
        ValueError: if there is none.
    """
    for row in dataset:
        return dict(row)
    why = f"all of them were skipped ({dict(skipped)})" if skipped else "it is empty"
    raise ValueError(f"No row is left to train on: the training set has no usable row, {why}. Repair the dataset.")


def has_images(columns: Sequence[str]) -> bool:
    """Whether these columns make a vision dataset for TRL."""
    return any(column in columns for column in IMAGE_COLUMNS)


def with_messages(dataset: AnyDataset) -> AnyDataset:
    """The same dataset with its conversations in a column `messages`, whatever they were called."""
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
    if any(names_an_image((dataset.features or {}).get(column)) for column in conversations):
        return True
    rows = list(islice(undecoded_rows(dataset), LOOKED_AT)) if conversations else []
    return any(embeds_images(row.get(column)) for row in rows for column in conversations)


def names_an_image(feature: Any) -> bool:
    """Whether a feature of a dataset is an image, or holds one."""
    if isinstance(feature, dict):
        return any(name in PAYLOADS or names_an_image(value) for name, value in feature.items())
    return isinstance(feature, Image) or (isinstance(feature, List | LargeList) and names_an_image(feature.feature))


def with_images(dataset: AnyDataset, columns: list[str]) -> AnyDataset:
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
        return dataset.map(lambda _row, index: {ROW_COLUMN: row_number(index)}, with_indices=True)
    if dataset._indices is not None:  # numbering a shuffled view would copy every image; its rows are named by content
        return dataset
    return dataset.add_column(ROW_COLUMN, list(range(len(dataset))), feature=Value("int64"))


def row_number(index: int) -> int:
    """A stream's row number; -1 where several dataloader workers each count their own part of it."""
    worker = torch.utils.data.get_worker_info()
    return index if worker is None or worker.num_workers == 1 else -1


def undecoded_rows(dataset: AnyDataset) -> Iterator[Row]:
    """Its rows as plain Python values, with images left undecoded."""
    dataset = undecoded(dataset)
    return iter(dataset.with_format(None) if isinstance(dataset, Dataset) else dataset)


def undecoded(dataset: AnyDataset) -> AnyDataset:
    """The same dataset with its images left as `{"bytes", "path"}`, those in the turns of a conversation too."""
    features = {name: _undecoded_feature(feature) for name, feature in (dataset.features or {}).items()}
    if features == (dataset.features or {}) or (isinstance(dataset, Dataset) and dataset.format["type"] == "custom"):
        return dataset  # a transform of the caller's own is made for decoded images
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
    if isinstance(feature, LargeList):
        return LargeList(_undecoded_feature(feature.feature))
    return feature
