"""Items of a task: from a dataset, or built in (data that installs with pip, so that `quick` needs no Hub).

Built-in images: drawn_colors and drawn_yes_no, which this package draws. The others come from the packages of the `demo` extra:
easy_vqa_what (one-word answers), easy_vqa_sentences (full sentences in wordings of the test split), and the texts xsum, imdb,
pubmedqa and contracts.
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from datasets import ClassLabel, load_dataset
from PIL import Image as PILImage

from ...bad_rows import BadRow
from ...images import decode_image
from ...mixtures import DistillSource
from ...rgb import to_rgb
from ...sources import flat_files, load_saved, load_source
from .drawings import Drawing, drawings
from .fidelity import Question
from .shapes import ShapeError, accepted_answers, choices_of, found, right_choices, text_of
from .suite import Data, FidelityTask, GroundedTask, TextTask, VisionTask

logger = logging.getLogger(__name__)

Row = dict[str, Any]
T = TypeVar("T")
INSTRUCTIONS = Path(__file__).with_name("instructions.yaml")
DRAWN = ("drawn_colors", "drawn_yes_no")
_LONGEST_PATH = 1024  # a longer text is an image itself, in base64


@dataclass(frozen=True)
class ImageItem:
    """A question about images. answers: the accepted texts. choices: what may be answered, if that is fixed."""

    key: str
    images: tuple[PILImage.Image, ...]
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


def text_items(task: TextTask, seed: int) -> dict[str, str]:
    """{key: text}, each cut to `max_words` words; texts of fewer than `head_words` + 8 words are left out.

    Raises:
        ValueError: naming task and item, for what is no text.
    """
    if task.builtin is not None:
        from ..demo.text import UNSEEN_SOURCES, passages

        if task.builtin not in UNSEEN_SOURCES:
            raise ValueError(
                f"Task {task.name!r}: built-in text {task.builtin!r} is unknown; expected one of {', '.join(UNSEEN_SOURCES)}."
            )
        texts: dict[int, Any] = dict(enumerate(passages(task.builtin)))
    else:
        rows = Rows(task, (task.column,))
        texts = dict(zip(rows.numbers, rows.column(task.column), strict=True))
    words: dict[int, list[str]] = {}
    for index, text in texts.items():
        if not isinstance(text, str):  # a blank one is short, and left out like every short one
            raise ValueError(
                f"Task {task.name!r}, item {index}: column {task.column!r}: expected a text, found {found(text)}. Name another "
                "column, or drop the row."
            )
        words[index] = text.split(" ")
    long_enough = [index for index, row in words.items() if len(row) >= task.head_words + 8]
    wanted = task.head_words + 8
    if not long_enough:
        raise ValueError(
            f"Task {task.name!r}: none of its {len(words)} texts has {wanted} words, with a space between each and the next, of which the first "
            f"{task.head_words} are the request in chat form. Name another column, give longer texts, or lower `head_words`; texts in a script "
            "without spaces are not read."
        )
    if len(long_enough) < len(words):
        logger.warning(
            "Task %r: %d of %d texts have fewer than %d words and are left out", task.name, len(words) - len(long_enough), len(words), wanted
        )  # fmt: skip
    return {str(index): " ".join(words[index][: task.max_words]) for index in _draw(task, long_enough, seed)}


def image_items(task: VisionTask | GroundedTask, seed: int) -> list[ImageItem]:
    """The items of a task about images, in the order in which they are scored; `shapes` says what the columns may hold.

    Raises:
        ValueError: naming task, item and column, for a value of no accepted shape.
    """
    if task.builtin is not None:
        return _built_in_images(task, seed)
    pictures = (task.image,) if isinstance(task.image, str) else task.image
    choices = getattr(task, "choices", None)
    rows = Rows(task, (*pictures, task.question, task.answer, *([choices] if choices else [])))
    drawn = _draw(task, list(rows.numbers), seed)
    right = _right_choices(task, rows) if isinstance(task, VisionTask) and choices else {}
    read_answers = partial(accepted_answers, metric=getattr(task, "metric", ""))
    items = []
    for index in drawn:
        row, key = rows[index], str(index)
        images = _row_images([row[column] for column in pictures], task, key)
        question = _question(_in(task, key, task.question, text_of, row[task.question]), len(images), task, key)
        if key in right:
            texts = choices_of(row[str(choices)]).texts
            items.append(ImageItem(key, images, question, tuple(texts[i] for i in right[key]), texts))
        else:
            accepted = _in(task, key, task.answer, read_answers, row[task.answer])
            items.append(ImageItem(key, images, question, accepted))
    return items


def fidelity_questions(task: FidelityTask, seed: int) -> list[Question]:
    """What the original and the models are asked, in the order of the data.

    Raises:
        ValueError: naming task, item and column, for a value of no accepted shape.
    """
    own: dict[str, list[str]] = yaml.safe_load(INSTRUCTIONS.read_text(encoding="utf-8"))
    if task.builtin == "instructions":
        return [Question(str(i), own["text"][i]) for i in _draw(task, list(range(len(own["text"]))), seed)]
    about = own["about_a_picture"]
    if task.builtin == "drawings":
        pictures = _drawings(task, 64, seed)
        return [Question(str(i), about[i % len(about)], p.caption, (p.image,)) for i, p in enumerate(pictures)]
    shown = () if task.image is None else (task.image,) if isinstance(task.image, str) else task.image
    named = [column for column in (task.instruction, task.caption) if column is not None]
    rows = Rows(task, (*shown, *named))
    questions: list[Question] = []
    for index in _draw(task, list(rows.numbers), seed):
        row, key = rows[index], str(index)
        texts = {column: _in(task, key, column, text_of, row[column]) for column in named}
        images = _row_images([row[column] for column in shown], task, key) if shown else ()
        instruction = texts[task.instruction] if task.instruction else about[len(questions) % len(about)]
        questions.append(
            Question(key, _question(instruction, len(images), task, key), texts.get(task.caption or ""), images)
        )
    return questions


def _right_choices(task: VisionTask, rows: Rows) -> dict[str, tuple[int, ...]]:
    """{key: indices of the right choices} of every row of the data: a column says together what its answers are."""
    given = rows.column(str(task.choices))
    column = [
        (str(index), answer, _in(task, str(index), str(task.choices), choices_of, value))
        for index, answer, value in zip(rows.numbers, rows.column(task.answer), given, strict=True)
    ]
    try:
        return right_choices(column, task.answer_is)
    except ShapeError as error:
        raise ValueError(f"Task {task.name!r}, column {task.answer!r}, {error}.") from error


def _in(task: Data, key: str, column: str, read: Callable[[Any], T], value: Any) -> T:
    """A value read, or refused with the place where it stands."""
    try:
        return read(value)
    except ShapeError as error:
        raise ValueError(f"Task {task.name!r}, item {key}: column {column!r}: {error}.") from error


def _question(text: str, images: int, task: Data, key: str) -> str:
    """The question without LLaVA's `<image>` marks: the images are put before it."""
    if marks := text.count("<image>"):
        if marks != images:
            raise ValueError(
                f"Task {task.name!r}, item {key}: its question has {marks} <image> marks for {images} images. Repair or drop the row."
            )
        text = text.replace("<image>", "").strip()
    return text


