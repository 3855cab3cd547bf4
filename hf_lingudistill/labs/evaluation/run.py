"""Score any number of models on the same items and say what was lost, what came back, and what it cost.

One model is in memory at a time. Whatever it gives on an item is on disk before the next batch, and a rerun goes on from there.
"""

from __future__ import annotations

import gc
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
from ...machine import machine
from ..statistics import Bootstrap
from .cache import ItemCache, digest
from .data import ImageItem, image_items, text_items
from .grounded import image_tokens, split_scores, token_scores, wins
from .language import bits_per_byte, harness_scores, require_harness
from .models import Scored, chat_template_of, describe, load_scored, read_config, takes_images
from .report import FILES, Task, build_report, write_report
from .suite import GroundedTask, HarnessTasks, Suite, TextTask, VisionTask, load_suite
from .vision import answers, conditions, score_answers

Report = dict[str, Any]

REFERENCE = "reference"  # the name of a reference model that is not among those compared


def evaluate_models(
    models: Mapping[str, str],
    suite: Suite | str,
    output_dir: str | Path,
    *,
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
        models: {name: folder or Hub id}. `original` is the LM that was lost from, `before` the VLM that lost it; every other name
            is compared with both. Columns keep this order.
        suite: a suite, the name of one in the package, or the path of a YAML file.
        output_dir: for the report, and `items/`, the item cache.
        reference: the model whose reaction to exchanged images says which tokens of an answer depend on the image: one of
            `models`, or the folder or Hub id of another VLM; default `before`, or the first VLM. A model that does not know
            the wording finds too many.
        compare: models that all others are compared with, besides `original` and `before`.
        training_log: a `trainer_state.json`, for the plot of training curves.

    Returns the report.

    Raises:
        ValueError, FileNotFoundError: for a suite, a dataset, names or a reference that do not fit, before a model is loaded.
        UnreadableModelError: for a model that cannot be loaded; a config that cannot be read, before the first is.
        ModuleNotFoundError: if the suite has lm-eval tasks and lm-eval is not installed.
        NotOurs: if output_dir holds a file of a name to be written that no evaluation wrote, before a model is loaded.
    """
    suite = load_suite(suite) if isinstance(suite, str) else suite
    out = Path(output_dir)
    check(out, *FILES, by="evaluate")
    if not models:
        raise ValueError("No model to score: pass at least one, as {name: path}.")
    if bad := [name for name in models if name == REFERENCE or not re.fullmatch(r"\w[\w.-]*", name)]:
        raise ValueError(
            f"A model cannot be named {bad[0]!r}: expected letters, digits, '.', '-' and '_', and not {REFERENCE!r}."
        )
    if unknown := [name for name in compare if name not in models]:
        raise ValueError(f"To compare with {unknown[0]!r}, pass it as a model; there are {', '.join(models)}.")
    to_score = dict(models)
    if suite.grounded and reference is not None and reference not in models:
        to_score = {REFERENCE: reference, **to_score}  # an instrument with a folder of its own, and no column
        reference = REFERENCE
    sees = {
        name: takes_images(read_config(name, path, trust_remote_code=trust_remote_code))
        for name, path in to_score.items()
    }
    if suite.grounded:
        reference = _reference(reference, sees)
    if not (any(sees[name] for name in models) or suite.texts or suite.lm_eval.tasks):
        raise ValueError(f"Suite {suite.name!r} is about images only, which none of {', '.join(models)} takes.")
    if suite.lm_eval.tasks:
        require_harness()
    items = _items(suite)

    results: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name, path in to_score.items():
        started = time.perf_counter()
        set_seed(suite.seed)
        scored = load_scored(name, path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        facts[name] = describe(scored)
        say(f"{name}: {facts[name]['path']} ({facts[name]['parameters'] / 1e6:.0f}M parameters, {scored.kind})")
        asked = suite
        if name == REFERENCE:
            asked = replace(suite, texts=(), vision=(), lm_eval=HarnessTasks(), lmms_eval=HarnessTasks())
        results[name] = _score(
            scored,
            asked,
            items,
            out / "items" / name,
            swaps=name == reference,
            batch_size=batch_size,
            progress=progress,
        )
        seconds[name] = round(time.perf_counter() - started, 1)
        del scored
        gc.collect()
        if machine().accelerated:
            torch.accelerator.empty_cache()

    tasks = _join(suite, items, results, list(models), reference)
    report = build_report(
        tasks,
        Bootstrap(resamples=suite.resamples, seed=suite.seed),
        compare=compare,
        suite={"name": suite.name, "seed": suite.seed, "sha256": digest(suite.__dict__)},
        models={name: facts[name] for name in models},
        seconds=seconds,
        config={
            "reference": facts[reference]["path"] if suite.grounded and reference in facts else None,
            "batch_size": batch_size,
        },
        machine=_machine(),
    )
    written = write_report(report, out, training_log=training_log)
    say(f"Report: {written}, with {written.with_suffix('.md').name} and plots beside it")
    return report


def _reference(wanted: str | None, sees: Mapping[str, bool]) -> str | None:
    """The model that tells which tokens depend on the image; None if there is none because no model takes images."""
    if wanted is None:
        return "before" if sees.get("before") else next((name for name in sees if sees[name]), None)
    if not sees[wanted]:
        raise ValueError(f"The reference model {wanted!r} takes no images; choose a VLM with --reference.")
    return wanted


# --------------------------------------------------------------------------------------------------------------------
# Items and scores
# --------------------------------------------------------------------------------------------------------------------
def _items(suite: Suite) -> dict[str, Any]:
    """The items of every task, read before any model is loaded: a wrong column or a missing harness costs seconds."""
    if suite.lmms_eval.tasks:
        from .lmms import find_tasks

        find_tasks(suite.lmms_eval.tasks)
    about_images: tuple[VisionTask | GroundedTask, ...] = (*suite.vision, *suite.grounded)
    items: dict[str, Any] = {task.name: text_items(task, suite.seed) for task in suite.texts}
    return items | {task.name: image_items(task, suite.seed) for task in about_images}


def _score(
    scored: Scored,
    suite: Suite,
    items: Mapping[str, Any],
    folder: Path,
    *,
    swaps: bool,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    """Everything one model gives, by task name."""

    def cache(name: str, task: Any) -> ItemCache:
        header = {
            "model": scored.fingerprint,
            "dtype": str(scored.model.dtype),
            "task": digest([task.__dict__, suite.seed, chat_template_of(scored), _keys(items[task.name])]),
        }
        return ItemCache(folder / f"{name}.jsonl", header)

    def bar(name: str) -> str | None:
        return f"{scored.name}: {name}" if progress else None

    found: dict[str, Any] = {}
    for text in suite.texts:
        for form in text.forms:
            name = f"{text.name}-{form}"
            found[name] = bits_per_byte(
                scored, text, form, items[text.name], cache(name, text), batch_size=batch_size, progress=bar(name)
            )
    if suite.lm_eval.tasks:
        found["lm_eval"] = harness_scores(
            scored, suite.lm_eval, seed=suite.seed, batch_size=batch_size, cache_folder=folder
        )
    if not scored.sees:
        return found
    for question in suite.vision:
        found[question.name] = {}
        for condition, images in conditions(items[question.name], question.controls, suite.seed).items():
            name = f"{question.name}-{condition}"
            given = answers(
                scored,
                question,
                items[question.name],
                images,
                cache(name, question),
                batch_size=batch_size,
                progress=bar(name),
            )
            found[question.name][condition] = score_answers(question, items[question.name], given)
    for grounded in suite.grounded:
        found[grounded.name] = token_scores(
            scored,
            grounded,
            items[grounded.name],
            cache(grounded.name, grounded),
            seed=suite.seed,
            swaps=swaps,
            batch_size=batch_size,
            progress=bar(grounded.name),
        )
    if suite.lmms_eval.tasks:
        from .lmms import lmms_scores

        found["lmms_eval"] = lmms_scores(
            scored, suite.lmms_eval, seed=suite.seed, batch_size=batch_size, cache_folder=folder
        )
    return found


def _keys(items: Any) -> Any:
    """What the items are, for the cache's header: texts by content, images by key and question."""
    if isinstance(items, Mapping):
        return items
    return [(item.key, item.question, item.answers) for item in items]


# --------------------------------------------------------------------------------------------------------------------
# From results by model to tasks with all models
# --------------------------------------------------------------------------------------------------------------------
def _join(
    suite: Suite, items: Mapping[str, Any], everything: Mapping[str, Any], models: list[str], reference: str | None
) -> list[Task]:
    tasks: list[Task] = []
    results = {model: everything[model] for model in models}
    for text in suite.texts:
        tasks += [_text_task(text, form, results) for form in text.forms]
    for harness, group in (("lm_eval", "language"), ("lmms_eval", "vision")):
        tasks += _harness_tasks(harness, group, results)
    for vision in suite.vision:
        tasks.append(_vision_task(vision, results))
    for grounded in suite.grounded:
        tasks += _grounded_tasks(grounded, items[grounded.name], results, everything, str(reference))
    return [task for task in tasks if task.items]


def _text_task(task: TextTask, form: str, results: Mapping[str, Any]) -> Task:
    key = f"{task.name}-{form}"
    return Task(
        name=f"bits_per_byte/{task.name}/{form}",
        group="language",
        title=f"{task.title or task.name}, {form}",
        metric="bits_per_byte",
        unit="bits/byte",
        higher_is_better=False,
        items={model: result[key] for model, result in results.items()},
    )


def _harness_tasks(harness: str, group: str, results: Mapping[str, Any]) -> list[Task]:
    names = list(dict.fromkeys(name for result in results.values() for name in result.get(harness, {})))
    tasks = []
    for name in names:
        found = {model: result[harness][name] for model, result in results.items() if name in result.get(harness, {})}
        first = next(iter(found.values()))
        tasks.append(
            Task(
                name=f"{harness}/{name}",
                group=group,
                title=first["title"],
                metric=first["metric"],
                unit="",
                higher_is_better=first["higher_is_better"],
                items={model: entry["items"] for model, entry in found.items()},
            )
        )
    return tasks


def _vision_task(task: VisionTask, results: Mapping[str, Any]) -> Task:
    seen = {model: result[task.name] for model, result in results.items() if task.name in result}
    return Task(
        name=f"vision/{task.name}",
        group="vision",
        title=task.title or task.name,
        metric=task.metric,
        unit="",
        higher_is_better=True,
        items={model: entry["own"] for model, entry in seen.items()},
        controls={control: {model: entry[control] for model, entry in seen.items()} for control in task.controls},
    )


def _grounded_tasks(
    task: GroundedTask,
    items: list[ImageItem],
    results: Mapping[str, Any],
    everything: Mapping[str, Any],
    reference: str,
) -> list[Task]:
    records = {model: result[task.name] for model, result in results.items() if task.name in result}
    if not records:  # none of the models takes images
        return []
    judge = everything[reference][task.name]
    for model, record in records.items():
        if any(record[item.key]["ids"] != judge[item.key]["ids"] for item in items):
            raise ValueError(
                f"Task {task.name!r}: {model} splits the answers into other tokens than {reference}, so that a split by token "
                "cannot be shared. Score models with one tokenizer together."
            )
    chosen = image_tokens(task, judge)
    split = {model: split_scores(record, chosen) for model, record in records.items()}
    title = task.title or task.name
    tokens = sum(map(len, chosen.values()))
    share = sum(map(sum, chosen.values())) / tokens
    kinds = (
        ("image_accuracy", f"{title}: accuracy on image tokens", "", True),
        ("image_nll", f"{title}: image tokens", "nats/token", False),
        ("rest_nll", f"{title}: other tokens", "nats/token", False),
    )
    tasks = [
        Task(
            name=f"grounded/{task.name}/{measure}",
            group="grounded",
            title=heading,
            metric=measure,
            unit=unit,
            higher_is_better=better,
            items={model: entry[measure]["own"] for model, entry in split.items()},
            controls={
                control: {m: entry[measure][control] for m, entry in split.items()} for control in ("grey", "shuffled")
            },
            notes={"reference": reference, "image_token_share": round(share, 4), "tokens": tokens},
        )
        for measure, heading, unit, better in kinds
    ]
    against = "before" if "before" in records else next(iter(records))
    tasks.append(
        Task(
            name=f"grounded/{task.name}/win_rate",
            group="grounded",
            title=f"{title}: whole answer likelier than under {against}",
            metric="win_rate",
            unit="",
            higher_is_better=True,
            items={model: wins(record, records[against]) for model, record in records.items() if model != against},
            notes={"against": against},
        )
    )
    return tasks


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
