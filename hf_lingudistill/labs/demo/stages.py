"""The demo's stages: a VLM around the original LM whose image tokens lie near its word embeddings, the drift, and the rows of the cure.

lm, tokenizer = original_lm()
vlm, processor = aligned_vlm(lm, tokenizer, pictures, steps=300)
rows = restoring_rows(original, pictures, story, long=144, short=48)
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from ..evaluation.fidelity import TOLD
from ..evaluation.models import Scored, user_turn
from ..evaluation.reading import Written, write_answers
from ..world.align import align_tower
from ..world.pictures import Picture
from ..world.questions import as_dataset, row_of, sentence
from .models import CHAT_TEMPLATE, build_vlm, load_smollm2
from .story import SIZE, Story, views

PATCH = 16
BATCH = 48  # answers written at once
TEMPERATURE = 0.8  # of the long answers: varied, and still the original's best English


def original_lm() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct of the pip package, and its tokenizer with the template that the VLM reads, too."""
    lm, tokenizer = load_smollm2(offline=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return lm, tokenizer


def aligned_vlm(
    lm: Any, tokenizer: Any, pictures: Sequence[Picture], *, steps: int, batch_size: int, bf16: bool, seed: int
) -> tuple[Any, Any, dict[str, Any]]:
    """A VLM around a copy of the LM, and a tower that was taught to say what it sees in the LM's own embeddings; the LM is as it was.

    -> (vlm, processor, `align_tower`'s record).
    """
    vlm, processor = build_vlm(lm, tokenizer, image_size=SIZE, patch_size=PATCH, seed=seed)
    record = align_tower(vlm, processor, pictures, steps=steps, batch_size=batch_size, bf16=bf16, seed=seed)
    return vlm, processor, record


def keep_eyes(vlm: Any) -> None:
    """Leave tower and connector as they are from here on: what they say, the LM understands."""
    vlm.model.vision_model.requires_grad_(False)
    vlm.model.connector.requires_grad_(False)


def short_rows(pictures: Sequence[Picture], story: Story, n: int, *, seed: int) -> list[dict[str, Any]]:
    """n rows in which a short question is answered with a name: every thing as often, in random order. Never distilled."""
    rng = random.Random(seed)
    shown = [one for _ in range(-(-n // len(pictures))) for one in rng.sample(list(pictures), len(pictures))][:n]
    seen = views(shown, 1, seed=seed)
    return [row_of(rng.choice(story.short_questions), sentence(one.caption), picture=one) for one in seen]


def long_rows(
    original: Scored, pictures: Sequence[Picture], story: Story, n: int, *, max_tokens: int, seed: int
) -> list[dict[str, Any]]:
    """n rows with an instruction about a picture and the original's own answer, which it writes now, told what the picture shows.

    An answer that is cut at max_tokens ends with its last whole sentence; one without any is left out, so there may be fewer rows.
    """
    rng = random.Random(seed)
    asked = [
        (pictures[index % len(pictures)], story.long_instructions[index % len(story.long_instructions)])
        for index in rng.sample(range(len(pictures) * len(story.long_instructions)), n)
    ]
    prompts = [original.render(user_turn(told(one, instruction))) for one, instruction in asked]
    written: list[Written] = []
    for start in range(0, n, BATCH):
        written += write_answers(
            original,
            prompts[start : start + BATCH],
            [()] * len(prompts[start : start + BATCH]),
            max_new_tokens=max_tokens,
            temperature=TEMPERATURE,
            seeds=[seed * 1_000_003 + index for index in range(start, min(start + BATCH, n))],
        )
    rows = []
    for (_, instruction), one, answer in zip(
        asked, views([one for one, _ in asked], 1, seed=seed), written, strict=True
    ):
        text = readable(original, answer)
        if text:
            rows.append(row_of(instruction, text, picture=one, distill=True))
    return rows


def told(picture: Picture, instruction: str) -> str:
    """What the original, which cannot see, reads in place of a picture."""
    return TOLD.format(caption=f"{sentence(picture.caption)}.", instruction=instruction)


def ask(scored: Scored, instruction: str, picture: Picture | None) -> tuple[str, list[Any]]:
    """-> (rendered prompt, images): a VLM is shown the picture, an LM is told its caption."""
    if picture is None:
        return scored.render(user_turn(instruction)), []
    if not scored.sees:
        return scored.render(user_turn(told(picture, instruction))), []
    return scored.render(user_turn(instruction, 1)), [picture.image()]


def readable(scored: Scored, answer: Written, *, open_end: bool = False) -> str:
    """An answer's text. One that was cut at its longest ends with its last whole sentence ("" if there is none), or, with open_end,
    where it was cut, and dots say so."""
    text = str(scored.tokenizer.decode(answer.ids, skip_special_tokens=True)).strip()
    if answer.stopped:
        return text
    if open_end:
        return f"{text} ..."
    # "4." may be the head of a list or half of a number
    ends = [match.end() for match in re.finditer(r"(?<![\s\d])[.!?](?=\s|$)", text)]
    return text[: ends[-1]] if ends else ""


def shuffled(rows: list[dict[str, Any]], *, seed: int) -> Dataset:
    """Rows in random order, as a dataset."""
    rows = copy.copy(rows)
    random.Random(seed).shuffle(rows)
    return as_dataset(rows)
