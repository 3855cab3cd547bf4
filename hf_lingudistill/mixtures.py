"""Datasets by name, and mixtures of them whose sources carry a flag each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets, load_from_disk
from trl import DatasetMixtureConfig, get_dataset

from ._internals import DatasetConfig
from .batch import AnyDataset, Row, has_images, undecoded
from .config import shown


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
            raise ValueError(f"datasets: expected a list of sources, found {shown(self.datasets)}.")
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


def load_source(source: DatasetConfig, *, streaming: bool = False) -> AnyDataset:
    """One dataset: a Hub id, a loader name with `data_files`, or a folder written by `save_to_disk`."""
    if not isinstance(source.path, str | Path):
        raise ValueError(f"A dataset must be named by a Hub id or a folder; found {shown(source.path)}.")
    folder = Path(source.path)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = load_from_disk(source.path)
        # A single unnamed dataset is the training split: evaluation must not read it by accident
        splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
        if source.split not in splits:
            raise ValueError(f"{source.path} has no split {source.split!r}, found {sorted(splits)}.")
        dataset: AnyDataset = splits[source.split]
        if source.columns is not None:
            dataset = dataset.select_columns(source.columns)
        return dataset.to_iterable_dataset() if streaming else dataset
    fields = {k: getattr(source, k) for k in DatasetConfig.__dataclass_fields__ if k != "fraction"}
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(**fields)], streaming=streaming)
    return get_dataset(mixture)["train"]


def load_mixture(mixture: DistillMixtureConfig, distill_column: str = "distill") -> DatasetDict:
    """Load and concatenate the sources of a mixture. -> {"train"[, "test"]}.

    Every row gets the flag of its source in `distill_column`; where some sources have images, the others get an empty
    `images` column. Shares (`fraction`) and `test_split_size` mean what they mean in TRL.
    """
    if not mixture.datasets:
        raise ValueError("The mixture is empty: list at least one source under `datasets:`.")
    parts = [load_source(source, streaming=mixture.streaming) for source in mixture.datasets]
    fractions = [source.fraction for source in mixture.datasets]
    if any(fraction is not None for fraction in fractions):
        parts = _take_fractions(parts, fractions, mixture.streaming)
    vision = any(has_images(part.column_names or []) for part in parts)
    flagged = [
        _with_columns(part, source, distill_column, vision)
        for part, source in zip(parts, mixture.datasets, strict=True)
    ]
    flagged = [part for part in flagged if not isinstance(part, Dataset) or len(part)] or flagged[:1]
    combined = concatenate_datasets(flagged)
    if mixture.test_split_size is not None:
        _check_test_split(mixture)
        return combined.train_test_split(test_size=mixture.test_split_size)
    return DatasetDict({"train": combined})


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
    return [part.select(range(round(weight * total))) for part, weight in zip(parts, weights, strict=True)]


def _with_columns(part: AnyDataset, source: DatasetConfig, distill_column: str, vision: bool) -> AnyDataset:
    if part.features is None:  # a stream that has to be looked into
        part = part._resolve_features()
    part = undecoded(part)  # before the map below, which would encode every image anew
    features = Features(dict(part.features))
    flag = getattr(source, "distill", None)
    # one name across sources; `image` holds a single image
    single = "image" in features and "images" not in features
    own_flag = flag is None and distill_column in features

    def completed(row: Row) -> Row:
        new: Row = {}
        if single:
            new["images"] = [row["image"]]
        elif vision and "images" not in row:
            new["images"] = []
        new[distill_column] = row[distill_column] if own_flag else flag is not False
        return new

    removed = ["image"] if single else []
    for name in removed:
        del features[name]
    if vision:
        features["images"] = List(Image(decode=False))
    features[distill_column] = Value("bool")
    return part.map(completed, remove_columns=removed, features=features)
