"""Results that are kept: what they were made from, how they come back into a folder without its weights, and how two runs compare.

Weights and answers are large and stay out of the repository; figures do not. A result names its `source`: the VLM it began at, the answers
it was measured on and how many of them. Arms of one seed are compared arm by arm, so they share a source; seeds may differ in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages import Place, is_done
from summary import Refusal

from hf_lingudistill.weights import fingerprint

ANSWERS = ("long", "test_images", "test_texts")
COMPARED = ("text_kl", "image_kl", "image_kl_dependent", "naming_seen")


def source(place: Place, run: Sequence[Any]) -> str | None:
    """A digest of the drifted VLM, the answers and the sizes of the measures; None while one of them is not made."""
    tower, _, drift, seed = run[:4]
    start, answers = place.start(tower, drift, seed), [place.answers / f"{name}.jsonl" for name in ANSWERS]
    if not is_done(start) or not all(path.is_file() for path in answers):
        return None
    parts = [fingerprint(start), json.dumps(place.settings["measure"], sort_keys=True)]
    parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in answers]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def of_another_source(place: Place, run: Sequence[Any]) -> bool:
    """Whether this seed has results of weights, answers or sizes that are not these: an arm more could not be held against them."""
    known = _known(place, run)
    return bool(known) and ((made := source(place, run)) is None or known != {made})


def _known(place: Place, run: Sequence[Any]) -> set[str | None]:
    """The sources of what this seed has, in either regime."""
    tower, _, drift, seed = run[:4]
    found = (place.out / "results").glob(f"{tower}/*/{drift}/{seed}/*.json")
    return {json.loads(path.read_text(encoding="utf-8")).get("source") for path in found}


def refuse_another_source(place: Place, run: Sequence[Any]) -> None:
    """See `of_another_source`.

    Raises:
        Refusal: if arms of this seed were measured on other weights, answers or sizes.
    """
    if of_another_source(place, run):
        raise Refusal(
            f"{run[0]}/{run[2]}/{run[3]} has results that began at another VLM, or were measured on other answers or other sizes than those in "
            f"{place.out}: an arm more cannot be held against them. Take a seed that has none, or begin anew with another --out."
        )


def read_kept(results: Path) -> dict[str, dict[str, Any]]:
    """{tower/regime/drift/seed/arm: what was measured} of a folder of results; {} if it has none."""
    path = results / "arms.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {row["arm"]: {name: value for name, value in row.items() if name != "arm"} for row in rows}


def lost(place: Place, results: Path) -> list[str]:
    """Arms that a folder of results has and the output folder has not: a report written there would lose them."""
    return [arm for arm in read_kept(results) if not (place.out / "results" / f"{arm}.json").is_file()]


def refuse_to_lose(place: Place, results: Path) -> None:
    """See `lost`.

    Raises:
        Refusal: if a report to `results` would lose arms.
    """
    if missing := lost(place, results):
        raise Refusal(
            f"{results} has {len(missing)} arms that {place.out} has not (the first: {missing[0]}), and the report would lose them. Give "
            f"--results another folder, or take them over first: `reproduce.py --out {place.out} --results {results} restore`."
        )


def restore(place: Place, results: Path) -> int:
    """Write kept figures into the output folder as if they had been measured there; what is there already stays. -> how many arms.

    Raises:
        Refusal: if `results` has no arms, or the output folder has arms of the same seeds that cannot be held against them.
    """
    kept, count = read_kept(results), 0
    if not kept:
        raise Refusal(f"{results} has no arms.jsonl with results: nothing to restore.")
    sources = {tuple(arm.split("/")[:4]): row.get("source") for arm, row in kept.items()}
    for run, source_ in sources.items():
        if _known(place, run) - {source_}:
            raise Refusal(
                f"{place.out} and {results} both have results of {'/'.join(run)}, of different sources: they cannot be held against each "
                "other. Restore into another --out."
            )
    for arm, row in kept.items():
        measured = {name: value for name, value in row.items() if name != "recovered_text_kl"}  # computed anew
        count += _write_new(place.out / "results" / f"{arm}.json", measured)
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    references = [arms["original"] for drifts in summary["regimes"].values() for arms in drifts.values()]
    if references and references[0]:
        path = place.out / "results" / "original.json"
        here = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_json(path, {metric: value["mean"] for metric, value in references[0].items()} | here)
    for name, told in summary["modes"].items():
        _write_new(place.out / "modes" / f"{name}.json", told)
    return count


def _write_new(path: Path, value: Any) -> bool:
    if path.is_file():
        return False
    write_json(path, value)
    return True


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(f".{os.getpid()}.part")  # runs side by side may measure the same: the original
    partial_path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial_path.replace(path)


def compare(ours: Mapping[str, Any], yours: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two summaries, arm by arm: {arm, metric, ours, yours}, each {mean, half, seeds}, for what both have measured."""

    def arms(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        towers = {"aligned": summary["regimes"], **summary["towers"]}
        return {
            f"{tower}/{regime}/{drift}/{arm}": scores
            for tower, regimes in towers.items()
            for regime, drifts in regimes.items()
            for drift, found in drifts.items()
            for arm, scores in found.items()
            if arm not in ("default", "original")
        }

    mine, other = arms(ours), arms(yours)
    return [
        {"arm": arm, "metric": metric, "ours": mine[arm][metric], "yours": other[arm][metric]}
        for arm in mine
        if arm in other
        for metric in COMPARED
        if metric in mine[arm] and metric in other[arm]
    ]
