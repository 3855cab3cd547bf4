"""The demo's report: what was measured, as JSON, as a table, and as a picture. Numbers in, files out; no model is touched here."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .json_text import as_json
from .statistics import Bootstrap, Items

Report = dict[str, Any]


def fidelity_entry(metric: str, measured: Mapping[str, Items]) -> Report:
    """The `language` or `pictures` part of a report. measured: (nats, tokens) of every answer, by arm (before, after).

    The original scores 0 by definition. `recovered`: the share of the distance that is gone; None if there was none.
    """
    scores = {arm: Bootstrap().score(items) for arm, items in measured.items()}
    before, after = scores["before"]["value"], scores["after"]["value"]
    weights = [weight for _, weight in measured["after"].values()]
    return {
        "metric": metric,
        "original": 0.0,
        **{arm: score["value"] for arm, score in scores.items()},
        "recovered": (before - after) / before if before > 0 else None,
        "interval95": {arm: _interval(score) for arm, score in scores.items()},
        "n_texts": len(weights),
        "n_tokens": int(sum(weights)),
    }


def _interval(score: Mapping[str, Any]) -> list[float] | None:
    """Both ends, or None where there are too few items for any."""
    return [score["low"], score["high"]] if math.isfinite(score["high"]) else None


def vision_entry(
    measured: Mapping[str, Mapping[str, Any]], shuffled: Mapping[str, Mapping[str, Any]], metric: str
) -> Report:
    """The `vision` part from `what_accuracy` results by arm; `shuffled`: the same with pictures exchanged between items."""

    def interval(correct: Sequence[bool]) -> list[float] | None:
        return _interval(Bootstrap().score({str(item): (float(right), 1.0) for item, right in enumerate(correct)}))

    return {
        "metric": metric,
        **{arm: result["accuracy"] for arm, result in measured.items()},
        "shuffled": {arm: result["accuracy"] for arm, result in shuffled.items()},
        "interval95": {arm: interval(result["correct"]) for arm, result in measured.items()},
        "n": next(iter(measured.values()))["n"],
    }


LABELS = {"original": "original LM", "before": "VLM before", "after": "VLM after"}


def table(report: Report) -> str:
    """The report as a Markdown table, one line per model."""
    vision = report["vision"]
    rows = [("model", "KL on text", "KL about pictures", "names right", "pictures exchanged")]
    for arm, label in LABELS.items():
        right, blind = vision.get(arm), vision["shuffled"].get(arm)
        rows.append(
            (
                label,
                f"{report['language'][arm]:.2f}",
                f"{report['pictures'][arm]:.2f}",
                "-" if right is None else f"{right:.0%}",
                "-" if blind is None else f"{blind:.0%}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def verdict(report: Report) -> str:
    """What the table's columns are, and what came back, in sentences."""
    language, pictures, vision = report["language"], report["pictures"], report["vision"]
    came_back = " ".join(
        f"{entry['recovered']:.0%} of the distance {where} is gone."
        for entry, where in ((language, "on text"), (pictures, "about pictures"))
        if entry["recovered"] is not None
    )
    return (
        f"KL: how far a model's next-token probabilities are from the original's, in nats per token, on {language['n_texts']} + "
        f"{pictures['n_texts']} answers of the original's own to instructions that were not trained on; about pictures, the original "
        f"is told what they show. {came_back} Names: {vision['n']} drawings in views that were not trained on. One run, seed "
        f"{report['config']['seed']}; {report['seconds']['total']:.0f} s in all ({report['cpu_seconds']['total']:.0f} s of CPU time) "
        f"on {report['machine']['threads']} threads in {'bf16' if report['config']['bf16'] else 'fp32'}."
    )


def prompts_text(prompts: Sequence[Mapping[str, str]], width: int = 100) -> str:
    """Every prompt with its answers under each other, wrapped, as plain text."""
    blocks = []
    for entry in prompts:
        lines = [f"> {entry['prompt']}" + (f"   [a picture of {entry['shows']}]" if entry.get("shows") else "")]
        for arm, label in LABELS.items():
            if entry.get(arm) is not None:
                text = " ".join(entry[arm].split()) or "(nothing)"
                lines.append(textwrap.fill(text, width, initial_indent=f"  {label:<12} ", subsequent_indent=" " * 15))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def write_report(report: Report, output_dir: Path) -> Path:
    """Write `report.json` and `report.png` to a folder. -> the path of the JSON."""
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "report.json"
    path.write_text(as_json(report) + "\n", encoding="utf-8")
    plot(report, output_dir / "report.png")
    return path


def plot(report: Report, path: Path) -> None:
    """Before and after, distance to the original on the left and names on the right, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"before": "#d97706", "after": "#0f766e"}
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), dpi=160)
    parts = (
        (report["language"], "Text: KL to the original"),
        (report["pictures"], "About pictures: KL to the original"),
        (report["vision"], "Names of drawings, share right"),
    )
    for axis, (entry, title) in zip(axes, parts, strict=True):
        for position, (arm, color) in enumerate(colors.items()):
            low, high = entry["interval95"][arm] or (entry[arm], entry[arm])
            axis.bar(position, entry[arm], width=0.62, color=color)
            axis.errorbar(
                position, entry[arm], [[entry[arm] - low], [high - entry[arm]]], color="#111827", capsize=3, lw=1
            )
            axis.annotate(
                f"{entry[arm]:.2f}",
                (position, high),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
            if "shuffled" in entry:
                label = "pictures exchanged" if position == 0 else None
                edges = [position - 0.31, position + 0.31]
                axis.plot(edges, [entry["shuffled"][arm]] * 2, color="#111827", ls=":", lw=1.4, label=label)
        axis.set_xticks(range(len(colors)), [LABELS[arm] for arm in colors], fontsize=9)
        axis.set_xlim(-0.6, 1.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(title, fontsize=9.5, loc="left")
        axis.margins(y=0.18)
        if entry.get("recovered") is not None:
            share = f"{entry['recovered']:.0%} of it gone"
            axis.text(0.98, 0.9, share, transform=axis.transAxes, ha="right", fontsize=9, color=colors["after"])
    axes[2].set_ylim(0, 1.35)
    axes[2].set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes[2].legend(frameon=False, fontsize=8.5, loc="upper right")
    figure.tight_layout(w_pad=2)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
