"""One dataset by name: a file, a folder, a loader with its files, or a Hub id. Whatever keeps it from being read is one sentence.

Paths of images are relative to the file that names them (or to `image_folder`), not to where the run was started.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    Json,
    LargeList,
    List,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from ._internals import DatasetConfig
from .bad_rows import AnyDataset, BadRow, Row
from .columns import embeds_images_anywhere, undecoded
from .config import shown
from .formats import PAIRS_COLUMN, SYSTEM_COLUMNS
from .images import IMAGE_COLUMNS
from .turns import CONVERSATION_COLUMNS, PAYLOADS

logger = logging.getLogger(__name__)

LOADERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# As datasets reads a file's name: the word stands alone, between dots, dashes, blanks or digits
_SPLITS = {
    split: re.compile(rf"(?:^|[-._ 0-9])(?:{words})(?:[-._ 0-9]|$)", re.IGNORECASE)
    for split, words in {
        "train": "train|training",
        "test": "test|testing|eval|evaluation",
        "validation": "validation|valid|val|dev",
    }.items()
}
# Of a CSV: pandas would make numbers of answers, and no answer of one that says `None`, as the rows around them are
_CSV_TEXTS = ("prompt", "completion", "text", PAIRS_COLUMN, *CONVERSATION_COLUMNS, *SYSTEM_COLUMNS, *IMAGE_COLUMNS)
_BESIDE_TABLES = ("README.md", "LICENSE", ".gitattributes")
_NO_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_LOOKED_IN = 32  # folders in which every image is looked for, where there are so many
_LONGEST_PATH = 1024  # a longer text is an image itself, in base64


def load_source(
    source: DatasetConfig, *, streaming: bool = False, image_folder: str | Path | None = None
) -> AnyDataset:
    """One split of one dataset.

    Args:
        source: `path` is a file (JSON, JSON lines, CSV, Parquet, Arrow, text), a folder (of such files, of images with `metadata`, or
            written by `save_to_disk`), the name of a loader with `data_files`, or a Hub id.
        streaming: read rows as they are needed.
        image_folder: where the relative paths of images begin; left out, at the file that names them. For a source that is a file,
            `data_dir` says the same.

    Raises:
        ValueError: if it cannot be read, or has no such split.
    """
    if not isinstance(source.path, str | Path):
        raise ValueError(f"A dataset must be named by a Hub id or a folder; found {shown(source.path)}.")
    path = Path(source.path)
    beside = {"image_folder": image_folder, "data_dir": source.data_dir if path.is_file() else None}
    for option, folder in beside.items():
        if folder and not Path(folder).is_dir():
            raise ValueError(
                f"{source.path}: {option} {str(folder)!r} is no folder. Name the one in which its images lie, or leave it out."
            )
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = load_saved(source.path)
            # A single unnamed dataset is the training split: evaluation must not read it by accident
            splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
            dataset = _part(splits, source)
            dataset = dataset.to_iterable_dataset() if streaming else dataset
        else:
            dataset = _loaded(source, path, streaming)
        if source.columns is not None:
            dataset = dataset.select_columns(source.columns)
        if isinstance(dataset, IterableDataset) and dataset.features is None:
            dataset = dataset._resolve_features()  # the first rows are read: what is wrong with the file shows now
    except Exception as error:
        raise ValueError(f"{source.path}: {_why(error, source)}") from error
    folders = [[Path(image_folder)]] if image_folder else []
    if path.is_file() and source.data_dir:
        folders.append([Path(source.data_dir)])
    return _with_whole_paths(dataset, [*folders, *_folders(source, path)])


def load_saved(folder: str | Path) -> Dataset | DatasetDict:
    """What `save_to_disk` wrote.

    Raises:
        ValueError: for a split without rows, of which there is no file to read.
    """
    try:
        return load_from_disk(str(folder))
    except IndexError:
        raise ValueError("holds a split without rows: give it some, or save the others without it") from None


def _loaded(source: DatasetConfig, path: Path, streaming: bool) -> AnyDataset:
    name, data_dir = str(source.path), source.data_dir
    files: Any = source.data_files
    more: dict[str, Any] = {}
    if path.is_file():
        files, data_dir = glob.escape(str(path)), None
        name = _loader(path)
        more = {"sep": "\t"} if ".tsv" in map(str.lower, path.suffixes) else {}
    elif path.is_dir() and files is None and data_dir is None:
        files = _tables(path)
        if files and glob.escape(str(path)) != str(path):  # datasets would take the folder's name for a pattern
            name = _loader(path / next(iter(files.values()))[0])
            files = {
                split: [glob.escape(str(path.absolute() / one)) for one in names] for split, names in files.items()
            }
        elif files:
            files = {split: [glob.escape(one) for one in names] for split, names in files.items()}
    if name == "csv" or (files and path.is_dir() and _kind(Path(next(iter(flat_files(files))))) == "csv"):
        more |= {"converters": dict.fromkeys(_CSV_TEXTS, str), "keep_default_na": False, "na_values": [""]}

    def loaded(**how: Any) -> AnyDataset:
        return load_dataset(
            name,
            name=source.name,
            data_dir=data_dir,
            data_files=files,
            split=source.split,
            streaming=streaming,
            **how,
            **more,
        )

    found = loaded()
    features = getattr(found, "features", None)
    if name != "json" or features is None:
        return found
    # Contents that are texts here and parts there are JSON each, and an answer that looks like it (`42`) would be read as it: whole, they are not
    whole = {
        column: Json() if not isinstance(feature, Json) and _holds_json(feature) else feature
        for column, feature in features.items()
    }
    return found if whole == dict(features) else loaded(features=Features(whole))


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, List | LargeList):
        return _holds_json(feature.feature)
    return any(map(_holds_json, feature.values())) if isinstance(feature, dict) else isinstance(feature, Json)


def _loader(path: Path) -> str:
    kind = _kind(path)
    if kind is None:
        raise ValueError(f"is a file of an unknown kind; expected one of {', '.join(LOADERS)}")
    return kind


def _tables(folder: Path) -> dict[str, list[str]] | None:
    """Table files by split where other files lie beside them; None where datasets itself finds what is meant.

    datasets goes by what is most frequent in a folder: it would take images, texts or PDFs for the rows, and leave out tables of a rarer kind.

    Raises:
        ValueError: for tables of several kinds.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _may_hold_rows(path, folder)]
    tables = [path for path in files if _kind(path) not in (None, "text")]
    on_top = [path for path in tables if path.parent == folder]
    kinds = {kind: path.relative_to(folder) for path in reversed(tables) if (kind := _kind(path))}
    others = any(_kind(path) in (None, "text") and path.name not in _BESIDE_TABLES for path in files)
    if _says_its_files(folder) or any(path.stem == "metadata" for path in on_top or tables):
        return None
    if len(kinds) > 1:
        raise ValueError(
            f"holds tables of several kinds ({', '.join(str(path) for path in sorted(kinds.values()))}), of which one alone would be read: "
            "name the file, or move the others out of the folder"
        )
    tables = on_top or tables
    if not tables or not (others or glob.escape(str(folder)) != str(folder)):
        return None
    found: dict[str, list[str]] = {}
    for path in tables:
        inside = path.relative_to(folder)
        names = (inside.stem, *inside.parent.parts)
        split = next((split for split, word in _SPLITS.items() if any(map(word.search, names))), "train")
        found.setdefault(split, []).append(inside.as_posix())
    if len(found) > 1:
        logger.warning(
            "%s: splits by the names of its files: %s.",
            folder,
            "; ".join(f"{split}: {', '.join(names)}" for split, names in found.items()),
        )
    return found


