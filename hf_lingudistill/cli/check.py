"""`lingudistill check`: does the LM fit as a teacher? Configs and tokenizers only."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace

from ..exit_codes import DOES_NOT_FIT, FITS
from .arguments import add_pair
from .command import Command
from .errors import bad_input


def add_arguments(parser: ArgumentParser) -> None:
    # Either way of naming them; `run` sees that each is named once
    parser.add_argument(
        "pair",
        metavar="VLM [LM]",
        nargs="*",
        default=[],
        help="student and teacher, in place of --student and --teacher",
    )
    add_pair(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="allow configs and tokenizers to run code from their repository",
    )
    parser.add_argument("--student_revision", metavar="REVISION", help="branch, tag or commit of STUDENT")
    parser.add_argument("--teacher_revision", metavar="REVISION", help="branch, tag or commit of TEACHER")


def run(args: Namespace) -> int:
    from ..compatibility import UnreadableModelError, check_compatibility, named_teacher

    named = [*args.pair, None, None]
    if len(args.pair) > 2 or (args.student and args.pair) or (args.teacher and args.pair[1:]):
        return bad_input(
            f"Name the pair as `check VLM LM`, or with --student and --teacher: {' '.join(args.pair)!r} is more than that."
        )
    student, teacher = args.student or named[0], args.teacher or named[1]
    if student is None:
        return bad_input("No student: pass --student VLM, and --teacher LM where its config or card does not name it.")
    try:
        if guessed := teacher is None:
            teacher = named_teacher(student, trust_remote_code=args.trust_remote_code)
            print(
                f"Teacher named by the student's config or card: {teacher}",
                file=sys.stderr if args.json else sys.stdout,
            )
        report = check_compatibility(
            student,
            teacher,
            trust_remote_code=args.trust_remote_code,
            student_revision=args.student_revision,
            teacher_revision=args.teacher_revision,
        )
    except UnreadableModelError as error:
        return bad_input(str(error))
    if args.json:
        print(json.dumps({**report.to_dict(), "teacher_guessed": guessed}, indent=2))
    else:
        print(report)
    return FITS if report.fits else DOES_NOT_FIT


COMMAND = Command(
    name="check",
    help="does this language model fit as a teacher?",
    description="Compare configs and tokenizers of a student and a teacher. No weights are read. "
    "Exit code: 0 it fits, 1 it does not fit, 2 bad input.",
    add_arguments=add_arguments,
    run=run,
)
