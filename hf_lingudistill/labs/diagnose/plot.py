"""The picture of a drift report: weights, states and cosines by layer; perplexity by sharing mode. PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .measure import READERS
from .prompts import CONDITIONS
from .recommend import shown
from .states import STATES

Report = Mapping[str, Any]
INK, MUTED, GRID, CHOSEN = "#111827", "#6b7280", "#e5e7eb", "#0f766e"
COLORS = {"keys": "#2563eb", "values": "#d97706", "hidden": "#7c3aed"}
NAMES = {"keys": "keys", "values": "values", "hidden": "hidden states"}
DASHES = {"text": "-", "behind": "--", "about": ":"}


def plot_drift(report: Report, path: Path) -> list[Path]:
    """Draw the report. -> the PNG and the SVG file."""
    conditions = list(report["perplexity"])
    figure = Figure(figsize=(12.5, 8.2), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=[1.55, 1])
    left, right = halves
    weights, distances, cosines = left.subplots(3, 1, height_ratios=[1.25, 1, 1])
    _weights(left, weights, report["weights"]["layers"])
    _curves(distances, report["states"], "distance")
    _curves(cosines, report["states"], "cosine")
    distances.set_title("Keys, values and hidden states: relative distance from the original", **_TITLE)
    cosines.set_title("The same: cosine with the original", **_TITLE)
    cosines.set_xlabel("layer", fontsize=9)
    distances.set_ylim(bottom=0)
    cosines.set_ylim(top=1 + 0.04 * (1 - cosines.get_ylim()[0]))
    _legend(left, conditions)
    for row, axis in enumerate(right.subplots(len(CONDITIONS), 1)):
        if row < len(conditions):
            _perplexity(axis, report, conditions[row])
        else:
            axis.axis("off")
    figure.suptitle(
        f"{report['student']['path']} against {report['teacher']['path']}: kv_sharing={report['recommendation']['mode']} recommended",
        fontsize=11,
        x=0.01,
        ha="left",
        color=INK,
    )
    files = [path, path.with_suffix(".svg")]
    figure.savefig(files[0], dpi=150, metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": "hf_lingudistill"}):  # an identical rerun gives an identical file
        figure.savefig(files[1], metadata={"Date": None})
    return files


_TITLE: dict[str, Any] = {"fontsize": 9.5, "loc": "left", "color": INK}


def _weights(figure: Any, axis: Any, layers: Sequence[Mapping[str, float]]) -> None:
    axis.set_title("Weights: relative Frobenius distance from the original", **_TITLE)
    axis.spines[:].set_visible(False)
    groups = list(dict.fromkeys(group for layer in layers for group in layer if group != "all"))
    if not groups:
        axis.set(xticks=[], yticks=[])
        axis.text(
            0.5, 0.5, "nothing to compare: no matrix has the same shape in both", fontsize=9, color=MUTED, ha="center"
        )
        return
    cells = [[layer.get(group, float("nan")) for layer in layers] for group in groups]
    image = axis.imshow(cells, aspect="auto", cmap="YlOrRd", vmin=0, interpolation="nearest")
    axis.set_yticks(range(len(groups)), groups, fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(length=0, labelsize=8)
    bar = figure.colorbar(image, ax=axis, pad=0.01, aspect=14)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)


def _curves(axis: Any, states: Mapping[str, Any], measure: str) -> None:
    layers = 0
    for condition, by_state in states.items():
        for state in STATES:
            values = by_state[state][measure]
            layers = len(values)
            if None not in values:
                axis.plot(range(layers), values, DASHES[condition], color=COLORS[state], lw=1.6)
    axis.set_xlim(-0.5, layers - 0.5)  # the columns of the weights above
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(color=GRID, lw=0.8)
    _clean(axis)


def _legend(figure: Any, conditions: Sequence[str]) -> None:
    handles = [Line2D([], [], color=COLORS[state], lw=2, label=NAMES[state]) for state in STATES]
    handles += [Line2D([], [], color=MUTED, ls=DASHES[c], lw=1.6, label=CONDITIONS[c]) for c in conditions]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2 * len(STATES),
        fontsize=8,
        frameon=False,
        columnspacing=1.2,
    )


def _perplexity(axis: Any, report: Report, condition: str) -> None:
    scores, found = report["perplexity"][condition], report["recommendation"]
    for line, reader in enumerate(READERS):
        score = scores[reader]
        chosen = reader == found["mode"] and condition == found["condition"]
        color = CHOSEN if chosen else INK if reader == "student" else MUTED
        axis.plot([score["low"], score["high"]], [line, line], color=color, lw=2.5 if chosen else 1.8)
        axis.plot(score["value"], line, "o", color=color, ms=6)
        axis.text(score["value"], line - 0.2, shown(score["value"]), fontsize=8, color=color, ha="center", va="bottom")
    labels = ["student", *(f"teacher: {mode}" for mode in READERS[1:])]
    axis.set_yticks(range(len(READERS)), labels)
    axis.set_ylim(len(READERS) - 0.5, -0.75)
    axis.axhline(0.5, color=GRID, lw=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.08)
    axis.grid(axis="x", color=GRID, lw=0.8)
    axis.set_title(f"Perplexity, {CONDITIONS[condition]} (n={scores['student']['n']})", **_TITLE)
    _clean(axis)
    axis.spines["left"].set_visible(False)


def _clean(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5, length=0)
    axis.set_axisbelow(True)