def _row_images(values: list[Any], task: Data, key: str) -> tuple[PILImage.Image, ...]:
    """The images of one column (one, or a list), or of several columns (those that are null are not used)."""
    if len(values) > 1:
        values = [value for value in values if value is not None]
    elif isinstance(values[0], list | tuple):
        values = list(values[0])
    if not values:
        raise ValueError(
            f"Task {task.name!r}, item {key}: it has no image. Drop the row, or leave it out with `where`."
        )
    return tuple(_image(value, task, key) for value in _with_whole_paths(values, task))


def _image(image: Any, task: Data | None, key: str) -> PILImage.Image:
    """An RGB image as the training reads it."""
    try:
        return decode_image(image)
    except BadRow as error:
        name = f"Task {task.name!r}, item" if task else "Item"
        raise ValueError(f"{name} {key}: expected an image; {error}. Repair or drop the row.") from error


class Rows:
    """The rows of a task's data that its `where` lets in, by their number in the data; read when asked for.

    Raises:
        ValueError: if a column is missing, or `where` lets none in.
    """

    def __init__(self, task: Data, columns: tuple[str, ...]) -> None:
        self.task, dataset = task, _load(task)
        where = dict(task.where or {})
        if missing := [column for column in (*columns, *where) if column not in dataset.column_names]:
            raise ValueError(
                f"Task {task.name!r}: {task.path} has no column {missing[0]!r}, found {', '.join(dataset.column_names)}. Name the "
                "columns in the suite."
            )
        self.dataset = dataset.select_columns(list(dict.fromkeys((*columns, *where))))
        self.numbers: Sequence[int] = range(len(dataset))
        for column, wanted in where.items():
            allowed = wanted if isinstance(wanted, list | tuple) else [wanted]
            self.numbers = [i for i, v in zip(self.numbers, self.column(column), strict=True) if v in allowed]
            if not self.numbers:
                seen = sorted({found(value) for value in self._whole(column)})[:5]
                raise ValueError(
                    f"Task {task.name!r}: where {column} is {wanted!r} there is no row, found {', '.join(seen)}."
                )

    def __getitem__(self, number: int) -> Row:
        try:
            row = dict(self.dataset[number])
        except Exception as error:  # an image that `datasets` cannot decode; PIL raises a dozen types
            raise ValueError(
                f"Task {self.task.name!r}, item {number}: expected an image, found one that cannot be read "
                f"({' '.join(str(error).split())[:200]}). Repair or drop the row."
            ) from error
        return {column: self._named(column, value) for column, value in row.items()}

    def column(self, name: str) -> list[Any]:
        """One column of these rows."""
        whole = self._whole(name)
        return [whole[number] for number in self.numbers]

    def _whole(self, name: str) -> list[Any]:
        return [self._named(name, value) for value in self.dataset.select_columns([name])[:][name]]

    def _named(self, column: str, value: Any) -> Any:
        """A class label by its name: its number says nothing to a reader."""
        feature = self.dataset.features[column]
        if isinstance(feature, ClassLabel) and isinstance(value, int):
            return feature.int2str(value) if value >= 0 else None  # -1: hidden
        return value


