"""Evaluation results as a model card needs them, from either kind of report: that of `lingudistill evaluate` and the embedded
demo's. What cannot be read is left out; no text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .run_facts import public_name

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """A number with its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"

    def signed(self) -> str:
        """As a difference."""
        if self.low is None or self.high is None:
            return f"{self.value:+z.3f}"
        return f"{self.value:+z.3f} [{self.low:+z.3f}, {self.high:+z.3f}]"


@dataclass(frozen=True)
class Task:
    """One benchmark: scores by model, controls by name, what changed since `before`, what came back.

    recovered: share of the loss, or the reason why there is none. ce_recovered: the same of the run with cross-entropy alone, and
    ce_change what this model has over it. chosen_by: a model of the comparison that chose the tokens, if one did. metric: an id such as `accuracy`. data: where the items came from, as the report records it.
    """

    name: str
    group: str
    title: str
    metric: str
    unit: str
    higher_is_better: bool
    n: int | None
    scores: dict[str, Score]
    controls: dict[str, Score] = field(default_factory=dict)
    data: Facts = field(default_factory=dict)
    change: Score | None = None
    recovered: Score | str | None = None
    ce_recovered: Score | None = None
    ce_change: Score | None = None
    chosen_by: str | None = None


def number(value: float) -> str:
    """A score as readers want it: three digits after the point below 10, one above; a dash if it is not finite."""
    return "-" if not math.isfinite(value) else f"{value:z.{3 if abs(value) < 10 else 1}f}"


def score_of(entry: Any) -> Score | None:
    """{"value", "low", "high"} -> Score; None for anything that is not a finite number."""
    if not isinstance(entry, Mapping) or not is_finite(entry.get("value")):
        return None
    low, high = entry.get("low"), entry.get("high")
    return Score(entry["value"], low, high) if is_finite(low) and is_finite(high) else Score(entry["value"])


