"""Average normalised Levenshtein similarity, the metric of DocVQA: an `evaluate` module."""

from typing import Any

import datasets
import evaluate
from rapidfuzz.distance import Levenshtein

_DESCRIPTION = """
An item scores 1 - d for the accepted answer with the smallest d, where d is the Levenshtein distance over the length of the
longer text; below a similarity of 0.5 it scores 0 (Biten et al., Scene Text Visual Question Answering, ICCV 2019). Case and
outer spaces do not count.
"""

_INPUTS = """
Args:
    predictions: list of n answers.
    references: list of n lists of accepted answers.
    threshold: similarities below it count as 0.
Returns:
    anls: mean over items. scores: list of n, in [0, 1].
"""


def similarity(answer: str, accepted: str) -> float:
    """1 - distance over the longer length, of texts without outer spaces and case."""
    a, b = " ".join(answer.lower().split()), " ".join(accepted.lower().split())
    return float(Levenshtein.normalized_similarity(a, b))


class Anls(evaluate.Metric):  # type: ignore[misc]
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], threshold: float = 0.5) -> dict[str, Any]:
        scores: list[float] = []
        for answer, accepted in zip(predictions, references, strict=True):
            best = max((similarity(answer, text) for text in accepted), default=0.0)
            scores.append(best if best >= threshold else 0.0)
        return {"anls": sum(scores) / len(scores), "scores": scores}
