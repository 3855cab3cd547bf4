"""Real images and questions for the demo: easy-VQA (one shape in one color on a plain background, 64x64, 13 answers).

Its "what" questions ask for the color or the shape and need the image. Its yes/no questions can be answered blind four
times out of five: they say nothing about vision, and a model that is taught with them learns to see much later.

    >>> vqa_rows("train", 3000, seed=0)    # images, prompt, completion, distill=False
    >>> vqa_rows("test", 300, seed=0)      # for measure.what_accuracy
    >>> grounded_rows("test", 100, seed=0) # full sentences about an image
"""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from ..rows import ROW_FEATURES

Split = Literal["train", "test"]
Kind = Literal["color", "shape", "yes_no"]

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
ANSWERS = (*COLORS, *SHAPES, "yes", "no")

# Wordings of the grounded rows. The two splits share none, so that a test measures the answer and not the template.
_REQUESTS: dict[str, tuple[str, ...]] = {
    "train": (
        "Describe the picture in a full sentence.",
        "What do you see here?",
        "Tell me what this image shows.",
        "Please write a caption for the picture.",
        "What is drawn in this image?",
        "Explain to a friend what the picture contains.",
    ),
    "test": (
        "Could you describe what is in front of you?",
        "Give a short description of this drawing.",
        "What would you say this image is about?",
    ),
}
_DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "train": (
        "The picture shows a {color} {shape} on a plain background.",
        "I can see a single {shape}. It is {color}, and there is nothing else in the image.",
        "There is one shape in this image, a {shape}, and its color is {color}.",
        "This is a drawing of a {shape} that has been filled in with {color}.",
        "Somebody has drawn a {color} {shape}. The rest of the picture was left empty.",
        "A {shape} in {color} stands alone in the image.",
    ),
    "test": (
        "In front of a plain background lies a {shape}, and it is painted {color}.",
        "It is a very simple drawing: only a {color} {shape} and nothing more.",
        "You are looking at a {shape}. Whoever made it chose {color} as the color.",
    ),
}


@dataclass(frozen=True)
class VqaItem:
    """One question about one image. kind: "color" or "shape" ("what" questions), or "yes_no"."""

    image_path: Path
    question: str
    answer: str
    kind: Kind


def vqa_items(split: Split) -> list[VqaItem]:
    """All questions of a split, in file order.

    Raises:
        ModuleNotFoundError: if easy-vqa is not installed.
        ValueError: if the split is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f'easy-VQA has the splits "train" and "test"; got {split!r}.')
    if importlib.util.find_spec("easy_vqa") is None:
        raise ModuleNotFoundError(
            "The demo reads its images from easy-vqa, not installed here; run `pip install easy-vqa==1.0`."
        )
    import easy_vqa  # after the check, so that the message names the command

    read_questions = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]
    read_images = {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}[split]
    paths = {int(key): Path(path) for key, path in read_images().items()}
    items = []
    for question, answer, image in zip(*read_questions(), strict=True):
        kind: Kind = "color" if answer in COLORS else "shape" if answer in SHAPES else "yes_no"
        items.append(VqaItem(paths[int(image)], question, answer, kind))
    return items


def annotated_images(split: Split) -> dict[Path, tuple[str, str]]:
    """(color, shape) of every image whose "what" questions give both."""
    color: dict[Path, str] = {}
    shape: dict[Path, str] = {}
    for item in vqa_items(split):
        if item.kind == "yes_no":
            continue
        # "what is the blue shape?" names the color and is answered with the shape, and the other way round.
        for word in [*item.question.rstrip("?").split(" "), item.answer]:
            if word in COLORS:
                color[item.image_path] = word
            elif word in SHAPES:
                shape[item.image_path] = word
    return {path: (color[path], shape[path]) for path in color if path in shape}


def _row(path: Path, prompt: str, completion: str, distill: bool) -> dict[str, Any]:
    return {
        # The encoded file, not its path: the dataset then works wherever it is saved to.
        "images": [{"bytes": path.read_bytes(), "path": None}],
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
        "distill": distill,
    }


def vqa_rows(
    split: Split,
    n: int,
    *,
    seed: int,
    kinds: tuple[Kind, ...] = ("color", "shape"),
    distill: bool = False,
) -> Dataset:
    """n questions with one-word answers, in random order: images (one each), prompt, completion, distill.

    The kinds come in equal numbers, as far as n divides. Vision-heavy rows: `distill` is false unless asked otherwise.

    Raises:
        ValueError: if a kind has fewer questions than its share of n.
    """
    rng = random.Random(seed)
    items = vqa_items(split)
    picked: list[VqaItem] = []
    for position, kind in enumerate(kinds):
        pool = [item for item in items if item.kind == kind]
        share = n // len(kinds) + (position < n % len(kinds))
        if share > len(pool):
            raise ValueError(f"Asked for {share} {kind!r} questions; easy-VQA's {split} split has {len(pool)}.")
        picked.extend(rng.sample(pool, share))
    rng.shuffle(picked)
    rows = [_row(item.image_path, item.question, item.answer, distill) for item in picked]
    return Dataset.from_list(rows, features=ROW_FEATURES)


def grounded_rows(split: Split, n: int, *, seed: int, distill: bool = True) -> Dataset:
    """n rows with a full sentence about an image: language whose color and shape depend on what is seen.

    Each image is used once. The wordings of the two splits differ.

    Raises:
        ValueError: if the split has fewer than n images with a known color and shape.
    """
    rng = random.Random(seed)
    known = sorted(annotated_images(split).items())
    if n > len(known):
        raise ValueError(f"Asked for {n} grounded rows; easy-VQA's {split} split has {len(known)} annotated images.")
    rows = []
    for path, (color, shape) in rng.sample(known, n):
        answer = rng.choice(_DESCRIPTIONS[split]).format(color=color, shape=shape)
        rows.append(_row(path, rng.choice(_REQUESTS[split]), answer, distill))
    return Dataset.from_list(rows, features=ROW_FEATURES)
