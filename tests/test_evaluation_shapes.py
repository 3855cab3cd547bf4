"""What the columns of an evaluation's data may hold: the public data sets' own shapes are read, everything else is refused by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from hf_lingudistill.labs.evaluation.data import image_items, text_items
from hf_lingudistill.labs.evaluation.shapes import ShapeError, accepted_answers, choices_of, right_choices
from hf_lingudistill.labs.evaluation.suite import GroundedTask, TextTask, VisionTask
from hf_lingudistill.labs.evaluation.vision import question, score_answers

TEN = ["green"] * 7 + ["teal"] * 3
ANIMALS = ["krill", "whale", "phytoplankton", "leopard"]
CHOICE = {"metric": "multiple_choice", "choices": "options"}
PEOPLE = {"answer": Value("string"), "answer_confidence": Value("string"), "answer_id": Value("int64")}


def picture() -> PILImage.Image:
    return PILImage.new("RGB", (8, 8), "red")


def saved(folder: Path, rows: list[dict[str, Any]], **features: Any) -> str:
    """Rows as a dataset on disk, with an image each where they have no `image`."""
    full = [{"image": picture(), "question": "what is it?", **row} for row in rows]
    known = {"image": Image(), "question": Value("string"), **features}
    names = list(full[0])
    data = Dataset.from_list(full, features=Features({n: known[n] for n in names}) if features else None)
    data.save_to_disk(folder / "data")
    return str(folder / "data")


def right_of(item: Any, *, wrong: bool = False) -> str:
    """What a model that is always right says; or the next choice, or nothing of the kind."""
    if not item.choices:
        return "neither" if wrong else item.answers[0]
    position = item.choices.index(item.answers[0])
    return "ABCDEFGH"[(position + wrong) % len(item.choices)]


# --------------------------------------------------------------------------------------------------------------------
# Public data sets, as their columns are on the Hub
# --------------------------------------------------------------------------------------------------------------------
HUB: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any], list[tuple[str, ...]]]] = {
    # name: (of the task, rows, features, accepted answers)
    "VQAv2": (
        {"answer": "answers", "metric": "vqa_accuracy"},
        [{"answers": [{"answer": t, "answer_confidence": "yes", "answer_id": i} for i, t in enumerate(TEN)]}] * 2,
        {"answers": List(PEOPLE)},
        [tuple(TEN)] * 2,
    ),
    "VQAv2, a mapping of lists": (
        {"answer": "answers", "metric": "vqa_accuracy"},
        [{"answers": {"answer": TEN, "answer_id": list(range(10))}}] * 2,
        {"answers": {"answer": List(Value("string")), "answer_id": List(Value("int64"))}},
        [tuple(TEN)] * 2,
    ),
    "TextVQA": (
        {"answer": "answers", "metric": "vqa_accuracy"},
        [{"answers": [*TEN[:9], ""]}] * 2,  # one of ten people said nothing
        {"answers": List(Value("string"))},
        [(*TEN[:9], "")] * 2,
    ),
    "DocVQA": (
        {"answer": "answers", "metric": "anls"},
        [{"answers": ["TRRF Vice President", "TRRF"]}, {"answers": ["1"]}],
        {"answers": List(Value("string"))},
        [("TRRF Vice President", "TRRF"), ("1",)],
    ),
    "AI2D": (
        {"answer": "answer", **CHOICE},
        [{"options": ANIMALS, "answer": str(i)} for i in range(4)],
        {"options": List(Value("string")), "answer": Value("string")},
        [(animal,) for animal in ANIMALS],
    ),
    "MMMU": (
        {"answer": "answer", "image": ("image_1", "image_2"), **CHOICE},
        [{"options": str(ANIMALS), "answer": "BD"[i], "image_1": picture(), "image_2": None} for i in range(2)],
        {"options": Value("string"), "answer": Value("string"), "image_1": Image(), "image_2": Image()},
        [("whale",), ("leopard",)],
    ),
    "MMMU, an open question": (
        {"answer": "answer"},
        [{"answer": "['24', 'twenty-four']"}, {"answer": "7.5"}],
        {"answer": Value("string")},
        [("24", "twenty-four"), ("7.5",)],
    ),
    "ScienceQA": (
        {"answer": "answer", **CHOICE},
        [{"options": ANIMALS[: 2 + i], "answer": i} for i in range(3)],
        {"options": List(Value("string")), "answer": Value("int8")},
        [(animal,) for animal in ANIMALS[:3]],
    ),
    "ARC": (
        {"answer": "answer", **CHOICE},
        [
            {"options": {"text": ANIMALS, "label": list("1234")}, "answer": "1"},
            {"options": {"text": ANIMALS, "label": list("ABCD")}, "answer": "B"},
        ],  # fmt: skip
        {"options": {"text": List(Value("string")), "label": List(Value("string"))}, "answer": Value("string")},
        [("krill",), ("whale",)],
    ),
    "choices by letter": (
        {"answer": "answer", **CHOICE},
        [{"options": {"A": "krill", "B": "whale", "C": None}, "answer": "B"}] * 2,
        {"options": dict.fromkeys("ABC", Value("string")), "answer": Value("string")},
        [("whale",)] * 2,
    ),
    "numbers": (
        {"answer": "answer"},
        [{"answer": 7}, {"answer": 12}],
        {"answer": Value("int64")},
        [("7",), ("12",)],
    ),
    "class labels": (
        {"answer": "answer"},
        [{"answer": 1}, {"answer": 0}],
        {"answer": ClassLabel(names=["no", "yes"])},
        [("yes",), ("no",)],
    ),
    "class labels that are indices": (
        {"answer": "answer", **CHOICE},
        [{"options": ANIMALS, "answer": i} for i in range(4)],
        {"options": List(Value("string")), "answer": ClassLabel(names=["3", "2", "1", "0"])},
        [(animal,) for animal in reversed(ANIMALS)],
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_a_model_that_is_right_scores_1_and_a_wrong_one_less(name: str, tmp_path: Path) -> None:
    settings, rows, features, expected = HUB[name]
    task = VisionTask(name="t", path=saved(tmp_path, rows, **features), **settings)
    items = image_items(task, 0)
    assert [item.answers for item in items] == expected
    right = score_answers(task, items, {item.key: right_of(item) for item in items})
    wrong = score_answers(task, items, {item.key: right_of(item, wrong=True) for item in items})
    assert [score for score, _ in right.values()] == [1.0] * len(items)
    assert [score for score, _ in wrong.values()] == [0.0] * len(items)


# --------------------------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "metric", "accepted"),
    [
        ("[3, 4]", "exact_match", ("[3, 4]",)),  # an answer, not a list of texts
        ("[unfinished", "exact_match", ("[unfinished",)),
        ('["a", "b"]', "exact_match", ("a", "b")),
        ("[{'answer': 'green', 'answer_id': 1}]", "vqa_accuracy", ("green",)),
        ({"text": ["a", "b"], "answer_start": [1, 2]}, "exact_match", ("a", "b")),
        (0.5, "relaxed_accuracy", ("0.5",)),
        ("None", "vqa_accuracy", ("None",)),  # a word that people say
        ([["a"]], "exact_match", "expected an answer's text, found list ['a']"),
        (None, "exact_match", "found null"),
        ([], "exact_match", "found an empty list"),
        (["a", None], "exact_match", "found null"),
        (["", ""], "vqa_accuracy", "a blank one. Test splits hide theirs"),
        (["a", ""], "exact_match", "a blank one among 2"),
        (" ", "exact_match", "a blank one"),
        (True, "exact_match", "expected an answer's text, found True"),
        (3.0, "exact_match", "the number 3.0"),
        (float("nan"), "relaxed_accuracy", "the number nan"),
        ({"label": "green"}, "exact_match", "found a mapping with label"),
        ({"answer": None}, "exact_match", "found null"),
        (b"green", "exact_match", "found bytes"),
    ],
)
def test_answers_are_texts_or_refused(value: Any, metric: str, accepted: Any) -> None:
    if isinstance(accepted, tuple):
        assert accepted_answers(value, metric) == accepted
        return
    with pytest.raises(ShapeError) as raised:
        accepted_answers(value, metric)
    assert accepted in str(raised.value)


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ('["a", "b"]', ("a", "b")),
        ([2, 3.5], ("2", "3.5")),
        ("krill, whale", "expected a list of choices, found 'krill, whale'"),
        ("A. krill\nB. whale", "expected a list of choices"),
        ("[]", "expected 2 to 26 choices, found 0"),
        (["a"], "found 1"),
        (["a"] * 27, "found 27"),
        (["a", None], "among the choices expected a text, found null"),
        (["a", ""], "a blank one"),
        ({"first": "a", "second": "b"}, "a mapping with first, second"),
        ({"A": "a", "B": None, "C": "c"}, "a mapping with A, B, C"),
        ({"text": ["a", "b"], "label": ["A"]}, "as many labels as choices"),
        (None, "found null"),
    ],
)
def test_choices_are_a_list_of_texts_or_refused(value: Any, texts: Any) -> None:
    if isinstance(texts, tuple):
        assert choices_of(value).texts == texts
        return
    with pytest.raises(ShapeError) as raised:
        choices_of(value)
    assert texts in str(raised.value)


def chosen(answers: list[Any], options: Any, kind: str | None = None) -> list[tuple[int, ...]]:
    """The right choices of rows that share their options, or have one list each."""
    each = options if isinstance(options[0], list) else [options] * len(answers)
    rows = [(str(i), answer, choices_of(texts)) for i, (answer, texts) in enumerate(zip(answers, each, strict=True))]
    return list(right_choices(rows, kind).values())


DIGITS = ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("answers", "options", "kind", "expected"),
    [
        (["B", "(b)", "C.", "D. leopard"], ANIMALS, None, [1, 1, 2, 3]),
        (["whale", " Whale "], ANIMALS, None, [1, 1]),
        ([["whale"], "['krill']"], ANIMALS, None, [1, 0]),
        (["B", "whale", "1"], ANIMALS, None, [1, 1, 1]),  # of several kinds, and each clear by itself
        # numerals: the column says what they are
        (["0", "2"], DIGITS, None, [0, 2]),  # there is no choice 0
        (["4", "2"], DIGITS, None, [3, 1]),  # there is no index 4
        (["2", "1"], [DIGITS, ANIMALS], None, [2, 1]),  # the second is no text
        (["2", "1"], DIGITS, "index", [2, 1]),
        (["2", "1"], DIGITS, "text", [1, 0]),
        ([2, 0], DIGITS, None, [2, 0]),
        # letters in another order
        (["B", "C"], [["C", "B", "A"], ANIMALS], None, [1, 2]),
        (["A", "A"], ["C", "B", "A"], "letter", [0, 0]),
    ],
)  # fmt: skip
def test_the_whole_column_says_what_its_answers_are(
    answers: list[Any], options: Any, kind: str | None, expected: list[int]
) -> None:
    assert chosen(answers, options, kind) == [(index,) for index in expected]


@pytest.mark.parametrize(
    ("answers", "options", "kind", "message"),
    [
        (
            ["2", "1"],
            DIGITS,
            None,
            "item 0: the answer '2' may be the text of choice '2' or the index of choice '3'. Say which in the suite: "
            "`answer_is: text` or `answer_is: index`",
        ),
        (
            ["A"],
            ["C", "B", "A"],
            None,
            "item 0: the answer 'A' may be the letter of choice 'C' or the text of choice 'A'.",
        ),
        (
            ["0", "4"],
            ANIMALS,
            None,
            "item 1: the answer is '4', and there are the choices 'krill', 'whale', 'phytoplankton', 'leopard': an index must be 0 to 3",
        ),  # fmt: skip
        ([-1], ANIMALS, None, "an index must be 0 to 3 (test splits hide theirs)"),
        ([4], ANIMALS, None, "item 0: the answer is 4"),
        (["?"], ANIMALS, None, "item 0: the answer '?' names none of the choices 'krill'"),
        (["E"], ANIMALS, None, "names none"),
        (["B. krill"], ANIMALS, None, "names none"),  # a letter and a text that disagree
        (["a whale"], ANIMALS, None, "names none"),
        ([""], ANIMALS, None, "names none"),
        ([None], ANIMALS, None, "found null. Test splits hide theirs"),
        ([[]], ANIMALS, None, "found an empty list"),
        ([True], ["no", "yes"], None, "the answer True names none"),
        ([1.0], ANIMALS, None, "the answer 1.0 names none"),
        ([{"answer": "whale"}], ANIMALS, None, "names none"),
        (["B"], ANIMALS, "text", "expected a choice's text"),
        (["5"], ANIMALS, "letter", "expected a letter"),
    ],
)
def test_an_answer_that_names_no_choice_or_several_is_refused(
    answers: list[Any], options: Any, kind: str | None, message: str
) -> None:
    with pytest.raises(ShapeError) as raised:
        chosen(answers, options, kind)
    assert message in str(raised.value)


def test_choices_that_are_letters_are_shown_without_and_answered_by_their_text(tmp_path: Path) -> None:
    """A diagram's labels: if the model says A, it may only mean the label A."""
    rows = [{"options": ["D", "B", "A", "C"], "answer": "2"}, {"options": ANIMALS, "answer": "0"}]
    path = saved(tmp_path, rows, options=List(Value("string")), answer=Value("string"))
    task = VisionTask(name="t", path=path, **CHOICE)
    labels, animals = image_items(task, 0)
    assert question(labels) == "what is it?\n- D\n- B\n- A\n- C"
    assert question(animals).splitlines()[1] == "A. krill"
    for said, score in (("A", 1.0), ("C", 0.0), ("D", 0.0), ("The answer is A.", 1.0), ("The answer is D.", 0.0)):
        assert score_answers(task, [labels], {labels.key: said})[labels.key] == (score, 1.0), said
    assert score_answers(task, [animals], {animals.key: "A"})[animals.key] == (1.0, 1.0)


