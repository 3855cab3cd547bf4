"""From one file per arm and seed to results/summary.json: means over seeds, 95 % t intervals, paired differences, and the rule."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student_t

METRICS = (
    "text_kl", "text_top1", "image_kl", "image_kl_dependent", "image_kl_rest", "bits_per_byte", "ifeval_strict", "ifeval_loose",
    "ifeval_tokens", "ifeval_stopped", "tokens_text", "ended_text", "tokens_long", "ended_long", "tokens_short", "ended_short",
    "naming_seen", "naming_new", "naming_exchanged", "yes_no", "recovered_text_kl", "seconds",
)  # fmt: skip
# CE arms by their share of text rows, per cent of a step's 16; the first is of regime P
REPLAY = {
    "0": ("P", "ce"),
    "12.5": ("M", "ce_replay_10"),
    "25": ("M", "ce"),
    "31.25": ("M", "ce_replay_30"),
    "50": ("M", "ce_replay_50"),
}
SCREEN = ("aligned", "P", "severe", 0)


class Refusal(ValueError):
    """What cannot be done without a wrong figure or a lost one, in one sentence."""


Results = dict[
    tuple[str, str, str, int, str], dict[str, Any]
]  # (tower, regime, drift, seed, arm) -> what was measured


def read(folder: Path) -> Results:
    """All results, with `recovered_text_kl`: the share of the KL that drift cost and the arm took back."""
    found: Results = {}
    for path in sorted(folder.glob("*/*/*/*/*.json")):
        tower, regime, drift, seed = path.relative_to(folder).parts[:4]
        found[tower, regime, drift, int(seed), path.stem] = json.loads(path.read_text(encoding="utf-8"))
    floor = original(folder).get("text_kl", 0.0)
    for key, result in found.items():
        before = found.get((*key[:4], "before"))
        if before is not None and before["text_kl"] > floor:
            result["recovered_text_kl"] = round(
                (before["text_kl"] - result["text_kl"]) / (before["text_kl"] - floor), 4
            )
    return found


def original(folder: Path) -> dict[str, Any]:
    path = folder / "original.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """mean, and half of the 95 % t interval over seeds (None for a single seed)."""
    half = None
    if len(values) > 1:
        half = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {"mean": round(fmean(values), 5), "half": None if half is None else round(half, 5), "seeds": len(values)}


def of_tower(results: Results, tower: str) -> dict[str, Any]:
    """{regime: {drift: {arm: {metric: interval}}}} of one tower."""
    found: dict[str, Any] = {}
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for (of, regime, drift, _, arm), result in results.items():
        if of == tower:
            groups.setdefault((regime, drift, arm), []).append(result)
    for (regime, drift, arm), members in groups.items():
        scores = {
            # IFEval is measured on some of the seeds; "seeds" says on how many
            metric: interval([member[metric] for member in members if member.get(metric) is not None])
            for metric in METRICS
            if any(member.get(metric) is not None for member in members)
        }
        found.setdefault(regime, {}).setdefault(drift, {})[arm] = scores
    return found


def paired(results: Results, tower: str, others: Sequence[str] = ("ce", "none", "before")) -> dict[str, Any]:
    """{regime: {drift: {"ARM - OTHER": {metric: interval}}}}: differences within a seed, over the seeds that have both."""
    found: dict[str, Any] = {}
    for regime, drift in sorted({(key[1], key[2]) for key in results if key[0] == tower}):
        here = {(key[3], key[4]): value for key, value in results.items() if key[:3] == (tower, regime, drift)}
        for arm in sorted({name for _, name in here}):
            for other in others:
                seeds = sorted(seed for seed, name in here if name == arm and (seed, other) in here)
                if arm == other or not seeds:
                    continue
                differences = {}
                for metric in METRICS:
                    pairs = [(here[seed, arm].get(metric), here[seed, other].get(metric)) for seed in seeds]
                    both = [a - b for a, b in pairs if a is not None and b is not None]
                    if both:
                        differences[metric] = interval(both)
                found.setdefault(regime, {}).setdefault(drift, {})[f"{arm} - {other}"] = differences
    return found


def replay(results: Results, shipped: str) -> dict[str, Any]:
    """{"ce": {share: {metric: interval}}, "shipped", "ce_people", "vision_people": {metric: interval}}, over the seeds that have all shares;
    {} without one. An arm that some of these seeds lack is left out."""

    def of(regime: str, arm: str, seed: int) -> dict[str, Any] | None:
        return results.get(("aligned", regime, "severe", seed, arm))

    seeds = [
        seed for seed in sorted({key[3] for key in results}) if all(of(*where, seed) for where in REPLAY.values())
    ]
    if not seeds:
        return {}

    def spread(regime: str, arm: str) -> dict[str, Any]:
        found = [of(regime, arm, seed) or {} for seed in seeds]
        return {metric: interval([one[metric] for one in found]) for metric in ("text_kl", "image_kl", "naming_seen")}

    beside = {"shipped": ("P", shipped), "ce_people": ("M", "ce_people"), "vision_people": ("M", "vision_people")}
    whole = {name: where for name, where in beside.items() if all(of(*where, seed) for seed in seeds)}
    return {
        "ce": {share: spread(*where) for share, where in REPLAY.items()},
        **{name: spread(*where) for name, where in whole.items()},
    }


def choose(folder: Path, settings: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """(the default, the arms that run over seeds) by the rule at the head of recipe.yaml; (None, []) before the screen is whole."""
    wanted = {arm for run in settings["runs"][: settings["screen"]] for arm in run[4]}
    screen = {key[4]: value for key, value in read(folder).items() if key[:4] == SCREEN and key[4] in wanted}
    if not wanted or wanted - set(screen):
        return None, []
    specs = settings["arms"]
    floor = screen["before"]["naming_seen"] - 0.03
    able = [
        arm
        for arm in screen
        if specs[arm]["kind"] == "distill"
        and not {"lora", "learning_rate"} & set(specs[arm])  # whose rivals have neither
        and screen[arm]["naming_seen"] >= floor
    ]
    if not able:  # every one lost its names: the rule has no answer, and a person must look
        return None, []
    loss = {arm: screen[arm]["text_kl"] + screen[arm]["image_kl"] for arm in able}
    best = min(loss.values())
    # Ties within 0.02 nats go to the cheaper arm
    default = min((arm for arm in able if loss[arm] <= best + 0.02), key=lambda arm: screen[arm]["seconds"])

    def best_other(*options: str) -> list[str]:
        """The best arm that differs from the default in one of the options."""

        def chosen(arm: str) -> list[str]:
            return [specs[arm]["args"].get(option, "student") for option in options]

        others = [arm for arm in able if chosen(arm) != chosen(default)]
        return [min(others, key=lambda arm: loss[arm])] if others else []

    fixed = [arm for arm in settings["decisive"] if arm != "default"]
    chosen = [*fixed, default, *best_other("distill_tokens"), *best_other("kv_sharing", "kv_source")]
    return default, list(dict.fromkeys(chosen))


def _on_as_many_prompts(results: Results, settings: Mapping[str, Any]) -> Results:
    """Results without IFEval's scores where other than the recipe's number of prompts was asked: a mean over both would be of neither."""
    wanted = settings["ifeval"]["prompts"]
    return {
        key: result
        if result.get("ifeval_prompts", wanted) == wanted
        else {name: value for name, value in result.items() if not name.startswith("ifeval_")}
        for key, result in results.items()
    }


def summarise(made: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The aligned tower; other towers under "towers", what each sharing mode gives its teacher under "modes"; {} without results.

    made: the recipe's output folder, with results/ and modes/.

    Raises:
        Refusal: if results are of several devices, or those of one seed of several sources.
    """
    folder = made / "results"
    results = _on_as_many_prompts(read(folder), settings)
    if not results:
        return {}
    devices = sorted({result.get("device", "not noted") for result in results.values()})
    if len(devices) > 1:
        raise Refusal(
            f"Results of several devices cannot be compared: {', '.join(devices)}. Keep each in an --out of its own."
        )
    sources: dict[str, set[Any]] = {}
    for key, result in results.items():
        sources.setdefault(f"{key[0]}/{key[2]}/{key[3]}", set()).add(result.get("source"))
    if mixed := [group for group, found in sources.items() if len(found) > 1]:
        raise Refusal(
            f"The arms of {mixed[0]} began at different VLMs or were measured on different answers: they cannot be compared."
        )
    main = of_tower(results, "aligned")
    reference = {
        metric: {"mean": value, "half": None} for metric, value in original(folder).items() if metric in METRICS
    }
    for drifts in main.values():
        for arms in drifts.values():
            arms["original"] = reference
    default, chosen = choose(folder, settings)
    shipped = settings["shipped"]
    for drifts in main.values():
        for arms in drifts.values():
            if shipped in arms:
                arms["default"] = arms[shipped]
    seeds = {len({key[3] for key in results if key[:3] == ("aligned", "P", drift)}) for drift in ("severe", "mild")}
    return {
        "seeds": max(seeds),
        "device": devices[0],
        "default": shipped,
        "elected": default,
        "decisive": chosen,
        "regimes": main,
        "paired": paired(results, "aligned", ("ce", "none", "before", shipped)),
        "replay": replay(results, shipped),
        "modes": {
            path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((made / "modes").glob("*.json"))
        },
        "towers": {tower: of_tower(results, tower) for tower in sorted({key[0] for key in results} - {"aligned"})},
    }


def write(made: Path, settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """summary.json, and arms.jsonl with every arm of every seed. -> the summary."""
    summary = summarise(made, settings)
    if not summary:
        return {}
    results = read(made / "results")
    out.mkdir(parents=True, exist_ok=True)
    # A line per figure, not four
    text = re.sub(r"\{[^{}]*\}", lambda found: " ".join(found[0].split()), json.dumps(summary, indent=1))
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    # As measured, an arm of a seed per line: a mean over seeds cannot be taken apart again
    lines = (json.dumps({"arm": "/".join(map(str, key)), **value}) for key, value in sorted(results.items()))
    (out / "arms.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return summary
