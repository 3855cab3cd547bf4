"""The `evaluate` modules, against cases worked out by hand."""

from __future__ import annotations

from typing import Any

import evaluate
import pytest

from hf_lingudistill.labs.evaluation.suite import METRICS
from hf_lingudistill.labs.evaluation.vision import METRICS as FOLDER
from hf_lingudistill.labs.evaluation.vision import load_metric


def score(metric: str, answer: str, accepted: list[str], **settings: Any) -> float:
    """One item's score."""
    found = load_metric(metric).compute(predictions=[answer], references=[accepted], **settings)
    return float(found["scores"][0])


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_loads_as_an_evaluate_module_and_returns_its_mean_and_every_score(metric: str) -> None:
    module = evaluate.load(str(FOLDER / metric / f"{metric}.py"))
    choices = {"choices": [["cat", "dog"]] * 3} if metric == "multiple_choice" else {}
    found = module.compute(predictions=["cat", "dog", "dog"], references=[["cat"], ["dog"], ["cat"]], **choices)
    assert found["scores"] == [1.0, 1.0, 0.0]
    assert found[metric] == pytest.approx(2 / 3)


# --------------------------------------------------------------------------------------------------------------------
# Exact match
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("Red.", ["red"], 1),
        ("  dark\n RED ", ["dark red"], 1),
        ('"teal"', ["blue", "teal"], 1),  # the second of several
        ("a red circle", ["red"], 0),
        ("red", [], 0),
        ("", ["red"], 0),
        ("", ["?"], 0),  # an answer that is punctuation only is not the same as none
        ("?", ["?"], 1),
        ("-5", ["5"], 0),
        ("- red", ["red"], 1),
        ("“CAFÉ”", ["café"], 1),
        ("कि", ["की"], 0),  # they differ in a vowel sign, which is no punctuation
        ("红色。", ["红色"], 1),
    ],
)
def test_exact_match(answer: str, accepted: list[str], expected: int) -> None:
    assert score("exact_match", answer, accepted) == expected


# --------------------------------------------------------------------------------------------------------------------
# ANLS
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("12 Mai 2020", ["12 May 2020"], 1 - 1 / 11),  # one substitution in 11 characters
        ("kitten", ["sitting"], 1 - 3 / 7),  # the textbook's three edits
        ("kitten", ["mitten", "sitting"], 1 - 1 / 6),  # the best of several
        ("  TOTAL   due", ["total due"], 1),
        ("ab", ["cd"], 0),
        ("abcd", ["abef"], 0.5),  # at the threshold
        ("abc", ["axy"], 0),  # 1/3 is below it
        ("", ["total"], 0),
        ("", [""], 1),
        ("total", [], 0),
        ("naïve", ["naive"], 0.8),  # a character, not the two bytes of ï
    ],
)
def test_anls(answer: str, accepted: list[str], expected: float) -> None:
    assert score("anls", answer, accepted) == pytest.approx(expected)


def test_a_package_that_a_metric_needs_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(path: str) -> None:
        raise ImportError("To be able to use anls, you need to install the following dependency: 'rapidfuzz'.")

    load_metric.cache_clear()
    monkeypatch.setattr(evaluate, "load", missing)
    with pytest.raises(
        ModuleNotFoundError, match=r"^A package that the metric anls needs is not installed \(.+'rapidfuzz'"
    ):
        load_metric("anls")


def test_the_threshold_of_anls_can_be_moved() -> None:
    assert score("anls", "abc", ["axy"], threshold=0.3) == pytest.approx(1 / 3)


# --------------------------------------------------------------------------------------------------------------------
# Relaxed accuracy
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("105", ["100"], 1),  # 5 % exactly
        ("105.1", ["100"], 0),
        ("95", ["100"], 1),
        ("-95", ["100"], 0),
        ("1,234", ["1234"], 1),
        ("$12.", ["12"], 1),
        ("50%", ["0.5"], 1),
        ("50%", ["50"], 0),
        ("52 %", ["50%"], 1),
        ("0.001", ["0"], 0),  # 5 % of nothing
        ("0", ["0.0"], 1),
        ("Blue.", ["blue"], 1),
        ("blue", ["blues"], 0),  # texts are not relaxed
        ("", ["0"], 0),
        ("%", ["0"], 0),
        ("NaN", ["nan"], 1),  # a word, not a number that equals nothing
        ("infinity", ["5"], 0),
        ("7", ["1", "7.1"], 1),
        ("7", [], 0),
    ],
)
def test_relaxed_accuracy(answer: str, accepted: list[str], expected: int) -> None:
    assert score("relaxed_accuracy", answer, accepted) == expected


def test_the_tolerance_of_relaxed_accuracy_can_be_moved() -> None:
    assert score("relaxed_accuracy", "110", ["100"], tolerance=0.1) == 1
    assert score("relaxed_accuracy", "110", ["100"]) == 0


