"""lm-eval tasks that lm-eval does not ship: the same harness and scoring.

`OWN_TASKS` maps a name to a function that builds the task's configuration. Those that end in `_local` take data that installs with
pip; the others need the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from datasets import Dataset, DatasetDict, Image, load_dataset

QUESTION = "Question: {{question}}\nAnswer:"
WITH_HINT = "{% if hint %}Context: {{hint}}\n{% endif %}" + QUESTION
SCIENCEQA = "derek-thomas/ScienceQA"


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


def _scienceqa(**_: Any) -> DatasetDict:
    """The test questions that have no image, with the hint where there is one (arXiv 2209.09513)."""
    rows = load_dataset(SCIENCEQA, split="test").cast_column("image", Image(decode=False))
    rows = rows.filter(lambda image: image is None, input_columns="image")
    return DatasetDict(
        {"test": rows.select_columns(["question", "choices", "answer", "hint"]).rename_column("answer", "gold")}
    )


def _task(name: str, dataset: Callable[..., DatasetDict], prompt: str = QUESTION) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": prompt,
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    }


OWN_TASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "commonsenseqa_local": lambda: _task("commonsenseqa_local", _commonsenseqa),
    "scienceqa_text": lambda: _task("scienceqa_text", _scienceqa, WITH_HINT),
}
