"""Bootstrap intervals, paired differences and the share of a loss that came back, on data whose truth is known."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from hf_lingudistill.labs import statistics
from hf_lingudistill.labs.evaluation import plots
from hf_lingudistill.labs.evaluation.report import (
    Task,
    build_report,
    markdown,
    share,
    signed,
    task_entry,
    write_report,
)
from hf_lingudistill.labs.statistics import Bootstrap, Items, loss_is_real

Array = np.ndarray[Any, np.dtype[np.float64]]


def items(values: Sequence[float] | Array, weights: Sequence[float] | Array | None = None) -> Items:
    """Items numbered from 0; weight 1 unless given."""
    weights = [1.0] * len(values) if weights is None else weights
    return {str(key): (float(v), float(w)) for key, (v, w) in enumerate(zip(values, weights, strict=True))}


def width(interval: dict[str, Any]) -> float:
    return float(interval["high"] - interval["low"])


# --------------------------------------------------------------------------------------------------------------------
# A score
# --------------------------------------------------------------------------------------------------------------------
def test_a_score_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    found = Bootstrap().score(items([2.0, 30.0], [1.0, 10.0]))
    assert found["value"] == pytest.approx(32 / 11)
    assert found["value"] != pytest.approx((2 / 1 + 30 / 10) / 2)
    assert found["n"] == 2


def covered(level: float, *, draws: int = 300, n: int = 80) -> float:
    """Share of simulated data sets whose interval holds the true bits per byte, 2: lengths and bits vary together."""
    rng = np.random.default_rng(0)
    hits = 0
    for draw in range(draws):
        lengths = rng.uniform(50, 400, n)
        bits = lengths * rng.gamma(16.0, 2 / 16.0, n)
        found = Bootstrap(resamples=300, seed=draw, level=level).score(items(bits, lengths))
        hits += found["low"] <= 2.0 <= found["high"]
    return hits / draws


def test_a_95_percent_interval_holds_the_truth_19_times_out_of_20() -> None:
    # 300 draws: the standard error of the share is 1.3 points; a percentile interval of n=80 covers a little less than it says
    assert 0.90 < covered(0.95) < 0.98


def test_a_50_percent_interval_does_not() -> None:
    assert 0.40 < covered(0.50) < 0.60


def test_the_interval_of_a_proportion_is_the_normal_one() -> None:
    found = Bootstrap(resamples=4000).score(items([1.0] * 120 + [0.0] * 280))
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert found["value"] == pytest.approx(0.3)
    assert (found["low"], found["high"]) == (
        pytest.approx(0.3 - half, abs=0.006),
        pytest.approx(0.3 + half, abs=0.006),
    )


def test_an_identical_rerun_gives_identical_numbers_and_another_seed_does_not() -> None:
    some = items(np.random.default_rng(1).normal(size=50))
    assert Bootstrap(seed=3).score(some) == Bootstrap(seed=3).score(some)
    assert Bootstrap(seed=3).score(some) == Bootstrap(seed=3).score(dict(reversed(some.items())))
    assert Bootstrap(seed=3).score(some) != Bootstrap(seed=4).score(some)


def test_the_numbers_do_not_depend_on_how_the_resamples_are_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    some = items(np.random.default_rng(1).normal(size=50))
    whole = Bootstrap(resamples=101).score(some)
    monkeypatch.setattr(statistics, "CHUNK", 7 * 50)
    assert Bootstrap(resamples=101).score(some) == whole


def test_items_that_weigh_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^The items weigh nothing in all \(no token, byte or question to score\)"):
        Bootstrap().score(items([0.0, 0.0], [0.0, 0.0]))
    # Some that weigh nothing are not: an answer may hold no token that depends on its image
    assert Bootstrap().score(items([0.0, 3.0, 5.0], [0.0, 2.0, 2.0]))["value"] == 2.0


@pytest.mark.parametrize("n", range(1, statistics.FEWEST + 2))
def test_a_few_items_have_no_interval(n: int) -> None:
    """No resample leaves the range of its items: of one item it is always itself, and would make any difference a sure one."""
    found = Bootstrap().score(items(np.arange(n), [2.0] * n))
    assert (found["value"], found["n"]) == ((n - 1) / 4, n)
    assert math.isfinite(found["low"]) == math.isfinite(found["high"]) == (n >= 6)


@pytest.mark.parametrize(("right", "value"), [(1.0, 1.0), (0.0, 0.0)])
def test_where_every_item_agrees_the_ends_are_exact(right: float, value: float) -> None:
    """Of 96 answers that are all right, resamples are all right as well. The exact interval is scipy's own."""
    n = 96
    found = Bootstrap(resamples=50).score(items([right] * n))
    exact = binomtest(int(right * n), n).proportion_ci(method="exact")
    assert found["value"] == value
    assert (found["low"], found["high"]) == (pytest.approx(exact.low), pytest.approx(exact.high))
    same = Bootstrap(resamples=50).difference(items([right] * n), items([right] * n))
    fall = binomtest(0, n).proportion_ci(method="exact").high  # of the next items, so many may fall
    assert (same["value"], same["low"], same["high"]) == (0.0, pytest.approx(-fall), pytest.approx(fall))
    # Controls: one that does not agree, and what is no share
    apart = Bootstrap(resamples=50).score(items([1 - right] + [right] * n))
    assert (apart["low"], apart["high"]) != (found["low"], found["high"])
    nats = Bootstrap(resamples=50).score(items([3.0] * n))
    assert (nats["low"], nats["high"]) == (3.0, 3.0)


