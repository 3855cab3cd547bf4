"""What `report.json` says, in one form: of `lingudistill evaluate`, or the shorter one of the embedded demo.

Whatever is missing or malformed there is "not evaluated" here: a page about two models must open without a report.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = {
    "original": "Original LM",
    "before": "Before",
    "after": "After",
    "ce_only": "Same steps, no distillation",
}


@dataclass(frozen=True)
class Score:
    """A value and its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Task:
    """One benchmark. scores: {model: Score}. shuffled: the same with the images exchanged, "the score of guessing".

    change: after minus before, on the same items. recovered: the share of what was lost that came back.
    """

    title: str
    group: str
    unit: str
    higher_is_better: bool
    n: int | None
    scores: dict[str, Score]
    shuffled: dict[str, Score] = field(default_factory=dict)
    change: Score | None = None
    recovered: Score | None = None


@dataclass(frozen=True)
class Point:
    """A model in the plane of language (x) and vision (y), each with its interval."""

    x: Score
    y: Score


@dataclass(frozen=True)
class Plane:
    """points: {model: Point}. x falls towards better. original_x: of the LM, which has no y. log: x is a logarithm."""

    points: dict[str, Point]
    x_label: str
    y_label: str
    original_x: float | None
    log: bool = False


@dataclass(frozen=True)
class Report:
    """models: names in the order of the columns. facts: {what: value} about the run, for people.

    prompts: what the models were asked, each with its picture's file or None. shapes: the models know easy-VQA's drawn shapes.
    """

    models: list[str]
    tasks: list[Task]
    plane: Plane | None
    facts: dict[str, str]
    prompts: list[tuple[Path | None, str]]
    shapes: bool


def read_report(path: Path | None) -> Report | None:
    """The report, or None where there is none or where the file holds something else."""
    if path is None:
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(raw, dict):
        return None
    prompts = _prompts(raw, path.parent)
    report = _from_evaluation(raw, prompts) if "tasks" in raw else _from_demo(raw, prompts)
    return report if report.tasks else None


def _prompts(raw: Mapping[str, Any], folder: Path) -> list[tuple[Path | None, str]]:
    """The prompts that can be asked again: of text alone, or about a picture that lies beside the report."""
    found: list[tuple[Path | None, str]] = []
    for entry in _list(raw.get("prompts")):
        text, image = _dict(entry).get("prompt"), _dict(entry).get("image")
        picture = folder / image if isinstance(image, str) else None
        if text and (not image or (picture and picture.is_file())):
            found.append((picture, str(text)))
    return found


def _knows_shapes(titles: Iterable[str]) -> bool:
    return any(re.match(r"easy.?vqa", title, re.IGNORECASE) for title in titles)


# --------------------------------------------------------------------------------------------------------------------
# `lingudistill evaluate`
# --------------------------------------------------------------------------------------------------------------------
def _from_evaluation(raw: Mapping[str, Any], prompts: list[tuple[Path | None, str]]) -> Report:
    main = str(raw.get("main") or "after")
    if main != "after":
        raw = _renamed(_renamed(raw, "after", "after (another)"), main, "after")
    entries = [task for task in _list(raw.get("tasks")) if isinstance(task, dict)]
    tasks = [task for task in map(_task, entries) if task.scores]
    named = list(_dict(raw.get("models"))) or list(dict.fromkeys(name for task in tasks for name in task.scores))
    models = [name for name in named if any(name in task.scores for task in tasks)]
    suite = _dict(raw.get("suite"))
    facts = {"Suite": suite.get("name"), "Seed": suite.get("seed"), **_machine(raw)}
    shapes = _knows_shapes(task.title for task in tasks)
    return Report(models, tasks, _plane_of_tasks(entries, models), _texts(facts), prompts, shapes)


def _renamed(raw: Any, arm: str, name: str) -> Any:
    """The report with an arm under another name: the one that is shown here is called "after", whatever it was."""
    if isinstance(raw, dict):
        return {name if key == arm else key: _renamed(value, arm, name) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_renamed(value, arm, name) for value in raw]
    return name if raw == arm else raw


def _task(raw: Mapping[str, Any]) -> Task:
    changes = [_score(one) for one in _list(raw.get("differences")) if _is_change(one)]
    return Task(
        title=str(raw.get("title") or raw.get("name") or "unnamed"),
        group=str(raw.get("group") or "other"),
        unit=str(raw.get("unit") or raw.get("metric") or "").replace("_", " "),
        higher_is_better=bool(raw.get("higher_is_better", True)),
        n=raw.get("n") if isinstance(raw.get("n"), int) else None,
        scores=_scores(raw.get("scores")),
        shuffled=_scores(_dict(raw.get("controls")).get("shuffled")),
        change=next((change for change in changes if change), None),
        recovered=_score(_dict(raw.get("recovered")).get("after")),
    )


def _is_change(raw: Any) -> bool:
    return isinstance(raw, dict) and (raw.get("of"), raw.get("minus")) == ("after", "before")


