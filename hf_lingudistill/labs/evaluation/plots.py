"""Plots of an evaluation: scores with intervals, the language-vision plane, training curves. PNG and SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Report = Mapping[str, Any]
INK, GRID = "#111827", "#e5e7eb"
NAMED = {"original": "#6b7280", "before": "#d97706", "after": "#0f766e"}
OTHERS = ("#2563eb", "#9333ea", "#be123c", "#65a30d", "#0891b2", "#a16207", "#4b5563", "#db2777")
MARKERS = "osD^vP*X"


def plot_all(report: Report, folder: Path, *, training_log: str | Path | None = None) -> list[Path]:
    """Write every plot that the report has data for. -> the PNG files."""
    written = [plot_scores(report, folder / "scores.png")]
    if (plane := plot_trade_off(report, folder / "trade_off.png")) is not None:
        written.append(plane)
    if training_log is not None:
        written.append(plot_training(training_log, folder / "training.png"))
    return written


def colors(models: Sequence[str]) -> dict[str, str]:
    """One color a model, the same in every plot."""
    others = [model for model in models if model not in NAMED]
    return NAMED | {model: OTHERS[i % len(OTHERS)] for i, model in enumerate(others)}


def plot_scores(report: Report, path: Path) -> Path:
    """One panel a task: a dot and its 95 % interval a model; for vision, what the controls reach as open marks."""
    plt = _pyplot()
    tasks, models = report["tasks"], list(report["models"])
    palette = colors(models)
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    height = 0.95 + 0.23 * len(models)
    figure, axes = plt.subplots(rows, columns, figsize=(4.3 * columns, height * rows + 0.3), squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    for position, (axis, task) in enumerate(zip(axes.flat, tasks, strict=False)):
        for line, model in enumerate(models):
            score = task["scores"].get(model)
            if score is None:
                axis.text(0.5, line, "not applicable", fontsize=7, color="#9ca3af", ha="center", va="center",
                          transform=axis.get_yaxis_transform())  # fmt: skip
                continue
            axis.plot([score["low"], score["high"]], [line, line], color=palette[model], lw=2, solid_capstyle="butt")
            axis.plot(score["value"], line, "o", color=palette[model], ms=5)
            for control, mark in (("shuffled", "|"), ("grey", "x")):
                reached = task["controls"].get(control, {}).get(model)
                if reached is not None and task["higher_is_better"]:
                    axis.plot(reached["value"], line, mark, color=INK, ms=6, mew=1.2)
        axis.set_yticks(range(len(models)), models if position % columns == 0 else [""] * len(models), fontsize=8.5)
        axis.set_ylim(len(models) - 0.4, -0.6)
        better = "higher is better" if task["higher_is_better"] else "lower is better"
        axis.set_title(_wrapped(task["title"], 44), fontsize=9, loc="left", color=INK)
        axis.set_xlabel(f"{task['unit'] or task['metric']} ({better}), n={task['n']}", fontsize=7.5)
        _clean(axis)
    if any(task["controls"] for task in tasks):
        figure.text(0.99, 0.004, "black marks: what the controls reach (| images exchanged, x grey images)", fontsize=7.5, ha="right")  # fmt: skip
    figure.tight_layout(h_pad=1.2, w_pad=1.5, rect=(0, 0.02, 1, 1))
    return _save(figure, path)


def plane_points(report: Report) -> dict[str, dict[str, Any]]:
    """{model: {"language", "language_error", "vision", "vision_error"}}: the mean over the language tasks above the original (0 is
    the original), the mean vision score, and half the width of their intervals. Language is `language_axis`."""
    texts = _language_tasks(report)
    seen = [task for task in report["tasks"] if task["group"] == "vision"]
    points = {}
    for model in report["models"]:
        if not texts or not seen or not all(model in task["scores"] for task in (*texts, *seen)):
            continue
        found = [d for task in texts for d in task["differences"] if d["of"] == model and d["minus"] == "original"]
        if len(found) < len(texts):
            continue
        points[model] = {
            "language": _mean([d["value"] for d in found]),
            # Tasks hold different items: their errors add in squares
            "language_error": _error(found),
            "vision": _mean([task["scores"][model]["value"] for task in seen]),
            "vision_error": _error([task["scores"][model] for task in seen]),
        }
    return points


def _language_tasks(report: Report) -> list[Any]:
    """Fidelity on text where it was measured, else bits per byte."""
    tasks = [task for task in report["tasks"] if task["metric"] == "text_kl"]
    return tasks or [task for task in report["tasks"] if task["metric"] == "bits_per_byte"]


def language_axis(report: Report) -> str:
    """What the language axis of the plane shows."""
    kl = any(task["metric"] == "text_kl" for task in report["tasks"])
    return "KL to the original LM, nats per token" if kl else "bits per byte above the original LM"


def plot_trade_off(report: Report, path: Path) -> Path | None:
    """Language against vision, every model a point: up and to the right is better. None where there is nothing to plot.

    Where most of many models crowd together, a second panel shows them closer.
    """
    points = plane_points(report)
    if len(points) < 2:
        return None
    plt = _pyplot()
    palette, crowd = colors(list(report["models"])), _crowd(points)
    panels = 2 if crowd else 1
    lines = math.ceil(len(points) / 5) if crowd else 0
    figure, axes = plt.subplots(1, panels, figsize=(7.2 if panels == 1 else 11, 4.8 + 0.2 * lines), squeeze=False)
    for axis, shown in zip(axes[0], [set(points), set(crowd)], strict=False):
        axis.axvline(0, color="#6b7280", lw=1, ls="--")
        axis.annotate(
            "original LM",
            (0, 1.01),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color="#6b7280",
            ha="center",
            va="bottom",
        )
        if "before" in points:
            axis.axhline(points["before"]["vision"], color=NAMED["before"], lw=0.8, ls=":")
        for position, (model, point) in enumerate(points.items()):
            if model not in shown:
                continue
            # colors come round again after eight, with another mark
            mark = MARKERS[(position + position // len(OTHERS)) % len(MARKERS)]
            axis.plot(point["language"], point["vision"], mark, color=palette[model], ms=6, label=model, zorder=3)
            axis.errorbar(
                point["language"], point["vision"], xerr=point["language_error"], yerr=point["vision_error"],
                fmt="none", ecolor=palette[model], elinewidth=0.9, alpha=0.35 if crowd else 0.95,
            )  # fmt: skip
        axis.invert_xaxis()
        axis.set_xlabel(f"{language_axis(report)} (better to the right)", fontsize=9)
        _clean(axis)
    axes[0][0].set_ylabel("vision score (better upwards)", fontsize=9)
    if crowd:
        low, high = (f(point["vision"] for point in crowd.values()) for f in (min, max))
        axes[0][1].set_ylim(low - 0.02, high + 0.02)
        axes[0][1].set_title("closer", fontsize=9, loc="left")
        figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="lower center", ncols=5)
        figure.tight_layout(rect=(0, 0.04 * lines, 1, 1))
    else:
        axes[0][0].legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.01, 1))
        figure.tight_layout()
    return _save(figure, path)


def _crowd(points: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Of more than ten points, the half or more whose language lies within an eighth of the whole range; else none."""
    values = sorted(point["language"] for point in points.values())
    if len(values) <= 10:
        return {}
    middle, reach = values[len(values) // 2], (values[-1] - values[0]) / 16
    near = {model: point for model, point in points.items() if abs(point["language"] - middle) <= reach}
    return near if len(near) * 2 >= len(values) else {}


def training_history(trainer_state: str | Path) -> list[dict[str, Any]]:
    """The log entries of a `trainer_state.json` that a LinguDistill run wrote.

    Raises:
        ValueError: if it does not exist, is none, or holds no such log.
    """
    expected = "expected the trainer_state.json of a LinguDistill run"
    try:
        found = json.loads(Path(trainer_state).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"training_log {str(trainer_state)!r}: {expected}, found {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"training_log {str(trainer_state)!r}: {expected}, found a file that is not JSON.") from error
    logged = found.get("log_history", []) if isinstance(found, dict) else []
    history = [entry for entry in logged if "ce_loss" in entry]
    if not history:
        raise ValueError(f"training_log {str(trainer_state)!r} holds no ce_loss: {expected}.")
    return history


def plot_training(trainer_state: str | Path, path: Path) -> Path:
    """Losses and the share of distilled tokens over steps, from a `trainer_state.json`.

    Raises:
        ValueError: as `training_history`.
    """
    history = training_history(trainer_state)
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    curves = {
        "ce_loss": ("cross-entropy, all labels", "#0f766e"),
        "student_ce": ("student on distilled rows", "#2563eb"),
        "teacher_ce": ("teacher on distilled rows", "#6b7280"),
        "kd_loss": ("divergence", "#be123c"),
    }
    shares = {
        "teacher_agreement": ("teacher and student agree", "#0f766e"),
        "confident_share": ("distilled tokens", "#be123c"),
    }
    for axis, wanted in ((left, curves), (right, shares)):
        for name, (label, color) in wanted.items():
            found = [(entry["step"], entry[name]) for entry in history if name in entry]
            if found:
                axis.plot(*zip(*found, strict=True), color=color, label=label, lw=1.6)
        axis.set_xlabel("step", fontsize=9)
        axis.legend(frameon=False, fontsize=8)
        _clean(axis)
    left.set_ylabel("nats per token", fontsize=9)
    right.set_ylabel("share", fontsize=9)
    right.set_ylim(0, 1)
    figure.tight_layout(w_pad=2)
    return _save(figure, path)


def _error(scores: Sequence[Mapping[str, Any]]) -> float:
    return math.sqrt(sum(((score["high"] - score["low"]) / 2) ** 2 for score in scores)) / len(scores)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def _clean(axis: Any) -> None:
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="both", labelsize=8.5, length=0)
    axis.grid(axis="x", color=GRID, lw=0.8)
    axis.set_axisbelow(True)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "hf_lingudistill"  # an identical rerun gives an identical file
    return plt


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=160, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    return path
