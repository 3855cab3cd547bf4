"""What the columns of an evaluation's data may hold, and what is read from it. Nothing else is scored: it is refused.

Texts (`question`, `text`): a text that is not blank.

Answers that are compared as text:

    "green"                                       one text: AI2D, MMMU (open questions), OCR-VQA
    ["a", "b", ...]                               accepted texts: DocVQA, TextVQA, ChartQA; ten people's in TextVQA
    [{"answer": "green", "answer_id": 1}, ...]    VQAv2, ten people; the key may be `text`; also {"answer": ["green", ...]}
    "['24', 'twenty-four']"                       such a list written as a text: MMMU
    7                                             a whole number; a number with a fraction for `relaxed_accuracy` only

Choices (`choices`), 2 to 26 of them:

    ["krill", "whale"]                            AI2D, ScienceQA
    "['krill', 'whale']"                          such a list written as a text: MMMU
    {"text": [...], "label": ["A", "B"]}          ARC
    {"A": "krill", "B": "whale"}                  by letter; unused letters may be null

The right choice (`answer` beside `choices`): an index from 0 as a number (ScienceQA) or as a text (AI2D), a letter (MMMU), a label
(ARC), or the choice's own text. The whole column decides which of these it is: among the choices 1, 2, 3 the answer "2" may be a
text or an index, and where the column leaves that open, it is refused until the suite says it (`answer_is`).
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

ANSWER_KINDS = ("text", "letter", "index", "label")
ANSWER_KEYS = ("answer", "text")  # of an answer that is a mapping
SHOWN = 80  # characters of a value in a message


class ShapeError(ValueError):
    """A value that is not of an accepted shape. The message does not say where it stands."""


@dataclass(frozen=True)
class Choices:
    """texts: in order. labels: the data's own names of them, if it has any."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()


def found(value: Any) -> str:
    """A value as a message shows it: short, with its type where that is not plain."""
    if value is None:
        return "null"
    text = repr(value) if isinstance(value, str | int | float) else f"{type(value).__name__} {value!r}"
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def text_of(value: Any) -> str:
    """A text that is not blank.

    Raises:
        ShapeError: for anything else.
    """
    if not isinstance(value, str):
        raise ShapeError(f"expected a text, found {found(value)}")
    if not value.strip():
        raise ShapeError("expected a text, found a blank one")
    return value


def accepted_answers(value: Any, metric: str) -> tuple[str, ...]:
    """The accepted texts of a row, repeats included.

    metric: `relaxed_accuracy` reads numbers, so that a fraction may stand there; in `vqa_accuracy` single people may have said
    nothing.

    Raises:
        ShapeError: if there is none, or something that has no one text.
    """
    value = _unwritten(value)
    if isinstance(value, Mapping):  # of lists, as `datasets` reads a sequence of mappings; or a single answer
        value = _answer_of(value)
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values:
        raise ShapeError("expected an answer, found an empty list. Drop the row")
    texts = tuple(_answer_text(entry, metric) for entry in values)
    blank = [text for text in texts if not text.strip()]
    if len(blank) == len(texts):
        raise ShapeError("expected an answer, found a blank one. Test splits hide theirs: choose another split")
    if blank and metric != "vqa_accuracy":  # a model that says nothing would be right
        raise ShapeError(f"expected answers, found a blank one among {len(texts)}. Repair or drop the row")
    return texts


def _answer_text(value: Any, metric: str) -> str:
    if isinstance(value, Mapping):
        value = _answer_of(value)
    if isinstance(value, str):
        return value
    if value is None:
        raise ShapeError(
            "expected an answer, found null. Test splits hide theirs: choose another split, or drop the row"
        )
    if isinstance(value, bool):
        raise ShapeError(
            f"expected an answer's text, found {value}: write what the model should say, such as yes or no"
        )
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value) and metric == "relaxed_accuracy":
        return repr(value)
    if isinstance(value, float):
        raise ShapeError(
            f"expected an answer's text, found the number {value!r}: metric {metric} compares texts, and a number with a fraction "
            "has several. Write it as a text, or take relaxed_accuracy"
        )
    raise ShapeError(f"expected an answer's text, found {found(value)}")


def _answer_of(value: Mapping[str, Any]) -> Any:
    keys = [key for key in ANSWER_KEYS if key in value]
    if len(keys) != 1:
        raise ShapeError(
            f"expected an answer, found a mapping with {', '.join(map(str, value)) or 'nothing in it'}: of its keys one must be "
            f"{' or '.join(map(repr, ANSWER_KEYS))}"
        )
    return value[keys[0]]


def _unwritten(value: Any) -> Any:
    """A list or mapping of texts that is written as a text, read; whatever else as it is ("[3, 4]" is an answer)."""
    content = _literal(value)
    entries = content if isinstance(content, list) else [content]
    return content if entries and all(isinstance(entry, str | Mapping) for entry in entries) else value


