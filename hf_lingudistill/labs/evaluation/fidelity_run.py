"""The fidelity tasks of an evaluation: the original comes first, and what it said stays while the other models come and go."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from ...identity import digest
from .cache import ItemCache, made_with, of_images
from .data import ImageItem
from .fidelity import Question, Record, Reference, dependence, fidelity, original_answers
from .models import Scored, chat_template_of
from .reading import Written
from .suite import FidelityTask
from .vision import conditions

ORIGINAL = "original"
Found = dict[str, dict[str, Record]]  # condition -> key -> record


class FidelityRun:
    """One per evaluation. Ask the original, then measure every model.

    Args:
        questions: of each task. folder: of the item cache, one folder per model. load: loads the original, for a run in which all
            seemed to be on disk and something was not. template: the chat template of `before`, read when a task asks for it.
    """

    def __init__(
        self,
        tasks: Sequence[FidelityTask],
        questions: Mapping[str, Sequence[Question]],
        folder: Path,
        load: Callable[[], Scored],
        template: Callable[[], str],
        *,
        seed: int,
        batch_size: int,
        progress: bool,
    ) -> None:
        self.tasks, self.questions, self.folder, self.load = tasks, questions, folder, load
        self.template = template() if any(task.template == "before" for task in tasks) else None
        self.seed, self.batch_size, self.progress = seed, batch_size, progress
        self.answers: dict[str, dict[str, Written]] = {}
        self.depends: dict[str, dict[str, list[bool]]] = {}
        self.references: dict[str, Reference] = {}
        self.asked = {
            task.name: digest([(q.key, q.instruction, q.caption, of_images(q.images)) for q in questions[task.name]])
            for task in tasks
        }
        self.source: dict[str, Any] = {}  # the original, as a header names it

    def ask(self, original: Scored, others: Mapping[str, str]) -> None:
        """Let the original write its answers and read them. others: {name: fingerprint} of the models that will be measured."""
        self.source = _named(original)
        loaded = original
        for task in self.tasks:
            original = self._as_asked(task, loaded)
            questions = self.questions[task.name]
            asked = [(q.key, q.instruction, q.caption) for q in questions]
            settings = [task.max_new_tokens, task.temperature, self.seed, chat_template_of(original), asked]
            cache = ItemCache(
                self.folder / original.name / f"{task.name}-answers.jsonl", self.source | {"task": digest(settings)}
            )
            self.answers[task.name] = original_answers(
                original,
                questions,
                max_new_tokens=task.max_new_tokens,
                temperature=task.temperature,
                seed=self.seed,
                batch_size=self.batch_size,
                cache=cache,
                progress=self._bar(original.name, f"{task.name}, its own answers"),
            )
            if task.about_images:
                self._split(task, original)
            if not all(self._on_disk(task, name, print_) for name, print_ in others.items()):
                self._reference(task, original)

    def _split(self, task: FidelityTask, original: Scored) -> None:
        header = self._header(task) | {"threshold": task.threshold}
        cache = ItemCache(self.folder / original.name / f"{task.name}-depends.jsonl", header)
        questions = self.questions[task.name]
        if any(question.key not in cache for question in questions):
            reference = self._reference(task, original)
            cache.add(
                dependence(reference, original, threshold=task.threshold, seed=self.seed, batch_size=self.batch_size)
            )
        self.depends[task.name] = {question.key: cache.records[question.key] for question in questions}

    def _reference(self, task: FidelityTask, original: Scored | None = None) -> Reference:
        if task.name not in self.references:
            original = self._as_asked(task, original or self.load())
            self.references[task.name] = Reference.of(
                original,
                self.questions[task.name],
                self.answers[task.name],
                batch_size=self.batch_size,
                progress=self._bar(original.name, f"{task.name}, reading them"),
            )
        return self.references[task.name]

    def _as_asked(self, task: FidelityTask, original: Scored) -> Scored:
        return original if task.template == "own" else replace(original, template=self.template)

    def measure(self, scored: Scored) -> dict[str, Found]:
        """{task: {condition: {key: record}}} of one model; conditions are `own` and the task's controls."""
        return {
            task.name: {
                condition: self._measure(task, scored, condition, images)
                for condition, images in self._conditions(task).items()
            }
            for task in self.tasks
            if scored.sees or not task.about_images or scored.name == ORIGINAL
        }

    def _measure(self, task: FidelityTask, scored: Scored, condition: str, images: Any) -> dict[str, Record]:
        answers = self.answers[task.name]
        if scored.name == ORIGINAL:  # the yardstick, whatever the picture
            return {key: {"kl": [0.0] * len(a.ids), "top1": [1] * len(a.ids)} for key, a in answers.items()}
        header = _named(scored) | {"task": digest([chat_template_of(scored), self._header(task)])}
        cache = ItemCache(self._file(task, scored.name, condition), header)
        if all(key in cache for key in answers):
            return {key: cache.records[key] for key in answers}
        return fidelity(
            self._reference(task),
            scored,
            images=images,
            batch_size=self.batch_size,
            cache=cache,
            progress=self._bar(scored.name, f"{task.name}-{condition}"),
        )

    def _conditions(self, task: FidelityTask) -> dict[str, Mapping[str, Sequence[PILImage.Image]] | None]:
        if not task.about_images:
            return {"own": None}
        items = [ImageItem(q.key, q.images, q.instruction, ()) for q in self.questions[task.name]]
        return {
            condition: {item.key: tuple(images) for item, images in zip(items, found, strict=True)}
            for condition, found in conditions(items, task.controls, self.seed).items()
        }

    def _header(self, task: FidelityTask) -> dict[str, Any]:
        asked = self.template if task.template == "before" else "own"
        return self.source | {
            "template": asked,
            "seed": self.seed,  # of the controls, and of the captions that are exchanged
            "asked": self.asked[task.name],  # an original may answer alike whatever it is asked
            "answers": digest({key: a.ids for key, a in self.answers[task.name].items()}),
        }

    def _file(self, task: FidelityTask, model: str, condition: str) -> Path:
        return self.folder / model / f"{task.name}-{condition}.jsonl"

    def _on_disk(self, task: FidelityTask, model: str, fingerprint: str) -> bool:
        """Whether a model's records look complete; whoever is wrong here has the original loaded once more."""
        names = ("own", *task.controls) if task.about_images else ("own",)
        for file in (self._file(task, model, condition) for condition in names):
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            header = json.loads(lines[0]) if len(lines) > len(self.questions[task.name]) else {}
            if (header.get("model"), header.get("made_with")) != (fingerprint, self.source["made_with"]):
                return False
        return True

    def _bar(self, model: str, what: str) -> str | None:
        return f"{model}: {what}" if self.progress else None


def _named(scored: Scored) -> dict[str, Any]:
    """A model and what it runs on, as a header names them."""
    return {
        "model": scored.fingerprint,
        "dtype": str(scored.model.dtype),
        "made_with": made_with(scored.model),
    }
