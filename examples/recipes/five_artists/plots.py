"""One picture per claim, from summary.json. A picture whose figures are not measured yet is not drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

DISTILLED, RIVAL, REFERENCE = "#1f6f8b", "#c8553d", "#6b6b6b"


def draw(summary: Mapping[str, Any], settings: Mapping[str, Any], out: Path) -> list[Path]:
    """-> the files written."""
    drawn = []
    severe = summary["regimes"].get("P", {}).get("severe", {})
    if len(severe) > 3:
        drawn.append(_arms(severe, settings, out / "arms.png"))
    if summary["modes"]:
        drawn.append(_modes(summary["modes"], out / "modes.png"))
    if summary.get("replay"):
        drawn.append(_replay(summary["replay"], out / "replay.png"))
    return drawn


def _arms(arms: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> Path:
    """Every arm in a line, the best on top: distance on text, distance where the picture matters, names."""
    cured = {name: arm for name, arm in arms.items() if name not in ("before", "original", "default")}
    names = sorted(cured, key=lambda name: -cured[name]["text_kl"]["mean"])
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 0.29 * len(names) + 1.3), sharey=True)
    columns = (
        ("text_kl", "KL on text", "log"),
        ("image_kl_dependent", "KL where the picture matters", "log"),
        ("naming_seen", "pictures named right", "linear"),
    )
    for axes, (metric, title, scale) in zip(panels, columns, strict=True):
        axes.set_xscale(scale)
        for place, name in enumerate(names):
            kind = settings["arms"][name]["kind"]
            color = REFERENCE if kind == "caption" else RIVAL if kind in ("ce", "interpolate") else DISTILLED
            value = cured[name][metric]
            once = value["half"] is None  # one seed: hollow
            axes.errorbar(
                value["mean"], place, xerr=value["half"] or 0, fmt="o", color=color, markersize=5.5, elinewidth=1.2,
                markerfacecolor="white" if once else color,
            )  # fmt: skip
        if scale == "log":
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        else:
            axes.axvline(arms["before"][metric]["mean"], color=REFERENCE, linewidth=0.9, linestyle=":")
            axes.annotate(
                "before", (arms["before"][metric]["mean"], -0.7), xytext=(-4, 0), textcoords="offset points", ha="right", fontsize=7.5,
                color=REFERENCE,
            )  # fmt: skip
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
    panels[0].set_ylim(-1, len(names) - 0.4)
    panels[0].set_yticks(
        range(len(names)), [f"{name} (default)" if name == settings["shipped"] else name for name in names]
    )
    for axes in panels[:2]:
        axes.set_xlabel("nats per token (log scale), less is better", fontsize=8)
    panels[2].set_xlabel("share, more is better (hollow: one seed)", fontsize=8)
    return _saved(figure, path)


def _modes(modes: Mapping[str, Any], path: Path) -> Path:
    """What each sharing mode gives its teacher, a panel per pair."""
    columns = min(len(modes), 3)
    rows = -(-len(modes) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3.4 * columns, 3.2 * rows), sharey=True, squeeze=False)
    for axes in panels.flat[len(modes) :]:
        axes.set_axis_off()
    for axes, (name, found) in zip(panels.flat, modes.items(), strict=False):
        readers = [reader for reader in found["readers"] if reader != "student"]
        for shift, part, color in ((-0.2, "dependent", DISTILLED), (0.2, "rest", REFERENCE)):
            heights = [found["readers"][reader][part] for reader in readers]
            axes.bar([index + shift for index in range(len(readers))], heights, width=0.38, color=color, label=part)
        axes.axhline(found["readers"]["none"]["dependent"], color=DISTILLED, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(readers)), readers, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
        tower, drift, _ = name.split("-")
        axes.set_title(f"{tower} tower, {drift} drift", fontsize=9)
        axes.tick_params(axis="y", labelsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("nats per token", fontsize=8)
    tallest = max(reader["dependent"] for found in modes.values() for reader in list(found["readers"].values())[1:])
    panels[0][0].set_ylim(0, 1.25 * tallest)  # room for the legend
    panels[0][0].legend(
        fontsize=8, title="teacher's KL to the original told the caption", title_fontsize=8, loc="upper left", ncols=2
    )
    return _saved(figure, path)


def _replay(replay: Mapping[str, Any], path: Path) -> Path:
    """How much text replay is enough for CE; what people's texts do to it; and distilling beside it."""
    shares = sorted(replay["ce"], key=float)
    figure, axes = plt.subplots(figsize=(5.4, 3.8))
    for metric, label, color in (("text_kl", "text", RIVAL), ("image_kl", "pictures", DISTILLED)):
        values = [replay["ce"][share][metric]["mean"] for share in shares]
        axes.plot([float(share) for share in shares], values, "o-", color=color, label=label)
    for share, arm, label in (
        (0, "shipped", "the default, no text"),
        (25, "ce_people", "cross-entropy on people's texts"),
        (25, "vision_people", "distilled on people's texts"),
    ):
        if arm in replay:
            value = replay[arm]["text_kl"]["mean"]
            axes.plot(share, value, "D", color=RIVAL, markersize=6)
            axes.annotate(label, (share, value), xytext=(7, -3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("text rows, per cent of a step")
    axes.set_ylabel("KL to the original, nats per token")
    axes.set_ylim(bottom=0)
    axes.legend(title="cross-entropy", loc="lower right")
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