def test_of_two_choices_with_the_same_text_both_are_right(tmp_path: Path) -> None:
    path = saved(tmp_path, [{"options": ["red", "blue", "red"], "answer": 2}] * 2)
    task = VisionTask(name="t", path=path, **CHOICE)
    items = image_items(task, 0)
    for said, score in (("A", 1.0), ("C", 1.0), ("red", 1.0), ("B", 0.0)):
        assert score_answers(task, items[:1], {"0": said})["0"] == (score, 1.0)


# --------------------------------------------------------------------------------------------------------------------
# The other columns, and the words with which a row is refused
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": None, "answer": "a"}, "Task 't', item 0: column 'question': expected a text, found null."),
        ({"question": {"en": "what?"}, "answer": "a"}, "column 'question': expected a text, found dict {'en': 'what?'}."),
        ({"question": "  ", "answer": "a"}, "found a blank one."),
        ({"question": ["what?"], "answer": "a"}, "column 'question': expected a text, found list ['what?']."),
        ({"question": "<image> or <image>?", "answer": "a"}, "2 <image> marks for 1 images."),
        ({"image": None, "question": "what?", "answer": "a"}, "item 0: expected an image; an image is missing (null). Repair"),
        ({"image": [], "question": "what?", "answer": "a"}, "item 0: it has no image. Drop the row, or leave it out with `where`."),
        ({"answer": None}, "Task 't', item 0: column 'answer': expected an answer, found null."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [VisionTask, GroundedTask])