def _load(task: Data) -> Any:
    path, files = Path(str(task.path)), task.data_files
    if files is not None and not isinstance(files, Mapping):
        files = {task.split: list(files) if isinstance(files, tuple) else files}  # else `datasets` calls them "train"
    # A file is one split, which `datasets` calls "train"; a part of it ("test[:50]") stays one
    split = re.sub(r"^\w+", "train", task.split) if path.is_file() else task.split
    try:
        if (path / "state.json").is_file():
            return load_saved(path)
        if (path / "dataset_dict.json").is_file():
            return load_saved(path / task.split)
        if task.revision is not None:
            return load_dataset(str(path), task.config, split=split, data_files=files, revision=task.revision)
        return load_source(DistillSource(path=str(task.path), name=task.config, split=split, data_files=files))
    except Exception as error:  # of Arrow, httpx, the Hub, a loader's parser: each has a type of its own
        cause = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(
            f"Task {task.name!r}: cannot read its data ({path}, split {task.split!r}): {cause[:300]}. Check `path`, `split`, `config` and "
            "`data_files` in the suite."
        ) from error


def _with_whole_paths(images: Iterable[Any], task: Data) -> list[Any]:
    """Images of a row, relative paths among them made whole: they begin at the file that names them, as in training."""
    files = flat_files(task.data_files) or [str(task.path)]
    folders = [path.parent if path.is_file() else path for path in map(Path, files)]

    def whole(image: Any) -> Any:
        if not isinstance(image, str) or len(image) > _LONGEST_PATH:
            return image
        return next((str(folder / image) for folder in folders if os.path.isfile(folder / image)), image)

    return [whole(image) for image in images]


def _draw(task: Data, keys: list[int], seed: int) -> list[int]:
    if task.n is None:
        return keys
    if task.n > len(keys):
        raise ValueError(f"Task {task.name!r} asks for {task.n} items, the data has {len(keys)} usable ones: lower n.")
    return sorted(random.Random(seed).sample(keys, task.n))


def _built_in_images(task: VisionTask | GroundedTask, seed: int) -> list[ImageItem]:
    if task.builtin in DRAWN:
        return _draw_pictures(task, seed)
    from ..demo.vqa import grounded_rows, vqa_rows

    n = task.n or 200
    if task.builtin == "easy_vqa_what":
        rows = vqa_rows("test", n, seed=seed)
    elif task.builtin == "easy_vqa_sentences":
        rows = grounded_rows("test", n, seed=seed)
    else:
        known = ", ".join((*DRAWN, "easy_vqa_what", "easy_vqa_sentences"))
        raise ValueError(f"Task {task.name!r}: built-in {task.builtin!r} is unknown; expected one of {known}.")
    return [
        ImageItem(
            str(index),
            tuple(to_rgb(image) for image in row["images"]),
            row["prompt"][0]["content"],
            (row["completion"][0]["content"],),
        )
        for index, row in enumerate(rows)
    ]


def _drawings(task: Data, usual: int, seed: int) -> list[Drawing]:
    try:
        return drawings(task.n or usual, seed)
    except ValueError as error:
        raise ValueError(f"Task {task.name!r}: {error}. Lower `n`.") from None


def _draw_pictures(task: VisionTask | GroundedTask, seed: int) -> list[ImageItem]:
    pictures = _drawings(task, 100, seed)
    if task.builtin == "drawn_colors":
        asked = [(f"What color is the {picture.shape}? Answer with one word.", picture.color) for picture in pictures]
    else:  # every other question is about another color, so that always saying yes scores one half
        colors = [p.color if i % 2 == 0 else p.other_color for i, p in enumerate(pictures)]
        asked = [
            (f"Is the {picture.shape} {color}? Answer yes or no.", "yes" if color == picture.color else "no")
            for picture, color in zip(pictures, colors, strict=True)
        ]
    return [
        ImageItem(str(index), (picture.image,), text, (answer,))
        for index, (picture, (text, answer)) in enumerate(zip(pictures, asked, strict=True))
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
