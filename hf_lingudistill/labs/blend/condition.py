"""The condition of `--keep`, such as `vision >= before - 0.01`: read strictly, and asked of a report.

condition = clause { "and" clause }
clause    = score (">=" | "<=") (number | model [("+" | "-") number])
score     = the name of a task in the report, or of a group whose tasks share one metric: `vision`, `language`, `grounded`
model     = "before" | "after" | "original"
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.report import GROUPS, difference

MODELS = ("before", "after", "original")
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_CLAUSE = re.compile(
    rf"(?P<score>[A-Za-z][\w./-]*)\s*(?P<relation>>=|<=)\s*"
    rf"(?:(?P<model>[A-Za-z]+)(?:\s*(?P<sign>[+-])\s*(?P<offset>{_NUMBER}))?|(?P<number>-?{_NUMBER}))"
)


@dataclass(frozen=True)
class Clause:
    """`score` at least (or at most) `number`, or the same score of `model` plus `number`."""

    score: str
    at_least: bool
    model: str | None
    number: float

    def holds(self, value: float, reference: float | None) -> bool:
        bound = self.number + (0.0 if reference is None else reference)
        # The same model compared with itself must not fall by the last bit of a sum
        return value >= bound - 1e-12 if self.at_least else value <= bound + 1e-12

    def __str__(self) -> str:
        relation = ">=" if self.at_least else "<="
        if self.model is None:
            return f"{self.score} {relation} {self.number:g}"
        offset = f" {'-' if self.number < 0 else '+'} {abs(self.number):g}" if self.number else ""
        return f"{self.score} {relation} {self.model}{offset}"


@dataclass(frozen=True)
class Condition:
    """All of its clauses."""

    clauses: tuple[Clause, ...]

    def holds(self, tasks: Sequence[Mapping[str, Any]], model: str) -> bool:
        """Whether a model of a report meets all clauses.

        Raises:
            ValueError: if a score is not in the report.
        """
        return all(
            clause.holds(
                score_of(tasks, clause.score, model),
                None if clause.model is None else score_of(tasks, clause.score, clause.model),
            )
            for clause in self.clauses
        )

    def holds_surely(self, tasks: Sequence[Mapping[str, Any]], model: str) -> bool | None:
        """Whether the worse end of each interval meets its clause too: of the paired difference to the other model, or of the score
        where the clause names a number. None where some clause has no interval: a group of several tasks, and a pair of models that
        the report does not compare."""
        found = [_worse_end_holds(clause, tasks, model) for clause in self.clauses]
        return False if False in found else None if None in found else True

    def __str__(self) -> str:
        return " and ".join(map(str, self.clauses))


def _worse_end_holds(clause: Clause, tasks: Sequence[Mapping[str, Any]], model: str) -> bool | None:
    named = tasks_named(tasks, clause.score)
    if model == clause.model:
        return clause.holds(0.0, None)
    if len(named) > 1:
        return None
    interval = named[0]["scores"][model] if clause.model is None else difference(named[0], model, clause.model)
    end = None if interval is None else interval["low" if clause.at_least else "high"]
    return None if end is None or not math.isfinite(end) else clause.holds(end, None)


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        ValueError: saying which part is not understood, and what is.
    """
    clauses = []
    for part in re.split(r"\s+and\s+", text.strip()):
        match = _CLAUSE.fullmatch(part.strip())
        if match is None or (match["model"] and match["model"] not in MODELS):
            raise ValueError(
                f"--keep {text!r}: {part.strip()!r} is not understood; expected SCORE >= MODEL - NUMBER (or <=, +, or a number alone), "
                f"joined by `and`, where MODEL is {', '.join(MODELS)}: for example 'vision >= before - 0.01'."
            )
        offset = float(match["number"] or match["offset"] or 0)
        clauses.append(
            Clause(
                match["score"], match["relation"] == ">=", match["model"], -offset if match["sign"] == "-" else offset
            )
        )
    return Condition(tuple(clauses))


def tasks_named(tasks: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The task of this name, or the tasks of this group.

    Raises:
        ValueError: if there is none, or the tasks of the group are of several metrics, whose mean would say nothing.
    """
    exact = [task for task in tasks if task["name"] == name]
    found = exact or [task for task in tasks if task["group"] == name]
    known = ", ".join(task["name"] for task in tasks)
    if not found:
        what = "has no task" if name in GROUPS else "has neither a task nor a group"
        raise ValueError(f"The suite {what} {name!r}; there are {known}.")
    kinds = sorted(
        {f"{task['metric']} ({'higher' if task['higher_is_better'] else 'lower'} is better)" for task in found}
    )
    if len(kinds) > 1:
        raise ValueError(
            f"The group {name!r} holds several metrics ({', '.join(kinds)}): name one of its tasks, {known}."
        )
    return found


def score_of(tasks: Sequence[Mapping[str, Any]], name: str, model: str) -> float:
    """A model's score on a task, or its mean over the tasks of a group.

    Raises:
        ValueError: as `tasks_named`, or if the model was not scored there.
    """
    values = []
    for task in tasks_named(tasks, name):
        if model not in task["scores"]:
            raise ValueError(f"{task['name']} has no score of {model!r}: choose another model or another score.")
        values.append(float(task["scores"][model]["value"]))
    return sum(values) / len(values)
