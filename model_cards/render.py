"""Render the example cards, of the demo and of a recipe, from their committed result files: `make cards`.

    python model_cards/render.py            # rewrite model_cards/*.md
    python model_cards/render.py --check    # exit 1 if one is stale, missing or left over (used by the tests)

A card of `docs/results/demo/report.json`, and one of the first `report.json` under each `examples/recipes/NAME/results/`; a
`lingudistill.json` beside it (the run facts that training writes) says how the model was trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_lingudistill.hub.card import PLOTS, render_card
from hf_lingudistill.hub.results import main_model
from hf_lingudistill.hub.run_facts import read_run_facts
from hf_lingudistill.hub.usage import Usage

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
TITLES = {"demo": "The demo's VLM"}
NOTE = "\n\n<!-- Rendered by `make cards`; edit the template in hf_lingudistill/hub/templates or the result files, not this file. -->\n"


def results(root: Path = ROOT) -> Iterator[tuple[str, Path, str | None]]:
    """(name of the card, folder of the report, command that makes it anew or None): of the demo, and of each recipe's first run."""
    if (root / "docs/results/demo/report.json").is_file():
        yield "demo", root / "docs/results/demo", None  # its report says itself which command it was
    for recipe in sorted((root / "examples/recipes").glob("*")):
        reports = sorted(recipe.glob("results/**/report.json"))
        if reports:
            script = recipe / "reproduce.py"
            command = f"python {script.relative_to(root)} all" if script.is_file() else None
            yield recipe.name, reports[0].parent, command


def card(name: str, folder: Path, command: str | None, root: Path = ROOT) -> str:
    """The text of one card. Plots are linked where they lie."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    link = Path("..") / folder.relative_to(root)
    plots = {title: f"{link}/{stem}.png" for stem, title in PLOTS.items() if (folder / f"{stem}.png").is_file()}
    facts, model = read_run_facts(folder), (report.get("models") or {}).get(main_model(report)) or {}
    source = f"outputs/{name}/{model.get('path', 'after')}"
    usage = Usage(source, made_by="the folder that the command under *Reproduce* makes")
    return (
        str(render_card(facts, report, name=TITLES.get(name, name), plots=plots, command=command, usage=usage)) + NOTE
    )


def render(root: Path = ROOT) -> dict[str, str]:
    """{file name: text} of all cards."""
    return {f"{name}.md": card(name, folder, command, root) for name, folder, command in results(root)}


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
