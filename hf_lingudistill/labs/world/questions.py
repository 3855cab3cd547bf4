"""What is asked about a picture: short questions with their answers, and instructions for long ones.

Training and tests share no long instruction, nor any sort of it: tests ask for letters, slogans and dialogues.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from ..rows import ROW_FEATURES
from .pictures import Picture

NAMING = ("What is this?", "What does the picture show?", "Name the thing in the picture.")
KINDS = "Is this nature, food, an object, travel or leisure?"

# What the original is told in place of the picture
TOLD = "The picture shows {caption}."

LONG_INSTRUCTIONS = (
    "Describe what you see in the picture.",
    "Describe the thing in the picture to someone who has never seen one.",
    "Give a detailed description of what is shown here.",
    "What does it look like, and what is it like to touch?",
    "Write a short story about what is in the picture.",
    "Tell a bedtime story in which this plays a part.",
    "Begin an adventure story with what you see.",
    "Invent a funny story about this.",
    "Tell me some interesting facts about this.",
    "What should everybody know about what is shown here?",
    "Where in the world would you find this, and why?",
    "Explain the history of what you see.",
    "How does this compare with similar things?",
    "What can people do with what is in the picture?",
    "Give three ideas for using this.",
    "How would you take care of what is shown here?",
    "What could go wrong with this, and how can it be avoided?",
    "Plan an afternoon around what you see in the picture.",
    "Write a short poem about this.",
    "Write four rhyming lines about what is in the picture.",
    "Praise the thing in the picture in the style of a poet.",
    "What feelings or memories could this bring up?",
    "Why might somebody love or hate this?",
    "What would a child ask about this, and what would you answer?",
)

HELD_OUT_INSTRUCTIONS = (
    "Write a letter to a friend in which you mention what the picture shows.",
    "Invent a slogan for this and explain it.",
    "Write a short dialogue between two people who look at this.",
    "Give me advice for drawing this.",
    "Write a newspaper headline about this, and the first lines of the article.",
    "Make up a riddle whose answer is shown here.",
    "Write a diary entry of somebody who came across this today.",
    "List the pros and cons of what you see.",
    "Turn this into a lesson for school.",
    "Write a product review of what is in the picture.",
    "If this could speak, what would it say?",
    "Write a speech in honor of what is shown here.",
)


def sentence(caption: str) -> str:
    """`a hot dog` -> `A hot dog`."""
    return caption[:1].upper() + caption[1:]


def row_of(prompt: str, completion: str, *, picture: Picture | None = None, distill: bool = False) -> dict[str, Any]:
    """One row of `ROW_FEATURES`."""
    return {
        "images": [] if picture is None else [{"bytes": picture.png(), "path": None}],
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
        "distill": distill,
    }


def as_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """Rows of `row_of` as a dataset."""
    return Dataset.from_list(rows, features=ROW_FEATURES)


def naming_rows(pictures: Sequence[Picture], question: str = NAMING[0]) -> list[dict[str, Any]]:
    """One row for each picture, in order: "What is this?", and its caption."""
    return [row_of(question, sentence(one.caption), picture=one) for one in pictures]


def yes_no_rows(pictures: Sequence[Picture], *, seed: int) -> list[dict[str, Any]]:
    """Two rows for each picture, in order: "Is this CAPTION?" with its own caption (Yes) and with another's (No).

    Whoever ignores the picture is right half of the time.

    Raises:
        ValueError: if all pictures have the same caption.
    """
    rng = random.Random(seed)
    captions = sorted({one.caption for one in pictures})
    if len(captions) < 2:
        raise ValueError("Yes/no questions need pictures with at least two captions.")
    rows = []
    for one in pictures:
        other = one.caption
        while other == one.caption:
            other = rng.choice(captions)
        rows.append(row_of(f"Is this {one.caption}?", "Yes", picture=one))
        rows.append(row_of(f"Is this {other}?", "No", picture=one))
    return rows


def short_rows(pictures: Sequence[Picture], n: int, *, seed: int) -> list[dict[str, Any]]:
    """n short questions in random order: three in five ask for the name, one in five yes or no (as often), one in five the kind,
    or the name where nobody said what kind."""
    rng = random.Random(seed)
    captions = sorted({one.caption for one in pictures})
    rows = []
    for index in range(n):
        one, sort = rng.choice(pictures), index % 10
        if sort in (3, 8) and len(captions) > 1:
            asked = one.caption
            while sort == 8 and asked == one.caption:
                asked = rng.choice(captions)
            rows.append(row_of(f"Is this {asked}?", "Yes" if sort == 3 else "No", picture=one))
        elif sort in (1, 6) and one.kind is not None:
            rows.append(row_of(KINDS, sentence(one.kind), picture=one))
        else:
            rows.append(row_of(rng.choice(NAMING), sentence(one.caption), picture=one))
    rng.shuffle(rows)
    return rows
