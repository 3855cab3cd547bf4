"""The table of all families (`make families`): complete, without a fault, and still true of a sample."""

from __future__ import annotations

import json
from typing import Any

import all_families
import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

RESULTS = json.loads(all_families.RESULTS.read_text())
ROWS = {row["type"]: row for row in RESULTS["families"]}


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, in words: a fit that does not compute what it should, or does not reach its end."""
    found = []
    if row["stage"] != "done" and row.get("fits") is not False:
        found.append(f"stops at {row['stage']}: {row['note']}")
    if row["stage"] == "done":
        if (
            row.get("same_error", 0.0) > all_families.ROUNDING
            or row.get("reference_error", 0.0) > all_families.ROUNDING
        ):
            found.append("errors beyond rounding")
        if "same_error" not in row and "reference_error" not in row:
            found.append("nothing was measured")
        if min(row["control"], row.get("modes_differ", 1.0)) <= 10 * all_families.ROUNDING:
            found.append("a control that did not move")
    return found


def test_the_table_knows_every_class_and_shows_no_fault() -> None:
    if RESULTS["transformers"] != transformers.__version__:
        pytest.skip(f"the table was made with transformers {RESULTS['transformers']}")
    assert ROWS.keys() == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    assert {name: found for name, row in ROWS.items() if (found := faults(row))} == {}
    assert sum(row["stage"] == "done" for row in ROWS.values()) > 60
    assert all(row["note"] for row in ROWS.values() if row["stage"] != "done")
    lines = all_families.RESULTS.read_text().splitlines()
    assert len(lines) == len(ROWS) + 2 and max(map(len, lines)) < 1200  # one line for each


def test_a_fault_is_seen() -> None:
    """Control of the test above."""
    good = ROWS["llava"]
    assert faults(good) == []
    for spoilt in ({"same_error": 25.0}, {"reference_error": 25.0}, {"control": 0.0}, {"modes_differ": 0.0}):
        assert len(faults(good | spoilt)) == 1
    for stage in ("build", "step", "reload", "died"):
        assert len(faults(good | {"stage": stage, "note": "why"})) == 1
    refused = ROWS["blip-2"]
    assert faults(refused) == [] and len(faults({k: v for k, v in refused.items() if k != "fits"})) == 1


@pytest.mark.parametrize("name", ["llava_next", "glm4v", "paddleocr_vl", "blip-2", "lfm2_vl"])
def test_the_table_is_still_true_of_a_sample(name: str) -> None:
    if name not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        pytest.skip("transformers does not know it")
    row = all_families.apart(name)
    assert faults(row) == []
    same = ("stage", "fits", "lm", "images")
    assert {key: row.get(key) for key in same} == {key: ROWS[name].get(key) for key in same}


@pytest.mark.slow
def test_the_table_is_still_true_of_all() -> None:
    wrong = {}
    for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        row = all_families.apart(name)
        if faults(row) or row["stage"] != ROWS.get(name, row)["stage"]:
            wrong[name] = row
    assert wrong == {}