def _may_hold_rows(path: Path, folder: Path) -> bool:
    """Neither a file of datasets' own nor hidden, such as the cache of a download."""
    return path.name not in _NO_ROWS and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _says_its_files(folder: Path) -> bool:
    """Whether the card of a dataset that was downloaded names its data files: datasets goes by that."""
    card = folder / "README.md"
    return card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace")


def _kind(path: Path) -> str | None:
    """The loader of a table file, packed or not; None for any other file."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _PACKED]
    return LOADERS.get(suffixes[-1]) if suffixes else None


def _part(splits: Mapping[str, Dataset], source: DatasetConfig) -> Dataset:
    """A split of a saved dataset, or a part of one (`train[:10%]`), as `load_dataset` takes it."""
    if source.split in splits:
        return splits[source.split]
    if not re.match(r"[\w.-]+\s*[\[+]", source.split):
        raise ValueError(_no_split(source, list(splits)))
    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute(
            {name: len(split) for name, split in splits.items()}
        )
    except ValueError as error:
        raise ValueError(f"has no part {source.split!r} ({error}); its splits are {list(splits)}") from None
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _no_split(source: DatasetConfig, names: list[str]) -> str:
    where = (
        f": name one of them (--dataset_train_split or --dataset_test_split of `distill`, --split of other commands, `split: {names[0]}` in YAML)"
        if names
        else ""
    )
    return f"has no split {source.split!r}, found {names}{where}"


def _why(error: BaseException, source: DatasetConfig) -> str:
    """The deepest reason of a failed load, in a sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or "no reason given"
    if isinstance(error, ValueError) and text.startswith(("is a file", "has no split", "has no part", "holds ")):
        return text + "."
    if isinstance(error, StopIteration):
        return "holds no rows."
    if isinstance(error, ValueError) and (splits := re.search(r"^(?:Unknown|Bad) split.*(\[.*\])", text)):
        return _no_split(source, re.findall(r"[\w.-]+", splits[1])) + "."
    if len(text) > 300:
        text = text[:297] + "..."
    missing = isinstance(error, OSError) or type(error).__module__.startswith(("datasets", "huggingface_hub"))
    if missing and not source.data_files and not Path(source.path).exists():
        where = "" if os.path.isabs(source.path) else " here, and it cannot be read from the Hub"
        return f"no such file or folder{where} ({type(error).__name__}: {text})."
    return f"cannot be read ({type(error).__name__}: {text})."


