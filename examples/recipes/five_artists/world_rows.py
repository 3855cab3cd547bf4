"""What is asked and what is answered: the questions of each set, the original's answers, and the training rows of a regime.

All answers are written once (`reproduce.py answers`) and shared by every arm and seed; a seed decides which rows are drawn.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructions import instructions

from hf_lingudistill.labs.demo.models import CHAT_TEMPLATE
from hf_lingudistill.labs.demo.text import language_rows, questions
from hf_lingudistill.labs.evaluation.cache import ItemCache, digest, items_of
from hf_lingudistill.labs.evaluation.fidelity import Question, original_answers
from hf_lingudistill.labs.evaluation.models import Scored
from hf_lingudistill.labs.evaluation.reading import Written
from hf_lingudistill.labs.world.pictures import SEEN, Picture, World
from hf_lingudistill.labs.world.questions import HELD_OUT_INSTRUCTIONS, LONG_INSTRUCTIONS, TOLD, row_of, short_rows
from hf_lingudistill.machine import machine

# In the order in which they are needed: the last two by regime M alone
SETS = ("long", "test_images", "test_texts", "text", "instructions")

# Sources of unseen text instructions; regime M's text rows come from others
TEST_TEXTS = ("truthfulqa", "piqa")
TRAINING_TEXTS = ("openbookqa", "narrativeqa")

# An answer that was cut at its longest must not teach a model to stop there: it is rendered without an end of turn
CUT = "\u22ef"
_END = "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
_PART = (
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
)
TRAINING_TEMPLATE = CHAT_TEMPLATE.replace(
    _PART + _END,
    "{% set text = message['content'] %}{% else %}{% set text = message['content'][0]['text'] %}{% endif %}"
    f"{{% if text.endswith('{CUT}') %}}{{{{ text[:-1] }}}}{{% else %}}"
    "{{ text + '<|im_end|>\\n' }}{% endif %}{% endgeneration %}",
)


@dataclass(frozen=True)
class Told(Question):
    """A question whose caption the original is told in the words that the aligned tower speaks."""

    def told(self, caption: str | None = None) -> str:
        if self.caption is None:
            return self.instruction
        return f"{TOLD.format(caption=self.caption if caption is None else caption)}\n{self.instruction}"


@dataclass(frozen=True)
class Asked:
    """A question and the picture that it is about (None: text alone)."""

    question: Told
    picture: Picture | None = None


def ask(world: World, settings: Mapping[str, Any]) -> dict[str, list[Asked]]:
    """The questions of each set: `long`, `text` and `instructions` are trained on, `test_images` and `test_texts` are not."""
    rng = random.Random(0)
    known = world.pictures(("long",), SEEN)
    # A third of the test pictures show things of each split: answers about what was trained on count no more than others
    shown = [world.pictures((split,), SEEN, one_each=1) for split in ("long", "short", "test")]
    for pictures in shown:
        rng.shuffle(pictures)
    n = settings["test_images"]["n"]
    tested = [pictures[index] for index in range(n) for pictures in shown if index < len(pictures)][:n]
    return {
        "long": [
            about(rng.choice(known), LONG_INSTRUCTIONS[index % len(LONG_INSTRUCTIONS)], f"long-{index}")
            for index in range(settings["long"]["n"])
        ],
        "test_images": [
            about(picture, HELD_OUT_INSTRUCTIONS[index % len(HELD_OUT_INSTRUCTIONS)], f"image-{index}")
            for index, picture in enumerate(tested)
        ],
        "test_texts": texts(TEST_TEXTS, settings["test_texts"]["n"], rng),
        "text": texts(TRAINING_TEXTS, settings["text"]["n"], rng),
        "instructions": [
            Asked(Told(f"instruction-{index}", one))
            for index, one in enumerate(instructions(settings["instructions"]["n"]))
        ],
    }


def about(picture: Picture, instruction: str, key: str) -> Asked:
    return Asked(Told(key, instruction, picture.caption, (picture.image(),)), picture)


def texts(sources: Sequence[str], n: int, rng: random.Random) -> list[Asked]:
    """n different questions, as many from each source; only the questions are used."""
    found = []
    for source in sources:
        asked = sorted({question for question, _ in questions(source)})
        rng.shuffle(asked)
        found += [(source, question) for question in asked[: n // len(sources)]]
    return [Asked(Told(f"{source}-{index}", question)) for index, (source, question) in enumerate(found)]


def write(original: Scored, name: str, asked: Sequence[Asked], settings: Mapping[str, Any], folder: Path) -> None:
    """The original's answers to a set, into folder; what is there is not written again."""
    original_answers(
        original,
        [one.question for one in asked],
        max_new_tokens=settings[name]["max_new_tokens"],
        temperature=settings["temperature"],
        seed={"long": 1, "text": 2, "test_images": 3, "test_texts": 4, "instructions": 5}[name],
        batch_size=256 if machine().accelerated else 32,
        cache=ItemCache(folder / f"{name}.jsonl", _header(name, asked, settings)),
    )


