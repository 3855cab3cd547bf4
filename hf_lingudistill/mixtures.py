"""Datasets by name, and mixtures of them whose sources carry a flag each."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    Json,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
)
from trl import DatasetMixtureConfig

from ._internals import DatasetConfig
from .bad_rows import SOURCE_COLUMN, AnyDataset, BadRow, Row, flag_of, row_name
from .columns import (
    check_named_column,
    columns_of,
    embeds_images_anywhere,
    has_images,
    resolved,
    row_number,
    undecoded,
    with_messages,
)
from .config import shown
from .formats import ACCEPTED, PAIRS_COLUMN, as_trl_row
from .images import IMAGE_COLUMNS
from .options import DistillOptions
from .places import column_images
from .sources import load_source
from .turns import CONVERSATION_COLUMNS

logger = logging.getLogger(__name__)

_FLAG = DistillOptions.distill_column
_ROWS = ("messages", "prompt", "completion")


@dataclass
class DistillSource(DatasetConfig):
    """One source of a mixture: TRL's fields, and whether its rows are distilled (None = its own column, else true)."""

    distill: bool | None = None


@dataclass
class DistillMixtureConfig(DatasetMixtureConfig):
    """TRL's `datasets:` section in the YAML, where each source may say `distill: true` or `distill: false`.

    Parameters:
        datasets (`list[DistillSource]`): the sources.
    """

    def __post_init__(self) -> None:
        if not isinstance(self.datasets, list):
            # argparse makes a source of one text
            found = self.datasets.path if isinstance(self.datasets, DatasetConfig) else self.datasets
            raise ValueError(f"datasets: expected a list of sources (`- path: ...`), found {shown(found)}.")
        if not isinstance(self.streaming, bool):
            raise ValueError(f"streaming: expected true or false, found {shown(self.streaming)}.")
        for index, source in enumerate(self.datasets):
            if not isinstance(source, dict | DatasetConfig):
                raise ValueError(f"datasets[{index}]: expected a mapping with 'path', found {shown(source)}.")
            if isinstance(source, dict):
                known = DistillSource.__dataclass_fields__
                unknown = sorted(map(str, set(source) - set(known)))
                if unknown or "path" not in source:
                    raise ValueError(
                        f"datasets[{index}]: expected 'path' and any of {sorted(set(known) - {'path'})}; "
                        + (f"found unknown {unknown}." if unknown else "'path' is missing.")
                    )
                self.datasets[index] = DistillSource(**source)
            _check_source(index, self.datasets[index])


def _check_source(index: int, source: DatasetConfig) -> None:
    """Raise ValueError for a field of another type than `datasets.load_dataset` takes."""
    text = ("a text", lambda value: isinstance(value, str | Path) and str(value).strip() != "")
    expected: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "path": text,
        "name": text,
        "data_dir": text,
        "data_files": ("a text, a list or a mapping", lambda value: isinstance(value, str | list | dict)),
        "split": text,
        "columns": (
            "a list of names",
            lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        ),
        "fraction": ("a number", lambda value: _is_number(value)),
        "distill": ("true or false", lambda value: isinstance(value, bool)),
    }
    for name, (what, fits) in expected.items():
        value = getattr(source, name, None)
        if not fits(value) and not (value is None and name not in ("path", "split")):
            raise ValueError(f"datasets[{index}].{name}: expected {what}, found {shown(value)}.")


