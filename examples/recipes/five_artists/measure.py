"""What an arm is measured on. Everything is held out: other instructions, other texts; things of all three splits.

text_kl, text_top1            KL(original || model) per token, agreement, on the original's answers to unseen text instructions
image_kl, _dependent, _rest   KL(original told the caption || model shown the picture), all tokens, those that depend on the picture
bits_per_byte                 of running text of four sources that no arm trains on
naming_seen, naming_new       "What is this?", exact, by artists that were trained on and by the fifth
naming_exchanged              the same about another thing's picture (control)
yes_no                        balanced questions, half of them right by chance
tokens_, ended_               length of its own greedy answers in tokens, and the share that it ended itself, asked the unseen instructions
                              (`text`), those about pictures (`long`; the original is told the caption) and for names (`short`)
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from world_rows import Asked, answers_of

from hf_lingudistill.labs.demo.measure import text_perplexity, what_accuracy
from hf_lingudistill.labs.demo.text import UNSEEN_SOURCES, passages
from hf_lingudistill.labs.evaluation.cache import ItemCache
from hf_lingudistill.labs.evaluation.fidelity import (
    Reference,
    dependence,
    fidelity,
    image_measures,
    text_measures,
)
from hf_lingudistill.labs.evaluation.models import Scored, load_scored, user_turn
from hf_lingudistill.labs.evaluation.reading import write_answers
from hf_lingudistill.labs.statistics import Bootstrap
from hf_lingudistill.labs.world.pictures import SEEN, UNSEEN, World
from hf_lingudistill.labs.world.questions import NAMING, as_dataset, naming_rows, yes_no_rows
from hf_lingudistill.machine import machine

SORTS = {"text": "test_texts", "long": "test_images"}  # whose instructions are held out


def precision() -> torch.dtype:
    """fp32 on a GPU; on a CPU that multiplies in bf16 that: a KL moves by what the row `original` shows, else zero."""
    return torch.bfloat16 if machine().bf16 and not machine().accelerated else torch.float32


class Measures:
    """The references, read once, and every measure of a model."""

    def __init__(
        self,
        world: World,
        sets: Mapping[str, Sequence[Asked]],
        settings: Mapping[str, Any],
        original: Path,
        answers: Path,
        sizes: Mapping[str, int],
        names: Sequence[str] = ("test_texts", "test_images"),
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """dtype: of the original that all are held against, whatever they are measured in; fp32 unless it is too large for that."""
        self.world, self.sizes, self.sets = world, sizes, sets
        scored = load_scored("original", str(original), dtype=dtype)
        self.references = {}
        for name in names:
            written = answers_of(name, sets[name], settings, answers)
            if written is None:
                raise RuntimeError(f"{answers / name}.jsonl is not whole: run `reproduce.py answers` first.")
            asked = [one.question for one in sets[name]][: sizes[name]]
            self.references[name] = Reference.of(scored, asked, written)
        self.depends = dependence(self.references["test_images"], scored)

    def of(
        self, path: Path, *, ifeval: Mapping[str, int] | None = None, lengths: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """Every measure of the model in this folder: {name: value}, and bootstrap half-widths in "half".

        ifeval, lengths: number of `prompts` and `max_new_tokens`; None leaves out what takes long.
        """
        scored: Scored = load_scored(path.name, str(path), dtype=precision())
        bootstrap = Bootstrap(resamples=1000)
        found: dict[str, Any] = {"half": {}}

        def keep(name: str, items: Any) -> None:
            score = bootstrap.score(items)
            found[name] = round(score["value"], 5)
            half = (score["high"] - score["low"]) / 2
            found["half"][name] = round(half, 5) if math.isfinite(half) else None  # of a few items

        text = text_measures(fidelity(self.references["test_texts"], scored, batch_size=16))
        keep("text_kl", text["kl"])
        keep("text_top1", text["top1"])
        if scored.sees:
            images = image_measures(fidelity(self.references["test_images"], scored, batch_size=16), self.depends)
            for name, own in (
                ("image_kl", "kl"),
                ("image_kl_dependent", "kl_dependent"),
                ("image_kl_rest", "kl_rest"),
            ):
                keep(name, {key: value for key, value in images[own].items() if value[1] > 0})
        nats: dict[str, float] = {}
        for source in UNSEEN_SOURCES:
            sample = random.Random(0).sample(passages(source), self.sizes["passages"])
            cut = [" ".join(text.split(" ")[:110]) for text in sample]
            result = text_perplexity(scored.model, scored.processing, cut, max_tokens=150)
            nats[source] = round(result["bits_per_byte"], 5)
        found["bits_per_byte"] = round(sum(nats.values()) / len(nats), 5)
        found["bits_per_byte_by_source"] = nats
        if scored.sees:
            found |= self._vision(scored)
        if lengths is not None:
            found |= self._lengths(scored, lengths)
        if ifeval is not None:
            for name, items in _ifeval(scored, ifeval).items():
                keep(f"ifeval_{name}", items)
            found["ifeval_prompts"] = ifeval["prompts"]
        return found

    def _lengths(self, scored: Scored, settings: Mapping[str, int]) -> dict[str, float]:
        n = settings["prompts"]
        shown = random.Random(3).sample(self.world.pictures(artists=SEEN), n)
        asked = {name: [one.question for one in self.sets[of]] for name, of in SORTS.items()}
        prompts: dict[str, list[tuple[str, tuple[Any, ...]]]] = {
            "text": [(question.told(), ()) for question in asked["text"][:n]],
            "long": [
                (question.instruction, question.images) if scored.sees else (question.told(), ())
                for question in asked["long"][:n]
            ],
            "short": [(NAMING[0], (picture.image(),)) for picture in shown] if scored.sees else [],
        }
        found = {}
        for sort, pairs in prompts.items():
            written = []
            for start in range(0, len(pairs), 20):
                batch = pairs[start : start + 20]
                written += write_answers(
                    scored,
                    [scored.render(user_turn(text, len(images))) for text, images in batch],
                    [images for _, images in batch],
                    max_new_tokens=settings["max_new_tokens"],
                )
            if written:
                found[f"tokens_{sort}"] = round(sum(len(one.ids) for one in written) / len(written), 2)
                found[f"ended_{sort}"] = round(sum(one.stopped for one in written) / len(written), 4)
        return found

    def _vision(self, scored: Scored) -> dict[str, float]:
        rng = random.Random(2)
        seen, new = (
            rng.sample(found, min(self.sizes["naming"], len(found)))
            for found in (
                self.world.pictures(artists=by, one_each=self.sizes.get("one_each")) for by in (SEEN, UNSEEN)
            )
        )
        some = seen[: self.sizes["yes_no"]]
        naming = as_dataset(naming_rows(seen))
        exchanged = naming.select(range(min(self.sizes["exchanged"], len(naming))))
        ask = {"batch_size": 256 if machine().accelerated else 32}
        return {
            "naming_seen": what_accuracy(scored.model, scored.processing, naming, **ask)["accuracy"],
            "naming_new": what_accuracy(scored.model, scored.processing, as_dataset(naming_rows(new)), **ask)[
                "accuracy"
            ],
            "naming_exchanged": what_accuracy(scored.model, scored.processing, exchanged, shuffled=True, **ask)[
                "accuracy"
            ],
            "yes_no": what_accuracy(scored.model, scored.processing, as_dataset(yes_no_rows(some, seed=0)), **ask)[
                "accuracy"
            ],
        }


def ifeval_prompts(settings: Mapping[str, int]) -> tuple[Any, list[Any]]:
    """The task, and its prompts. Raises ModuleNotFoundError where a package of theirs is missing."""
    from hf_lingudistill.labs.evaluation.ifeval import checkable, read_prompts
    from hf_lingudistill.labs.evaluation.suite import IfevalTask

    task = IfevalTask(limit=settings["prompts"], max_new_tokens=settings["max_new_tokens"])
    prompts = checkable(read_prompts(task))
    if settings["prompts"] < len(prompts):
        prompts = random.Random(0).sample(prompts, settings["prompts"])
    return task, prompts


def _ifeval(scored: Scored, settings: Mapping[str, int]) -> dict[str, Any]:
    """Strict, loose, stopped and length, on prompts drawn once for all models."""
    from hf_lingudistill.labs.evaluation.ifeval import ifeval_scores

    task, prompts = ifeval_prompts(settings)
    with tempfile.TemporaryDirectory() as scratch:
        cache = ItemCache(Path(scratch) / "ifeval.jsonl", {"model": scored.fingerprint})
        return ifeval_scores(scored, task, prompts, cache, batch_size=250 if machine().accelerated else 20)
