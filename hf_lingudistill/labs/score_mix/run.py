"""`score_mix`: rows of every source are read by student and teacher, and a flag is proposed for each source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ...columns import prepare_dataset
from ...compatibility import UnreadableModelError, check_compatibility
from ...folders import check
from ...identity import digest
from ...mixtures import DistillMixtureConfig, DistillSource
from ...options import DistillOptions
from ...sentences import at_home
from ...sources import load_source
from ...yaml_text import read_yaml
from ..diagnose.prompts import Prompt, prompt_of
from ..evaluation.cache import ItemCache, made_with, of_images
from ..evaluation.models import (
    Scored,
    chat_template_of,
    describe,
    load_scored,
    read_config,
    release_memory,
    require_template,
    takes_images,
)
from ..statistics import Bootstrap, Items
from .measure import Read, Record, as_texts, read_all, student_reader, teacher_reader
from .report import FILES

Report = dict[str, Any]
SCHEMA = "lingudistill-mix/2"  # 2: an image is held against a grey one, not against none


@dataclass(frozen=True)
class Limits:
    """When the teacher should speak. max_dependence: nats per token of the answer that the image is worth, at most. min_language: nats
    per row that the teacher's own distribution leaves open over the answer, at least: what its soft targets can say beyond the labels."""

    max_dependence: float = 0.5
    min_language: float = 10.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number of nats, got {value}.")


@dataclass(frozen=True)
class Source:
    """Rows of one source. unusable: {reason: number} of those that cannot be read. entry: as a recipe names it.
    marked: how many of the rows that were drawn are flagged true in a column of their own; None without one."""

    name: str
    prompts: tuple[Prompt, ...]
    unusable: Mapping[str, int]
    entry: DistillSource
    marked: int | None = None


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------
def read_sources(data: Sequence[str], *, rows: int = 64, split: str = "train", seed: int = 0) -> list[Source]:
    """Draw rows of every source.

    Args:
        data: recipes (`.yaml` with a `datasets:` section, each entry of which is a source), or datasets by file, folder or Hub id.
        rows: of each source, drawn at random. split: of datasets that are not named by a recipe.

    Raises:
        ValueError: if a source cannot be read, or has no row with an answer.
    """
    if rows < 2:
        raise ValueError(f"--rows must be at least 2 per source, got {rows}: an interval needs some.")
    entries = [entry for name in data for entry in _entries(name, split)]
    if not entries:
        raise ValueError("No data: pass a dataset (file, folder or Hub id), or a recipe with a `datasets:` section.")
    names = _names(entries)
    return [_read_source(entry, name, rows, seed) for entry, name in zip(entries, names, strict=True)]


