"""Vision: greedy answers to questions about images, scored by the package's `evaluate` modules, with two controls.

A score that the controls reach (image replaced by grey; images exchanged between items) says nothing about vision.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import evaluate

from ...progress import progress_bar
from ...sentences import install
from ..metrics.multiple_choice.multiple_choice import lettered
from ..statistics import Items
from .cache import ItemCache
from .data import ImageItem, grey, other_item
from .models import Scored, user_turn
from .reading import Images, write_answers
from .suite import VisionTask

METRICS = Path(__file__).parents[1] / "metrics"


@cache
def load_metric(name: str) -> Any:
    """One of the `evaluate` modules in `hf_lingudistill/labs/metrics`; `compute` returns the mean and `scores` per item.

    Raises:
        ModuleNotFoundError: if it needs a package that is not installed, saying how to install it.
    """
    try:
        return evaluate.load(str(METRICS / name / f"{name}.py"))
    except ImportError as error:
        raise ModuleNotFoundError(
            f"A package that the metric {name} needs is not installed ({' '.join(str(error).split())[:120]}); run "
            f"{install('eval')}."
        ) from error


def conditions(items: Sequence[ImageItem], controls: Sequence[str], seed: int) -> dict[str, list[Images]]:
    """The images of every item as they are (`own`), and under each control."""
    found: dict[str, list[Images]] = {"own": [item.images for item in items]}
    if "grey" in controls:
        found["grey"] = [[grey(image) for image in item.images] for item in items]
    if "shuffled" in controls:
        found["shuffled"] = [items[other].images for other in other_item(list(items), seed)]
    return found


def answers(
    scored: Scored,
    task: VisionTask,
    items: Sequence[ImageItem],
    images: Sequence[Images],
    cache: ItemCache,
    *,
    batch_size: int = 8,
    progress: str | None = None,
) -> dict[str, str]:
    """The model's greedy answers, by item key."""
    todo = [index for index, item in enumerate(items) if item.key not in cache]
    bar = progress_bar(
        total=len(items), initial=len(items) - len(todo), desc=progress, unit="item", disable=progress is None
    )
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        prompts = [scored.render(user_turn(question(items[i]) + task.suffix, len(images[i]))) for i in batch]
        written = generate(scored, prompts, [images[i] for i in batch], task.max_new_tokens)
        cache.add({items[i].key: text for i, text in zip(batch, written, strict=True)})
        bar.update(len(batch))
    bar.close()
    return {item.key: cache.records[item.key] for item in items}


def question(item: ImageItem) -> str:
    """The question, and on lines of their own the choices if there are any: with letters, where letters name choices."""
    marks = [f"{letter}." for letter in ascii_uppercase] if lettered(list(item.choices)) else ["-"] * len(item.choices)
    return "\n".join((item.question, *(f"{mark} {choice}" for mark, choice in zip(marks, item.choices, strict=False))))


def generate(scored: Scored, prompts: Sequence[str], images: Sequence[Images], max_new_tokens: int) -> list[str]:
    """Greedy continuations of rendered prompts up to the end of the turn, special tokens and outer spaces removed. Of a model's generation
    config only the stops count: a repetition penalty there would tell apart two models with the same weights."""
    written = write_answers(scored, prompts, images, max_new_tokens=max_new_tokens)
    return [
        text.strip() for text in scored.tokenizer.batch_decode([one.ids for one in written], skip_special_tokens=True)
    ]


def score_answers(task: VisionTask, items: Sequence[ImageItem], given: dict[str, str]) -> Items:
    """-> {key: (score, 1)}."""
    arguments: dict[str, Any] = {
        "predictions": [given[item.key] for item in items],
        "references": [list(item.answers) for item in items],
    }
    if task.metric == "multiple_choice":
        arguments["choices"] = [list(item.choices) for item in items]
    scores = load_metric(task.metric).compute(**arguments)["scores"]
    return {item.key: (float(score), 1.0) for item, score in zip(items, scores, strict=True)}
