"""Score any number of models on the same items and say what was lost, what came back, and what it cost.

One model is in memory at a time. Whatever it gives on an item is on disk before the next batch, and a rerun goes on from there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..._version import __version__
from ...folders import check
from ...identity import digest
from ...machine import device_of, machine
from ...sentences import install
from ...weights import fingerprint
from ..statistics import Bootstrap
from .checks import check_roles, check_templates, check_tokens
from .fidelity_run import ORIGINAL, FidelityRun
from .join import DEPENDS, join
from .language import require_harness
from .models import (
    Made,
    Scored,
    describe,
    load_scored,
    read_config,
    read_template,
    release_memory,
    takes_images,
)
from .plots import training_history
from .report import FILES, Task, build_report, write_report
from .scoring import read_items, score
from .suite import HarnessTasks, Suite, load_suite
from .terminal import as_text

Report = dict[str, Any]

REFERENCE = "reference"  # the name of a reference model that is not among those compared


def evaluate_models(
    models: Mapping[str, str],
    suite: Suite | str,
    output_dir: str | Path,
    *,
    made: Mapping[str, Made] | None = None,
    check_ends: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
    reference: str | None = None,
    compare: Sequence[str] = (),
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    training_log: str | Path | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Report:
    """Score models and write `report.json`, `report.md` and the plots.

    Args:
        models: {name: folder or Hub id}. `original` is the LM that was lost from, `before` the VLM that lost it, `base` the VLM
            before it was tuned further (the paper's reference); every other name is compared with them. Columns keep this order.
        suite: a suite, the name of one in the package, or the path of a YAML file.
        output_dir: for the report, and `items/`, the item cache.
        made: further VLMs by name, each made when its turn comes.
        check_ends: called with the report's tasks as `models` have them, before the first of `made` is made; what it raises ends the run.
        reference: the model whose reaction to exchanged images says which tokens of an answer depend on the image: one of
            `models`, or the folder or Hub id of another VLM; default `before`, or the first VLM. A model that does not know
            the wording finds too many.
        compare: models that all others are compared with, besides `original`, `before` and `base`.
        training_log: a `trainer_state.json`, for the plot of training curves.

    Returns the report.

    Raises:
        ValueError, FileNotFoundError: for a suite, a dataset, names, a reference, a device or a log that do not fit, before a model is loaded.
        UnreadableModelError: for a model that cannot be loaded; a config that cannot be read, before the first is.
        ModuleNotFoundError: if the suite needs a package that is not installed, saying which and how to install it.
        NotOurs: if output_dir holds a file of a name to be written that no evaluation wrote, before a model is loaded.
    """
    suite = load_suite(suite) if isinstance(suite, str) else suite
    out = Path(output_dir)
    made = made or {}
    _check_asked(
        suite, models, made, out, reference=reference, compare=compare, device=device, training_log=training_log
    )
    if reference is not None and reference not in models:  # the folder or Hub id of one that is compared is that one
        reference = next((name for name, path in models.items() if _same_place(path, reference)), reference)
    to_score = dict(models)
    if suite.grounded and reference is not None and reference not in models:
        to_score = {REFERENCE: reference, **to_score}  # an instrument with a folder of its own, and no column
        reference = REFERENCE
    configs = {name: read_config(name, path, trust_remote_code=trust_remote_code) for name, path in to_score.items()}
    sees = {name: takes_images(config) for name, config in configs.items()}
    check_roles(models, sees, suite)
    if note := _another_original(configs):
        say(note)
    sees |= dict.fromkeys(made, True)
    if suite.grounded:
        reference = _reference(reference, sees)
    _check_something_to_measure(suite, [*models, *made], sees)
    if suite.lm_eval.tasks:
        require_harness()
    check_templates(to_score, sees, suite, trust_remote_code=trust_remote_code)
    items = read_items(suite)
    check_tokens(to_score, sees, suite, items, reference=reference, trust_remote_code=trust_remote_code)
    prints = {name: fingerprint(path, configs[name]) for name, path in to_score.items()}
    prints |= {name: model.fingerprint for name, model in made.items()}

    def load(name: str) -> Scored:
        if name in made:
            return made[name].make(name)
        return load_scored(
            name,
            to_score[name],
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            fingerprint_=prints[name],
        )

    fidelity = None
    if suite.fidelity:
        to_score = {ORIGINAL: to_score[ORIGINAL], **to_score}  # it writes what the others read
        fidelity = FidelityRun(
            suite.fidelity,
            items,
            out / "items",
            lambda: load(ORIGINAL),
            lambda: read_template(
                models.get("before") or next(path for name, path in models.items() if sees[name]),
                trust_remote_code=trust_remote_code,
            ),
            seed=suite.seed,
            batch_size=batch_size,
            progress=progress,
        )
    names = [*models, *made]
    bootstrap = Bootstrap(resamples=suite.resamples, seed=suite.seed)
    results: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    def scored(some: Sequence[str], of: list[str]) -> list[Task]:
        found = _score_all(
            some,
            load,
            suite,
            items,
            out / "items",
            fidelity,
            prints={name: prints[name] for name in names if name != ORIGINAL},
            reference=reference,
            batch_size=batch_size,
            progress=progress,
            say=say,
        )
        for known, new in zip((results, facts, seconds), found, strict=True):
            known.update(new)
        if fidelity is not None:
            results[DEPENDS] = fidelity.depends
        return join(suite, items, results, of, reference)

    tasks = scored(list(to_score), list(models))
    if made:
        if check_ends is not None:
            check_ends(build_report(tasks, bootstrap)["tasks"])
        tasks = scored(list(made), names)
    report = build_report(
        tasks,
        bootstrap,
        compare=compare,
        suite={"name": suite.name, "seed": suite.seed, "sha256": digest(suite.__dict__)},
        models={name: facts[name] for name in names},
        seconds=seconds,
        config={
            "reference": facts[reference]["path"] if suite.grounded and reference in facts else None,
            "batch_size": batch_size,
        },
        machine=_machine(),
    )
    written, plotted = write_report(report, out, training_log=training_log)
    say(as_text(report))
    beside = f"{written.with_suffix('.md').name} and plots" if plotted else written.with_suffix(".md").name
    say(f"Report: {written}, with {beside} beside it")
    if not plotted:
        say(f"No plots: they need matplotlib; run {install('eval')}.")
    return report


def _same_place(one: str, other: str) -> bool:
    return one == other or (
        Path(one).is_dir() and Path(other).is_dir() and Path(one).resolve() == Path(other).resolve()
    )


def _check_asked(
    suite: Suite,
    models: Mapping[str, str],
    made: Mapping[str, Made],
    out: Path,
    *,
    reference: str | None,
    compare: Sequence[str],
    device: str | None,
    training_log: str | Path | None,
) -> None:
    """All that can be checked without reading a model's config."""
    check(out, *FILES, by="evaluate")
    device_of(device)
    if training_log is not None:
        training_history(training_log)
    if not models:
        raise ValueError("No model to score: pass at least one, as {name: path}.")
    if bad := [name for name in (*models, *made) if name == REFERENCE or not re.fullmatch(r"\w[\w.-]*", name)]:
        raise ValueError(
            f"A model cannot be named {bad[0]!r}: expected letters, digits, '.', '-' and '_', and not {REFERENCE!r}."
        )
    if unknown := [name for name in compare if name not in models]:
        raise ValueError(f"To compare with {unknown[0]!r}, pass it as a model; there are {', '.join(models)}.")
    if reference is not None and not suite.grounded:
        raise ValueError(
            f"--reference says which tokens depend on an image, and suite {suite.name!r} has no task `grounded`: leave it out."
        )


def _check_something_to_measure(suite: Suite, names: Sequence[str], sees: Mapping[str, bool]) -> None:
    """sees: whether each model takes images."""
    if not (any(sees[name] for name in names) or _about_text(suite)):
        raise ValueError(f"Suite {suite.name!r} is about images only, which none of {', '.join(names)} takes.")
    alone = suite.texts or suite.lm_eval.tasks or suite.ifeval is not None or suite.lmms_eval.tasks
    if set(names) == {ORIGINAL} and not alone:
        raise ValueError(
            "Only the original is given, and there is nothing to hold against it: pass --before, --after, or another model."
        )


def _score_all(
    names: Sequence[str],
    load: Callable[[str], Scored],
    suite: Suite,
    items: Any,
    folder: Path,
    fidelity: FidelityRun | None,
    *,
    prints: Mapping[str, str],
    reference: str | None,
    batch_size: int,
    progress: bool,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
    """One model after the other, so that one is in memory. prints: fingerprints of those that are held against the original. -> what was scored,
    the facts of each model and its seconds, all by name."""
    results: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name in names:
        started = time.perf_counter()
        set_seed(suite.seed)
        scored = load(name)
        facts[name] = describe(scored)
        say(f"{name}: {facts[name]['path']} ({facts[name]['parameters'] / 1e6:.0f}M parameters, {scored.kind})")
        asked = suite
        if name == REFERENCE:
            asked = replace(
                suite, texts=(), vision=(), fidelity=(), ifeval=None, lm_eval=HarnessTasks(), lmms_eval=HarnessTasks()
            )
        if fidelity is not None and name == ORIGINAL:
            fidelity.ask(scored, prints)
        results[name] = score(
            scored,
            asked,
            items,
            folder / name,
            fidelity=fidelity if name != REFERENCE else None,
            swaps=name == reference,
            batch_size=batch_size,
            progress=progress,
        )
        seconds[name] = round(time.perf_counter() - started, 1)
        del scored
        release_memory()
    return results, facts, seconds


def _another_original(configs: Mapping[str, Any]) -> str | None:
    """A word where the original cannot be the LM that the VLM was built from: its share of what came back would be of something else."""
    if not {ORIGINAL, "before"} <= configs.keys():
        return None
    of = {name: configs[name].get_text_config() for name in (ORIGINAL, "before")}
    for what, field in (
        ("layers", "num_hidden_layers"),
        ("dimensions of hidden states", "hidden_size"),
        ("key/value heads", "num_key_value_heads"),
    ):
        ours, theirs = (getattr(of[name], field, None) for name in (ORIGINAL, "before"))
        if None not in (ours, theirs) and ours != theirs:
            return (
                f"Note: the original has {ours} {what}, the VLM before {theirs}: it is not the language model that this VLM was built from, and what came "
                "back is not of that one."
            )
    return None


def _about_text(suite: Suite) -> bool:
    return bool(
        suite.texts or suite.lm_eval.tasks or suite.ifeval or any(not task.about_images for task in suite.fidelity)
    )


def _reference(wanted: str | None, sees: Mapping[str, bool]) -> str | None:
    """The model that tells which tokens depend on the image; None if there is none because no model takes images."""
    if wanted is None:
        return "before" if sees.get("before") else next((name for name in sees if sees[name]), None)
    if not sees[wanted]:
        raise ValueError(f"The reference model {wanted!r} takes no images; choose a VLM with --reference.")
    return wanted


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": machine().name,
        "hf_lingudistill": __version__,
    }
    for package in ("transformers", "lm_eval", "lmms_eval"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
