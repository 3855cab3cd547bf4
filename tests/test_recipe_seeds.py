"""The recipe's summary over seeds: means, paired differences and their intervals."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scipy import stats

RECIPE = Path(__file__).resolve().parents[1] / "examples/recipes/smollm2_135m"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def seeds() -> ModuleType:
    return load("seeds")


def run(drift: str, seed: int, arms: dict[str, float]) -> dict[str, Any]:
    """A report in which an arm's bits are 1 and 3 times a number, and everything else the number."""

    def task(metric: str, times: float = 1.0, texts: bool = False) -> dict[str, Any]:
        seeing = {arm: value for arm, value in arms.items() if texts or arm != "original"}
        shares = {arm: {"value": value * times} for arm, value in arms.items() if arm not in ("original", "before")}
        return {
            "metric": metric,
            "scores": {arm: {"value": value * times} for arm, value in seeing.items()},
            "recovered": shares if texts else {},
        }

    tasks = [task("bits_per_byte", 1.0, texts=True), task("bits_per_byte", 3.0, texts=True)]
    tasks += [task(metric) for metric in ("exact_match", "image_accuracy", "image_nll", "rest_nll")]
    return {"drift": drift, "seed": seed, "models": dict.fromkeys(arms), "tasks": tasks}


@pytest.mark.parametrize("values", [[0.1, 0.4], [1.0, 2.0, 4.5], [3.0, 3.0, 3.0, 3.5, 2.0]])
def test_the_interval_is_students(seeds: ModuleType, values: list[float]) -> None:
    found = seeds.spread(dict(enumerate(values)))
    low, high = stats.t.interval(0.95, len(values) - 1, loc=found["mean"], scale=stats.sem(values))
    assert found["mean"] == pytest.approx(sum(values) / len(values))
    assert found["half"] == pytest.approx((high - low) / 2, rel=1e-3)


def test_one_seed_has_no_interval_and_equal_ones_none_to_speak_of(seeds: ModuleType) -> None:
    assert seeds.spread({4: 0.5}) == {"values": {"4": 0.5}, "mean": 0.5, "half": None}
    assert seeds.spread({0: 0.5, 1: 0.5})["half"] == 0.0


def test_differences_are_taken_within_a_seed(seeds: ModuleType) -> None:
    """Seeds that scatter together leave a small interval of the difference; a seed that one arm lacks is no part of it."""
    reports = [
        run("severe", 0, {"original": 0.5, "before": 4.0, "ce": 1.0, "prompt": 0.9}),
        run("severe", 1, {"original": 0.5, "before": 4.0, "ce": 2.0, "prompt": 1.9}),
        run("severe", 2, {"original": 0.5, "before": 4.0, "ce": 9.0}),
        run("mild", 0, {"original": 0.5, "before": 4.0, "prompt": 0.7}),
    ]
    found = seeds.summarise(reports, ["ce", "prompt", "never_run"])
    assert list(found) == ["severe", "mild"] and found["severe"]["seeds"] == [0, 1, 2]
    severe = found["severe"]
    assert severe["arms"]["ce"]["bits_per_byte"]["values"] == {"0": 2.0, "1": 4.0, "2": 18.0}  # the mean of 1x and 3x
    assert severe["arms"]["ce"]["recovered_worst"]["values"] == {
        "0": 1.0,
        "1": 2.0,
        "2": 9.0,
    }  # the smaller of the two
    difference = severe["differences"]["prompt"]["ce"]["image_nll"]
    assert difference["values"] == pytest.approx({"0": -0.1, "1": -0.1})
    assert difference["half"] < 1e-12 and severe["arms"]["ce"]["image_nll"]["half"] > 1.0
    assert "questions" not in severe["arms"]["original"] and "never_run" not in severe["arms"]
    assert "recovered" not in severe["arms"]["before"]
    assert "ce" not in found["mild"]["arms"] and found["mild"]["arms"]["prompt"]["image_nll"]["half"] is None


def test_the_picture_of_a_summary(seeds: ModuleType, tmp_path: Path) -> None:
    reports = [run("severe", seed, {"original": 0.5, "before": 4.0, "ce": 1.0 + seed}) for seed in range(2)]
    seeds.plot(seeds.summarise(reports, ["ce"]), tmp_path / "seeds")
    assert (tmp_path / "seeds.png").stat().st_size > 10_000
    drawn = (tmp_path / "seeds.svg").read_text(encoding="utf-8")
    assert "severe drift, seeds 0, 1" in drawn or drawn.count("<path") > 10


def test_the_plan_runs_every_stage_after_what_it_needs() -> None:
    """Each arm's adaptation, reference and source of interpolation come before it; the decisive arms run in every drift and seed."""
    recipe = load("reproduce")
    plan = recipe.plan()
    order = {recipe.target_of(step): index for index, step in enumerate(plan)}
    assert len(order) == len(plan)
    for index, step in enumerate(plan):
        assert all(path == recipe.OUT / "vlm" or order[path] < index for path in recipe.needs(step)), step
    for drift in recipe.RECIPE["drift"]:
        for seed in recipe.RECIPE["seeds"]:
            missing = [a for a in recipe.RECIPE["decisive"] if ["arm", drift, str(seed), a] not in plan]
            assert not missing, (drift, seed, missing)
    screen = recipe.RECIPE["screen"]
    assert {s[3] for s in plan if s[:3] == ["arm", screen["drift"], str(screen["seed"])]} == set(recipe.RECIPE["arms"])