# --------------------------------------------------------------------------------------------------------------------
# VQA accuracy
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("matches", "expected"),
    [
        (0, 0.0),
        (1, 0.3),  # nine of the ten subsets hold the match: 9/10 * 1/3
        (2, 0.6),  # eight hold both, two hold one: 8/10 * 2/3 + 2/10 * 1/3
        (3, 0.9),  # seven hold three, three hold two: 7/10 + 3/10 * 2/3
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_vqa_accuracy_leaves_each_of_ten_people_out(matches: int, expected: float) -> None:
    people = ["red"] * matches + ["blue"] * (10 - matches)
    assert score("vqa_accuracy", "Red", people) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("Two dogs.", "2 dogs", 1),
        ("the dog", "a dog", 1),
        ("none", "0", 1),
        ("1,000", "1000", 1),
        ("1.5", "15", 0),  # a decimal point stays
        ("red, blue", "red blue", 1),
        ("no", "yes", 0),
        ("", "yes", 0),
        ("Über", "über", 1),
        ("U.S.A.", "usa", 1),  # a full stop is left out, and parts no word
        ("st. louis", "st louis", 1),
        ("red,blue", "red blue", 1),
        ("don't walk", "dont walk", 1),
        ("dog\u2019s", "dog's", 1),
        (".5", "5", 0),
        ("10:30", "10 30", 0),  # a time of day stays one
        ("t-shirt", "t shirt", 1),
        *((silent, "A", 0) for silent in ("", "the")),  # of a letter that is an article
        ("a.", "A", 1),
    ],
)
def test_vqa_accuracy_of_one_reference_is_exact_match_in_the_challenges_normal_form(
    answer: str, accepted: str, expected: int
) -> None:
    assert score("vqa_accuracy", answer, [accepted]) == expected


# --------------------------------------------------------------------------------------------------------------------
# Multiple choice
# --------------------------------------------------------------------------------------------------------------------
SHAPES = ["circle", "rectangle", "triangle"]


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", " B) ", "B. rectangle", "(B) it has corners", "Rectangle!"])
@pytest.mark.parametrize("reference", ["B", "rectangle"])
def test_a_choice_is_named_by_its_letter_or_its_text(answer: str, reference: str) -> None:
    assert score("multiple_choice", answer, [reference], choices=[SHAPES]) == 1
    assert score("multiple_choice", answer, ["A"], choices=[SHAPES]) == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The answer is B", 1),
        ("Answer: (B) because", 1),
        ("I see a rectangle here", 1),
        ("The answer is a rectangle", 1),  # "a" is no letter here
        ("The answer is a circle", 0),
        ("a circle or a rectangle", 0),  # two are none
        ("rectangles", 0),
        ("B or C", 0),
        ("D", 0),  # there is no D
        ("The answer is: B", 1),
        ("The correct answer is: B.", 1),
        ("**B**", 1),
        ("The answer is **B**.", 1),
        ("Option B", 1),
        ("The correct option is B.", 1),
        ("\\boxed{B}", 1),
        ("The answer is A rectangle", 1),  # an article, whatever its size
        ("Answer: A rectangle.", 1),
        ("The answer is B for it has corners", 1),
        ("The answer is B or C", 0),
        ("Choice: (B)", 1),
        ("", 0),
        *(
            (two, 0)
            for two in ("(B) and (C)", "B) or C)", "(B) or (C), I cannot tell", "Answer: B, C", "option A or option B")
        ),
        *((two, 0) for two in ("B/C", "B & A", "Answer: A and B", "The answer is B. or C.", "B or option C")),
        ("(B) it has corners, unlike (A)", 1),  # a second letter in the reasons names none
        ("B, A rectangle has corners", 1),  # nor does an article
        ("Answer: B, A rectangle it is", 1),
        ("B. A and C have none", 0),  # two in a row, whatever is said of them
        *(
            (one, 1)
            for one in (
                "B\nIt has corners.",
                "(B)\n\nBecause",
                "It is B.",
                "I think it's B",
                "B, because it has corners",
            )
        ),
        *(
            (one, 1)
            for one in (
                "B - it has corners",
                "The correct choice would be B.",
                "A: The answer is B",
                "The answer must be B.",
            )
        ),
        *(
            (one, 0)
            for one in (
                "It is not B.",
                "Neither B nor C",
                "I see B and C",
                "It isn't B",
                "I, for one, cannot tell",
                "It is A.",
            )
        ),
        ("Plan B12", 0),
    ],
)
def test_what_a_sentence_names(answer: str, expected: int) -> None:
    assert score("multiple_choice", answer, ["rectangle"], choices=[SHAPES]) == expected


@pytest.mark.parametrize(
    ("answer", "choices", "right"),
    [
        ("It is dark red.", ["red", "dark red"], "dark red"),
        ("C++", ["C", "C++"], "C++"),
        ("-5", ["5", "-5"], "-5"),
        ("b", ["b", "a"], "b"),  # the text before the letter
        ("क", ["की", "क"], "क"),
    ],
)
def test_of_choices_that_hold_one_another_the_named_one_counts(answer: str, choices: list[str], right: str) -> None:
    assert score("multiple_choice", answer, [right], choices=[choices]) == 1
    wrong = next(choice for choice in choices if choice != right)
    assert score("multiple_choice", answer, [wrong], choices=[choices]) == 0


def test_answers_that_name_no_choice_are_counted() -> None:
    found = load_metric("multiple_choice").compute(
        predictions=["A", "neither", ""], references=[["circle"]] * 3, choices=[SHAPES] * 3
    )
    assert (found["scores"], found["unparsed"]) == ([1.0, 0.0, 0.0], 2)
