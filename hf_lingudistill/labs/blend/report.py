"""The front between two VLMs: a table, JSON, and a plot."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..json_text import as_json
from ..statistics import ends

Report = Mapping[str, Any]
MODEL = "model"
FILES = ["blend.json", "blend.md", "front.png", "front.svg", MODEL]


def as_text(front: Report) -> str:
    """The table, and what was chosen."""
    return "\n".join([*_lines(front, "  ", "", ""), "", _verdict(front)])


def _markdown(front: Report) -> str:
    rows = _lines(front, " | ", "| ", " |")
    return "\n".join(
        ["# Blend", "", rows[0], "|---" * (3 + len(_scores(front))) + "|", *rows[1:], "", _verdict(front), ""]
    )


def _scores(front: Report) -> list[str]:
    return list(front["points"][0]["scores"])


def _lines(front: Report, between: str, first: str, last: str) -> list[str]:
    scores = _scores(front)
    table = [("model", "share of after", *scores, "keeps")]
    for point in front["points"]:
        mark = " <- saved" if point["name"] == front["chosen"] else ""
        cells = [_cell(point["scores"][score]) for score in scores]
        table.append((point["name"], f"{point['weight']:g}", *cells, _kept(point) + mark))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        (first + between.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + last).rstrip()
        for row in table
    ]


def _kept(point: Report) -> str:
    if not point["keeps"]:
        return "no"
    return {True: "yes, surely", False: "yes, as measured", None: "yes"}[point["keeps_surely"]]


_SURE = {
    True: "The condition was checked on the measured scores. It also holds at the worse end of the 95 % interval.",
    False: "The condition was checked on the measured scores. At the worse end of the 95 % interval it fails, so another sample of items might "
    "reject this blend.",
    None: "The condition was checked on the measured scores. A score of several tasks has no interval, so another sample of items might reject "
    "this blend.",
}


def _cell(score: Report) -> str:
    interval = f" [{', '.join(ends(score, '{:z.3f}'.format))}]" if "low" in score else ""
    return f"{score['value']:z.3f}{interval}"


def _verdict(front: Report) -> str:
    direction = "highest" if front["higher_is_better"] else "lowest"
    if front["chosen"] is None:
        return f"Nothing was saved: {front['reason']}."
    return (
        f"Saved in model/: {front['chosen']}, with the {direction} {front['most']} of those with {front['keep']}. "
        + _SURE[next(point["keeps_surely"] for point in front["points"] if point["name"] == front["chosen"])]
    )


def write_front(front: Report, folder: Path) -> None:
    """Write `blend.json`, `blend.md` and, where matplotlib is installed, the plot into a folder that is being made."""
    (folder / "blend.json").write_text(as_json(front) + "\n", encoding="utf-8")
    (folder / "blend.md").write_text(_markdown(front), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        _plot(front, folder / "front.png")


INK, MUTED, GRID, CHOSEN = "#111827", "#6b7280", "#e5e7eb", "#0f766e"
COLORS = {"uniform": "#2563eb", "drift": "#d97706"}
LABELS = {"uniform": "one weight for all", "drift": "by how far each layer had moved"}


def _plot(front: Report, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7.6, 5.2), layout="constrained")
    axis = figure.add_subplot()
    most = front["most"]
    across = next((score for score in _scores(front) if score != most), most)
    ends = {point["name"]: point for point in front["points"] if not point["shares"]}

    def place(point: Report) -> tuple[float, float]:
        return point["scores"][across]["value"], point["scores"][most]["value"]

    for shares, color in COLORS.items():
        between = [point for point in front["points"] if point["shares"] == shares]
        if not between:
            continue
        line = [ends["before"], *between, ends["after"]]
        axis.plot(*zip(*map(place, line), strict=True), color=color, lw=1.2, alpha=0.6, label=LABELS[shares])
        for point in between:
            x, y = place(point)
            axis.plot(x, y, "o", color=color, ms=6, mfc=color if point["keeps"] else "white")
            axis.annotate(
                f"{point['weight']:g}", (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7.5, color=MUTED
            )
    for name, point in ends.items():
        x, y = place(point)
        axis.plot(x, y, "s", color=INK, ms=7, mfc=INK if point["keeps"] else "white")
        axis.annotate(name, (x, y), xytext=(6, -11), textcoords="offset points", fontsize=9, color=INK)
    for point in front["points"]:
        if point["name"] == front["chosen"]:
            axis.plot(*place(point), "o", ms=15, mfc="none", mec=CHOSEN, mew=2, label="saved")
    axis.plot([], [], "o", color=MUTED, mfc="white", label=f"does not keep {front['keep']}")
    axis.set_xlabel(across, fontsize=9)
    axis.set_ylabel(f"{most} ({'higher' if front['higher_is_better'] else 'lower'} is better)", fontsize=9)
    if not front["higher_is_better"]:
        axis.invert_yaxis()
    axis.margins(0.12)
    axis.grid(color=GRID, lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=MUTED)
    axis.legend(fontsize=8, frameon=False)
    axis.set_title("Between the VLM before and the VLM after", fontsize=11, loc="left", color=INK)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": "hf_lingudistill"}):  # an identical rerun gives an identical file
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