@pytest.mark.parametrize("n", [6, 10, 30])
@pytest.mark.parametrize("kind", ["normal", "nearly all right"])
def test_few_items_are_covered_as_well_as_many(n: int, kind: str) -> None:
    """Plain percentiles held 2 of 3 truths at n = 10 where 95 of 100 answers are right."""
    rng = np.random.default_rng(0)
    hits = 0
    for draw in range(200):
        drawn = rng.normal(size=n) + 9 if kind == "normal" else (rng.random(n) < 0.95).astype(float)
        found = Bootstrap(resamples=300, seed=draw).score(items(drawn))
        hits += found["low"] <= (9 if kind == "normal" else 0.95) <= found["high"]
    assert hits / 200 > 0.87


def test_no_common_item_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^No item was scored by all the models compared; score the same suite"):
        Bootstrap().difference({"a": (1.0, 1.0)}, {"b": (1.0, 1.0)})


# --------------------------------------------------------------------------------------------------------------------
# Two models
# --------------------------------------------------------------------------------------------------------------------
def test_a_paired_interval_is_narrower_than_an_unpaired_one() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(size=300)  # how hard an item is, for both models alike
    one, other = items(hard + rng.normal(scale=0.2, size=300)), items(hard + 0.1 + rng.normal(scale=0.2, size=300))
    bootstrap = Bootstrap()
    unpaired = math.hypot(width(bootstrap.score(one)), width(bootstrap.score(other)))
    paired = width(bootstrap.difference(other, one))
    # in closed form sqrt(2 * 0.2^2) against sqrt(2 * (1 + 0.2^2))
    assert paired / unpaired == pytest.approx(0.2 / math.sqrt(1.04), rel=0.15)


def test_of_models_that_have_nothing_in_common_it_is_not() -> None:
    rng = np.random.default_rng(2)
    one, other = items(rng.normal(size=300)), items(rng.normal(size=300))
    bootstrap = Bootstrap()
    unpaired = math.hypot(width(bootstrap.score(one)), width(bootstrap.score(other)))
    assert width(bootstrap.difference(other, one)) / unpaired == pytest.approx(1.0, abs=0.12)


def test_a_difference_is_taken_on_common_items_only() -> None:
    found = Bootstrap().difference(items([5.0, 5.0, 5.0]), {"1": (1.0, 1.0), "2": (3.0, 1.0), "9": (1000.0, 1.0)})
    assert (found["value"], found["n"]) == (3.0, 2)


def test_a_model_does_not_differ_from_itself() -> None:
    some = items(np.random.default_rng(0).normal(size=20))
    assert Bootstrap().difference(some, some) == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 20}


# --------------------------------------------------------------------------------------------------------------------
# What came back
# --------------------------------------------------------------------------------------------------------------------
def test_recovered_is_exact_where_every_item_lost_and_got_back_alike() -> None:
    original = np.random.default_rng(0).uniform(1, 3, 40)
    found = Bootstrap().recovered(items(original + 0.5), items(original + 2.0), items(original))
    assert [found[key] for key in ("value", "low", "high")] == [pytest.approx(0.75)] * 3
    assert found["lost"]["value"] == pytest.approx(2.0)


