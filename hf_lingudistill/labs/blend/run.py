"""`blend`: score the weights between two VLMs on a suite, and save those that keep what is asked and have the most language."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...checkpoints import check_apart
from ...compatibility import UnreadableModelError, check_compatibility
from ...folders import check, replacing
from ...hub.run_facts import SCHEMA as RECORD
from ...hub.run_facts import model_fact, read_run_facts, write_run_facts
from ...machine import device_of
from ...weights import check_finite, fingerprint, load_whole
from ..diagnose.weights import weight_drift
from ..evaluation import evaluate_models
from ..evaluation.checks import check_templates
from ..evaluation.models import Made, Scored, load_scored, read_config, scoring_dtype, takes_images
from ..evaluation.report import FILES as OF_EVALUATION
from ..evaluation.report import GROUPS
from ..evaluation.suite import Suite, load_suite
from .condition import Condition, parse_condition, score_of, tasks_named
from .report import FILES, MODEL, as_text, write_front
from .weights import SHARES, Blend, blend_into, check_alike, drift_of

Report = dict[str, Any]
SCHEMA = "lingudistill-blend/1"
WEIGHTS = (0.2, 0.4, 0.6, 0.8)


def blend(
    before: str,
    after: str,
    suite: Suite | str,
    keep: str,
    output_dir: str | Path,
    *,
    original: str | None = None,
    weights: Sequence[float] = WEIGHTS,
    shares: Sequence[str] | None = None,
    most: str | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Report:
    """Score every blend on the suite's items, which are drawn once, and save the one with most language among those that keep.

    Args:
        before, after: two VLMs of one build, folders or Hub ids. original: the LM that they were built from.
        keep: the condition, see `condition`. Candidates are the blends and the VLM after, not the VLM before.
        output_dir: `evaluation/` gets the report and the item cache of the evaluation, from which a rerun goes on; beside it the front
            and, where a blend is chosen, `model/`.
        weights: the shares of the VLM after, each between 0 and 1. shares: of `SHARES`; left out, all that can be had (`drift` needs the
            original).
        most: what the most language is measured by, a task or a group of the report; left out, the KL to the original on text, or else
            the group `language`.

    Returns the front as plain values; `chosen` is the name of the blend that was saved, or None.

    Raises:
        ValueError: for a condition, weights or a suite that do not do; NotBlendable: for models of other builds.
        UnreadableModelError: for a model that cannot be loaded.
        NotOurs: if output_dir holds a file of a name to be written that no run of this wrote.
    """
    condition = parse_condition(keep)
    suite = load_suite(suite) if isinstance(suite, str) else suite
    for name in {*(clause.score for clause in condition.clauses), *([most] if most else [])}:
        _check_score(name, suite)
    out = Path(output_dir)
    check(out, *FILES, by="blend")
    check_apart(out / MODEL, what="the blend's folder", before=before, after=after, original=original)
    check(out / "evaluation", *OF_EVALUATION, by="evaluate")
    device_of(device)
    blends = _blends(weights, shares, original)
    _check_models(before, after, trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    models = {**({"original": original} if original else {}), "before": before, "after": after}
    check_templates(models, {name: name != "original" for name in models}, suite, trust_remote_code=trust_remote_code)
    if any(point.shares == "drift" for point in blends):
        drift = _drift(before, str(original), options)
        blends = [Blend(p.weight, p.shares, drift) if p.shares == "drift" else p for p in blends]
    configs = [
        read_config(role, path, trust_remote_code=trust_remote_code)
        for role, path in (("before", before), ("after", after))
    ]
    prints = [fingerprint(path, config) for path, config in zip((before, after), configs, strict=True)]
    stored = getattr(configs[0], "dtype", None) or torch.float32

    def make(point: Blend) -> Callable[[str], Scored]:
        def made(name: str) -> Scored:
            # Blended in the dtype in which it would be saved, and scored in the evaluation's: what is scored is what is saved
            scored = load_scored(name, before, **{**options, "dtype": stored})
            blend_into(scored.model, after, point, trust_remote_code=trust_remote_code)
            for weight in scored.model.parameters():  # buffers stay: rotary frequencies in bf16 are other frequencies
                weight.data = weight.data.to(scoring_dtype(dtype, device))
            check_finite(scored.model.named_parameters(), name)
            scored.path, scored.fingerprint = (
                f"{point.weight:g} of the VLM after, {point.shares}",
                point.fingerprint(*prints),
            )
            return scored

        return made

    report = evaluate_models(
        models,
        suite,
        out / "evaluation",
        made={point.name: Made(point.fingerprint(*prints), make(point)) for point in blends},
        check_ends=lambda tasks: _check_scores(tasks, condition, most),
        batch_size=batch_size,
        progress=progress,
        say=say,
        **options,
    )
    found = _front(report, blends, condition, most or _language(report["tasks"]))
    chosen = next((p for p in [*blends, Blend(1.0, "uniform")] if _name(p) == found["chosen"]), None)
    # A model that an earlier run chose stays where this one chooses none
    with replacing(out, *(name for name in FILES if chosen is not None or name != MODEL), by="blend") as folder:
        write_front(found, folder)
        if chosen is not None:
            record = {
                **found,
                "sources": {"before": model_fact(before), "after": model_fact(after)},
                "suite": suite.name,
            }
            _save(before, after, original, chosen, record, folder / MODEL, trust_remote_code)
    say(as_text(found))
    if chosen is None and (out / MODEL).exists():
        say(f"{out / MODEL} is of an earlier run, and stays.")
    return found


def _name(point: Blend) -> str:
    """As the report has it."""
    return "after" if point.weight == 1.0 else point.name


def _blends(weights: Sequence[float], shares: Sequence[str] | None, original: str | None) -> list[Blend]:
    if not weights or any(not 0.0 < weight < 1.0 for weight in weights):
        raise ValueError(
            f"--weights must lie between 0 (before) and 1 (after), which are scored in any case; got {' '.join(f'{w:g}' for w in weights) or 'none'}."
        )
    shares = shares or (SHARES if original else ("uniform",))
    if unknown := [name for name in shares if name not in SHARES]:
        raise ValueError(f"--shares must be some of {', '.join(SHARES)}; got {unknown[0]!r}.")
    if "drift" in shares and original is None:
        raise ValueError(
            "--shares drift needs the LM that both were built from, from which layers have moved: pass --original."
        )
    return [Blend(weight, kind) for kind in dict.fromkeys(shares) for weight in sorted(set(weights))]


def _check_models(before: str, after: str, trust_remote_code: bool) -> None:
    """Refuse what can be refused from configs: the models are built without weights."""
    built = {}
    for role, path in (("before", before), ("after", after)):
        config = read_config(role, path, trust_remote_code=trust_remote_code)
        if not takes_images(config):
            raise UnreadableModelError(
                f"{role}: {path!r} is a language model that takes no images; expected a vision-language model. Pass the language model as "
                "--original."
            )
        with torch.device("meta"):
            built[role] = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    check_alike(built["before"], built["after"])


def _check_score(name: str, suite: Suite) -> None:
    """Refuse a score that the suite cannot hold, before any model is loaded."""
    tasks = [task.name for task in (*suite.texts, *suite.vision, *suite.grounded, *suite.fidelity)]
    tasks += [*suite.lm_eval.tasks, *suite.lmms_eval.tasks, *([suite.ifeval.name] if suite.ifeval else [])]
    if name not in GROUPS and not any(task in name.split("/") for task in tasks):
        raise ValueError(
            f"{name!r} is no score of the suite {suite.name!r}: expected one of the groups {', '.join(GROUPS)}, or a task of its report, such "
            f"as 'vision/{tasks[0]}'. Its tasks are {', '.join(tasks)}."
        )


def _check_scores(tasks: Sequence[Mapping[str, Any]], condition: Condition, most: str | None) -> None:
    """Refuse what can be told from the models that are not made, before the first blend is."""
    condition.holds(tasks, "after")
    tasks_named(tasks, most or _language(tasks))


def _drift(before: str, original: str, options: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """What `diagnose` measures of the weights of the VLM before."""
    fit = check_compatibility(before, original, trust_remote_code=options["trust_remote_code"])
    fit.raise_for_misfit()
    # On the CPU: each weight is looked at once
    here = {**options, "device": "cpu"}
    student, lm = load_scored("before", before, **here), load_scored("original", original, **here)
    found = weight_drift(student.model, lm.model, fit.shared_vocab_size)
    del student, lm
    gc.collect()
    return drift_of({"layers": found.layers, "outside": found.outside})


# --------------------------------------------------------------------------------------------------------------------
# The choice
# --------------------------------------------------------------------------------------------------------------------
def _language(tasks: Sequence[Mapping[str, Any]]) -> str:
    """The score of language: how far from the original on text where the suite measures it."""
    found = next((str(task["name"]) for task in tasks if task["metric"] == "text_kl"), "language")
    try:
        tasks_named(tasks, found)
    except ValueError as error:
        raise ValueError(f"{error} Pass it as --most.") from error
    return found


def _front(report: Report, blends: Sequence[Blend], condition: Condition, most: str) -> Report:
    tasks = report["tasks"]
    higher = bool(tasks_named(tasks, most)[0]["higher_is_better"])
    places = {
        "before": (0.0, ""),
        "after": (1.0, ""),
        **{point.name: (point.weight, point.shares) for point in blends},
    }
    scores = list(dict.fromkeys([most, *(clause.score for clause in condition.clauses)]))
    points: list[dict[str, Any]] = []
    for name, (weight, shares) in places.items():
        kept = condition.holds(tasks, name)
        points.append(
            {
                "name": name,
                "weight": weight,
                "shares": shares,
                "keeps": kept,
                "keeps_surely": condition.holds_surely(tasks, name) if kept else False,
                "scores": {score: _with_interval(tasks, score, name) for score in scores},
            }
        )

    def language(point: Mapping[str, Any]) -> float:
        value = float(point["scores"][most]["value"])
        return value if higher else -value

    before = points[0]
    able = [point for point in points[1:] if point["keeps"]]
    # Of equals, the one that has changed less
    best = max(able, key=lambda point: (language(point), -places[point["name"]][0]), default=None)
    reason = None
    if best is None:
        reason, best = f"no weight meets {condition}", None
    elif language(best) <= language(before):
        reason, best = f"of the weights that meet {condition}, none has more language than the VLM before", None
    return {
        "schema": SCHEMA,
        "keep": str(condition),
        "most": most,
        "higher_is_better": higher,
        "points": sorted(points, key=lambda point: (point["shares"], point["weight"])),
        "chosen": best and best["name"],
        "reason": reason,
    }


def _with_interval(tasks: Sequence[Mapping[str, Any]], score: str, model: str) -> dict[str, Any]:
    """{"value"}, and the ends of its interval where it is one task's."""
    named = tasks_named(tasks, score)
    ends = {key: named[0]["scores"][model][key] for key in ("low", "high")} if len(named) == 1 else {}
    if not all(map(math.isfinite, ends.values())):  # of a few items
        ends = {}
    return {"value": score_of(tasks, score, model), **ends}


def _save(
    before: str, after: str, original: str | None, point: Blend, front: Report, folder: Path, trust_remote_code: bool
) -> None:
    """Write the blend in the dtype of the VLM before, its processor, and the record of the VLM after with what was done to it."""
    model = load_whole(
        AutoModelForImageTextToText, before, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
    )
    blend_into(model, after, point, trust_remote_code=trust_remote_code)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(before, trust_remote_code=trust_remote_code).save_pretrained(folder)
    trained = read_run_facts(after) if Path(after).is_dir() else {}
    known = {
        "schema": RECORD,
        "student": model_fact(before),
        **({"teacher": model_fact(original)} if original else {}),
    }
    chosen = next(p for p in front["points"] if p["name"] == front["chosen"])
    facts = {
        **front["sources"],
        "weight": point.weight,
        "shares": point.shares,
        "by_group": {group: point.share(group) for group, _ in point.drift},
        "keep": front["keep"],
        "most": front["most"],
        "suite": front["suite"],
        "scores": chosen["scores"],
    }
    write_run_facts({**(trained or known), "blend": facts}, folder)
