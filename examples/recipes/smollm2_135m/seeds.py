"""The decisive arms over seeds: means, paired differences, their intervals, and a picture. Reports in, a summary out.

An interval here says how an arm scatters from seed to seed (another adaptation, other rows, another order); the intervals in a
run's own report say how its score scatters from item to item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Report = Mapping[str, Any]

# What is summarised: title, unit, whether more is better
MEASURES = {
    "bits_per_byte": ("bits/byte, unseen texts", False),
    "recovered": ("recovered, mean of sources", True),
    "recovered_worst": ("recovered, worst source", True),
    "questions": ("image questions", True),
    "image_accuracy": ("image tokens right", True),
    "image_nll": ("image tokens, nats", False),
    "rest_nll": ("other tokens, nats", False),
}
# Labels in the picture, where the arm's name would not say it
TITLES = {
    "before": "VLM before",
    "interpolate_05": "interpolation, .5 + .5",
    "ce": "CE on the mix",
    "prompt": "LinguDistill (default)",
    "prompt_kl": "the same, ce_weight 0",
    "none_kl": "nothing shared, ce_weight 0",
    "kl_text": "KL on text rows alone",
}
# 97.5 % quantiles of Student's t by degrees of freedom
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def measures(report: Report, model: str) -> dict[str, float | None]:
    """One number a measure, None where the model has no such score (the original answers no image questions)."""
    by_metric: dict[str, list[Any]] = {}
    for task in report["tasks"]:
        by_metric.setdefault(task["metric"], []).append(task)
    texts = by_metric["bits_per_byte"]
    shares = [task["recovered"].get(model) for task in texts]
    known = [share["value"] for share in shares if share and share["value"] is not None]
    found: dict[str, float | None] = {
        "bits_per_byte": _mean([task["scores"][model]["value"] for task in texts]),
        "recovered": _mean(known) if known else None,
        "recovered_worst": min(known) if known else None,
    }
    for name, metric in (("questions", "exact_match"), *((m, m) for m in ("image_accuracy", "image_nll", "rest_nll"))):
        score = by_metric[metric][0]["scores"].get(model)
        found[name] = None if score is None else score["value"]
    return found


def spread(values: Mapping[int, float]) -> dict[str, Any]:
    """values: {seed: value}. -> with their mean and `half`, half the width of the 95 % t interval of the mean (None for one seed)."""
    numbers = list(values.values())
    mean, half = _mean(numbers), None
    if len(numbers) > 1:
        variance = sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
        half = T975[len(numbers) - 1] * (variance / len(numbers)) ** 0.5
    return {"values": {str(seed): value for seed, value in values.items()}, "mean": mean, "half": half}


def summarise(reports: Sequence[Report], arms: Sequence[str]) -> dict[str, Any]:
    """reports: one for each drift and seed, with keys `drift` and `seed`. arms: those to summarise, beside original and before.

    -> {drift: {"seeds": [...], "arms": {arm: {measure: spread}}, "differences": {arm: {rival: {measure: spread}}}}}; a difference
    is arm minus rival of the same seed, over the seeds that have both.
    """
    found: dict[str, Any] = {}
    for drift in dict.fromkeys(report["drift"] for report in reports):
        runs = {report["seed"]: report for report in reports if report["drift"] == drift}
        scores = {
            arm: {seed: measures(report, arm) for seed, report in runs.items() if arm in report["models"]}
            for arm in ("original", "before", *arms)
        }
        scores = {arm: by_seed for arm, by_seed in scores.items() if by_seed}
        found[drift] = {
            "seeds": sorted(runs),
            "arms": {arm: _spreads(by_seed) for arm, by_seed in scores.items()},
            "differences": {
                arm: {
                    rival: _spreads({seed: _minus(mine[seed], theirs[seed]) for seed in mine if seed in theirs})
                    for rival, theirs in scores.items()
                    if rival != arm
                }
                for arm, mine in scores.items()
            },
        }
    return found


def _spreads(by_seed: Mapping[int, Mapping[str, float | None]]) -> dict[str, Any]:
    found = {}
    for measure in MEASURES:
        values = {seed: value for seed, scores in by_seed.items() if (value := scores[measure]) is not None}
        if values:
            found[measure] = spread(values)
    return found


def _minus(mine: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if a is None or (b := theirs[name]) is None else a - b for name, a in mine.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def plot(summary: Mapping[str, Any], path: Path, titles: Mapping[str, str] = TITLES) -> None:
    """Language (bits per byte above the original) against what is seen; a small mark a seed, a large one their mean.

    summary: of `summarise`. path: without suffix; .png and .svg are written. titles: {arm: label}, the arm's name where there is none.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = list(dict.fromkeys(arm for part in summary.values() for arm in part["arms"] if arm != "original"))
    palette = dict(zip(arms, plt.get_cmap("tab10").colors, strict=False))
    marks = dict(zip(arms, "osD^vPX*hp", strict=False))
    panels = (("questions", "image questions right", False), ("image_nll", "nats an image token (inverted)", True))
    figure, axes = plt.subplots(len(summary), 2, figsize=(10.4, 3.9 * len(summary)), squeeze=False)
    for row, (drift, part) in zip(axes, summary.items(), strict=True):
        for axis, (measure, label, inverted) in zip(row, panels, strict=True):
            for arm in arms:
                language = part["differences"].get(arm, {}).get("original", {}).get("bits_per_byte")
                seen = part["arms"].get(arm, {}).get(measure)
                if language is None or seen is None:
                    continue
                seeds = [seed for seed in seen["values"] if seed in language["values"]]
                x, y = [language["values"][s] for s in seeds], [seen["values"][s] for s in seeds]
                axis.scatter(x, y, s=16, marker=marks[arm], color=palette[arm], alpha=0.5, lw=0)
                axis.scatter(
                    [_mean(x)], [_mean(y)], s=70, marker=marks[arm], color=palette[arm], label=titles.get(arm, arm),
                    edgecolor="white", lw=0.8, zorder=3,
                )  # fmt: skip
            axis.axvline(0, color="#9ca3af", lw=0.9, ls="--", zorder=0)
            if "before" in part["arms"]:
                axis.axhline(part["arms"]["before"][measure]["mean"], color="#9ca3af", lw=0.9, ls=":", zorder=0)
            axis.invert_xaxis()
            if inverted:
                axis.invert_yaxis()
            axis.set_xlabel("bits per byte above the original LM (better to the right)", fontsize=8.5)
            axis.set_ylabel(f"{label} (better upwards)", fontsize=8.5)
            seeds = ", ".join(map(str, part["seeds"]))
            axis.set_title(f"{drift} drift, seeds {seeds}", fontsize=9.5, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8.5, loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.05 + 0.04 / len(summary), 1, 1))
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)