def test_recovered_and_its_interval_agree_with_the_closed_form() -> None:
    rng = np.random.default_rng(5)
    n = 400
    original = rng.uniform(1, 3, n)
    before = original + rng.gamma(4.0, 0.25, n)
    after = original + 0.3 * (before - original) + rng.normal(scale=0.2, size=n)
    found = Bootstrap(resamples=4000).recovered(items(after), items(before), items(original))
    gained, lost = before - after, before - original
    share = gained.mean() / lost.mean()
    assert found["value"] == pytest.approx(share)
    # the delta method's standard error of a ratio of means
    half = 1.96 * np.std(gained - share * lost, ddof=1) / (math.sqrt(n) * lost.mean())
    assert (found["low"], found["high"]) == (pytest.approx(share - half, abs=half / 8), pytest.approx(share + half, abs=half / 8))  # fmt: skip


def test_of_shares_that_all_agree_what_came_back_has_the_ends_of_the_exact_interval() -> None:
    """Twenty answers lost, and all of them right again: resamples agree, and say nothing of the next answer."""
    bootstrap, n = Bootstrap(resamples=50), 20
    right, wrong = items([1.0] * n), items([0.0] * n)
    found = bootstrap.recovered(right, wrong, right)
    others = binomtest(0, n).proportion_ci(method="exact").high  # of the next answers, so many may fall, from 1 to -1
    assert (found["value"], found["low"], found["high"]) == (1.0, pytest.approx(1 - 2 * others), 1.0)
    rng = np.random.default_rng(0)
    before = items(np.round(rng.random(200)))
    same = bootstrap.recovered(before, before, items([1.0] * 200))
    assert same["low"] < 0.0 < same["high"] and math.copysign(1, same["value"]) == 1.0
    assert share(same).startswith("0% [-") and share(same | {"low": -0.001}).startswith("0% [0%, ")
    assert signed({"value": -0.0, "low": -0.0001, "high": 0.0}) == "+0.000 [+0.000, +0.000]"
    # Control: nats have no exact interval
    nats = items(rng.uniform(1, 3, n))
    lost = {key: (value + 2.0, weight) for key, (value, weight) in nats.items()}
    whole = bootstrap.recovered(nats, lost, nats)
    assert whole["low"] == whole["high"] == 1.0


@pytest.mark.parametrize(("after", "expected"), [(0.0, 1.0), (1.0, 0.0), (-0.5, 1.5), (2.0, -1.0)])
def test_recovered_may_be_none_all_or_more(after: float, expected: float) -> None:
    original = np.random.default_rng(0).uniform(1, 3, 40)
    found = Bootstrap().recovered(items(original + after), items(original + 1.0), items(original))
    assert found["value"] == pytest.approx(expected)


def test_nothing_was_lost_when_the_loss_is_inside_its_noise() -> None:
    rng = np.random.default_rng(0)
    original, noise = rng.uniform(1, 3, 100), rng.normal(size=100)
    noise -= noise.mean()
    standard_error = noise.std(ddof=1) / 10
    inside = Bootstrap().recovered(items(original), items(original + noise + 1.0 * standard_error), items(original))
    assert (inside["value"], inside["reason"]) == (None, "nothing was lost")
    assert inside["lost"]["value"] == pytest.approx(standard_error)
    # the same noise around a larger loss is a share
    outside = Bootstrap().recovered(items(original), items(original + noise + 3.0 * standard_error), items(original))
    assert outside["value"] == pytest.approx(1.0)


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_gain_is_not_a_loss(higher_is_better: bool) -> None:
    """Before is better than the original by far more than noise: nothing came back, as nothing was lost."""
    rng = np.random.default_rng(0)
    better = 1.0 if higher_is_better else -1.0
    original = rng.uniform(1, 3, 50)
    before, after = original + better, original + 0.5 * better
    models = {"original": items(original), "before": items(before), "after": items(after)}
    task = Task("t", "language", "T", "m", "", higher_is_better, models)
    assert task_entry(task, Bootstrap())["recovered"] == {"after": {"value": None, "reason": "nothing was lost"}}
    # the same numbers read the other way round are a loss of which half came back
    task.higher_is_better = not higher_is_better
    assert task_entry(task, Bootstrap())["recovered"]["after"]["value"] == pytest.approx(0.5)


