"""Multiple choice answered in free text: an `evaluate` module."""

import re
import string
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Which of the choices an answer names, and whether that is the right one. An answer names a choice by its letter ("B", "(B)",
"B. ...", "the answer is B", "option B", "**B**") or by its text. What names no choice, or more than one, is wrong. Where a choice's text is itself the
letter of another one (the labels in a diagram), letters would mean two things: then its text alone names a choice.
"""

_INPUTS = """
Args:
    predictions: list of n answers.
    references: list of n lists, each holding the right choice: its text, or its letter where letters name choices.
    choices: list of n lists of texts, in the order of the letters A, B, ...
Returns:
    multiple_choice: mean over items. scores: list of n, 0.0 or 1.0. unparsed: number of answers that name no choice.
"""

LETTERS = string.ascii_uppercase
# Not \W, which would take the vowel signs of Indic scripts for punctuation
_OUTER = string.punctuation + "“”„‘’«»…–—·。，、！？：；（）「」"


def _lower(text: str) -> str:
    return " ".join(text.lower().split())


def _normal(text: str) -> str:
    """Lower case, single spaces, no punctuation at either end; the sign of a number, and what is punctuation only, stay."""
    text = _lower(text)
    outer = re.escape(_OUTER)
    return re.sub(rf"^(?:(?!-\d)[{outer}\s])+|[{outer}\s]+$", "", text) or text


def lettered(choices: list[str]) -> bool:
    """Whether a letter names a choice: not where one choice's text is the letter of another."""
    letters = list(LETTERS.lower()[: len(choices)])
    return not any(_normal(text) in letters and _normal(text) != letters[i] for i, text in enumerate(choices))


def _by_letter(answer: str, letters: str) -> str | None:
    """The letter by which an answer names a choice, as a capital, or None."""
    says = (
        r"(?i:(?:answer|option|choice)(?:\s+(?:is|(?:would|will|should|must)\s+be))?\s*:?\s*(?:(?:option|choice)\s+)?)"
    )
    not_i = letters.replace("I", "") or letters  # "I, for one, ..."
    patterns = [
        rf"^\s*\(?([{letters}{letters.lower()}])\)?\s*[.:)]?\s*$",
        rf"^\s*A:.*(?i:answer\s+is)\s*\(?([{letters}])\)?\s*[.)]?\s*$",  # of a question and its answer: "A: The answer is B"
        rf"^\s*\(?([{letters}])\)?[.:)]\s",
        rf"^\s*\(?([{letters}])\)?[ \t]*\n",  # alone on its line
        rf"^\s*\(?([{not_i}])\)?\s*(?:,|\s[-\u2013\u2014])\s",
        # In capitals: "the answer is a circle" names no letter. At an end or a stop, or no article, whatever follows
        rf"{says}\(?([{letters}])\)?(?=\s*(?:$|[.,:;)]))",
    ]
    # "Answer: A dog" and "I see ..." are words
    if plain := letters.translate({ord(article): None for article in "AI"}):
        patterns.append(rf"{says}\(?([{plain}])\)?(?!\w)")
    found = next((match for pattern in patterns if (match := re.search(pattern, answer)) is not None), None)
    return None if found is None else found.group(1).upper()


def _joins_letters(answer: str, letters: str) -> bool:
    """Whether an answer names two choices in a row: "(A) or (B)", "B, C", "option A and option B"."""
    one = rf"(?<!\w)\(?([{letters}])\)?[.:)]?"
    another = rf"(?:(?i:option|choice)\s+)?\(?([{letters}])(?!\w)(\s+[^\W\d_A-Z]\w*)?"
    return any(
        found.group(1) != found.group(2) and not (found.group(2) in "AI" and found.group(3))  # "B, a rectangle"
        for found in re.finditer(rf"{one}\s*(?:,|/|&|\bor\b|\band\b)\s*{another}", answer)
    )


def _alone(answer: str, letters: str) -> str | None:
    """The one letter that an answer names a choice by, and by nothing else: "It is B." An A or an I is a word elsewhere than at the end."""
    if re.search(r"(?i)\b(?:not|neither|nor|never|no|or|except)\b|n['\u2019]t\b", answer) or _joins_letters(
        answer, letters
    ):
        return None
    found = re.findall(rf"(?<![\w'\u2019])([{letters}])(?![\w'\u2019])", answer)
    last = re.search(rf"(?<![\w'\u2019])[{letters}](?=[.!)]*\s*$)", answer)
    kept = {letter for letter in found if letter not in "AI"} | ({last.group()} if last else set())
    return kept.pop() if len(kept) == 1 else None


def named(answer: str, choices: list[str]) -> int | None:
    """The index of the one choice that an answer names, or None."""
    letters = LETTERS[: len(choices)]
    for form in (_lower, _normal):  # as it stands first: "C++" is not "C"
        texts = [form(choice) for choice in choices]
        if form(answer) in texts:
            return texts.index(form(answer))
    bare = re.sub(r"[*_`$]+|\\boxed\{([^{}]*)\}", r"\1", answer)  # "**B**", "\boxed{B}"
    if lettered(choices) and (letter := _by_letter(bare, letters)) is not None:
        return None if _joins_letters(bare, letters) else letters.index(letter)
    rest, inside = answer.lower(), []
    for index in sorted(range(len(texts)), key=lambda index: -len(texts[index])):
        # Taken out once found: who says "dark red" does not also say "red"
        rest, times = re.subn(rf"(?<!\w){re.escape(texts[index])}(?!\w)", "", rest) if texts[index] else (rest, 0)
        inside += [index] if times else []
    if not inside and lettered(choices):
        alone = _alone(bare, letters)
        return None if alone is None else letters.index(alone)
    return inside[0] if len(inside) == 1 else None


class MultipleChoice(evaluate.Metric):  # type: ignore[misc]
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": text, "references": datasets.List(text), "choices": datasets.List(text)}
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], choices: list[list[str]]
    ) -> dict[str, Any]:
        scores: list[float] = []
        unparsed = 0
        for answer, accepted, options in zip(predictions, references, choices, strict=True):
            given = named(answer, options)
            unparsed += given is None
            right = {named(text, options) for text in accepted}
            # By text, not by index: of two choices with the same text, both are right
            texts = {_lower(options[index]) for index in right if index is not None}
            scores.append(float(given is not None and _lower(options[given]) in texts))
        return {"multiple_choice": sum(scores) / len(scores), "scores": scores, "unparsed": unparsed}
