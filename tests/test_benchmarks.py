"""The benchmarks start: one that nobody runs between two lent machines must not have rotted when one comes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402


@pytest.mark.parametrize("teacher", ["nf4", "none"])
def test_the_gpu_table_measures_every_arm_at_toy_size(teacher: str, tmp_path: Path) -> None:
    sizes = {"length": 96, "image_size": 64, "response": 16, "batch": 1}
    case = {"shape": "toy", "checkpointing": True, "teacher": teacher, **sizes}
    gpu.make_shape("toy", tmp_path, sizes["image_size"])
    found = gpu.measure(case, tmp_path, rounds=1)
    assert set(found["arms"]) == set(gpu.ARMS) and found["teacher_mb"] > 0 and found["before_mb"] > 0
    assert all(arm["seconds"] > 0 and arm["ratio"] > 0 for arm in found["arms"].values())
    assert found["length"] >= 64 + sizes["response"]


def test_the_largest_student_trains_adapters_and_its_own_weights_are_the_vlm_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LORA", ("toy",))
    sizes = {"length": 96, "image_size": 64, "response": 16, "batch": 1}
    gpu.make_shape("toy", tmp_path, sizes["image_size"])
    found = gpu.measure({"shape": "toy", "checkpointing": False, "teacher": "none", **sizes}, tmp_path, rounds=1)
    assert found["before_mb"] == 0 and set(found["arms"]) == set(gpu.ARMS)


def test_every_case_names_a_shape_and_the_table_says_what_did_not_run() -> None:
    assert {case["shape"] for case in gpu.CASES} == set(gpu.SHAPES) - {"toy"}
    result = {"device": "D", "torch": "2", "dtype": "bf16", "tests": {"summary": "none"}}
    case = {**gpu.CASES[0], "failed": "no time left"}
    assert "no time left" in gpu.table({**result, "cases": [case]})