def test_a_loss_is_real_when_its_interval_lies_on_the_worse_side_of_zero() -> None:
    assert loss_is_real({"low": 0.1, "high": 0.2}, higher_is_better=False)
    assert not loss_is_real({"low": -0.1, "high": 0.2}, higher_is_better=False)
    assert loss_is_real({"low": -0.2, "high": -0.1}, higher_is_better=True)
    assert not loss_is_real({"low": 0.1, "high": 0.2}, higher_is_better=True)


# --------------------------------------------------------------------------------------------------------------------
# The report that is made of them
# --------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def tasks() -> list[Task]:
    rng = np.random.default_rng(0)
    hard = rng.uniform(50, 100, 30)
    losses = {"original": 1.0, "before": 2.0, "ce": 1.4, "after": 1.1}
    language = {name: items(hard * loss + rng.normal(size=30), hard) for name, loss in losses.items()}
    seen = {name: items(rng.integers(0, 2, 40).astype(float)) for name in losses if name != "original"}
    return [
        Task("bits_per_byte/news/plain", "language", "News | plain", "bits_per_byte", "bits/byte", False, language),
        Task("vision/shapes", "vision", "Shapes", "exact_match", "", True, seen, {"grey": seen, "shuffled": seen}),
        *(
            Task(
                f"grounded/{name}/image_nll",
                "grounded",
                f"{title}: image tokens",
                "image_nll",
                "nats/token",
                False,
                seen,
                notes={"reference": "before", "image_token_share": share, "tokens": 90},
            )  # fmt: skip
            for name, title, share in (("one", "First", 0.25), ("two", "Second", 0.5))
        ),
    ]


def report_of(tasks: list[Task]) -> dict[str, Any]:
    names = ("original", "before", "ce", "after")
    models = {name: {"path": name, "kind": "vlm", "parameters": 1e6, "dtype": "float32"} for name in names}
    suite = {"name": "s", "seed": 0}
    return build_report(tasks, Bootstrap(resamples=200), compare=["ce"], suite=suite, models=models, seconds={}, machine={})  # fmt: skip


def test_every_model_is_compared_with_the_original_before_and_those_asked_for_once(tasks: list[Task]) -> None:
    entry = task_entry(tasks[0], Bootstrap(resamples=200), ["ce"])
    assert {(found["of"], found["minus"]) for found in entry["differences"]} == {
        ("before", "original"),
        ("ce", "original"),
        ("after", "original"),
        ("ce", "before"),
        ("after", "before"),
        ("after", "ce"),
    }
    assert len(entry["differences"]) == 6
    assert set(entry["recovered"]) == {"ce", "after"}
    assert entry["n"] == 30


def test_what_was_lost_is_unknown_without_the_original(tasks: list[Task]) -> None:
    assert task_entry(tasks[1], Bootstrap(resamples=200))["recovered"] == {}


def test_markdown_has_every_model_task_and_note(tasks: list[Task]) -> None:
    text = markdown(report_of(tasks))
    for name in ("original", "before", "ce", "after"):
        assert f"- **{name}**: {name} (vlm, 1M, float32)" in text
    assert "| task | n | original | before | ce | after |" in text
    assert r"| News \| plain (bits/byte, lower is better) | 30 | 1.0" in text
    assert "| Shapes | grey | - | 0." in text  # the original has no eyes
    assert "First: 25.0% of 90 answer tokens depend on the image (reference: before)." in text
    assert "Second: 50.0% of 90 answer tokens depend on the image (reference: before)." in text
    assert text.count("before is also compared, and scores too well here") == 2
    columns = [line.count(" |") for line in text.splitlines() if line.startswith("| ")]
    assert min(columns) >= 3


def test_a_judge_that_is_not_compared_favours_none(tasks: list[Task]) -> None:
    judged = [dataclasses.replace(task, notes=task.notes | {"reference": "judge"}) if "reference" in task.notes else task for task in tasks]  # fmt: skip
    assert any(task.notes.get("reference") == "judge" for task in judged)
    text = markdown(report_of(judged))
    assert "depend on the image (reference: judge)." in text
    assert "scores too well" not in text


def test_a_report_is_written_with_its_plots_and_an_identical_one_gives_identical_files(
    tasks: list[Task], tmp_path: Any
) -> None:
    report = report_of(tasks)
    names = ["report.json", "report.md", "scores.png", "scores.svg", "trade_off.png", "trade_off.svg"]
    for folder in ("one", "two"):
        write_report(report, tmp_path / folder)
        written = sorted(file.name for file in (tmp_path / folder).iterdir())
        assert [name for name in written if not name.startswith(".")] == names
    for name in names:
        first = (tmp_path / "one" / name).read_bytes()
        assert first == (tmp_path / "two" / name).read_bytes(), name
        assert len(first) > 500, name