def test_a_row_of_another_shape_is_refused_by_task_item_and_column(
    kind: Any, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, [row] * 2)
    with pytest.raises(ValueError) as raised:
        image_items(kind(name="t", path=path), 0)
    assert message in str(raised.value)


def test_llavas_image_marks_are_taken_out_of_the_question(tmp_path: Path) -> None:
    path = saved(tmp_path, [{"question": "<image>\nwhat is it?", "answer": "red"}] * 2)
    assert image_items(VisionTask(name="t", path=path), 0)[0].question == "what is it?"


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    path = saved(
        tmp_path, [{"image": {"bytes": b"no image", "path": None}, "answer": "red"}] * 2, answer=Value("string")
    )
    with pytest.raises(
        ValueError, match=r"^Task 't', item 0: expected an image, found one that cannot be read \(.+Repair"
    ):
        image_items(VisionTask(name="t", path=path), 0)


@pytest.mark.parametrize("value", [None, 3, ["a", "b"], {"en": "a"}])
def test_a_text_that_is_none_is_refused(value: Any, tmp_path: Path) -> None:
    Dataset.from_list([{"text": value}, {"text": value}]).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"^Task 't', item 0: column 'text': expected a text, found "):
        text_items(TextTask(name="t", path=str(tmp_path / "data")), 0)


