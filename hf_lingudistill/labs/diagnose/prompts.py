"""The prompts that a drift report is measured on: the user's, or those that ship with the package.

A prompt is a conversation up to the assistant's last turn, and that turn: the *answer*, on which perplexity is taken. It belongs to
one of three conditions: `text` (no image), `behind` (the same text, with an image before it), `about` (a row with images of its own).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml
from PIL import Image as PILImage
from PIL import ImageDraw
from trl import prepare_multimodal_messages

from ...batch import BadRow, decode_image
from ...columns import prepare_dataset
from ...formats import as_trl_row
from ...mixtures import DistillSource
from ...sources import load_source

CONDITIONS = {
    "text": "text, no image",
    "behind": "text behind an image",
    "about": "answer about an image",
}
SIDE = 96  # pixels of a drawn picture
IMAGE_FILES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
HEAD_WORDS = 12  # of a plain passage, quoted in the prompt; the rest is the answer
SHIPPED = "shipped with hf_lingudistill"


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with a user's turn, in TRL's multimodal form, its images, and the assistant's answer."""

    key: str
    condition: str
    messages: tuple[dict[str, Any], ...]
    answer: str
    images: tuple[PILImage.Image, ...] = ()

    def with_images(self, images: Sequence[PILImage.Image]) -> Prompt:
        """The same text behind images."""
        plain = [{"role": turn["role"], "content": _text_of(turn["content"])} for turn in self.messages]
        return _prompt(self.key, "behind", plain, self.answer, images)


@dataclass(frozen=True)
class Prompts:
    """prompts: in the order in which they are measured. source: what they are, for the report. drawn: whether their images are
    the package's own drawings."""

    prompts: tuple[Prompt, ...]
    source: str
    drawn: bool = False


def load_prompts(
    *,
    texts: str | Path | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    images: Sequence[str | Path] = (),
    max_rows: int = 48,
    seed: int = 0,
) -> Prompts:
    """Read the prompts.

    Args:
        texts: a .txt file (passages between blank lines: the first words are quoted in the prompt, the rest is the answer) or a
            .jsonl file whose rows have `messages`, `prompt` and `completion`, or `text`, and may have `images` (paths, relative
            to the file).
        dataset: a Hub id, or a folder written by `save_to_disk`, with the same columns. Exclusive with `texts`. dataset_config,
            split: as on the Hub.
        images: image files or folders of them; each text without an image is measured behind one of them as well. The word
            `drawn` stands for the package's own pictures.
        max_rows: of a dataset, drawn at random; of a file, the first.

    With neither `texts` nor `dataset`: the texts shipped with the package, behind `images` or the package's own pictures; without
    `images`, also its questions about those pictures.

    Raises:
        ValueError: for a row or image that cannot be used, with its number; or if nothing is left.
        FileNotFoundError: if a file does not exist.
    """
    if texts is not None and dataset is not None:
        raise ValueError("Pass --texts or --dataset, not both: each is a set of prompts.")
    if max_rows < 1:
        raise ValueError(f"--max_rows must be at least 1, got {max_rows}.")
    shipped = texts is None and dataset is None
    drawn = list(images) == ["drawn"] or (shipped and not images)
    pictures = drawn_pictures() if drawn else _image_files(images)
    if texts is not None:
        found, source = _of_rows(_file_rows(Path(texts)), max_rows), Path(texts).name
    elif dataset is not None:
        found, source = (
            _of_rows(_dataset_rows(dataset, dataset_config, split, max_rows, seed), max_rows),
            f"{dataset}, split {split}",
        )
    else:
        found, source = _shipped(about=drawn), SHIPPED
    if not found:
        raise ValueError(f"No prompt to measure in {source}: expected at least one text with an answer.")
    behind = [
        prompt.with_images([picture])
        for prompt, picture in zip((p for p in found if not p.images), cycle(pictures or [None]), strict=False)
        if picture is not None
    ]
    if behind and not shipped:
        source += f", behind {'drawn pictures' if drawn else 'the images given'}"
    about = [prompt for prompt in found if prompt.images]
    return Prompts((*(p for p in found if not p.images), *behind, *about), source, drawn)


def _prompt(
    key: str, condition: str, messages: Sequence[Mapping[str, Any]], answer: str, images: Sequence[PILImage.Image]
) -> Prompt:
    turns = prepare_multimodal_messages([dict(message) for message in messages], images=list(images))
    return Prompt(key, condition, tuple(turns), answer, tuple(images))


# --------------------------------------------------------------------------------------------------------------------
# What ships with the package
# --------------------------------------------------------------------------------------------------------------------
def _shipped(*, about: bool) -> list[Prompt]:
    content = _shipped_content()
    found = [
        _prompt(f"text {index}", "text", _user(entry["prompt"]), entry["answer"], ())
        for index, entry in enumerate(content["texts"])
    ]
    if about:
        pictures = drawn_pictures()
        found += [
            _prompt(f"picture {index}", "about", _user(entry["question"]), entry["answer"], [pictures[index]])
            for index, entry in enumerate(content["pictures"])
        ]
    return found


def _shipped_content() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(files(__package__).joinpath("texts.yaml").read_text(encoding="utf-8"))
    return content


def drawn_pictures() -> list[PILImage.Image]:
    """The package's own pictures, 96 x 96 RGB."""
    return [_draw(entry["background"], entry["shapes"]) for entry in _shipped_content()["pictures"]]