# --------------------------------------------------------------------------------------------------------------------
# Paths of images
# --------------------------------------------------------------------------------------------------------------------
Folders = list[
    list[Path]
]  # where an image is looked for: in the folders of the first group, then of the next; of one group any may be meant


def _folders(source: DatasetConfig, path: Path) -> Folders:
    """The folders of the local files of a source."""
    if path.is_file():
        return [[path.parent]]
    if path.is_dir():
        holds = {p.parent for p in path.rglob("*") if _kind(p) is not None and _may_hold_rows(p, path)}
        below = sorted(holds - {path})
        return [[path], below] if path in holds else [below, [path]]
    base = Path(source.data_dir) if source.data_dir else Path()
    files = [base / name for name in flat_files(source.data_files) if "://" not in name]
    return [list(dict.fromkeys(file.parent for file in files if file.parent.is_dir()))]


def flat_files(files: Any) -> list[str]:
    """The names in `data_files`: a text, a list, or lists by split."""
    if isinstance(files, Mapping):
        files = list(files.values())
    if isinstance(files, list | tuple):
        return [name for part in files for name in flat_files(part)]
    return [] if files is None else [str(files)]


def _with_whole_paths(dataset: AnyDataset, folders: Folders) -> AnyDataset:
    features = dict(dataset.features or {})
    columns = [name for name in IMAGE_COLUMNS if name in features and _holds_text(features[name])]
    turns = [name for name in (*CONVERSATION_COLUMNS, "prompt") if name in features]
    columns += [name for name in turns if embeds_images_anywhere(dataset, [name])]
    if not any(folders) or not columns:
        return dataset

    def whole(row: Row) -> Row:
        return {name: _whole_turns(row[name], folders, of_image=name in IMAGE_COLUMNS) for name in columns}

    dataset = undecoded(dataset)
    options: dict[str, Any] = {"desc": "Paths of images"} if isinstance(dataset, Dataset) else {}
    return dataset.map(whole, features=dataset.features, **options)


def _holds_text(feature: Any) -> bool:
    if isinstance(feature, List | LargeList):
        return _holds_text(feature.feature)
    if isinstance(feature, dict):
        return any(_holds_text(value) for value in feature.values())
    if isinstance(feature, Json):  # rows of several types, texts perhaps among them
        return True
    return isinstance(feature, Value) and "string" in feature.dtype and not isinstance(feature, Image)


def _whole_turns(value: Any, folders: Folders, *, of_image: bool) -> Any:
    """`_whole` of a column; turns that are JSON text stay so."""
    if of_image or not isinstance(value, str) or not value.lstrip().startswith("["):
        return _whole(value, folders, of_image=of_image)
    try:
        turns = json.loads(value)
    except ValueError:  # said when the row's turn comes
        return value
    return json.dumps(_whole(turns, folders, of_image=False), ensure_ascii=False)


def _whole(value: Any, folders: Folders, *, of_image: bool) -> Any:
    """A value with the relative paths of images in it made whole. of_image: whether a text in it is an image."""
    if isinstance(value, list):
        return [_whole(v, folders, of_image=of_image) for v in value]
    if isinstance(value, dict):
        return {
            key: _whole(
                v, folders, of_image=of_image or (key in PAYLOADS and "from" not in value and "role" not in value)
            )
            if key not in ("type", "text")
            else v
            for key, v in value.items()
        }
    return _whole_path(value, folders) if of_image and isinstance(value, str) else value


def _whole_path(text: str, folders: Folders) -> str:
    if len(text) > _LONGEST_PATH or "://" in text or text.startswith(("data:", "[")) or os.path.isabs(text):
        return text
    for group in folders:
        # os.path's, since Path's fails on a text that is longer than a file's name may be
        there = [folder for folder in group[:_LOOKED_IN] if os.path.isfile(folder / text)]
        there = there or [folder for folder in group[_LOOKED_IN:] if os.path.isfile(folder / text)][:1]
        if len({os.path.realpath(folder / text) for folder in there}) > 1:
            raise BadRow(
                "image unreadable",
                f"{text!r} lies in {str(there[0])!r} and in {str(there[1])!r}, and which one a row means depends on the file that names it. Give "
                "each of the files as a source of its own (`datasets:` of a recipe), or name the folder (--image_folder).",
            )
        if there:
            return str((there[0] / text).absolute())
    if os.path.isfile(text) or not Path(text).suffix:
        return text
    return str((next(filter(None, folders))[0] / text).absolute())  # where it was looked for, for the message
