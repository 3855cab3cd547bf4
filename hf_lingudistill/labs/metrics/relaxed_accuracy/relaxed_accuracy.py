"""Relaxed accuracy, the metric of ChartQA: an `evaluate` module."""

import math
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
A number is right within 5 % of the reference, everything else when it equals the reference but for case (Masry et al., ChartQA,
Findings of ACL 2022). A per cent sign divides by 100; thousands separators and a currency sign are ignored.
"""

_INPUTS = """
Args:
    predictions: list of n answers.
    references: list of n lists of accepted answers.
    tolerance: relative, of numbers.
Returns:
    relaxed_accuracy: mean over items. scores: list of n, 0.0 or 1.0.
"""


def number(text: str) -> float | None:
    """The number that a text is, or None. Words that Python takes for numbers ("nan", "infinity") are words."""
    text = text.strip().rstrip(".").replace(",", "").lstrip("$€£")
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def matches(answer: str, accepted: str, tolerance: float) -> bool:
    """Whether a text is right; a reference of 0 must be hit exactly."""
    left, right = number(answer), number(accepted)
    if left is not None and right is not None:
        return abs(left - right) <= tolerance * abs(right)
    return answer.strip().rstrip(".").lower() == accepted.strip().rstrip(".").lower()


class RelaxedAccuracy(evaluate.Metric):  # type: ignore[misc]
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], tolerance: float = 0.05) -> dict[str, Any]:
        scores = [
            float(any(matches(answer, text, tolerance) for text in accepted))
            for answer, accepted in zip(predictions, references, strict=True)
        ]
        return {"relaxed_accuracy": sum(scores) / len(scores), "scores": scores}
