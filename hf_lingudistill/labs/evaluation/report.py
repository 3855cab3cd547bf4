"""The report of an evaluation: JSON for machines, Markdown for readers, plots. Numbers in, files out."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...folders import replacing
from ...hub.results import number
from ..json_text import as_json
from ..statistics import Bootstrap, Items, check_finite, ends, loss_is_real

Report = dict[str, Any]
SCHEMA = "lingudistill-evaluation/1"
# What an evaluation writes beside its item cache
PLOTS = [f"{name}.{suffix}" for name in ("scores", "trade_off", "training") for suffix in ("png", "svg")]
FILES = ["report.json", "report.md", *PLOTS]
GROUPS = {
    "language": "Language",
    "vision": "Vision",
    "grounded": "Language about an image",
}


@dataclass
class Task:
    """One score of all models. items: {model: Items}. data: where the items came from, see `join`. controls: {control: {model: Items}}. beside: {what: {model: Items}}, what is
    told with the score and is neither good nor bad."""

    name: str
    group: str
    title: str
    metric: str
    unit: str
    higher_is_better: bool
    items: dict[str, Items]
    controls: dict[str, dict[str, Items]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, dict[str, Items]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def build_report(tasks: Sequence[Task], bootstrap: Bootstrap, *, compare: Sequence[str] = (), **facts: Any) -> Report:
    """Scores with intervals, paired differences and the share recovered, for every task.

    compare: models that every later one is compared with, besides `original`, `before` and `base`. facts: further keys of the report.
    """
    return {"schema": SCHEMA, **facts, "tasks": [task_entry(task, bootstrap, compare) for task in tasks]}


def task_entry(task: Task, bootstrap: Bootstrap, compare: Sequence[str] = ()) -> Report:
    """A task's part of the report; see `statistics` for what the numbers are."""
    for by_model in (task.items, *task.controls.values(), *task.beside.values()):
        for model, items in by_model.items():
            check_finite(items, f"{model}, {task.name}")
    scores = {model: bootstrap.score(items) for model, items in task.items.items()}
    differences, shares, to_base = [], {}, {}
    base = [model for model in ("original", "before") if model in task.items]
    compare = ("base", *compare)
    others = [*base, *dict.fromkeys(model for model in compare if model in task.items and model not in base)]
    for model, items in task.items.items():
        for other in others:
            if model != other and not (model in others and others.index(model) < others.index(other)):
                differences.append({"of": model, "minus": other, **bootstrap.difference(items, task.items[other])})
        if len(base) == 2 and model not in base:
            shares[model] = _share(task, bootstrap, items, task.items["original"])
        if "before" in task.items and "base" in task.items and model not in (*base, "base"):
            to_base[model] = _share(task, bootstrap, items, task.items["base"])
    return {
        "name": task.name,
        "group": task.group,
        "title": task.title,
        "metric": task.metric,
        "unit": task.unit,
        "higher_is_better": task.higher_is_better,
        "n": max(score["n"] for score in scores.values()),  # of the items that weigh something
        **({"data": task.data} if task.data else {}),
        "scores": scores,
        "controls": {
            control: {model: bootstrap.score(items) for model, items in by_model.items()}
            for control, by_model in task.controls.items()
        },
        "differences": differences,
        "recovered": shares,
        **({"recovered_to_base": to_base} if to_base else {}),
        **(
            {"beside": {what: {m: bootstrap.score(i) for m, i in of.items()} for what, of in task.beside.items()}}
            if task.beside
            else {}
        ),
        **({"notes": task.notes} if task.notes else {}),
    }


def _share(task: Task, bootstrap: Bootstrap, items: Items, whole: Items) -> Report:
    """What came back of what `before` has lost against `whole`."""
    found = bootstrap.recovered(items, task.items["before"], whole)
    lost = found.pop("lost")
    if found["value"] is not None and not loss_is_real(lost, higher_is_better=task.higher_is_better):
        return {"value": None, "reason": "nothing was lost"}
    return found


def difference(entry: Mapping[str, Any], of: str, minus: str) -> Mapping[str, Any] | None:
    """The paired difference of two models in a task's entry, if it has one."""
    return next((d for d in entry["differences"] if d["of"] == of and d["minus"] == minus), None)


