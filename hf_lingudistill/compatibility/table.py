"""What was found, line by line, and how it is printed."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["fits", "note", "misfit"]
TABLE_WIDTH = 100


@dataclass(frozen=True)
class Check:
    """One line of the report.

    student, teacher: the values compared, for display. reason: empty when it fits. fix: empty when there is nothing to
    do.
    """

    name: str
    status: Status
    student: str
    teacher: str
    reason: str = ""
    fix: str = ""

    @property
    def message(self) -> str:
        """The reason and the fix, as one line of text."""
        return f"{self.reason} {self.fix}".strip()


@dataclass(frozen=True)
class CompatibilityReport:
    """What `check_compatibility` found. `print(report)` shows a table.

    Attributes:
        student, teacher: names, for display.
        checks: in the order of the table.
        shared_vocab_size: ids below it have the same token string in both tokenizers (compared one by one) and a row
            in both embeddings. 0 if a tokenizer is missing.
        student_vocab_size, teacher_vocab_size: rows of the token embedding, as the config states them.
        image_token_ids: placeholders of images and videos in the student's input.
        aliases: (student id, teacher id) of tokens that mean the same under two names: what ends an assistant's turn.
        teacher_is_vlm: the teacher is a VLM, whose text half teaches (all of it with kv_sharing='images').
    """

    student: str
    teacher: str
    checks: list[Check]
    shared_vocab_size: int = 0
    student_vocab_size: int = 0
    teacher_vocab_size: int = 0
    image_token_ids: tuple[int, ...] = field(default=())
    aliases: tuple[tuple[int, int], ...] = field(default=())
    teacher_is_vlm: bool = False

    @property
    def misfits(self) -> list[Check]:
        return [check for check in self.checks if check.status == "misfit"]

    @property
    def notes(self) -> list[Check]:
        return [check for check in self.checks if check.status == "note"]

    @property
    def fits(self) -> bool:
        return not self.misfits

    def raise_for_misfit(self) -> None:
        """Do nothing if the pair fits.

        Raises:
            ValueError: with every misfit, one sentence and its fix each.
        """
        messages = [check.message for check in self.misfits]
        if len(messages) == 1:
            raise ValueError(messages[0])
        if messages:
            raise ValueError(f"{len(messages)} reasons why the teacher does not fit:\n- " + "\n- ".join(messages))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, strings and numbers (JSON)."""
        return {
            "student": self.student,
            "teacher": self.teacher,
            "fits": self.fits,
            "shared_vocab_size": self.shared_vocab_size,
            "student_vocab_size": self.student_vocab_size,
            "teacher_vocab_size": self.teacher_vocab_size,
            "image_token_ids": list(self.image_token_ids),
            "aliases": [list(pair) for pair in self.aliases],
            "teacher_is_vlm": self.teacher_is_vlm,
            "checks": [asdict(check) for check in self.checks],
        }

    def __str__(self) -> str:
        values = 36  # 16 + 6 + 2 * 36 and three gaps of two make TABLE_WIDTH
        lines = [*_wrap(f"Student: {self.student}"), *_wrap(f"Teacher: {self.teacher}"), ""]
        rows = [("check", "status", "student", "teacher"), ("-" * 16, "-" * 6, "-" * values, "-" * values)]
        lines += [_row(row, values) for row in rows]
        for check in self.checks:
            lines.append(_row((check.name, check.status, check.student, check.teacher), values))
            if check.reason:
                lines += _wrap(check.reason, indent="    ")
            if check.fix:
                lines += _wrap(f"Fix: {check.fix}" if check.status == "misfit" else check.fix, indent="    ")
        lines += ["", self._verdict()]
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.fits:
            return f"Does not fit: {count(len(self.misfits), 'misfit')}, {count(len(self.notes), 'note')}."
        return f"Fits, with {count(len(self.notes), 'note')}." if self.notes else "Fits."


def count(number: int | None, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, TABLE_WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _row(cells: tuple[str, str, str, str], values: int) -> str:
    name, status, *rest = cells
    shown = [cell if len(cell) <= values else cell[: values - 3] + "..." for cell in rest]
    return "  ".join([f"{name:<16}", f"{status:<6}", *(f"{cell:<{values}}" for cell in shown)]).rstrip()
