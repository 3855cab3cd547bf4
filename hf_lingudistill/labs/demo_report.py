"""Reports: what was measured, as JSON, as a table, and as a picture. Numbers in, files out; no model is touched here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .statistics import Bootstrap

Report = dict[str, Any]


def recovered(original: float, before: float, after: float) -> float | None:
    """(before - after) / (before - original): the share of the lost log-perplexity that came back. None: nothing was lost."""
    lost = before - original
    return (before - after) / lost if lost > 0 else None


def bootstrap_interval(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of sum(values) / sum(weights), resampling items.

    values: one sum per item (nats of a text, 0 or 1 of a question). weights: tokens of an item; None = 1 each.
    """
    weights = [1.0] * len(values) if weights is None else weights
    pairs = zip(values, weights, strict=True)
    score = Bootstrap().score({str(item): pair for item, pair in enumerate(pairs)})
    return score["low"], score["high"]


def language_entry(measured: Mapping[str, Mapping[str, Any]], source: str) -> Report:
    """The `language` part of a report from `text_perplexity` results by arm (original, before, after, ce_only)."""
    nll = {arm: result["nll_per_token"] for arm, result in measured.items()}
    entry: Report = {"metric": f"perplexity on {source} (never trained on)"}
    entry |= {arm: result["perplexity"] for arm, result in measured.items()}
    entry["recovered"] = recovered(nll["original"], nll["before"], nll["after"])
    if "ce_only" in nll:
        entry["recovered_ce_only"] = recovered(nll["original"], nll["before"], nll["ce_only"])
    entry["interval95"] = {
        arm: [math.exp(bound) for bound in bootstrap_interval(result["nll"], result["tokens"])]
        for arm, result in measured.items()
    }
    first = next(iter(measured.values()))
    return entry | {"n_texts": first["n_texts"], "n_tokens": first["n_tokens"]}


def vision_entry(
    measured: Mapping[str, Mapping[str, Any]], shuffled: Mapping[str, Mapping[str, Any]], metric: str
) -> Report:
    """The `vision` part from `what_accuracy` results by arm; `shuffled`: the same with images permuted between items."""
    entry: Report = {"metric": metric}
    entry |= {arm: result["accuracy"] for arm, result in measured.items()}
    entry["shuffled"] = {arm: result["accuracy"] for arm, result in shuffled.items()}
    entry["interval95"] = {
        arm: list(bootstrap_interval([float(c) for c in result["correct"]])) for arm, result in measured.items()
    }
    return entry | {"n": next(iter(measured.values()))["n"]}


LABELS = {"original": "original LM", "before": "VLM before", "after": "VLM after", "ce_only": "same steps, CE only"}


def table(report: Report) -> str:
    """The report as a Markdown table, one line a model."""
    language, vision, seconds = report["language"], report["vision"], report["seconds"]
    rows = [("model", "held-out perplexity", '"what" accuracy', "images shuffled", "seconds to make")]
    for arm, label in LABELS.items():
        if arm not in language:
            continue
        accuracy, blind = vision.get(arm), vision["shuffled"].get(arm)
        rows.append(
            (
                label,
                f"{language[arm]:.1f}",
                "-" if accuracy is None else f"{accuracy:.3f}",
                "-" if blind is None else f"{blind:.3f}",
                f"{seconds[arm]:.0f}" if arm in seconds else "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def prompts_text(prompts: Sequence[Mapping[str, str]]) -> str:
    """Prompts with the outputs side by side, as plain text."""
    lines = []
    for entry in prompts:
        lines.append(f"> {entry['prompt']}" + ("  [with an image]" if entry.get("image") else ""))
        for arm in ("original", "before", "after"):
            if entry.get(arm) is not None:
                lines.append(f"    {LABELS[arm]:<12} {entry[arm]}")
    return "\n".join(lines)


def write_report(report: Report, output_dir: Path) -> Path:
    """Write `report.json` and `report.png` to a folder. -> the path of the JSON."""
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "report.json"
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    plot(report, output_dir / "report.png")
    return path


def plot(report: Report, path: Path) -> None:
    """Before and after, language on the left and vision on the right, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    language, vision = report["language"], report["vision"]
    colors = {"original": "#6b7280", "before": "#d97706", "after": "#0f766e", "ce_only": "#93c5c0"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), dpi=160, gridspec_kw={"width_ratios": [4, 3]})
    arms = [arm for arm in LABELS if arm in language]
    for axis, entry, shown in ((left, language, arms), (right, vision, [arm for arm in arms if arm in vision])):
        for position, arm in enumerate(shown):
            low, high = entry["interval95"][arm]
            axis.bar(position, entry[arm], width=0.62, color=colors[arm])
            axis.errorbar(
                position, entry[arm], [[entry[arm] - low], [high - entry[arm]]], color="#111827", capsize=3, lw=1
            )
            text = f"{entry[arm]:.0f}" if axis is left else f"{entry[arm]:.2f}"
            axis.annotate(text, (position, high), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=9)
        axis.set_xticks(range(len(shown)), [LABELS[arm].replace(", ", ",\n") for arm in shown], fontsize=8.5)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_title("Language: held-out perplexity (lower is better)", fontsize=10, loc="left")
    left.margins(y=0.15)
    right.set_title('Vision: accuracy on "what" questions', fontsize=10, loc="left")
    right.set_ylim(0, 1.08)
    for position, arm in enumerate(arm for arm in arms if arm in vision):
        blind = vision["shuffled"].get(arm)
        if blind is not None:
            label = "images shuffled" if position == 0 else None
            right.plot(
                [position - 0.31, position + 0.31], [blind, blind], color="#111827", ls=":", lw=1.4, label=label
            )
    right.legend(frameon=False, fontsize=8.5, loc="upper right", bbox_to_anchor=(1, 1.02))
    share = language["recovered"]
    if share is not None:
        left.text(0.99, 0.93, f"{share:.0%} of the lost log-perplexity\nrecovered", transform=left.transAxes, ha="right", va="top", fontsize=9, color=colors["after"])  # fmt: skip
    figure.tight_layout(w_pad=3)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
