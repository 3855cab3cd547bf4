"""The scores of a mixture: a table for the terminal, files, and a plot."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ...folders import replacing
from ..json_text import as_json
from ..statistics import FEWEST, ends

Report = Mapping[str, Any]
FILES = ["mix.json", "rows.jsonl", "datasets.yaml", "mix.png", "mix.svg"]


def as_text(report: Report) -> str:
    """The table, with what is proposed and why."""
    head = ("source", "rows", "image, nats/token", "answer tokens", "language, nats/row", "distill")
    rows = [
        (
            source["name"],
            f"{source['n']}",
            _interval(source["dependence"]) if source["with_image"] else "no image",
            f"{source['answer_tokens']['value']:.0f}",
            _interval(source["language"]),
            _proposal(source),
        )
        for source in report["sources"]
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    limits = report["limits"]
    lines += [
        "",
        f"distill: true where the image is worth at most {limits['max_dependence']:g} nats per token and the teacher leaves at least "
        f"{limits['min_language']:g} nats per row open; '?' where a 95 % interval contains a limit.",
        "The limits are a judgement, not a measurement: look at the plot and at rows.jsonl.",
    ]
    for source in report["sources"]:
        if source["marked"] is not None and source["marked"] is not source["distill"]:
            lines.append(
                f"{source['name']}: marked {_flag(source['marked'])} now, proposed {_flag(source['distill'])}."
            )
        if _has_own_flags(source):
            lines.append(
                f"{source['name']}: its rows carry flags of their own ({source['rows_marked']} of {source['n'] + sum(source['unusable'].values())} true), which "
                "datasets.yaml leaves to them."
            )
        if source["unusable"]:
            lines.append(
                f"{source['name']}: {sum(source['unusable'].values())} rows left out ({_counts(source['unusable'])})."
            )
    seen = [source for source in report["sources"] if source["with_image"]]
    if seen and not any(source["dependence"]["low"] > 0 for source in seen):
        lines.append(
            "No source is shown to need its images (no interval lies above 0): this student does not look at them, no answer needs them, "
            f"or the rows are too few (below {FEWEST} there is no interval)."
        )
    return "\n".join(lines)


def _has_own_flags(source: Report) -> bool:
    return source.get("rows_marked") is not None


def _proposal(source: Report) -> str:
    return _flag(source["distill"]) + ("" if source["sure"] else " ?")


def _flag(value: bool) -> str:
    return str(value).lower()


def _interval(score: Report) -> str:
    low, high = ends(score, "{:z.2f}".format)
    return f"{score['value']:z.2f} [{low}, {high}]"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in counts.items())


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `mix.json`, `rows.jsonl`, `datasets.yaml` (a recipe's section with the proposed flags) and, where matplotlib is installed,
    the plot. -> what was written.

    Raises:
        NotOurs: if a file of such a name is there that this function did not write.
    """
    with replacing(folder, *FILES, by="score-mix") as made:
        summary = {name: value for name, value in report.items() if name != "rows"}
        (made / "mix.json").write_text(as_json(summary) + "\n", encoding="utf-8")
        with (made / "rows.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in report["rows"])
        # A flag of the source would take the place of those that its rows have
        entries = [
            source["entry"] if _has_own_flags(source) else {**source["entry"], "distill": source["distill"]}
            for source in report["sources"]
        ]
        (made / "datasets.yaml").write_text(yaml.safe_dump({"datasets": entries}, sort_keys=False), encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is not None:
            _plot(report, made / "mix.png")
    return [folder / name for name in FILES if (folder / name).exists()]


INK, MUTED, GRID, SPEAKS = "#111827", "#6b7280", "#e5e7eb", "#ecfdf5"
COLORS = ("#2563eb", "#d97706", "#7c3aed", "#059669", "#dc2626", "#0891b2", "#be185d", "#65a30d")
MARKS = "osD^vPX*"


def _plot(report: Report, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(9, 5.6), layout="constrained")
    axis = figure.add_subplot()
    limits = report["limits"]
    rows = report["rows"]
    # A row of which nothing is open still has a place on a logarithmic axis
    least = 0.1
    axis.set_xscale("log")
    right = 2 * max(max(row["language"] for row in rows), limits["min_language"], 1.0)
    ends = [source["dependence"]["low"] for source in report["sources"]]
    low = min(
        0.0, *(row["dependence"] for row in rows), *filter(math.isfinite, ends)
    )  # of one row, there is no interval
    high = max(limits["max_dependence"], *(row["dependence"] for row in rows))
    margin = 0.08 * (high - low)
    axis.set(xlim=(least * 0.8, right), ylim=(low - margin, high + margin))
    axis.fill_between([limits["min_language"], right], low - margin, limits["max_dependence"], color=SPEAKS, zorder=0)
    axis.text(right * 0.93, low - margin * 0.6, "distill: true", ha="right", va="bottom", fontsize=9, color="#047857")
    for number, source in enumerate(report["sources"]):
        color, mark = COLORS[number % len(COLORS)], MARKS[number // len(COLORS) % len(MARKS)]
        own = [row for row in rows if row["source"] == source["name"]]
        axis.scatter(
            [max(row["language"], least) for row in own],
            [row["dependence"] for row in own],
            s=9,
            color=color,
            alpha=0.35,
            lw=0,
        )
        x, y = source["language"], source["dependence"]
        axis.errorbar(
            max(x["value"], least),
            y["value"],
            xerr=[[max(x["value"], least) - max(x["low"], least)], [max(x["high"], least) - max(x["value"], least)]],
            yerr=[[y["value"] - y["low"]], [y["high"] - y["value"]]],
            fmt=mark,
            color=color,
            mec="white",
            ms=9,
            lw=1.4,
            label=f"{source['name']}: {_proposal(source)}",
        )
    axis.set_xlabel("language: nats per row that the teacher leaves open over the answer", fontsize=9)
    axis.set_ylabel("image: nats per token that it is worth to the student", fontsize=9)
    axis.grid(color=GRID, lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=MUTED)
    figure.suptitle(
        "What the teacher should speak on: rows (small) and sources with 95 % intervals",
        fontsize=11,
        x=0.01,
        ha="left",
        color=INK,
    )
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, title="source: distill", title_fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": "hf_lingudistill"}):  # an identical rerun gives an identical file
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
