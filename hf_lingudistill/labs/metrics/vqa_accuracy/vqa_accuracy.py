"""The accuracy of the VQA challenge: an `evaluate` module."""

import re
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Ten people answered each question. An answer scores min(1, matches / 3), averaged over all ways to leave one person out
(Antol et al., VQA: Visual Question Answering, ICCV 2015). With a single reference it is exact match. Answers are normalised as
the challenge does: lower case, digits for number words, no articles, no punctuation except in numbers and times of day. Apostrophes
are left out, where the challenge has a list of contractions ("dont" is "don't"). An answer that is an article alone stays, where the
challenge makes it an empty one.
"""

_INPUTS = """
Args:
    predictions: list of n answers.
    references: list of n lists of what people answered, repeats included.
Returns:
    vqa_accuracy: mean over items. scores: list of n, in [0, 1].
"""

_NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}


def normalise(text: str) -> str:
    """The challenge's normal form of an answer."""
    text = " ".join(text.lower().split())
    text = re.sub(
        r"['\u2019]|\.(?!\d)|(?<=\d),(?=\d)", "", text
    )  # "U.S." is "us", "1,000" is "1000", "1.5" and ".5" stay
    text = re.sub(r"""[,;/\[\]"{}()=+\\_\-<>@`?!]""", " ", text)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def score(answer: str, people: list[str]) -> float:
    """min(1, matches / 3), averaged over leaving each person out."""
    answer, people = normalise(answer), [normalise(text) for text in people]
    if len(people) < 2:
        return float(answer in people)
    matches = sum(text == answer for text in people)
    left = [matches - (text == answer) for text in people]
    return sum(min(1.0, count / 3) for count in left) / len(left)


class VqaAccuracy(evaluate.Metric):  # type: ignore[misc]
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        scores = [score(answer, people) for answer, people in zip(predictions, references, strict=True)]
        return {"vqa_accuracy": sum(scores) / len(scores), "scores": scores}
