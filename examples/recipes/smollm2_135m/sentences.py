"""Long answers about easy-VQA images: a description and the answers to two questions, as sentences.

Two sets of wordings that share no template: `train` for the mix, `test` for measuring. What differs between images (color, shape,
what is absent) comes from easy-VQA's annotations; the rest is language.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from hf_lingudistill.labs.demo.vqa import COLORS, SHAPES, annotated_images

REQUESTS = {
    "train": (
        "Describe the picture, then answer: {first} {second}",
        "{first} {second} Please answer in full sentences and say what the image shows.",
        "Look at the image and tell me about it. I also want to know: {first} {second}",
        "Write a few sentences about this image. {first} And {second}",
        "I cannot see the picture. What does it contain? {first} {second}",
    ),
    "test": (
        "Help me picture this drawing in my mind. {first} {second}",
        "A visitor asks two things about this artwork: {first} {second} What would you reply, with a word on the whole?",
        "Give an account of what is in front of you, covering these points: {first} {second}",
    ),
}
QUESTIONS = {
    "train": {
        "color": ("What color is the shape?", "Which color was used?", "Can you name the color?"),
        "shape": ("What shape is it?", "Which shape do you see?", "What is the name of the shape?"),
        "other_shape": ("Is there a {other_shape}?", "Do you also see a {other_shape}?"),
        "other_color": ("Is anything {other_color}?", "Does the image contain something {other_color}?"),
    },
    "test": {
        "color": ("How would you call its color?", "In what color was it painted?"),
        "shape": ("What kind of figure is it?", "How would you call this figure?"),
        "other_shape": ("Could it be a {other_shape}?", "Would you say there is a {other_shape} somewhere?"),
        "other_color": ("Has {other_color} been used at all?", "Would you find any {other_color} in it?"),
    },
}
DESCRIPTIONS = {
    "train": (
        "The picture shows a {color} {shape} on a plain background.",
        "I can see a single {shape}. It is {color}, and there is nothing else in the image.",
        "There is one shape in this image, a {shape}, and its color is {color}.",
        "This is a drawing of a {shape} that has been filled in with {color}.",
        "Somebody has drawn a {color} {shape}. The rest of the picture was left empty.",
        "A {shape} in {color} stands alone in the image.",
        "The image is simple: it has a {color} {shape} and no other objects.",
        "What you have here is a {color} {shape}, drawn without any details around it.",
        "On an even background someone has placed a {shape}, which is {color}.",
        "The image contains a {shape}. Its color is {color} all over.",
    ),
    "test": (
        "Imagine a sheet of paper with nothing on it but a {shape}, and let that {shape} be {color}.",
        "Whoever made this chose {color} paint and left us one {shape}, with plenty of empty space around.",
        "It is a modest composition, only a {shape} whose surface is entirely {color}.",
        "You are looking at a {color} figure, namely a {shape}, that floats in front of a pale ground.",
    ),
}
ANSWERS = {
    "train": {
        "color": (
            "The color is {color}.",
            "It is {color}.",
            "As for the color, the shape is {color}.",
            "They used {color}.",
        ),
        "shape": (
            "The shape is a {shape}.",
            "It is a {shape}.",
            "As for the shape, I see a {shape}.",
            "It is called a {shape}.",
        ),
        "other_shape": (
            "No, there is no {other_shape}, only a {shape}.",
            "There is no {other_shape} in the picture.",
            "I do not see a {other_shape}; the shape is a {shape}.",
        ),
        "other_color": (
            "No, nothing is {other_color}; the shape is {color}.",
            "There is nothing {other_color} in the image.",
            "No, the only color besides the background is {color}.",
        ),
    },
    "test": {
        "color": ("I would call its color {color}.", "It was painted in {color}, as far as one can tell."),
        "shape": (
            "People would know this figure as a {shape}.",
            "In geometry this figure goes by the name of {shape}.",
        ),
        "other_shape": (
            "One could look for a {other_shape} and would find a {shape} in its place.",
            "Hardly a {other_shape}, since everything about it says {shape}.",
        ),
        "other_color": (
            "The painter had no use for {other_color} and worked in {color}.",
            "Not a trace of {other_color}, because {color} fills it completely.",
        ),
    },
}


def answer_rows(images: str, wording: str, n: int, seed: int) -> list[dict[str, Any]]:
    """n of {"path", "question", "answer"}. images: easy-VQA's split. wording: whose templates, `train` or `test`.

    Each image is used once as long as there are enough.
    """
    rng = random.Random(seed)
    known = sorted(annotated_images(images).items())  # type: ignore[arg-type]
    picked = rng.sample(known, n) if n <= len(known) else rng.choices(known, k=n)
    return [_row(path, color, shape, wording, rng) for path, (color, shape) in picked]


def _row(path: Path, color: str, shape: str, wording: str, rng: random.Random) -> dict[str, Any]:
    slots = {
        "color": color,
        "shape": shape,
        "other_color": rng.choice([c for c in COLORS if c != color]),
        "other_shape": rng.choice([s for s in SHAPES if s != shape]),
    }
    asked = rng.sample(sorted(QUESTIONS[wording]), 2)
    first, second = (rng.choice(QUESTIONS[wording][kind]).format(**slots) for kind in asked)
    sentences = [rng.choice(DESCRIPTIONS[wording]), *(rng.choice(ANSWERS[wording][kind]) for kind in asked)]
    return {
        "path": path,
        "question": rng.choice(REQUESTS[wording]).format(first=first, second=second),
        "answer": " ".join(sentences).format(**slots),
    }
