"""`diagnose`: how far a VLM's language model has drifted from the original, and which sharing mode follows from it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from ..._version import __version__
from ...compatibility import check_compatibility
from ...machine import machine
from ...progress import progress_bar
from ...teacher import prepare_teacher, vocabulary_of
from ..evaluation.models import Scored, describe, load_scored, require_template
from ..statistics import Bootstrap, Items
from .measure import READERS, TWICE, Measured, measure
from .prompts import CONDITIONS, Prompts, load_prompts
from .recommend import default_mode, recommend, rule
from .states import STATES
from .weights import weight_drift

Report = dict[str, Any]


def diagnose(
    student: str,
    teacher: str,
    *,
    prompts: Prompts | None = None,
    max_answer_tokens: int = 128,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Measure drift layer by layer and perplexity by sharing mode, and recommend a mode.

    Args:
        student: the VLM, folder or Hub id. teacher: the LM that it was built from.
        prompts: what to measure on, from `load_prompts`; None = the texts and pictures that ship with the package.
        max_answer_tokens: of each answer, the first so many tokens are read.
        dtype: default bf16 on an accelerator that multiplies in it, else fp32.

    Returns the report as plain numbers and strings: `as_text` renders it, `write_report` writes it.

    Raises:
        ValueError: if the pair does not fit (see `check_compatibility`), or a prompt cannot be used.
        UnreadableModelError: if a model cannot be loaded.
    """
    started = time.perf_counter()
    fit = check_compatibility(student, teacher, trust_remote_code=trust_remote_code)
    fit.raise_for_misfit()
    prompts = load_prompts() if prompts is None else prompts
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    require_template("student", student, sees=True, trust_remote_code=trust_remote_code)
    vlm, lm = load_scored("student", student, **options), load_scored("teacher", teacher, **options)
    if prompts.drawn:
        _keep_pictures_whole(vlm)
    facts = {"student": describe(vlm), "teacher": describe(lm)}
    weights = weight_drift(vlm.model, lm.model, fit.shared_vocab_size)
    reader = prepare_teacher(lm.model, vocabulary_of(vlm.model, fit))
    bar = progress_bar(prompts.prompts, desc="Reading prompts", unit="prompt", disable=not progress)
    measured = [measure(vlm, reader, prompt, max_answer_tokens=max_answer_tokens) for prompt in bar]

    bootstrap = Bootstrap(seed=seed)
    items = _items(measured)
    found = recommend(items, drifted=weights.drifted, bootstrap=bootstrap)
    return {
        **facts,
        "prompts": {
            "source": prompts.source,
            "count": {condition: len(part["student"]) for condition, part in items.items()},
        },
        "drifted": weights.drifted,
        "weights": asdict(weights) | {"largest": weights.largest, "ranking": weights.ranking},
        "states": {condition: _states(measured, condition) for condition in items},
        "perplexity": {condition: _perplexity(part, bootstrap) for condition, part in items.items()},
        "language_lost": _language_lost(items, bootstrap),
        "recommendation": asdict(found) | {"rule": rule(default_mode())},
        "settings": {"max_answer_tokens": max_answer_tokens, "resamples": bootstrap.resamples, "seed": seed},
        "machine": _machine(),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _keep_pictures_whole(student: Scored) -> None:
    """Read each picture as one tile: a drawing of 96 pixels has no fine print, and a tile costs the vision tower a pass."""
    processor = student.processing.image_processor
    if hasattr(processor, "do_image_splitting"):
        processor.do_image_splitting = False


def _items(measured: Sequence[Measured]) -> dict[str, dict[str, Items]]:
    """condition -> reader -> {prompt: (nats, tokens)}, of the conditions that have prompts."""
    present = [c for c in CONDITIONS if any(m.condition == c for m in measured)]
    return {
        condition: {
            reader: {m.key: (m.nats[reader], float(m.tokens)) for m in measured if m.condition == condition}
            for reader in (*READERS, *TWICE.values())
        }
        for condition in present
    }


def _states(measured: Sequence[Measured], condition: str) -> dict[str, dict[str, list[float | None]]]:
    """state -> {"distance", "cosine"} by layer, averaged over the positions of all prompts."""
    chosen = [m for m in measured if m.condition == condition]
    weight = torch.tensor([float(m.positions) for m in chosen])
    mean = torch.einsum("n,nlsm->lsm", weight / weight.sum(), torch.stack([m.drift for m in chosen]))

    def by_layer(state: int, measure: int) -> list[float | None]:
        return [None if math.isnan(value) else round(value, 6) for value in mean[:, state, measure].tolist()]

    return {state: {"distance": by_layer(i, 0), "cosine": by_layer(i, 1)} for i, state in enumerate(STATES)}


def _perplexity(items: Mapping[str, Items], bootstrap: Bootstrap) -> dict[str, Any]:
    """reader -> {"value", "low", "high", "n"}, and the number of tokens."""
    found: dict[str, Any] = {"tokens": int(sum(weight for _, weight in items["student"].values()))}
    for reader in (*READERS, *TWICE.values()):
        score = bootstrap.score(items[reader])
        ends = {key: score[key] for key in ("value", "low", "high")}
        # Of few prompts there is no interval, whose ends are infinite: e to the lower one would be a number
        found[reader] = {key: math.exp(end) if math.isfinite(end) else end for key, end in ends.items()} | {
            "n": score["n"]
        }
    return found


def _language_lost(items: Mapping[str, Mapping[str, Items]], bootstrap: Bootstrap) -> dict[str, Any] | None:
    """Nats per token by which the student reads text worse than the original does alone; None if there is no text."""
    text = items.get("text")
    return bootstrap.difference(text["student"], text["none"]) if text else None


def _machine() -> dict[str, Any]:
    return {
        "hf_lingudistill": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        "device": machine().name,
    }
