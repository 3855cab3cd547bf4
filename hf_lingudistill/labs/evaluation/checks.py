"""Are these the models that the suite needs? Told from names and configs, before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .suite import Suite

VLMS = ("base", "before", "after")


def check_roles(models: Mapping[str, str], sees: Mapping[str, bool], suite: Suite) -> None:
    """Refuse swapped, doubled and missing models.

    Args:
        models: {name: folder or Hub id}. sees: {name: whether its config is a VLM's}.

    Raises:
        ValueError: in one sentence that says what to pass instead.
    """
    wrong = [name for name in VLMS if name in models and not sees[name]]
    if sees.get("original") and "original" in models:
        swapped = f" {wrong[0]} is one: are the two swapped?" if wrong else ""
        raise ValueError(
            f"original: {models['original']!r} is a vision-language model; expected the language model that it was built from.{swapped} A "
            "VLM to compare with is passed as --base."
        )
    if wrong:
        raise ValueError(
            f"{wrong[0]}: {models[wrong[0]]!r} is a language model that takes no images; expected a vision-language model. Pass the "
            "language model as --original."
        )
    places: dict[str, str] = {}
    for name, path in models.items():
        place = str(Path(path).resolve()) if Path(path).is_dir() else path
        if place in places:
            raise ValueError(f"{places[place]} and {name} are the same model, {path!r}; expected two to compare.")
        places[place] = name
    if suite.fidelity and "original" not in models:
        raise ValueError(
            f"Suite {suite.name!r} measures fidelity to the original, which is missing; pass the language model that the VLM was built "
            "from as --original."
        )
