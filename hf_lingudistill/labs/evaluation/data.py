"""Items of a task: from a dataset, or built in (data that installs with pip, so that `quick` needs no Hub).

Built-in texts: xsum, imdb, pubmedqa, contracts. Built-in images: easy_vqa_what (one-word answers), easy_vqa_sentences (full
sentences in wordings of the test split). They come from the packages of the `demo` extra.
"""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset, load_from_disk
from PIL import Image as PILImage

from .suite import Data, GroundedTask, TextTask, VisionTask

Row = dict[str, Any]


@dataclass(frozen=True)
class ImageItem:
    """A question about images. answers: the accepted texts. choices: what may be answered, if that is fixed."""

    key: str
    images: tuple[PILImage.Image, ...]
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


def text_items(task: TextTask, seed: int) -> dict[str, str]:
    """{key: text}, each cut to `max_words` words; texts of fewer than `head_words` + 8 words are left out."""
    if task.builtin is not None:
        from ..demo.text import UNSEEN_SOURCES, passages

        if task.builtin not in UNSEEN_SOURCES:
            raise ValueError(
                f"Task {task.name!r}: built-in text {task.builtin!r} is unknown; expected one of {', '.join(UNSEEN_SOURCES)}."
            )
        texts = dict(enumerate(passages(task.builtin)))
    else:
        texts = {index: str(row[task.column]) for index, row in _rows(task, (task.column,)).items()}
    words = {index: text.split(" ") for index, text in texts.items()}
    long_enough = [index for index, row in words.items() if len(row) >= task.head_words + 8]
    return {str(index): " ".join(words[index][: task.max_words]) for index in _draw(task, long_enough, seed)}


def image_items(task: VisionTask | GroundedTask, seed: int) -> list[ImageItem]:
    """The items of a task about images, in the order in which they are scored."""
    if task.builtin is not None:
        return _easy_vqa(task, seed)
    choices = getattr(task, "choices", None)
    columns = (task.image, task.question, task.answer, *([choices] if choices else []))
    rows = _rows(task, columns)
    return [_item(str(index), rows[index], task, choices) for index in _draw(task, list(rows), seed)]


def _item(key: str, row: Row, task: VisionTask | GroundedTask, choices: str | None) -> ImageItem:
    answer, images = row[task.answer], row[task.image]
    if choices and isinstance(answer, int):  # ScienceQA and others give the right choice by its index
        answer = row[choices][answer]
    if answer == [] and isinstance(task, GroundedTask):
        raise ValueError(f"Task {task.name!r}, item {key}: expected an answer to score, found none. Drop the row.")
    return ImageItem(
        key,
        tuple(_image(image, task, key) for image in (images if isinstance(images, list) else [images])),
        str(row[task.question]),
        tuple(str(text) for text in (answer if isinstance(answer, list) else [answer])),
        tuple(str(text) for text in row[choices]) if choices else (),
    )


def _image(image: Any, task: Data, key: str) -> PILImage.Image:
    try:
        if isinstance(image, dict):
            image = PILImage.open(io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"])
        return image.convert("RGB")  # type: ignore[no-any-return]
    except Exception as error:
        raise ValueError(
            f"Task {task.name!r}, item {key}: expected an image, found one that cannot be read ({error}). Repair or drop the row."
        ) from error


def _rows(task: Data, columns: tuple[str, ...]) -> dict[int, Row]:
    path = str(task.path)
    files = task.data_files
    if files is not None and not isinstance(files, Mapping):
        files = {task.split: list(files) if isinstance(files, tuple) else files}  # else `datasets` calls them "train"
    if (Path(path) / "state.json").is_file():
        dataset = load_from_disk(path)
    elif (Path(path) / "dataset_dict.json").is_file():
        dataset = load_from_disk(str(Path(path) / task.split))
    else:
        dataset = load_dataset(path, task.config, split=task.split, data_files=files, revision=task.revision)
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(
            f"Task {task.name!r}: {path} has no column {missing[0]!r}, found {', '.join(dataset.column_names)}. Name the columns "
            "in the suite."
        )
    return _Lazy(dataset)


class _Lazy(dict[int, Row]):
    """Rows by index, read when asked for."""

    def __init__(self, dataset: Any) -> None:
        super().__init__((index, {}) for index in range(len(dataset)))
        self.dataset = dataset

    def __getitem__(self, index: int) -> Row:
        return dict(self.dataset[index])

    def items(self) -> Any:
        return ((index, self[index]) for index in self)


def _draw(task: Data, keys: list[int], seed: int) -> list[int]:
    if task.n is None:
        return keys
    if task.n > len(keys):
        raise ValueError(f"Task {task.name!r} asks for {task.n} items, the data has {len(keys)} usable ones: lower n.")
    return sorted(random.Random(seed).sample(keys, task.n))


def _easy_vqa(task: VisionTask | GroundedTask, seed: int) -> list[ImageItem]:
    from ..demo.vqa import grounded_rows, vqa_rows

    n = task.n or 200
    if task.builtin == "easy_vqa_what":
        rows = vqa_rows("test", n, seed=seed)
    elif task.builtin == "easy_vqa_sentences":
        rows = grounded_rows("test", n, seed=seed)
    else:
        raise ValueError(
            f"Task {task.name!r}: built-in {task.builtin!r} is unknown; expected easy_vqa_what or easy_vqa_sentences."
        )
    return [
        ImageItem(
            str(index),
            tuple(image.convert("RGB") for image in row["images"]),
            row["prompt"][0]["content"],
            (row["completion"][0]["content"],),
        )
        for index, row in enumerate(rows)
    ]


def grey(image: PILImage.Image) -> PILImage.Image:
    """An even grey of the same size."""
    return PILImage.new("RGB", image.size, (127, 127, 127))


def other_item(items: list[ImageItem], seed: int, shift: int = 1) -> list[int]:
    """For each item, another one whose images take the place of its own: a permutation without a fixed point.

    shift: 1, 2 ... give permutations that differ at every item. The other image may show the same thing by chance: what the
    control then reaches is what guessing reaches.

    Raises:
        ValueError: with fewer than two items.
    """
    if len(items) < 2:
        raise ValueError(f"Exchanging images needs at least 2 items; got {len(items)}.")
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    found = [0] * len(items)
    for position, index in enumerate(order):
        found[index] = order[(position + 1 + (shift - 1) % (len(items) - 1)) % len(items)]
    return found
