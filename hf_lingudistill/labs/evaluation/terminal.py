"""The report of an evaluation on the terminal: one table a group, then what it says in sentences."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ...hub.results import number
from ..statistics import FEWEST
from .report import GROUPS, difference, share, signed

Report = Mapping[str, Any]
YARDSTICKS = ("original", "base", "before")


def as_text(report: Report, *, width: int | None = None) -> str:
    """Tables and verdict, without colors, as wide as the terminal."""
    out = io.StringIO()
    console = Console(file=out, width=width or max(80, shutil.get_terminal_size((120, 24)).columns), color_system=None)
    models = list(report["models"])
    later = [m for m in models if m not in YARDSTICKS and any(m in task["recovered"] for task in report["tasks"])]
    for group, title in GROUPS.items():
        tasks = [task for task in report["tasks"] if task["group"] == group]
        if not tasks:
            continue
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("task", overflow="fold", min_width=24)
        for name in (*models, *(f"{model} recovered" if len(later) > 1 else "recovered" for model in later)):
            table.add_column(name, justify="right", no_wrap=True)
        for task in tasks:
            arrow = "higher" if task["higher_is_better"] else "lower"
            scores = [_cell(task["scores"].get(model)) for model in models]
            back = [share(task["recovered"].get(model)) for model in later]
            table.add_row(f"{task['title']} ({task['unit'] or task['metric']}, {arrow} is better)", *scores, *back)
        console.print(table)
    text = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    said = "±: half of the 95 % interval over items; [ ]: the interval of the share that came back."
    return "\n".join([text, said, *verdict(report)])


def _cell(score: Mapping[str, Any] | None) -> str:
    """A score over half the width of its interval."""
    if score is None:
        return "-"
    return f"{number(score['value'])} ± {number((score['high'] - score['low']) / 2)}"


def verdict(report: Report) -> list[str]:
    """For every model after `before`: what language came back, and what it cost in vision."""
    lines = []
    language = [task for task in report["tasks"] if task["group"] == "language"]
    for model in report["models"]:
        if model in YARDSTICKS:
            continue
        for key, whole in (("recovered", "the original"), ("recovered_to_base", "base")):
            task = next((task for task in language if model in task.get(key, {})), None)
            if task is not None:
                lines.append(f"{model}, language against {whole}: {_came_back(task, key, model)}.")
        changes = [d for t in report["tasks"] if t["group"] == "vision" for d in [difference(t, model, "before")] if d]
        if changes:
            lines.append(f"{model}, vision against before: {_changed(changes)}.")
    chosen = {str(task.get("notes", {}).get("reference")) for task in report["tasks"] if task["group"] == "grounded"}
    for model in sorted(chosen & set(report["models"])):
        lines.append(
            f"Grounded tasks: the tokens were chosen where {model} is sure, which favours it. Use a VLM that is not compared as --reference."
        )
    return lines


def _changed(changes: Sequence[Mapping[str, Any]]) -> str:
    """What paired differences say, and the differences."""
    known = [change for change in changes if math.isfinite(change["high"])]
    if not known:
        values = ", ".join(f"{change['value']:+z.3f}" for change in changes)
        return f"fewer than {FEWEST} items cannot tell ({values})"
    told = ", ".join(map(signed, changes))
    if any(change["low"] > 0 or change["high"] < 0 for change in known):
        return f"a change ({told})"
    return f"no clear change (the 95 % interval includes 0): {told}"


def _came_back(task: Report, key: str, model: str) -> str:
    scores = {name: number(task["scores"][name]["value"]) for name in ("before", model)}
    moved = f"{task['title']}, {task['unit'] or task['metric']}: before {scores['before']}, {model} {scores[model]}"
    found = task[key][model]
    if found["value"] is None:
        return f"{found['reason']} ({moved})"
    return f"{share(found)} of what was lost came back ({moved})"