def test_where_tells_the_seen_part_from_the_unseen_one(tmp_path: Path) -> None:
    rows = [{"answer": f"thing {i}", "artist": "new" if i % 3 == 0 else f"old {i % 3}"} for i in range(9)]
    path = saved(tmp_path, rows, answer=Value("string"), artist=Value("string"))

    def keys(where: Any, **settings: Any) -> list[str]:
        return [item.key for item in image_items(VisionTask(name="t", path=path, where=where, **settings), 0)]

    assert keys({"artist": "new"}) == ["0", "3", "6"]
    assert keys({"artist": ["old 1", "old 2"]}) == ["1", "2", "4", "5", "7", "8"]
    assert keys({"artist": "new", "answer": ("thing 3", "thing 4")}) == ["3"]
    assert set(keys({"artist": "new"}, n=2)) < {"0", "3", "6"}
    with pytest.raises(
        ValueError, match=r"^Task 't': where artist is 'newer' there is no row, found 'new', 'old 1', 'old 2'\.$"
    ):
        keys({"artist": "newer"})
    with pytest.raises(
        ValueError, match=r"^Task 't': .+ has no column 'painter', found image, question, answer, artist\."
    ):
        keys({"painter": "new"})
    with pytest.raises(ValueError, match="a builtin has none"):
        VisionTask(name="t", builtin="easy_vqa_what", where={"a": 1})