def is_finite(value: Any) -> bool:
    """Whether it is a number that can be shown: no bool, no NaN, not infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def main_model(report: Facts) -> str:
    """The model of a report that a card is about: `after`, else the one named like the default sharing mode, else the last one."""
    from ..options import DistillOptions  # imports trl

    models = list(report.get("models") or {})
    for name in ("after", DistillOptions.kv_sharing):
        if name in models or not models:
            return name
    return str(models[-1])


def tasks_of(report: Facts, main: str | None = None) -> list[Task]:
    """The benchmarks of a report, whichever of the two kinds it is. Entries that cannot be read are left out."""
    if "tasks" in report:
        tasks = [_evaluated(entry, main or main_model(report)) for entry in report["tasks"] or []]
        return [task for task in tasks if task is not None]
    parts = (
        _demo_fidelity(report, "language", "text"),
        _demo_fidelity(report, "pictures", "pictures"),
        _demo_vision(report),
    )
    return [task for task in parts if task is not None]


def _evaluated(entry: Facts, main: str) -> Task | None:
    scores = {name: score for name, found in (entry.get("scores") or {}).items() if (score := score_of(found))}
    if main not in scores:
        return None
    # Under one name in every card, whatever the report's arm is called
    scores["after"] = scores[main]
    ce = next((name for name in ("ce_only", "ce") if name in scores), None)
    shares = entry.get("recovered") or {}
    share = shares.get(main) or {}
    controls = {name: score for name, by in (entry.get("controls") or {}).items() if (score := score_of(by.get(main)))}
    reference = (entry.get("notes") or {}).get("reference")
    return Task(
        name=str(entry.get("name", "")),
        group=str(entry.get("group", "language")),
        chosen_by=reference if reference in ("before", main) else None,
        title=str(entry.get("title") or entry.get("name") or "untitled"),
        metric=str(entry.get("metric") or "score"),
        unit=str(entry.get("unit") or ""),
        higher_is_better=bool(entry.get("higher_is_better", True)),
        n=entry.get("n") if isinstance(entry.get("n"), int) else None,
        scores=scores,
        controls=controls,
        data=entry["data"] if isinstance(entry.get("data"), Mapping) else {},
        change=_difference(entry, main, "before"),
        recovered=score_of(share) or (str(share["reason"]) if share.get("reason") else None),
        ce_recovered=score_of(shares.get(ce)),
        ce_change=_difference(entry, main, ce),
    )


def _difference(entry: Facts, of: str, minus: str | None) -> Score | None:
    pairs = entry.get("differences") or []
    return score_of(next((pair for pair in pairs if pair.get("of") == of and pair.get("minus") == minus), None))


def _demo_scores(entry: Facts) -> dict[str, Score]:
    intervals = entry.get("interval95") or {}
    scores = {}
    for arm in ("original", "before", "after"):
        low, high = intervals.get(arm) or (None, None)
        if score := score_of({"value": entry.get(arm), "low": low, "high": high}):
            scores[arm] = score
    return scores


def _demo_fidelity(report: Facts, part: str, about: str) -> Task | None:
    entry = report.get(part) or {}
    scores = _demo_scores(entry)
    if "after" not in scores:
        return None
    metric, _, title = str(entry.get("metric", "KL to the original")).partition(" on ")
    return Task(
        name=f"fidelity/{about}",
        group="language" if part == "language" else "grounded",
        title=title or about,
        metric=metric,
        unit="nats per token",
        higher_is_better=False,
        n=entry.get("n_texts"),
        scores=scores,
        recovered=score_of({"value": entry.get("recovered")}) or "nothing was lost",
    )


def _demo_vision(report: Facts) -> Task | None:
    entry = report.get("vision") or {}
    scores = _demo_scores(entry)
    if "after" not in scores:
        return None
    shuffled = score_of({"value": (entry.get("shuffled") or {}).get("after")})
    change = scores["after"].value - scores["before"].value if "before" in scores else None
    return Task(
        name="accuracy/drawings",
        group="vision",
        title=str(entry.get("metric", "vision")),
        metric="accuracy",
        unit="accuracy",
        higher_is_better=True,
        n=entry.get("n"),
        scores=scores,
        controls={"shuffled": shuffled} if shuffled else {},
        change=Score(change) if change is not None else None,
    )


def overlaid(below: Facts, above: Facts) -> dict[str, Any]:
    """Two sets of facts as one: what the upper one knows counts."""
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(name), Mapping):
            merged[name] = overlaid(below[name], value)
        elif value is not None and value != []:
            merged[name] = value
    return merged


def run_facts_of_models(report: Facts) -> dict[str, Any]:
    """What an evaluation's report says about where its models come from: names alone. A path such as `demo/before` looks like a
    Hub id, and a base model must not be claimed for that."""
    models = report.get("models") or {}
    run_facts = {}
    for part, name in (("student", "before"), ("teacher", "original")):
        fact = models.get(name) or {}
        if isinstance(fact.get("path"), str) and fact["path"]:
            run_facts[part] = {"name": public_name(fact["path"]), "parameters": fact.get("parameters")}
    return run_facts


def run_facts_of_demo(report: Facts) -> dict[str, Any]:
    """What the embedded demo's report says about the training, as run facts."""
    config, seconds, machine = (report.get(name) or {} for name in ("config", "seconds", "machine"))
    history = report.get("training") or [{}]
    return {
        "student": {"prose": "a SmolVLM that was made on the spot", "language": "en"},
        "teacher": {
            "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "license": "apache-2.0",
            "quantization": config.get("teacher_quantization"),
            "mib": config.get("teacher_mib"),
        },
        "datasets": [
            {"name": "short questions about OpenMoji drawings (CC BY-SA 4.0)", "distill": False},
            {"name": "the teacher's own long answers about them, told what they show", "distill": True},
        ],
        "settings": dict(config),
        "training": {
            "steps": config.get("max_steps"),
            "seconds": seconds.get("after"),
            "tokens": history[-1].get("num_tokens"),
        },
        "hardware": {
            "device": "cpu",
            "processes": 1,
            "threads": machine.get("threads"),
            "precision": "bf16" if config.get("bf16") else "fp32",
        },
        "versions": {name: machine[name] for name in ("hf_lingudistill", "torch") if machine.get(name)},
    }
