"""Reports: the numbers that a table and a JSON are made of."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from hf_lingudistill.labs.demo_report import (
    bootstrap_interval,
    language_entry,
    prompts_text,
    recovered,
    table,
    vision_entry,
    write_report,
)

ROOT = Path(__file__).resolve().parent.parent


def perplexity(nll_per_token: float, texts: int = 20) -> dict:
    spread = [nll_per_token * 10 * (1 + 0.1 * ((i % 5) - 2)) for i in range(texts)]
    return {
        "perplexity": math.exp(nll_per_token),
        "nll_per_token": nll_per_token,
        "nll": spread,
        "tokens": [10] * texts,
        "n_texts": texts,
        "n_tokens": 10 * texts,
    }


def accuracy(share: float, n: int = 50) -> dict:
    right = round(share * n)
    return {"accuracy": right / n, "correct": [True] * right + [False] * (n - right), "n": n}


@pytest.fixture
def report() -> dict:
    arms = {"original": 3.0, "before": 4.0, "after": 3.1, "ce_only": 3.3}
    return {
        "language": language_entry({arm: perplexity(nll) for arm, nll in arms.items()}, "a source"),
        "vision": vision_entry(
            {"before": accuracy(0.8), "after": accuracy(0.78)},
            {"before": accuracy(0.2), "after": accuracy(0.2)},
            "metric",
        ),
        "seconds": {"original": 1.0, "before": 2.0, "after": 3.0},
        "config": {},
    }


def test_recovered_is_a_share_of_log_perplexity_not_of_perplexity(report):
    assert report["language"]["recovered"] == pytest.approx(0.9)
    assert report["language"]["recovered_ce_only"] == pytest.approx(0.7)
    language = report["language"]
    of_perplexity = (language["before"] - language["after"]) / (language["before"] - language["original"])
    assert of_perplexity != pytest.approx(0.9, abs=0.01)  # control: the other reading gives another number


def test_nothing_recovered_where_nothing_was_lost():
    assert recovered(original=3.0, before=3.0, after=2.9) is None
    assert recovered(original=3.0, before=3.5, after=3.6) == pytest.approx(-0.2)


def test_bootstrap_interval_covers_the_mean_and_narrows_with_items():
    few = bootstrap_interval([0.0, 1.0] * 10)
    many = bootstrap_interval([0.0, 1.0] * 200)
    assert few[0] < 0.5 < few[1] and many[0] < 0.5 < many[1]
    assert few[1] - few[0] > 2 * (many[1] - many[0])
    assert bootstrap_interval([1.0] * 5) == (1.0, 1.0)
    assert bootstrap_interval([0.0, 1.0] * 10) == few  # the seed is fixed


def test_table_has_a_line_per_model_and_marks_what_was_not_measured(report):
    lines = table(report).splitlines()
    assert len(lines) == 2 + 4 and len({len(line) for line in lines}) == 1
    assert lines[2].split("|")[3].strip() == "-"  # the LM sees nothing
    assert "0.780" in lines[4] and "0.200" in lines[4]


def test_report_is_json_with_a_picture_beside_it(report, tmp_path):
    path = write_report(report, tmp_path / "new")
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    picture = path.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_prompts_show_the_models_that_answered():
    text = prompts_text([{"prompt": "color?", "image": "x", "original": None, "before": "red", "after": "blue"}])
    assert "[with an image]" in text and "original" not in text and "red" in text and "blue" in text


@pytest.fixture(scope="module")
def readme_tool():
    spec = importlib.util.spec_from_file_location("fill_readme", ROOT / "docs/fill_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_figures_are_those_of_the_result_files(readme_tool):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_tool.fill(text) == text, "README.md is stale: run `make results`"
    number = re.search(r"<!-- results:demo -->.*?(\d+\.\d)", text, re.DOTALL)
    changed = text[: number.start(1)] + "9999.9" + text[number.end(1) :]
    assert readme_tool.fill(changed) == text  # control: a typed figure is overwritten


def test_the_recipes_figures_are_those_of_its_result_files(readme_tool):
    path = ROOT / "examples/recipes/five_artists/README.md"
    text = path.read_text(encoding="utf-8")
    assert path in readme_tool.FILLED and "<!-- results:five_artists_severe -->" in text
    assert readme_tool.fill(text) == text, "the recipe's README is stale: run `make results`"


def test_files_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(((?!https?:)[^)#]+)\)", text) + re.findall(
        r"`((?:docs|benchmarks|tests|examples)/[\w./]+)`", text
    )
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