def test_the_plane_is_bits_per_byte_above_the_original_against_vision(tasks: list[Task]) -> None:
    report = report_of(tasks)
    points = plots.plane_points(report)
    assert set(points) == {"before", "ce", "after"}  # the original has no vision score
    language, vision = report["tasks"][0], report["tasks"][1]
    expected = language["scores"]["before"]["value"] - language["scores"]["original"]["value"]
    assert points["before"]["language"] == pytest.approx(expected)
    assert points["before"]["vision"] == vision["scores"]["before"]["value"]
    assert points["before"]["vision_error"] == pytest.approx(width(vision["scores"]["before"]) / 2)


def test_many_models_that_crowd_together_are_also_shown_closer() -> None:
    def point(language: float) -> dict[str, float]:
        return {"language": language, "vision": 0.5, "language_error": 0.0, "vision_error": 0.0}

    near = {f"near {i}": point(i / 1000) for i in range(9)}
    far = {"before": point(0.8), "half": point(0.4)}
    assert set(plots._crowd(far | near)) == set(near)
    assert not plots._crowd(near)  # few enough to be told apart as they are
    assert not plots._crowd({str(i): point(float(i)) for i in range(20)})  # no crowd


def test_there_is_no_plane_without_a_second_axis(tasks: list[Task], tmp_path: Any) -> None:
    assert plots.plot_trade_off(report_of(tasks[:1]), tmp_path / "plane.png") is None
    assert not list(tmp_path.iterdir())


def test_training_curves_need_the_log_of_a_distillation(tmp_path: Any) -> None:
    log = tmp_path / "trainer_state.json"
    log.write_text('{"log_history": [{"step": 1, "loss": 2.0}]}')
    with pytest.raises(
        ValueError, match=r"holds no ce_loss: expected the trainer_state.json of a LinguDistill run\.$"
    ):
        plots.plot_training(log, tmp_path / "training.png")
    log.write_text(
        '{"log_history": [{"step": 1, "ce_loss": 2.0, "kd_loss": 0.5, "confident_share": 0.4}, {"step": 2, "ce_loss": 1.0}]}'
    )
    plots.plot_training(log, tmp_path / "training.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("training.png", "training.svg"))


def test_items_that_weigh_nothing_are_none() -> None:
    """An answer without a token that depends on the picture says nothing of such tokens: of one that has some, no interval follows."""
    bootstrap = Bootstrap(resamples=200)
    empty = {str(index): (0.0, 0.0) for index in range(1, 64)}
    one = bootstrap.score({"0": (2.0, 1.0), **empty})
    assert one == bootstrap.score({"0": (2.0, 1.0)}) and (one["low"], one["high"], one["n"]) == (
        -math.inf,
        math.inf,
        1,
    )
    shares = [{"0": (value, 1.0), **empty} for value in (2.0, 3.0, 1.0)]
    assert bootstrap.recovered(*shares)["reason"] == "fewer than 6 items cannot tell"
    # Control: several that weigh something have an interval, the others change nothing of it
    several = {f"s{index}": (float(index), 1.0) for index in range(8)}
    assert bootstrap.score(several | empty) == bootstrap.score(several) | {"n": 8}


def test_a_single_item_shows_no_interval_anywhere() -> None:
    from hf_lingudistill.labs.diagnose.report import _language_lost
    from hf_lingudistill.labs.score_mix.report import _interval

    bootstrap = Bootstrap(resamples=100)
    one, eight = {"a": (3.0, 2.0)}, items([3.0, 5.0] * 4, [2.0] * 8)
    assert _interval(bootstrap.score(one)) == "1.50 [-, -]"
    assert re.fullmatch(r"2\.00 \[1\.\d\d, 2\.\d\d\]", _interval(bootstrap.score(eight)))  # control
    perplexity = {"student": {"value": 4.0}, "none": {"value": 3.0}}
    said = _language_lost(bootstrap.difference(one, {"a": (2.0, 2.0)}), perplexity)
    assert "(+0.500 nats per token, no interval: fewer than 6 cannot tell, n=1)" in said and "inf" not in said
