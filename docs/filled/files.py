"""Where the results lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "docs/results/demo/report.json"
FAMILIES = ROOT / "docs/results/families.json"
STEP_COST = ROOT / "benchmarks/results/step_cost.json"
GPU_COST = ROOT / "benchmarks/results/gpu.json"
ON_POLICY_COST = ROOT / "benchmarks/results/on_policy_cost_gpu.json"
PLAN_CHECK = ROOT / "benchmarks/results/plan_check.json"
ANSWERS_ONCE = ROOT / "benchmarks/results/answers_once.json"
RECIPE = ROOT / "examples/recipes/five_artists"
SUMMARY = RECIPE / "results/summary.json"
ON_A_CPU = RECIPE / "results/cpu/summary.json"
LARGER = RECIPE / "results/qwen/cpu/summary.json"
NOT_YET = "Not measured yet: `make reproduce`."


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