def _entries(name: str, split: str) -> list[DistillSource]:
    if not name.endswith((".yaml", ".yml")):
        return [DistillSource(path=name, split=split)]
    try:
        recipe = at_home(read_yaml(Path(name).read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {name!r} cannot be read: {error}") from error
    if not isinstance(recipe, dict) or not recipe.get("datasets"):
        raise ValueError(f"The recipe {name!r} has no `datasets:` section; expected one that lists its sources.")
    return [
        entry
        for entry in DistillMixtureConfig(datasets=recipe["datasets"]).datasets
        if isinstance(entry, DistillSource)
    ]


def _names(entries: Sequence[DistillSource]) -> list[str]:
    """Short names that tell the sources apart: the configuration, the folder or the file; else with a number."""
    short = []
    for entry in entries:
        files = entry.data_files if isinstance(entry.data_files, str) else None
        short.append(
            entry.name or (Path(files).parent.name if files and "/" in files else "") or Path(str(entry.path)).name
        )
    return [name if short.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(short)]


def _read_source(entry: DistillSource, name: str, rows: int, seed: int) -> Source:
    dataset: Any = prepare_dataset(load_source(entry))  # undecoded, so that a bad image costs its row alone
    drawn = dataset.shuffle(seed=seed).select(range(min(rows, len(dataset))))
    prompts, unusable, first = [], {}, ""  # type: ignore[var-annotated]
    for number, row in enumerate(drawn):
        try:
            prompts.append(prompt_of(row, f"{name}/{number}"))
        except ValueError as error:
            reason = str(getattr(error, "reason", "not usable"))
            unusable[reason] = unusable.get(reason, 0) + 1
            first = first or str(error)
    if not prompts:
        raise ValueError(f"{name}: none of {len(drawn)} rows can be scored. {first or 'It has no rows.'}")
    flags = DistillOptions.distill_column
    own = sum(map(bool, drawn[flags])) if entry.distill is None and flags in dataset.column_names else None
    return Source(name, tuple(prompts), unusable, entry, own)


# --------------------------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------------------------
def score_mix(
    student: str,
    teacher: str,
    sources: Sequence[Source],
    output_dir: str | Path,
    *,
    limits: Limits | None = None,
    max_answer_tokens: int = 256,
    batch_size: int = 4,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Score rows and propose a flag for every source. One model is in memory at a time; a rerun goes on where the last one stopped.

    Args:
        student: the VLM. teacher: its LM; each a folder or Hub id.
        output_dir: for the item cache; `write_report` writes the rest.
        max_answer_tokens: of each answer, the first so many are read.

    Returns the report as plain values.

    Raises:
        UnreadableModelError: for a model that cannot be loaded, or is not what it is passed as.
        NotOurs: if output_dir holds a file of a name to be written that no run of this wrote.
    """
    limits, out = limits or Limits(), Path(output_dir)
    check(out, *FILES, by="score-mix")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    for role, path, sees in (("student", student, True), ("teacher", teacher, False)):
        if takes_images(read_config(role, path, **options)) is not sees:
            raise UnreadableModelError(
                f"{role}: {path!r} is a {'language model that takes no images' if sees else 'vision-language model'}; expected "
                f"{'a vision-language model' if sees else 'the language model that the student was built from'}."
            )
        require_template(role, path, sees=sees, **options)
    check_compatibility(student, teacher, trust_remote_code=trust_remote_code).raise_for_misfit()
    prompts = [prompt for source in sources for prompt in source.prompts]
    options |= {"dtype": dtype, "device": device}

    def read(role: str, path: str, reader: Callable[[Scored, int], Read]) -> tuple[dict[str, Record], dict[str, Any]]:
        scored = load_scored(role, path, **options)
        cache = ItemCache(out / "items" / f"{role}.jsonl", _header(scored, prompts, max_answer_tokens))
        bar = f"{role}: answers" if progress else None
        found = read_all(prompts, reader(scored, max_answer_tokens), cache, batch_size=batch_size, bar=bar)
        facts = describe(scored)
        del scored
        release_memory()
        return found, facts

    seen, student_facts = read("student", student, student_reader)
    told, teacher_facts = read("teacher", teacher, teacher_reader)
    bootstrap = Bootstrap(seed=seed)
    return {
        "schema": SCHEMA,
        "student": student_facts,
        "teacher": teacher_facts,
        "limits": {"max_dependence": limits.max_dependence, "min_language": limits.min_language},
        "settings": {"max_answer_tokens": max_answer_tokens, "seed": seed, "resamples": bootstrap.resamples},
        "sources": [_of_source(source, seen, told, bootstrap, limits) for source in sources],
        "rows": [_of_row(source, prompt, seen, told) for source in sources for prompt in source.prompts],
    }


def _header(scored: Scored, prompts: Sequence[Prompt], max_answer_tokens: int) -> dict[str, Any]:
    rows = [(p.key, as_texts(p.messages), p.answer, of_images(p.images)) for p in prompts]
    return {
        "model": scored.fingerprint,
        "dtype": str(scored.model.dtype),
        "made_with": made_with(scored.model),
        "rows": digest([SCHEMA, chat_template_of(scored), max_answer_tokens, rows]),
    }


def _of_row(source: Source, prompt: Prompt, seen: Mapping[str, Any], told: Mapping[str, Any]) -> Report:
    mine, theirs = seen[prompt.key], told[prompt.key]
    read = len(mine["own"])
    own, blank = sum(mine["own"]), sum(mine["grey"]) if "grey" in mine else None
    return {
        "row": prompt.key,
        "source": source.name,
        "images": len(prompt.images),
        "answer_tokens": mine["tokens"],
        "tokens_read": read,
        "loss": own / read,
        "loss_grey_image": None if blank is None else blank / read,
        "dependence": 0.0 if blank is None else (blank - own) / read,
        "teacher_entropy": theirs["entropy"] / theirs["tokens"],
        "teacher_loss": theirs["nats"] / theirs["tokens"],
        "language": theirs["entropy"],
    }


def _of_source(
    source: Source, seen: Mapping[str, Any], told: Mapping[str, Any], bootstrap: Bootstrap, limits: Limits
) -> Report:
    rows = {prompt.key: _of_row(source, prompt, seen, told) for prompt in source.prompts}

    def score(value: str, weight: str | None) -> dict[str, Any]:
        items: Items = {
            key: (row[value] * (row[weight] if weight else 1), row[weight] if weight else 1)
            for key, row in rows.items()
        }
        return bootstrap.score(items)

    # Of rows with an image: texts beside them depend on none, and would dilute what those do
    pictured = {
        key: (row["dependence"] * row["tokens_read"], row["tokens_read"]) for key, row in rows.items() if row["images"]
    }
    dependence = bootstrap.score(pictured) if pictured else score("dependence", "tokens_read")
    found = {
        "dependence": dependence,  # nats per token
        "language": score("language", None),  # nats per row
        "answer_tokens": score("answer_tokens", None),
        "teacher_entropy": score("teacher_entropy", "tokens_read"),
    }
    depends, language = found["dependence"], found["language"]
    speaks = depends["value"] <= limits.max_dependence and language["value"] >= limits.min_language
    wanted = (depends["high"] <= limits.max_dependence, language["low"] >= limits.min_language)
    against = (depends["low"] > limits.max_dependence, language["high"] < limits.min_language)
    return {
        "name": source.name,
        "n": len(rows),
        "with_image": sum(row["images"] > 0 for row in rows.values()),
        "unusable": dict(source.unusable),
        **found,
        "distill": speaks,
        "sure": all(wanted) if speaks else any(against),
        "marked": source.entry.distill,
        "rows_marked": source.marked,
        "entry": {
            name: value for name, value in vars(source.entry).items() if value is not None and name != "distill"
        },
    }
