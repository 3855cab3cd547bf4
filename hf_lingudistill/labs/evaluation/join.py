"""From what every model gave to tasks that hold all models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...hub.run_facts import hub_id, public_name
from ..statistics import Items
from .data import ImageItem
from .fidelity import image_measures, text_measures
from .fidelity_run import ORIGINAL
from .grounded import image_tokens, split_scores, wins
from .report import Task
from .scoring import SKIPPED
from .suite import Data, FidelityTask, GroundedTask, IfevalTask, Suite, TextTask, VisionTask

DEPENDS = "depends"  # among the results: which tokens of the original's answers depend on the picture, by task


def join(
    suite: Suite, items: Mapping[str, Any], everything: Mapping[str, Any], models: list[str], reference: str | None
) -> list[Task]:
    """The results of all models, by task of the report. everything: {model: what `score` returned}, and `DEPENDS`."""
    tasks: list[Task] = []
    results = {model: everything[model] for model in models}
    for fidelity in suite.fidelity:
        tasks += _fidelity_tasks(fidelity, results, everything.get(DEPENDS, {}).get(fidelity.name))
    if suite.ifeval is not None:
        tasks += _ifeval_tasks(suite.ifeval, results, skipped=items[SKIPPED])
    for text in suite.texts:
        tasks += [_text_task(text, form, results) for form in text.forms]
    for harness, group in (("lm_eval", "language"), ("lmms_eval", "vision")):
        tasks += _harness_tasks(harness, group, results)
    for vision in suite.vision:
        tasks.append(_vision_task(vision, results))
    for grounded in suite.grounded:
        tasks += _grounded_tasks(grounded, items[grounded.name], results, everything, str(reference))
    return [task for task in tasks if task.items]


def source_of(task: Data) -> dict[str, Any]:
    """Where a task's items came from: {"builtin"}, or {"id": on the Hub, or None, "name", "split"[, "config"]}. Of a folder, the last part."""
    if task.builtin is not None:
        return {"builtin": task.builtin}
    path = str(task.path)
    # A bare name is a loader's (`parquet`, `json`)
    found = {"id": hub_id(path) if "/" in path else None, "name": public_name(path), "split": task.split}
    return found | ({"config": task.config} if task.config else {})


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
        data=source_of(task),
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
                data={"harness": harness},
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
        data=source_of(task),
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
            data=source_of(task),
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
            data=source_of(task),
            notes={"against": against},
        )
    )
    return tasks


def _fidelity_tasks(
    task: FidelityTask, results: Mapping[str, Any], depends: Mapping[str, Sequence[bool]] | None
) -> list[Task]:
    found = {model: result[task.name] for model, result in results.items() if task.name in result}
    if len(found) < 2:  # the original alone
        return []

    def measured(condition: str) -> dict[str, dict[str, Items]]:
        """{measure: {model: Items}}"""
        by_model = {
            model: image_measures(entry[condition], depends)
            if depends is not None
            else text_measures(entry[condition])
            for model, entry in found.items()
        }
        return {
            measure: {model: of[measure] for model, of in by_model.items()}
            for measure in next(iter(by_model.values()))
        }

    own, controls = measured("own"), {control: measured(control) for control in task.controls if depends is not None}
    title, prefix = task.title or task.name, "image" if depends is not None else "text"
    told = "KL to the original told the caption" if depends is not None else "KL to the original"
    headings = {
        "kl": (f"{title}: {told}", "nats/token", False),
        "kl_dependent": (f"{title}: KL, tokens that depend on the picture", "nats/token", False),
        "kl_rest": (f"{title}: KL, other tokens", "nats/token", False),
        "top1": (f"{title}: same most likely token as the original", "", True),
    }
    flags = [flag for row in (depends or {}).values() for flag in row]
    answers = "greedy" if task.temperature == 0 else f"sampled at temperature {task.temperature:g}"
    notes = {
        "answers": f"the original's own, {answers}, at most {task.max_new_tokens} tokens"
        + (", asked in the VLM's chat template" if task.template == "before" else ""),
        "answer_tokens": int(_weight(own["kl"])),
        **({"dependent_share": round(sum(flags) / len(flags), 4)} if flags else {}),
    }
    return [
        Task(
            name=f"fidelity/{task.name}/{prefix}_{measure}",
            group="language" if depends is None else "grounded",
            title=heading,
            metric=f"{prefix}_{measure}",
            unit=unit,
            higher_is_better=better,
            items=own[measure],
            data=source_of(task),
            controls={
                control: {model: items for model, items in of[measure].items() if model != ORIGINAL}
                for control, of in controls.items()
            },
            notes=notes,
        )
        for measure, (heading, unit, better) in headings.items()
        if measure in own and _weight(own[measure])  # every token may depend on the picture
    ]


def _weight(items: Mapping[str, Items]) -> float:
    """Tokens scored; the same for every model."""
    return sum(tokens for _, tokens in next(iter(items.values())).values())


def _ifeval_tasks(task: IfevalTask, results: Mapping[str, Any], *, skipped: int) -> list[Task]:
    title = task.title or "IFEval"
    beside = {
        "share of answers that end by themselves": {m: result[task.name]["stopped"] for m, result in results.items()},
        "tokens per answer": {model: result[task.name]["tokens"] for model, result in results.items()},
    }
    return [
        Task(
            name=f"{task.name}/{measure}",
            group="language",
            title=f"{title}, all instructions followed, {measure}",
            metric=f"ifeval_{measure}",
            unit="",
            higher_is_better=True,
            items={model: result[task.name][measure] for model, result in results.items()},
            data=source_of(task),
            beside=beside if measure == "strict" else {},
            notes={"skipped": skipped, "max_new_tokens": task.max_new_tokens},
        )
        for measure in ("strict", "loose")
    ]