def load_mixture(
    mixture: DistillMixtureConfig,
    distill_column: str = _FLAG,
    *,
    seed: int = 42,
    skip_bad_rows: bool = False,
    text_column: str = "text",
) -> DatasetDict:
    """Load and concatenate the sources of a mixture. -> {"train"[, "test"]}.

    Every row gets the flag of its source in `distill_column`, and where it came from in `SOURCE_COLUMN`; where some sources have images, the others get an empty
    `images` column. Shares (`fraction`) and `test_split_size` mean what they mean in TRL.

    Args:
        seed: draws the rows of `test_split_size`; the same seed sets the same rows aside, on every process and after a resume.
        skip_bad_rows: leave a flag that is not boolean out, for the trainer to skip and count its row.
        text_column: where running text stands.

    Raises:
        ValueError: for a source that cannot be read, a flag that is not boolean, or a column of flags that was named and that no
            source has.
    """
    if not mixture.datasets:
        raise ValueError("The mixture is empty: list at least one source under `datasets:`.")
    parts = [load_source(source, streaming=mixture.streaming) for source in mixture.datasets]
    for index, (part, source) in enumerate(zip(parts, mixture.datasets, strict=True)):
        _check_shape(columns_of(part), f"datasets[{index}] ({source.path})", text_column)
    if any(getattr(source, "distill", None) is None for source in mixture.datasets):
        check_named_column(distill_column, *parts, source="datasets of the recipe")
    fractions = [source.fraction for source in mixture.datasets]
    if any(fraction is not None for fraction in fractions):
        parts = _take_fractions(parts, fractions, mixture.streaming)
    names = [f"datasets[{index}] ({source.path})" for index, source in enumerate(mixture.datasets)]
    flagged = [
        _with_columns(
            part, getattr(source, "distill", None), distill_column, features, name, skip_bad_rows=skip_bad_rows
        )
        for (part, features), source, name in zip(
            _with_common_features(parts, distill_column), mixture.datasets, names, strict=True
        )
    ]
    flagged = [part for part in flagged if not isinstance(part, Dataset) or len(part)] or flagged[:1]
    # A stream is read once, from its start: its sources in turns, since the last of them would come too late or never
    combined = (
        interleave_datasets(flagged, stopping_strategy="all_exhausted_without_replacement")
        if mixture.streaming and len(flagged) > 1
        else concatenate_datasets(flagged)
    )
    if mixture.test_split_size is not None:
        _check_test_split(mixture)
        return combined.train_test_split(test_size=mixture.test_split_size, seed=seed)
    return DatasetDict({"train": combined})


def _check_shape(columns: Collection[str], name: str, text_column: str) -> None:
    """Raise ValueError for a source none of whose columns is trained on. Joined with others, its rows would be empty ones of their shape."""
    if not {*CONVERSATION_COLUMNS, PAIRS_COLUMN, "prompt", "completion", text_column, "input_ids"} & set(columns):
        raise ValueError(
            f"{name} has the columns {', '.join(sorted(columns)) or 'none'}: expected {ACCEPTED}. Rename them, or leave the source out."
        )


