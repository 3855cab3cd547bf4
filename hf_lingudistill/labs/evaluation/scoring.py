"""What one model gives on every item of a suite, task by task."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...identity import digest
from .cache import ItemCache, made_with, of_images
from .data import fidelity_questions, image_items, text_items
from .fidelity_run import FidelityRun
from .grounded import token_scores
from .ifeval import CHECKERS, Instructed, checkable, ifeval_scores, read_prompts
from .language import bits_per_byte, harness_scores
from .models import Scored, chat_template_of
from .suite import GroundedTask, IfevalTask, Suite, VisionTask
from .vision import answers, conditions, load_metric, score_answers

SKIPPED = "ifeval/skipped"  # among the items: the number of prompts whose checker would need a download


def read_items(suite: Suite) -> dict[str, Any]:
    """The items of every task, read before any model is loaded: a wrong column or a missing harness costs seconds."""
    if suite.lmms_eval.tasks:
        from .lmms import find_tasks

        find_tasks(suite.lmms_eval.tasks)
    for task in suite.vision:
        load_metric(task.metric)
    about_images: tuple[VisionTask | GroundedTask, ...] = (*suite.vision, *suite.grounded)
    items: dict[str, Any] = {task.name: text_items(task, suite.seed) for task in suite.texts}
    items |= {task.name: image_items(task, suite.seed) for task in about_images}
    items |= {task.name: fidelity_questions(task, suite.seed) for task in suite.fidelity}
    if suite.ifeval is not None:
        prompts = read_prompts(suite.ifeval)
        able = checkable(prompts)
        wanted = suite.ifeval.limit or suite.ifeval.n or len(able)
        drawn = sorted(random.Random(suite.seed).sample(range(len(able)), min(wanted, len(able))))
        items[suite.ifeval.name] = [able[index] for index in drawn]
        items[SKIPPED] = len(prompts) - len(able)
    return items


def score(
    scored: Scored,
    suite: Suite,
    items: Mapping[str, Any],
    folder: Path,
    *,
    fidelity: FidelityRun | None,
    swaps: bool,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    """Everything one model gives, by task name."""

    keys = functools.cache(lambda task: _keys(items[task]))  # once for all conditions: it reads every pixel

    def cache(name: str, task: Any) -> ItemCache:
        header = {
            "model": scored.fingerprint,
            "dtype": str(scored.model.dtype),
            "made_with": made_with(scored.model, *(CHECKERS if isinstance(task, IfevalTask) else ())),
            "task": digest([task.__dict__, suite.seed, chat_template_of(scored), keys(task.name)]),
        }
        return ItemCache(folder / f"{name}.jsonl", header)

    def bar(name: str) -> str | None:
        return f"{scored.name}: {name}" if progress else None

    found: dict[str, Any] = {} if fidelity is None else dict(fidelity.measure(scored))
    for text in suite.texts:
        for form in text.forms:
            name = f"{text.name}-{form}"
            found[name] = bits_per_byte(
                scored, text, form, items[text.name], cache(name, text), batch_size=batch_size, progress=bar(name)
            )
    if suite.lm_eval.tasks:
        found["lm_eval"] = harness_scores(
            scored, suite.lm_eval, seed=suite.seed, batch_size=batch_size, cache_folder=folder
        )
    if suite.ifeval is not None:
        name = suite.ifeval.name
        found[name] = ifeval_scores(
            scored, suite.ifeval, items[name], cache(name, suite.ifeval), batch_size=batch_size, progress=bar(name)
        )
    if not scored.sees:
        return found
    for question in suite.vision:
        found[question.name] = {}
        for condition, images in conditions(items[question.name], question.controls, suite.seed).items():
            name = f"{question.name}-{condition}"
            given = answers(
                scored,
                question,
                items[question.name],
                images,
                cache(name, question),
                batch_size=batch_size,
                progress=bar(name),
            )
            found[question.name][condition] = score_answers(question, items[question.name], given)
    for grounded in suite.grounded:
        found[grounded.name] = token_scores(
            scored,
            grounded,
            items[grounded.name],
            cache(grounded.name, grounded),
            seed=suite.seed,
            swaps=swaps,
            batch_size=batch_size,
            progress=bar(grounded.name),
        )
    if suite.lmms_eval.tasks:
        from .lmms import lmms_scores

        found["lmms_eval"] = lmms_scores(
            scored, suite.lmms_eval, seed=suite.seed, batch_size=batch_size, cache_folder=folder
        )
    return found


def _keys(items: Any) -> Any:
    """What the items are, for the cache's header: all that a record or a kept verdict depends on, pixels included."""
    if isinstance(items, Mapping):
        return items
    if items and isinstance(items[0], Instructed):
        return [(prompt.key, prompt.prompt, prompt.instructions, prompt.arguments) for prompt in items]
    return [(item.key, item.question, item.answers, item.choices, of_images(item.images)) for item in items]