# --------------------------------------------------------------------------------------------------------------------
# Markdown
# --------------------------------------------------------------------------------------------------------------------
def markdown(report: Report) -> str:
    """The report as Markdown: one table per group, one line per task, one column per model."""
    models = list(report["models"])
    lines = [
        f"# Evaluation: suite `{report['suite']['name']}`",
        "",
        "Each score with its 95 % bootstrap interval over items (brackets). "
        "Differences are paired: the same items, drawn together.",
        "",
    ]
    lines += [f"- **{name}**: {fact['path']} ({fact['kind']}, {fact['parameters'] / 1e6:.0f}M, {fact['dtype']})" for name, fact in report["models"].items()]  # fmt: skip
    for group, title in GROUPS.items():
        tasks = [task for task in report["tasks"] if task["group"] == group]
        if not tasks:
            continue
        lines += ["", f"## {title}", ""]
        lines += _table(("task", "n", *models), [_row(task, models) for task in tasks])
        changes = [row for task in tasks for row in _changes(task, models)]
        if changes:
            lines += ["", "Paired differences and what came back:", ""]
            head = ("task", "model", "minus before", "minus original", "recovered")
            lines += _table((*head, "recovered, to base") if "base" in models else head, changes)
        controls = [row for task in tasks for row in _controls(task, models)]
        if controls:
            lines += ["", "Controls (a score that these reach says nothing about vision):", ""]
            lines += _table(("task", "control", *models), controls)
        beside = [
            [what, *(_cell(of.get(model)) for model in models)]
            for task in tasks
            for what, of in task.get("beside", {}).items()
        ]
        if beside:
            lines += ["", "Beside them:", "", *_table(("", *models), beside)]
        lines += _said(tasks)
        notes = {task["name"].split("/")[1]: task for task in tasks if "image_token_share" in task.get("notes", {})}
        for task in notes.values():  # one line for the measures of a task, which share their split
            note, title = task["notes"], task["title"].rpartition(":")[0]
            lines += ["", f"{title}: {note['image_token_share']:.1%} of {note['tokens']} answer tokens depend on the image (reference: {note['reference']})."]  # fmt: skip
            if note["reference"] in models:
                lines[-1] += f" {note['reference']} is also compared, and scores too well here: the tokens were chosen where it is sure. Use a VLM that is not compared as --reference."  # fmt: skip
    lines += ["", "## How", ""]
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines += [f"Seed {report['suite']['seed']}; {machine}. Seconds: {report['seconds']}.", ""]
    return "\n".join(lines)


def _said(tasks: Sequence[Report]) -> list[str]:
    """How fidelity and IFEval were measured, one line per task of the suite."""
    found: dict[str, str] = {}
    for task in tasks:
        notes = task.get("notes", {})
        name = task["name"].split("/")[-2]
        if "answer_tokens" in notes:
            found[name] = f"{name}: {notes['answers']}; {notes['answer_tokens']} tokens in all"
            if "dependent_share" in notes:
                found[name] += f", of which {notes['dependent_share']:.1%} depend on the picture"
        if "skipped" in notes:
            found[name] = f"{name}: greedy answers, at most {notes['max_new_tokens']} tokens; {notes['skipped']} prompts left out whose checker needs a sentence splitter"  # fmt: skip
    return [line for text in found.values() for line in ("", f"{text}.")]


def _row(task: Report, models: Sequence[str]) -> list[str]:
    arrow = "higher is better" if task["higher_is_better"] else "lower is better"
    unit = f"{task['unit'] or task['metric']}, {arrow}"
    return [f"{task['title']} ({unit})", str(task["n"]), *(_cell(task["scores"].get(model)) for model in models)]


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    return f"{number(score['value'])} [{number(score['low'])}, {number(score['high'])}]"


def share(found: Mapping[str, Any] | None) -> str:
    """What came back, as a reader sees it."""
    if found is None:
        return "-"
    if found["value"] is None:
        return str(found["reason"])
    return f"{found['value']:z.0%} [{found['low']:z.0%}, {found['high']:z.0%}]"


def signed(score: Mapping[str, Any] | None) -> str:
    """A difference and its interval; dashes for what there is not."""
    if score is None:
        return "-"
    low, high = ends(score, "{:+z.3f}".format)
    return f"{score['value']:+z.3f} [{low}, {high}]"


def _changes(task: Report, models: Sequence[str]) -> list[list[str]]:
    rows = []
    for model in task["scores"]:
        if model == "original":
            continue
        to_before, to_original = difference(task, model, "before"), difference(task, model, "original")
        if to_before is None and to_original is None:
            continue
        row = [task["title"], model, signed(to_before), signed(to_original), share(task["recovered"].get(model))]
        rows.append([*row, share(task.get("recovered_to_base", {}).get(model))] if "base" in models else row)
    return rows


def _controls(task: Report, models: Sequence[str]) -> list[list[str]]:
    return [
        [task["title"], control, *(_cell(scores.get(model)) for model in models)]
        for control, scores in task["controls"].items()
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------
def write_report(report: Report, output_dir: Path, *, training_log: str | Path | None = None) -> tuple[Path, bool]:
    """Write `report.json`, `report.md` and, where matplotlib is installed, the plots (PNG and SVG) to a folder. -> the path of the
    JSON, and whether it was.

    Raises:
        NotOurs: if a file of such a name is there that this function did not write.
    """
    plotted = importlib.util.find_spec("matplotlib") is not None
    with replacing(output_dir, *FILES, by="evaluate") as made:
        (made / "report.json").write_text(as_json(report) + "\n", encoding="utf-8")
        (made / "report.md").write_text(markdown(report), encoding="utf-8")
        if plotted:
            from .plots import plot_all

            plot_all(report, made, training_log=training_log)
    return output_dir / "report.json", plotted
