"""lm-eval tasks on data that installs with pip: the same harness and scoring, no Hub.

`LOCAL_TASKS` maps a name to a function that builds the task's configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from datasets import Dataset, DatasetDict


def _multiple_choice(source: str) -> list[dict[str, Any]]:
    """Questions with lettered options -> question, choices (texts without their letters), gold (index)."""
    from ..demo.text import records

    rows = []
    for record in records(source):
        options = [line.strip() for line in record["options"].split("\n") if line.strip()]
        if record["answer"] not in options:
            continue
        choices = [re.sub(r"^[A-Z]\.\s*", "", option) for option in options]
        rows.append(
            {"question": record["question"].strip(), "choices": choices, "gold": options.index(record["answer"])}
        )
    return rows


def _commonsenseqa(**_: Any) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_list(_multiple_choice("commonsenseqa"))})


def _task(name: str, dataset: Callable[..., DatasetDict]) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    }


LOCAL_TASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "commonsenseqa_local": lambda: _task("commonsenseqa_local", _commonsenseqa),
}
