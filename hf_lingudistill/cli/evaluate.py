"""`lingudistill evaluate`: how much language was lost, how much came back, at what cost to vision."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace

from ..exit_codes import DONE
from .arguments import add_before_and_original, add_loading, below_one, loading
from .command import Command
from .errors import bad_input, failed


def add_arguments(parser: ArgumentParser) -> None:
    add_before_and_original(
        parser, before="the VLM before distillation", original="the LM that it was built from, no VLM"
    )
    parser.add_argument("--base", metavar="VLM", help="the VLM before it was tuned further, as a second yardstick")
    parser.add_argument("--after", metavar="VLM", help="the VLM after distillation")
    parser.add_argument(
        "--model", metavar="NAME=PATH", action="append", default=[], help="a further model; may be given again"
    )
    parser.add_argument(
        "--suite",
        default="quick",
        metavar="quick|demo|paper|PATH.yaml",
        help="what to score; default: quick (no Hub, no further package)",
    )
    parser.add_argument("--output_dir", required=True, help="where the report and the item cache go")
    parser.add_argument(
        "--reference",
        metavar="NAME|VLM",
        help="the model that tells which tokens of an answer depend on the image; default: before",
    )
    parser.add_argument(
        "--compare",
        metavar="NAME",
        action="append",
        default=[],
        help="a model that all others are compared with, besides original and before; may be given again",
    )
    parser.add_argument("--training_log", metavar="FILE", help="a trainer_state.json, for the plot of training curves")
    parser.add_argument("--batch_size", type=int, default=8)
    add_loading(parser)


def run(args: Namespace) -> int:
    models = {name: getattr(args, name) for name in ("original", "base", "before", "after") if getattr(args, name)}
    for entry in args.model:
        name, separator, path = entry.partition("=")
        if not (separator and path and re.fullmatch(r"[\w.-]+", name)) or name in models or name == "reference":
            return bad_input(
                f"--model {entry!r}: expected NAME=PATH with a new name of letters, digits, '.', '-' and '_'."
            )
        models[name] = path
    if not models:
        return bad_input(
            "No model to score: pass --student (the VLM before), and --teacher and --after where you have them."
        )
    if wrong := below_one(args, "batch_size"):
        return bad_input(wrong)
    from ..labs.evaluation import evaluate_models

    try:
        evaluate_models(
            models,
            args.suite,
            args.output_dir,
            reference=args.reference,
            compare=args.compare,
            batch_size=args.batch_size,
            **loading(args),
            training_log=args.training_log,
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return failed(error)
    return DONE


COMMAND = Command(
    name="evaluate",
    help="score models on the same items: language, vision, language about images",
    description="Score any number of models on the same items and write report.json, report.md and plots. A rerun goes "
    "on where the last one stopped. Exit code: 0 done, 2 bad input.",
    add_arguments=add_arguments,
    run=run,
)
