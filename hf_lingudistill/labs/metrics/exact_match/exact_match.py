"""Exact match after normalising: an `evaluate` module."""

import re
import string
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
1 if the answer equals one of the accepted ones, else 0, after lowering case, joining runs of white space and removing the
punctuation around the whole answer (but not the sign of a number, nor an answer that is punctuation only).
"""

_INPUTS = """
Args:
    predictions: list of n answers.
    references: list of n lists of accepted answers.
Returns:
    exact_match: mean over items. scores: list of n, 0.0 or 1.0.
"""


# Not \W, which would take the vowel signs of Indic scripts for punctuation
_OUTER = string.punctuation + "“”„‘’«»…–—·。，、！？：；（）「」"


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation at either end; the sign of a number, and what is punctuation only, stay."""
    text = " ".join(text.lower().split())
    outer = re.escape(_OUTER)
    return re.sub(rf"^(?:(?!-\d)[{outer}\s])+|[{outer}\s]+$", "", text) or text


class ExactMatch(evaluate.Metric):  # type: ignore[misc]
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
        scores = [
            float(normalise(answer) in {normalise(text) for text in accepted})
            for answer, accepted in zip(predictions, references, strict=True)
        ]
        return {"exact_match": sum(scores) / len(scores), "scores": scores}
