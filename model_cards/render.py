"""Render the example cards, of the demo and of a recipe, from their committed result files: `make cards`.

    python model_cards/render.py            # rewrite model_cards/*.md
    python model_cards/render.py --check    # exit 1 if one is stale, missing or left over (used by the tests)

A card of `docs/results/demo/report.json`, and one of the first `report.json` (else of the `summary.json` over seeds) under each
`examples/recipes/NAME/results/`; a `lingudistill.json` beside a report (the run facts that training writes) says how the model was
trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hf_lingudistill.hub.card import render_card
from hf_lingudistill.hub.manifest import PLOTS
from hf_lingudistill.hub.run_facts import SETTINGS, read_run_facts
from hf_lingudistill.hub.usage import Usage
from hf_lingudistill.options import DistillOptions

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
TITLES = {"demo": "The demo's VLM", "five_artists": "A VLM of five artists"}
NOTE = "\n\n<!-- Rendered by `make cards`; edit the template in hf_lingudistill/hub/templates or the result files, not this file. -->\n"


def results(root: Path = ROOT) -> Iterator[tuple[str, Path, str | None]]:
    """(name of the card, file of the results, command that makes them anew or None): of the demo, and of each recipe's first run."""
    demo = root / "docs/results/demo/report.json"
    if demo.is_file():
        yield "demo", demo, None  # its report says itself which command it was
    for recipe in sorted((root / "examples/recipes").glob("*")):
        found = sorted(recipe.glob("results/**/report.json")) or sorted(recipe.glob("results/summary.json"))
        if found:
            script = recipe / "reproduce.py"
            command = f"python {script.relative_to(root)} all" if script.is_file() else None
            yield recipe.name, found[0], command


# Of a recipe that is run over seeds: metric -> (group, title, unit, higher is better)
SEED_METRICS = {
    "text_kl": ("language", "KL to the original LM, on its own answers to instructions", "nats/token", False),
    "bits_per_byte": ("language", "Held-out text", "bits/byte", False),
    "ifeval_strict": ("language", "IFEval, strict", "accuracy", True),
    "image_kl": (
        "grounded",
        "KL to the original LM told the caption, on answers about a picture",
        "nats/token",
        False,
    ),
    "image_kl_dependent": (
        "grounded",
        "KL on the tokens of those answers that depend on the picture",
        "nats/token",
        False,
    ),
    "naming_seen": ("vision", "Naming things by artists that were trained on", "accuracy", True),
    "naming_new": ("vision", "Naming things by an artist that was never seen", "accuracy", True),
}