def _draw(background: str, shapes: Sequence[Mapping[str, Any]]) -> PILImage.Image:
    image = PILImage.new("RGB", (SIDE, SIDE), background)
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        left, top, right, bottom = shape["box"]
        kind, color = shape["kind"], shape["color"]
        if kind == "circle":
            pen.ellipse((left, top, right, bottom), fill=color)
        elif kind == "square":
            pen.rectangle((left, top, right, bottom), fill=color)
        elif kind == "triangle":
            pen.polygon([(left, bottom), ((left + right) // 2, top), (right, bottom)], fill=color)
        else:
            pen.line((left, top, right, bottom), fill=color, width=8)
    return image


# --------------------------------------------------------------------------------------------------------------------
# What the user gives
# --------------------------------------------------------------------------------------------------------------------
def _file_rows(path: Path) -> Iterable[Mapping[str, Any]]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"--texts {str(path)!r} {what}: expected a .txt or .jsonl file.")
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--texts {str(path)!r} has the suffix {path.suffix!r}: expected .txt or .jsonl.")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--texts {str(path)!r} is no text in UTF-8 ({error.reason} at byte {error.start})."
        ) from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(
            content.split("\n"), start=1
        ):  # not splitlines, which parts a line at U+2028 too
            if line.strip():
                yield _json_row(line, f"{path.name}, line {number}") | {"_folder": path.parent}
    else:
        for passage in content.split("\n\n"):
            if passage.strip():
                yield {"text": " ".join(passage.split())}


def _json_row(line: str, name: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{name}: expected a JSON object, found what cannot be read ({error}).") from error
    if not isinstance(row, dict):
        raise ValueError(f"{name}: expected a JSON object, found {type(row).__name__}.")
    return row


def _dataset_rows(path: str, config: str | None, split: str, max_rows: int, seed: int) -> Iterable[Mapping[str, Any]]:
    source = DistillSource(path=path, name=config, split=split)
    dataset: Any = prepare_dataset(load_source(source))  # images stay undecoded, so that a bad one can be named
    return dataset.shuffle(seed=seed).select(range(min(max_rows, len(dataset))))  # type: ignore[no-any-return]


def _of_rows(rows: Iterable[Mapping[str, Any]], max_rows: int) -> list[Prompt]:
    return [prompt_of(row, f"row {number}") for number, row in zip(range(max_rows), rows, strict=False)]


def prompt_of(row: Mapping[str, Any], key: str) -> Prompt:
    """A row of any accepted format as a prompt, its last answer and its images.

    Raises:
        ValueError: naming the row by its key, if it ends with no answer or an image cannot be read.
    """
    name = key[:1].upper() + key[1:]
    messages, answer, stored = _exchange(row, name)
    images = _decoded(stored, row.get("_folder"), name)
    try:
        return _prompt(key, "about" if images else "text", messages, answer, images)
    except ValueError as error:  # TRL's: roles, and image placeholders without an image
        raise ValueError(f"{name}: {error}") from error


def _exchange(row: Mapping[str, Any], name: str) -> tuple[list[Mapping[str, Any]], str, list[Any]]:
    """The conversation, the answer and the undecoded images of a row of any accepted format."""
    row = as_trl_row({k: v for k, v in row.items() if k != "_folder"}, name)
    if "messages" in row:
        *messages, last = row["messages"] or [{}]
        if last.get("role") != "assistant" or not messages:
            raise ValueError(
                f"{name}: its messages must end with an assistant's turn after a user's, which is the answer."
            )
        answer = _text_of(last.get("content", ""))
    elif "prompt" in row:
        prompt, completion = row["prompt"], row["completion"]
        messages = _user(prompt) if isinstance(prompt, str) else list(prompt)
        answer = completion if isinstance(completion, str) else _text_of(completion[0].get("content", ""))
    else:
        words = str(row["text"]).split(" ")
        messages = _user("Continue this text: " + " ".join(words[:HEAD_WORDS]))
        answer = " ".join(words[HEAD_WORDS:])
    if not answer.strip():
        raise ValueError(f"{name} has an empty answer (a passage needs more than {HEAD_WORDS} words): leave it out.")
    # A turn that only calls a tool says nothing
    messages = [{"content": "", **turn} for turn in messages]
    return messages, answer.strip(), row.get("images") or []


def _user(text: str) -> list[Mapping[str, Any]]:
    return [{"role": "user", "content": text}]


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part.get("text"))


def _decoded(images: list[Any], folder: Path | None, name: str) -> list[PILImage.Image]:
    try:
        return [
            decode_image(
                folder / image if folder and isinstance(image, str) and os.path.isfile(folder / image) else image
            )
            for image in images
        ]
    except BadRow as error:
        raise ValueError(f"{name}: {error}. Repair or remove the row.") from error


def _image_files(names: Sequence[str | Path]) -> list[PILImage.Image]:
    paths: list[Path] = []
    for name in map(Path, names):
        if not name.exists():
            raise FileNotFoundError(
                f"--images {str(name)!r} does not exist: expected image files, a folder of them, or 'drawn'."
            )
        inside = sorted(p for p in name.iterdir() if p.suffix.lower() in IMAGE_FILES) if name.is_dir() else [name]
        if not inside:
            raise ValueError(f"--images {str(name)!r} holds no image: expected files such as .png or .jpg.")
        paths += inside
    try:
        return [decode_image(path) for path in paths]
    except BadRow as error:
        raise ValueError(f"--images: {error}.") from error