def _is_number(value: Any) -> bool:
    """Whether it is a number to calculate with: not NaN, not infinite, not an integer that no float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300


def _check_test_split(mixture: DistillMixtureConfig) -> None:
    size: Any = mixture.test_split_size
    if mixture.streaming:
        raise ValueError(
            "`test_split_size` needs the number of rows, which a streamed source does not tell: drop one of the two."
        )
    if not (_is_number(size) and size > 0):
        raise ValueError(f"test_split_size must be a positive number (a share below 1, or rows); found {shown(size)}.")


def _take_fractions(parts: list[AnyDataset], fractions: list[float | None], streaming: bool) -> list[AnyDataset]:
    if streaming:
        raise ValueError(
            "`fraction` needs the number of rows, which a streamed source does not tell: drop one of the two."
        )
    shares = [fraction for fraction in fractions if fraction is not None]
    if len(shares) != len(fractions) or min(shares) <= 0:
        raise ValueError(f"`fraction` must be a positive number for every source or for none; found {fractions}.")
    weights = [share / sum(shares) for share in shares]
    total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True) if weight)
    counts = [round(weight * total) for weight in weights]
    for index, count in enumerate(counts):
        if not count:
            logger.warning(
                "datasets[%d]: its fraction of %.0f rows in all rounds to no row, and it is left out.", index, total
            )
    return [part.select(range(count)) for part, count in zip(parts, counts, strict=True)]


def _with_common_features(parts: list[AnyDataset], distill_column: str) -> list[tuple[AnyDataset, Features]]:
    """Each part beside the features that all parts get: what the sources call alike is of one type in all of them.

    Conversations that differ (a text here and parts there) are kept as JSON; a column that nobody trains on and whose types differ
    (an id as number and as text) is left out.
    """
    parts = [with_messages(resolved(part)) for part in parts]
    embedding = [embeds_images_anywhere(part, _ROWS) for part in parts]
    seeing = any(embedding) or any(has_images(part.column_names) for part in parts)
    parts = [undecoded(part) for part in parts]  # before they are mapped, which would encode every image anew
    common: dict[str, Any] = {}
    for column in dict.fromkeys(name for part in parts for name in part.column_names):
        if column in IMAGE_COLUMNS or column == distill_column:
            continue
        found = [part.features[column] for part in parts if column in part.column_names]
        own = column in _ROWS and any(
            e for e, part in zip(embedding, parts, strict=True) if column in part.column_names
        )
        found = _alike(found)
        if all(feature == found[0] for feature in found) and not own:
            common[column] = found[0]
        elif column in (*_ROWS, "tools", "chat_template_kwargs"):
            common[column] = Json()
        else:
            logger.warning("Column %r has another type in each source and is left out.", column)
    if seeing:
        common["images"] = List(Image(decode=False))
    common[distill_column] = Value("bool")
    common[SOURCE_COLUMN] = Value("string")
    return [(part, Features(common)) for part in parts]


def _alike(features: list[Any]) -> list[Any]:
    """The types of a column in each source, those of a text as one: a CSV's is another than a JSON's, and a column of nulls is of any type."""
    known = [feature for feature in features if feature != Value("null")] or features
    return [Value("string") if feature == Value("large_string") else feature for feature in known]


def _with_columns(
    part: AnyDataset, flag: bool | None, distill_column: str, features: Features, name: str, *, skip_bad_rows: bool
) -> AnyDataset:
    """A part with exactly these columns, and the flag of its source.

    flag: of the source; None = its own column, else true. skip_bad_rows: a flag of the column that is not boolean becomes null, which
    is refused where rows are counted; else it is refused here, since a column of booleans would take it for true.
    """
    own_flag = flag is None and distill_column in part.column_names
    embeds = embeds_images_anywhere(part, _ROWS)

    def completed(row: Row, index: int) -> Row:
        new = {column: row.get(column) for column in features}
        number = row_number(index)
        new[SOURCE_COLUMN] = where = (
            f"{name}, {f'row {number}' if number >= 0 else row_name(row).replace('The', 'the', 1)}"
        )
        if "images" in features:
            try:
                taken = as_trl_row(row, where, chat=False) if embeds else row
                of_conversation = row.get("messages") is not None
                new["images"] = column_images(taken, where, of_conversation=of_conversation) or []
                new.update({column: taken.get(column) for column in _ROWS if column in features})
            except BadRow as error:
                # Turns cannot be stored apart from their images; of two columns that differ, one would be lost
                if embeds and skip_bad_rows:  # without turns it is left out where rows are counted
                    new.update({column: None for column in _ROWS if column in features}, images=[])
                elif embeds or error.reason != "images not a list":
                    raise
                else:
                    new["images"] = [row["images"]]
        try:
            new[distill_column] = flag_of(row, distill_column, where) if own_flag else flag is not False
        except BadRow:
            if not skip_bad_rows:
                raise
            new[distill_column] = None
        if not isinstance(part, Dataset):  # a stream keeps what it is given
            return new
        # A text that reads as JSON would be taken for it: the answer "2" for a number
        return {
            column: json.dumps(value) if isinstance(value, str) and isinstance(features[column], Json) else value
            for column, value in new.items()
        }

    return part.map(completed, with_indices=True, remove_columns=part.column_names, features=features)
