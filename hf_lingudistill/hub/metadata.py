"""The metadata of a card, and its scores as the Hub reads them. No network; validated with huggingface_hub's own classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from .escape import plain, repo_or_none
from .results import Facts, Task, tasks_of

TAGS = ("lingudistill", "trl", "sft", "distillation")
TAGS_ON_POLICY = ("lingudistill", "trl", "on-policy", "distillation")

# Datasets on the Hub that built-in tasks and those of lm-eval and lmms-eval are made of, for the card's `model-index`. Each id was found
# in public code that loads it (November 2026); none was asked of the Hub itself.
HUB_DATASETS = {
    "xsum": "EdinburghNLP/xsum",
    "imdb": "stanfordnlp/imdb",
    "pubmedqa": "qiaojin/PubMedQA",
    "wikitext": "Salesforce/wikitext",
    "lambada": "EleutherAI/lambada_openai",
    "hellaswag": "Rowan/hellaswag",
    "arc_easy": "allenai/ai2_arc",
    "arc_challenge": "allenai/ai2_arc",
    "scienceqa": "lmms-lab/ScienceQA",
    "docvqa_val": "lmms-lab/DocVQA",
    "mmstar": "Lin-Chen/MMStar",
    "commonsenseqa_local": "tau/commonsense_qa",
}

# {task: (dataset, task id, items)} for `.eval_results`, which the Hub shows on the dataset's leaderboard: it takes datasets that are
# registered as benchmarks, by the task ids of their own `eval.yaml`, in percent. From the Hub's documentation and its published
# examples; a benchmark whose id or scale they leave open is not here. Bits per byte on a few texts of XSum is no score on XSum.
BENCHMARKS = {"gsm8k": ("openai/gsm8k", "gsm8k", 1319)}


def card_data(
    run_facts: Facts,
    report: Facts,
    *,
    name: str,
    base_model: str | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
    main: str | None = None,
    adapter: bool = False,
) -> ModelCardData:
    """The card's metadata block. The teacher is a tag: a second `base_model` would read as a merge."""
    student, teacher = run_facts.get("student") or {}, run_facts.get("teacher") or {}
    base = repo_or_none(base_model or student.get("id"))
    teacher_id = repo_or_none(teacher.get("id"))
    datasets = [identity for fact in run_facts.get("datasets") or [] if (identity := repo_or_none(fact.get("id")))]
    code, licence_name, licence_link = licence_of(student, license)
    all_tags = [
        *(TAGS_ON_POLICY if run_facts.get("sampling") else TAGS),
        *([f"teacher:{teacher_id}"] if teacher_id else []),
        *tags,
    ]
    results = eval_results(tasks_of(report, main))
    extra: dict[str, Any] = {"base_model_relation": "adapter" if adapter else "finetune"} if base else {}
    return ModelCardData(
        base_model=base,
        datasets=list(dict.fromkeys(datasets)) or None,
        language=_languages(student.get("language")),
        library_name="peft" if adapter else "transformers",
        license=code,
        license_name=licence_name,
        license_link=licence_link,
        pipeline_tag="image-text-to-text",
        tags=[tag for tag in all_tags if re.fullmatch(r"[\w.:/-]{1,120}", tag)],
        model_name=plain(name, 96) if results else None,
        eval_results=results or None,
        **extra,
    )


def licence_of(student: Facts, chosen: str | None = None) -> tuple[str | None, str | None, str | None]:
    """(licence code, name, link): the chosen one, else the base model's. Names and links go with `other` alone."""
    code = chosen or student.get("license")
    if not isinstance(code, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,60}", code):
        return None, None, None
    if chosen or code != "other":
        return code, None, None
    name, link = student.get("license_name"), student.get("license_link")
    named = isinstance(name, str) and re.fullmatch(r"[\w.-]{1,60}", name)
    linked = isinstance(link, str) and re.fullmatch(r"https://[\w./%#?=&~+-]{1,200}", link)
    return code, name if named else None, link if linked else None


def _languages(found: Any) -> list[str] | None:
    codes = [found] if isinstance(found, str) else list(found or [])
    known = [code for code in codes if isinstance(code, str) and re.fullmatch(r"[a-z]{2,3}|code|multilingual", code)]
    return known or None


def eval_results(tasks: Sequence[Task]) -> list[EvalResult]:
    """This model's scores for the card's `model-index`, one per task."""
    places = {id(task): _place(task) for task in tasks}
    shared = {place for place in places.values() if list(places.values()).count(place) > 1}
    return [
        EvalResult(
            task_type="image-text-to-text" if task.group in ("vision", "grounded") else "text-generation",
            dataset_type=dataset_of(task),
            dataset_name=plain(task.title, 120),
            # The Hub takes entries of one place for one: two tasks on the same data are told apart
            dataset_config=_joined(places[id(task)][1], _slug(task) if places[id(task)] in shared else None),
            dataset_split=places[id(task)][2],
            metric_type=identifier(task.metric),
            metric_name=plain(task.unit or task.metric, 60),
            metric_value=task.scores["after"].value,
            metric_args=_interval(task),
        )
        for task in tasks
    ]


def _place(task: Task) -> tuple[str, str | None, str | None]:
    """(dataset, configuration, split) of a task's data."""
    config, split = (task.data.get(key) for key in ("config", "split"))
    named = _joined(identifier(config) if isinstance(config, str) else None, _form(task))
    return dataset_of(task), named, identifier(split) if isinstance(split, str) else None


def _joined(*words: str | None) -> str | None:
    return " ".join(filter(None, words)) or None


def eval_result_file(tasks: Sequence[Task], *, date: str | None = None) -> str | None:
    """`.eval_results/lingudistill.yaml`: accuracies on the whole of a registered benchmark. None if there are none.

    date: ISO 8601; left out, the Hub takes the commit's.
    """
    entries = []
    for task in tasks:
        dataset, identity, items = BENCHMARKS.get(_slug(task), (None, None, None))
        ours = task.data.get("harness") is not None or task.data.get("id") == dataset
        if dataset and identity and ours and task.n == items and task.higher_is_better:
            value, notes = 100 * task.scores["after"].value, f"{plain(task.metric, 60)}, hf_lingudistill"
            entries.append(EvalResultEntry(dataset_id=dataset, task_id=identity, value=value, date=date, notes=notes))
    return yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None


def dataset_of(task: Task) -> str:
    """The dataset on the Hub that the report says the items came from; else the task's name, which its user chose."""
    if identity := repo_or_none(task.data.get("id")):
        return identity
    known = task.data.get("builtin") or (_slug(task) if task.data.get("harness") else None)
    return HUB_DATASETS.get(str(known), _slug(task))


def _slug(task: Task) -> str:
    """The name of a task: the second part of names such as `bits_per_byte/xsum/plain`."""
    parts = [part for part in task.name.split("/") if part]
    return identifier(parts[1] if len(parts) > 1 else parts[0] if parts else task.title)


def _form(task: Task) -> str | None:
    """How the data is used: the third part of `bits_per_byte/xsum/plain`."""
    parts = [part for part in task.name.split("/") if part]
    return identifier(parts[2]) if len(parts) > 2 else None


def identifier(text: str) -> str:
    """A name of small letters, digits and underscores, at most 80 of them."""
    return re.sub(r"[^a-z0-9_]+", "_", text.lower()).strip("_")[:80] or "unnamed"


def _interval(task: Task) -> dict[str, Any] | None:
    after = task.scores["after"]
    known = {"low95": after.low, "high95": after.high, "items": task.n}
    return {name: value for name, value in known.items() if value is not None} or None
