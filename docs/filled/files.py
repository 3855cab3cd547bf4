"""Where the results lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "docs/results/demo/report.json"
FAMILIES = ROOT / "docs/results/families.json"
STEP_COST = ROOT / "benchmarks/results/step_cost.json"
# The newest first. The H100's `vision_before` ran the VLM before over whole rows; since 2026-11-27 it stops at the last image token.
GPU_COSTS = (ROOT / "benchmarks/results/gpu_h200.json", ROOT / "benchmarks/results/gpu.json")
ON_POLICY_COST = ROOT / "benchmarks/results/on_policy_cost_gpu.json"
PLAN_CHECK = ROOT / "benchmarks/results/plan_check.json"
ANSWERS_ONCE = ROOT / "benchmarks/results/answers_once.json"
RECIPE = ROOT / "examples/recipes/five_artists"
SUMMARY = RECIPE / "results/summary.json"
ON_A_CPU = RECIPE / "results/cpu/summary.json"
LARGER = RECIPE / "results/qwen/summary.json"
LARGER_ON_A_CPU = RECIPE / "results/qwen/cpu/summary.json"
NOT_YET = "Not measured yet: `make reproduce`."


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gpu_cases() -> list[tuple[str, dict[str, Any]]]:
    """(GPU, case) of all that `benchmarks/gpu.py` has measured."""
    results = map(read, GPU_COSTS)
    return [(found["device"].split(" ")[1], case) for found in results for case in found["cases"] if "arms" in case]
