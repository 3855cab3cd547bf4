"""Reports: the numbers that a table and a JSON are made of."""

import json
from pathlib import Path

import pytest

from hf_lingudistill.labs.demo_report import (
    fidelity_entry,
    prompts_text,
    table,
    verdict,
    vision_entry,
    write_report,
)

ROOT = Path(__file__).resolve().parent.parent


def answers(nats_per_token: float, n: int = 20) -> dict:
    """(nats, tokens) of n answers of 10 tokens, scattered around a mean."""
    return {f"answer{i}": (nats_per_token * 10 * (1 + 0.1 * ((i % 5) - 2)), 10.0) for i in range(n)}


def accuracy(share: float, n: int = 50) -> dict:
    right = round(share * n)
    return {"accuracy": right / n, "correct": [True] * right + [False] * (n - right), "n": n}


@pytest.fixture
def report() -> dict:
    return {
        "language": fidelity_entry("KL on text", {"before": answers(4.0), "after": answers(0.4)}),
        "pictures": fidelity_entry("KL on pictures", {"before": answers(3.0), "after": answers(0.6)}),
        "vision": vision_entry(
            {"before": accuracy(0.8), "after": accuracy(0.78)},
            {"before": accuracy(0.2), "after": accuracy(0.2)},
            "metric",
        ),
        "seconds": {"total": 250.4},
        "cpu_seconds": {"total": 400.0},
        "config": {"seed": 0, "bf16": False},
        "machine": {"threads": 2},
    }


def test_recovered_is_the_share_of_the_distance_that_is_gone(report):
    language = report["language"]
    assert language["recovered"] == pytest.approx(0.9) and language["original"] == 0.0
    assert (language["n_texts"], language["n_tokens"]) == (20, 200)
    low, high = language["interval95"]["before"]
    assert low < 4.0 < high < 5.0
    worse = fidelity_entry("KL", {"before": answers(1.0), "after": answers(1.1)})
    assert worse["recovered"] == pytest.approx(-0.1)
    assert fidelity_entry("KL", {"before": answers(0.0), "after": answers(0.1)})["recovered"] is None


def test_table_has_a_line_per_model_and_marks_what_was_not_measured(report):
    lines = table(report).splitlines()
    assert len(lines) == 2 + 3 and len({len(line) for line in lines}) == 1
    assert lines[2].split("|")[4].strip() == "-"  # the LM sees nothing
    assert "0.40" in lines[4] and "78%" in lines[4] and "20%" in lines[4]


def test_the_verdict_says_what_came_back_and_how_long_it_took(report):
    text = verdict(report)
    for part in (
        "90% of the distance on text",
        "80% of the distance about pictures",
        "250 s in all",
        "fp32",
        "seed 0",
    ):
        assert part in text
    report["config"]["bf16"], report["language"]["recovered"] = True, None
    assert "bf16" in verdict(report) and "on text is gone" not in verdict(report)


def test_report_is_json_with_a_picture_beside_it(report, tmp_path):
    path = write_report(report, tmp_path / "new")
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    picture = path.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_prompts_show_the_models_that_answered_in_lines_of_a_terminals_width():
    long = "a sentence that goes on " * 20
    text = prompts_text(
        [
            {"prompt": "color?", "image": "kite.png", "shows": "a kite", "before": "red", "after": long},
            {"prompt": "why?", "after": " "},
        ]
    )
    assert "[a picture of a kite]" in text and "original" not in text and "red" in text
    assert max(map(len, text.splitlines())) <= 100 and " ".join(text.split()).count("goes on") == 20
    assert "(nothing)" in text
