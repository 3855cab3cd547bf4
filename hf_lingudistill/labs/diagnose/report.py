"""A drift report as text and JSON. Numbers in, files out."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...folders import replacing
from ..json_text import as_json
from ..statistics import ends, interval
from .measure import READERS
from .prompts import CONDITIONS
from .recommend import shown, tell
from .states import STATES

Report = Mapping[str, Any]
WIDTH = 110
FILES = ("drift.json", "drift.txt", "drift.png", "drift.svg")
LABELS = {"student": "student"} | {mode: f"teacher, {mode}" for mode in READERS[1:]}


def as_text(report: Report) -> str:
    """The whole report, at most 110 columns wide."""
    models = [
        f"{role.capitalize()}: {report[role]['path']}, {report[role]['dtype']}" for role in ("student", "teacher")
    ]
    counts = ", ".join(f"{n} x {CONDITIONS[name]}" for name, n in report["prompts"]["count"].items())
    prompts = f"Prompts: {report['prompts']['source']} ({counts})"
    parts = [
        [*_wrap(models[0]), *_wrap(models[1]), *_wrap(prompts)],
        _layers(report),
        _most_moved(report),
        _perplexity(report),
        _recommendation(report),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def _layers(report: Report) -> list[str]:
    conditions = list(report["states"])
    lines = _wrap(
        "Drift of the language model: relative distance from the original and, for hidden states, their cosine with the original's; K, "
        "V and hidden states are means over the tokens of the prompts that the original can read."
    )
    groups = ["K", "V", "hidden", "cosine of hidden"]
    width = 7 * len(conditions) - 1
    lines += ["", " " * 14 + "".join(f"   {group:^{max(width, len(group))}}" for group in groups).rstrip()]

    def row(layer: str, weights: str, cells: Sequence[Sequence[str]]) -> str:
        joined = (" ".join(f"{cell:>6}" for cell in group) for group in cells)
        return f"{layer:>5}  {weights:>7}" + "".join(
            f"   {part:>{max(width, len(group))}}" for group, part in zip(groups, joined, strict=True)
        )

    lines.append(row("layer", "weights", [conditions] * len(groups)))
    for index, layer in enumerate(report["weights"]["layers"]):
        cells = [[_number(report["states"][c][state]["distance"][index]) for c in conditions] for state in STATES]
        cells.append([_number(report["states"][c]["hidden"]["cosine"][index]) for c in conditions])
        lines.append(row(str(index), _number(layer.get("all")), cells))
    return lines


def _most_moved(report: Report) -> list[str]:
    weights, found = report["weights"], ""
    if not report["drifted"]:
        found = f"No drift: the largest distance of any matrix group is {weights['largest']:.1e}, the rounding of bf16 or less."
    elif weights["ranking"]:
        layers = ", ".join(f"{layer} ({weights['layers'][layer]['all']:.3g})" for layer in weights["ranking"][:3])
        found = f"Weights that moved most: layers {layers}; by matrix group, mean over layers: {_groups(weights['layers'])}."
    if weights["outside"]:
        found += " Outside the layers: " + ", ".join(f"{k} {v:.3g}" for k, v in weights["outside"].items()) + "."
    if weights["not_compared"]:
        found += (
            f" Not compared, for want of a counterpart of the same shape: {', '.join(weights['not_compared'][:4])}"
        )
        found += f" and {len(weights['not_compared']) - 4} more." if len(weights["not_compared"]) > 4 else "."
    return _wrap(found)


def _groups(layers: Sequence[Mapping[str, float]]) -> str:
    names = dict.fromkeys(name for layer in layers for name in layer if name != "all")
    means = {name: [layer[name] for layer in layers if name in layer] for name in names}
    mean = {name: sum(values) / len(values) for name, values in means.items()}
    return ", ".join(f"{name} {mean[name]:.3g}" for name in sorted(mean, key=lambda name: -mean[name]))


def _perplexity(report: Report) -> list[str]:
    table = report["perplexity"]
    lines = ["Perplexity of the answers, 95 % bootstrap interval over prompts", ""]
    lines.append(_row(["", *(CONDITIONS[condition] for condition in table)]))
    lines.append(_row(["", *(f"n={part['student']['n']}, {part['tokens']} tokens" for part in table.values())]))
    for reader, label in LABELS.items():
        scores = [part[reader] for part in table.values()]
        lines.append(_row([label, *(f"{shown(s['value'])}  ({_ends(s)})" for s in scores)]))
    if report["language_lost"] is not None:
        lines += ["", *_wrap(_language_lost(report["language_lost"], table["text"]))]
    return lines


def _ends(score: Report) -> str:
    return " - ".join(ends(score, shown)) if math.isfinite(score["high"]) else "no interval"


def _language_lost(lost: Report, text: Report) -> str:
    student, alone = shown(text["student"]["value"]), shown(text["none"]["value"])
    read = f"On text without an image the student's perplexity is {student} and the original's, read alone, {alone}"
    measured = f"{lost['value']:+z.3f} nats per token, {interval(lost)}, n={lost['n']}"
    verdict = {
        "higher": "that much language was lost",
        "tie": "no loss of language can be told on these texts",
        "lower": "on these texts nothing was lost, the student is the better of the two",
    }[tell(lost)]
    return f"{read} ({measured}): {verdict}."


def _recommendation(report: Report) -> list[str]:
    found = report["recommendation"]
    twice = (
        f", blind_weight={found['blind_weight']:g}" if "blind_weight" in found else ""
    )  # reports of before it have none
    lines = [f"Recommended: kv_sharing={found['mode']}{twice}", *_wrap(found["reason"], "  ")]
    for note in found["notes"]:
        lines += _wrap(f"- {note}", "  ", hanging="    ")
    return [*lines, *_wrap(f"Rule: {found['rule']}", "  ")]


def _wrap(text: str, indent: str = "", *, hanging: str | None = None) -> list[str]:
    after = indent if hanging is None else hanging
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=after, break_on_hyphens=False)


def _row(cells: Sequence[str]) -> str:
    return "".join(f"{cell:<{30 if column else 18}}" for column, cell in enumerate(cells)).rstrip()


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.0e}"


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `drift.json`, `drift.txt` and, where matplotlib is installed, `drift.png` and `drift.svg`. -> what was written.

    Raises:
        NotOurs: if a file of such a name is there that this function did not write.
    """
    with replacing(folder, *FILES, by="diagnose") as made:
        (made / "drift.json").write_text(as_json(report) + "\n", encoding="utf-8")
        (made / "drift.txt").write_text(as_text(report) + "\n", encoding="utf-8")
        try:
            from .plot import plot_drift

            plot_drift(report, made / "drift.png")
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
    return [folder / name for name in FILES if (folder / name).exists()]