def answers_of(
    name: str, asked: Sequence[Asked], settings: Mapping[str, Any], folder: Path
) -> dict[str, Written] | None:
    """{key: answer} of a set, None if it is not whole. Only reads: another process may be writing."""
    path = folder / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = items_of(lines, _header(name, asked, settings))
    if not all(one.question.key in found for one in asked):
        return None
    return {
        one.question.key: Written(tuple(found[one.question.key]["ids"]), found[one.question.key]["stopped"])
        for one in asked
    }


def _header(name: str, asked: Sequence[Asked], settings: Mapping[str, Any]) -> dict[str, Any]:
    questions = digest([(one.question.key, one.question.told()) for one in asked])
    return {"set": name, "settings": settings[name], "temperature": settings["temperature"], "questions": questions}


def _drawn(rng: random.Random, rows: Sequence[Any], wanted: int) -> list[Any]:
    """So many of the rows in random order; each again only after all of them, where they are fewer.

    Raises:
        ValueError: if there are none to draw from.
    """
    if wanted and not rows:
        raise ValueError(f"{wanted} rows are asked for, and the original has answered no question of that kind.")
    found: list[Any] = []
    while len(found) < wanted:
        found += rng.sample(list(rows), min(wanted - len(found), len(rows)))
    return found


def training_rows(
    world: World,
    long: Sequence[tuple[Asked, str]],
    text: Sequence[tuple[Asked, str]],
    *,
    per_step: Mapping[str, int],
    steps: int,
    seed: int,
    people: bool = False,
    by_length: bool = False,
) -> tuple[list[dict[str, Any]], list[str | None]]:
    """Rows in order, and for each the key of its question if the original wrote its answer. Every step holds `per_step` rows of
    each sort: `short` questions (CE), `long` answers about pictures and `text` (both distilled).

    text: what the original answered to texts. people: the text rows are what people wrote instead. by_length: short rows first within a
        step, so that the parts it is cut into are padded less.
    """
    rng = random.Random(seed + 100)
    short = short_rows(world.pictures(("long", "short"), SEEN), per_step["short"] * steps, seed=seed)
    pool: dict[str, list[tuple[dict[str, Any], str | None]]] = {"short": [(row, None) for row in short]}
    chosen = _drawn(rng, long, per_step["long"] * steps)
    pool["long"] = [
        (row_of(one.question.instruction, answer, picture=one.picture, distill=True), one.question.key)
        for one, answer in chosen
    ]
    wanted = per_step["text"] * steps
    if people:
        pool["text"] = [(row, None) for row in language_rows(wanted, seed=seed + 13)] if wanted else []
    else:
        pool["text"] = [
            (row_of(one.question.instruction, answer, distill=True), one.question.key)
            for one, answer in _drawn(rng, text, wanted)
        ]
    rows: list[dict[str, Any]] = []
    keys: list[str | None] = []
    for step in range(steps):
        of_step = [pair for sort, count in per_step.items() for pair in pool[sort][step * count : (step + 1) * count]]
        rng.shuffle(of_step)
        if by_length:
            of_step.sort(key=lambda pair: sum(len(pair[0][part][0]["content"]) for part in ("prompt", "completion")))
        rows += [row for row, _ in of_step]
        keys += [key for _, key in of_step]
    return rows, keys