def _literal(value: Any) -> Any:
    """The list or mapping that a text is in Python or JSON; whatever else as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            content = read(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return content if isinstance(content, list | Mapping) else value
    return value


def choices_of(value: Any) -> Choices:
    """The choices of a row.

    Raises:
        ShapeError: if they are not of an accepted shape, too few or too many.
    """
    labels: tuple[str, ...] = ()
    read = _literal(value)
    if isinstance(read, Mapping) and {"text", "label"} <= set(read):
        labels, read = tuple(map(str, read["label"])), read["text"]
        if not isinstance(read, list | tuple) or len(labels) != len(read):
            raise ShapeError(f"expected as many labels as choices, found {found(value)}")
    elif isinstance(read, Mapping):
        given = {str(key): text for key, text in read.items() if text is not None}
        letters = tuple(ascii_uppercase[: len(given)])
        if tuple(key.upper() for key in given) != letters:
            raise ShapeError(
                f"expected choices by letter (A, B, ...), found a mapping with {', '.join(map(str, read))}"
            )
        labels, read = letters, list(given.values())
    if not isinstance(read, list | tuple):
        raise ShapeError(f"expected a list of choices, found {found(value)}")
    if not 2 <= len(read) <= len(ascii_uppercase):
        raise ShapeError(
            f"expected 2 to {len(ascii_uppercase)} choices, found {len(read)}. Leave such rows out (`where`), or score them in a task "
            "without `choices`"
        )
    return Choices(tuple(_choice_text(entry) for entry in read), labels)


def _choice_text(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # what the model reads is what it is compared with
    try:
        return text_of(value)
    except ShapeError as error:
        raise ShapeError(f"among the choices {error}") from None


# --------------------------------------------------------------------------------------------------------------------
# Which choice is right
# --------------------------------------------------------------------------------------------------------------------
def readings(value: Any, choices: Choices) -> dict[str, int]:
    """{kind of answer: index of the choice that it then names}, for every kind that the value can be."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return {}
    texts, count = [text.strip() for text in choices.texts], len(choices.texts)
    if isinstance(value, int):
        seen = {"text": texts.index(str(value))} if str(value) in texts else {}
        return seen | ({"index": value} if 0 <= value < count else {})
    value = value.strip()
    folded = [text.casefold() for text in texts]
    seen = {}
    if value in texts:
        seen["text"] = texts.index(value)
    elif folded.count(value.casefold()) == 1:
        seen["text"] = folded.index(value.casefold())
    if choices.labels:  # "1" to "4" are labels in ARC, and no indices
        return seen | ({"label": choices.labels.index(value)} if value in choices.labels else {})
    if lettered := re.fullmatch(r"\(?([A-Za-z])\)?[.:)]?(?:\s+(.+))?", value, flags=re.DOTALL):
        letter, rest = ascii_uppercase.index(lettered[1].upper()), lettered[2]
        # "B. whale" is a letter if the second choice is whale; "a whale" names no letter
        if letter < count and (rest is None or (re.match(r"\(?\w[.:)]", value) and rest.casefold() == folded[letter])):
            seen["letter"] = letter
    if re.fullmatch(r"\d+", value) and int(value) < count:
        seen["index"] = int(value)
    return seen


def right_choices(rows: Iterable[tuple[str, Any, Choices]], kind: str | None = None) -> dict[str, tuple[int, ...]]:
    """{row: indices of the right choices}, where the whole column says what its answers are.

    rows: (row's name, answer, choices) of the column. kind: one of `ANSWER_KINDS`, if the suite says it.

    Raises:
        ShapeError: naming the row, for an answer that names no choice, or may name several.
    """
    asked = [
        (row, entry, choices, readings(entry, choices))
        for row, value, choices in rows
        for entry in _entries(value, row)
    ]
    for row, value, choices, seen in asked:
        if not seen or (kind is not None and kind not in seen):
            raise ShapeError(f"item {row}: {_names_none(value, choices, kind)}")
    common = [kind] if kind else [name for name in ANSWER_KINDS if all(name in seen for *_, seen in asked)]
    chosen: dict[str, tuple[int, ...]] = {}
    for row, value, choices, seen in asked:
        names = {seen[name]: name for name in (common or seen)}
        if len(names) > 1:
            first, second = sorted(names)[:2]
            raise ShapeError(
                f"item {row}: the answer {found(value)} may be the {names[first]} of choice {found(choices.texts[first])} or the "
                f"{names[second]} of choice {found(choices.texts[second])}. Say which in the suite: `answer_is: {names[first]}` or "
                f"`answer_is: {names[second]}`"
            )
        chosen[row] = (*chosen.get(row, ()), *names)
    return chosen


def _entries(value: Any, row: str) -> Sequence[Any]:
    value = _unwritten(value)
    if isinstance(value, list | tuple):
        if not value:
            raise ShapeError(f"item {row}: expected an answer, found an empty list. Drop the row")
        return value
    return [value]


def _names_none(value: Any, choices: Choices, kind: str | None) -> str:
    shown = ", ".join(found(text) for text in choices.texts[:4]) + (", ..." if len(choices.texts) > 4 else "")
    if value is None:
        return "expected the right choice, found null. Test splits hide theirs: choose another split, or drop the row"
    numeral = isinstance(value, int) or (isinstance(value, str) and re.fullmatch(r"-?\d+", value.strip()))
    if numeral and not isinstance(value, bool) and kind in (None, "index") and not choices.labels:
        hidden = " (test splits hide theirs)" if int(value) < 0 else ""
        return f"the answer is {found(value)}, and there are the choices {shown}: an index must be 0 to {len(choices.texts) - 1}{hidden}"
    wanted = {
        None: "an index from 0, a letter, or a choice's text",
        "text": "a choice's text",
        "index": "an index from 0",
    }
    return (
        f"the answer {found(value)} names none of the choices {shown}: expected "
        f"{wanted.get(kind, f'a {kind}')}. Repair or drop the row"
    )