def _plane_of_tasks(entries: list[dict[str, Any]], models: list[str]) -> Plane | None:
    """Language: bits per byte above the original LM, mean over texts. Vision: mean score. As `trade_off.png` has it."""
    texts = [task for task in entries if task.get("metric") == "bits_per_byte"]
    vision = [task for task in entries if task.get("group") == "vision"]
    points = {}
    for model in models:
        above = [_above_original(task, model) for task in texts]
        seen = [_scores(task.get("scores")).get(model) for task in vision]
        if above and seen and all(above) and all(seen):
            points[model] = Point(_mean(above), _mean(seen))
    if len(points) < 2:
        return None
    return Plane(points, "bits per byte above the original LM", "vision score, mean", original_x=0.0)


def _above_original(task: Mapping[str, Any], model: str) -> Score | None:
    for one in _list(task.get("differences")):
        if isinstance(one, dict) and (one.get("of"), one.get("minus")) == (model, "original"):
            return _score(one)
    return None


def _mean(scores: list[Any]) -> Score:
    value = sum(score.value for score in scores) / len(scores)
    if any(score.low is None or score.high is None for score in scores):
        return Score(value)
    # Tasks hold different items: their errors add in squares.
    error = math.sqrt(sum(((score.high - score.low) / 2) ** 2 for score in scores)) / len(scores)
    return Score(value, value - error, value + error)


# --------------------------------------------------------------------------------------------------------------------
# The embedded demo
# --------------------------------------------------------------------------------------------------------------------
def _from_demo(raw: Mapping[str, Any], prompts: list[tuple[Path | None, str]]) -> Report:
    language, vision = _dict(raw.get("language")), _dict(raw.get("vision"))
    words, sight = _demo_scores(language), _demo_scores(vision)
    models = [name for name in NAMES if name in words or name in sight]
    recovered = _score({"value": language.get("recovered")})
    shuffled = {
        name: Score(value) for name, value in _dict(vision.get("shuffled")).items() if _number(value) is not None
    }
    tasks = [
        Task(_title(language, "Text"), "language", "nats per token", False, _count(language, "n_texts"), words,
             recovered=recovered),
        Task(_title(vision, "Vision"), "vision", "accuracy", True, _count(vision, "n"), sight, shuffled=shuffled),
    ]  # fmt: skip
    both = {name: Point(words[name], sight[name]) for name in models if name in words and name in sight}
    plane = None
    if len(both) >= 2:
        original = words["original"].value if "original" in words else None
        plane = Plane(both, "distance to the original LM on text, nats per token", "vision accuracy", original)
    settings = _dict(raw.get("config"))
    facts = {
        "Seed": settings.get("seed"),
        "Sharing": settings.get("kv_sharing"),
        "Teacher": settings.get("teacher_quantization"),
        "Drawings": raw.get("drawings"),
        **_machine(raw),
    }
    tasks = [task for task in tasks if task.scores]
    return Report(models, tasks, plane, _texts(facts), prompts, _knows_shapes(task.title for task in tasks))


def _demo_scores(raw: Mapping[str, Any]) -> dict[str, Score]:
    intervals = _dict(raw.get("interval95"))
    scores = {}
    for name in NAMES:
        if (value := _number(raw.get(name))) is not None:
            low, high = (*_list(intervals.get(name)), None, None)[:2]
            scores[name] = Score(value, _number(low), _number(high))
    return scores


def _title(raw: Mapping[str, Any], otherwise: str) -> str:
    title = str(raw.get("metric") or otherwise)
    return title[:1].upper() + title[1:]


def _count(raw: Mapping[str, Any], key: str) -> int | None:
    value = raw.get(key)
    return value if isinstance(value, int) else None


# --------------------------------------------------------------------------------------------------------------------
# Reading what may be anything
# --------------------------------------------------------------------------------------------------------------------
def _dict(raw: Any) -> dict[str, Any]:
    return raw if isinstance(raw, dict) else {}


def _list(raw: Any) -> list[Any]:
    return raw if isinstance(raw, list) else []


def _number(raw: Any) -> float | None:
    return float(raw) if isinstance(raw, int | float) and not isinstance(raw, bool) and math.isfinite(raw) else None


def _score(raw: Any) -> Score | None:
    raw = _dict(raw)
    value = _number(raw.get("value"))
    return None if value is None else Score(value, _number(raw.get("low")), _number(raw.get("high")))


def _scores(raw: Any) -> dict[str, Score]:
    found = {str(name): _score(value) for name, value in _dict(raw).items()}
    return {name: score for name, score in found.items() if score is not None}


def _machine(raw: Mapping[str, Any]) -> dict[str, Any]:
    machine = _dict(raw.get("machine"))
    return {"hf_lingudistill": machine.get("hf_lingudistill"), "torch": machine.get("torch")}


def _texts(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in facts.items() if value is not None}