def report_of(summary: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What a recipe's `summary.json` says of its default arm after severe drift, in regime P, in the form of an evaluation's report.

    settings: of its recipe.yaml. Scores are means over seeds, with 95 % t intervals where there are several.
    """
    arms, arm = summary["regimes"]["P"]["severe"], summary["default"]
    paired = summary["paired"]["P"]["severe"]
    names = {"original": "original", "before": "before", "ce": "ce", "after": arm}
    tasks = []
    for metric, (group, title, unit, higher) in SEED_METRICS.items():
        scores = {name: _score(arms.get(of, {}).get(metric)) for name, of in names.items()}
        differences = {other: _score(paired.get(f"{arm} - {other}", {}).get(metric)) for other in ("before", "ce")}
        share = {name: _score(arms.get(of, {}).get(f"recovered_{metric}")) for name, of in names.items()}
        exchanged = (
            {"exchanged": {"after": _score(arms[arm].get("naming_exchanged"))}} if metric == "naming_seen" else {}
        )
        tasks.append(
            {"name": metric, "group": group, "title": title, "metric": metric, "unit": unit, "higher_is_better": higher,
             "scores": scores, "controls": exchanged, "recovered": share,
             "differences": [{"of": "after", "minus": other, **score} for other, score in differences.items() if score]}
        )  # fmt: skip
    paths = {"before": "the VLM after severe drift", "original": "SmolLM2-135M-Instruct"}
    return {
        "models": {name: {"path": paths.get(name, name)} for name in names},
        "tasks": tasks,
        "intervals": f"means over {summary['seeds']} seeds, with 95 % t intervals over them"
        if summary["seeds"] > 1
        else "one seed",
        "arm": {**settings["arms"][arm].get("args", {}), "learning_rate": settings["training"]["learning_rate"]},
        "steps": settings["training"]["max_steps"],
        "device": summary["device"],
        "rows": settings["regimes"]["P"],
    }


def _score(found: dict[str, Any] | None) -> dict[str, Any] | None:
    if not found:
        return None
    mean, half = found["mean"], found.get("half")
    return {"value": mean} if half is None else {"value": mean, "low": mean - half, "high": mean + half}


def facts_of(file: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The facts that training wrote beside the report; of a recipe over seeds, its settings."""
    if "arm" not in report:
        return read_run_facts(file.parent)
    total = sum(report["rows"].values())
    left_out = {field.name: field.default for field in dataclasses.fields(DistillOptions) if field.name in SETTINGS}
    return {
        "student": {"prose": "a SmolVLM whose language was lost to short questions about pictures"},
        "teacher": {"id": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"},
        "datasets": [
            {"name": f"{name}, {rows} of {total} rows of a batch"} for name, rows in report["rows"].items() if rows
        ],
        "settings": {**left_out, **report["arm"], "per_device_train_batch_size": total},
        "training": {"steps": report["steps"]},
        "hardware": {"device": report["device"], "precision": "bf16"},
    }


def card(name: str, file: Path, command: str | None, root: Path = ROOT) -> str:
    """The text of one card. Plots are linked where they lie."""
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if file.name == "summary.json":
        settings = yaml.safe_load((file.parents[1] / "recipe.yaml").read_text(encoding="utf-8"))
        report = report_of(report, settings)
    folder = file.parent
    link = Path("..") / folder.relative_to(root)
    plots = {title: f"{link}/{stem}.png" for stem, title in PLOTS.items() if (folder / f"{stem}.png").is_file()}
    usage = Usage(f"outputs/{name}/after", made_by="the folder that the command under *Reproduce* makes")
    if "arm" in report:  # its weights lie in a folder per seed and arm
        usage = dataclasses.replace(
            usage,
            source="OUT",
            made_by="the folder of an arm under `outputs/`, which the command under *Reproduce* makes",
        )
    title = TITLES.get(name, name)
    card = render_card(facts_of(file, report), report, name=title, plots=plots, command=command, usage=usage)
    return str(card) + NOTE


def render(root: Path = ROOT) -> dict[str, str]:
    """{file name: text} of all cards."""
    found = results(root)
    return {f"{name}.md": card(name, file, command, root) for name, file, command in found if is_told(file)}


def is_told(file: Path) -> bool:
    """Whether a recipe's summary already has what its card is about: the default arm after severe drift, in regime P."""
    if file.name != "summary.json":
        return True
    summary = json.loads(file.read_text(encoding="utf-8"))
    return summary["default"] in summary["regimes"].get("P", {}).get("severe", {}) and "P" in summary["paired"]


def stale(cards: dict[str, str], folder: Path = CARDS) -> list[str]:
    """File names whose content in the folder is not what was rendered, or that were rendered once and should not be there. A card
    that somebody wrote is left alone, whatever it is called."""
    held = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    held = {name: text for name, text in held.items() if name in cards or text.endswith(NOTE)}
    return sorted(name for name in cards.keys() | held.keys() if cards.get(name) != held.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    cards = render()
    names = stale(cards)
    if args.check:
        if names:
            print(f"Stale model cards: {', '.join(names)}. Run `make cards`.", file=sys.stderr)
        return int(bool(names))
    for name in names:
        if name in cards:
            (CARDS / name).write_text(cards[name], encoding="utf-8")
        else:
            (CARDS / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
