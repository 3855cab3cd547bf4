"""`lingudistill plan`: memory per device and cost of a step, from configs alone."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field

from ..exit_codes import DOES_NOT_FIT, FITS
from .arguments import LM, VLM
from .command import TrlCommand
from .errors import bad_input, check_options


@dataclass
class PlanArguments:
    """The options of `plan` beside those of a `Setup`."""

    student: str = field(metadata={"help": VLM, "metavar": "VLM"})
    teacher: str | None = field(default=None, metadata={"help": LM, "metavar": "LM"})
    smallest: bool = field(
        default=False,
        metadata={"help": "Find the fewest devices that fit, up to 64, in place of --engine and --gpus."},
    )
    json: bool = field(default=False, metadata={"help": "Print the plan as JSON, sizes in bytes."})


def main(arguments: list[str]) -> int:
    from trl import TrlParser

    from ..labs.plan import PlanError, Setup, make_plan, read_pair, smallest_plan
    from ..scripts.arguments import OptionHelp, negated, with_on_and_off

    parser = TrlParser(
        (PlanArguments, Setup),  # type: ignore[arg-type]
        prog="lingudistill plan",
        description="Memory per device by what takes it, and the cost of a step over supervised fine-tuning, from the configs of "
        "student and teacher alone; docs/scale.md says how good the figures are. "
        "Exit code: 0 it fits, 1 it does not fit, 2 bad input.",
        allow_abbrev=False,
        formatter_class=OptionHelp,
    )
    check_options(parser, arguments)
    try:
        args, setup, unknown = parser.parse_args_into_dataclasses(
            with_on_and_off(negated(parser), arguments), return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    except PlanError as error:
        return bad_input(str(error))
    from ..compatibility import UnreadableModelError  # after the help, which needs no transformers

    try:
        student, teacher = read_pair(args.student, args.teacher)
        plan = smallest_plan(student, teacher, setup) if args.smallest else make_plan(student, teacher, setup)
    except (PlanError, UnreadableModelError) as error:
        return bad_input(str(error))
    if plan is None:
        print(f"lingudistill: no set-up of up to 64 devices of {setup.gpu_memory:g} GiB fits.", file=sys.stderr)
        return DOES_NOT_FIT
    print(json.dumps(plan.to_dict(), indent=2) if args.json else plan)
    return FITS if plan.fits else DOES_NOT_FIT


COMMAND = TrlCommand(
    name="plan",
    help="what memory does a run need per device, what does a step cost, on which set-up does it fit?",
    main=main,
)
