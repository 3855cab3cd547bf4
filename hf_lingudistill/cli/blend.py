"""`lingudistill blend`: weights between two VLMs, which keep what is asked with most language."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..exit_codes import DOES_NOT_FIT, DONE
from .arguments import add_before_and_original, add_loading, below_one, loading
from .command import Command
from .errors import bad_input, failed


def add_arguments(parser: ArgumentParser) -> None:
    add_before_and_original(
        parser, before="the VLM at weight 0", original="the LM that both were built from", required=True
    )
    parser.add_argument(
        "--after", required=True, metavar="VLM", help="the VLM at weight 1: distilled, or any of the same build"
    )
    parser.add_argument(
        "--suite", default="quick", metavar="quick|demo|paper|PATH.yaml", help="what to score; default: quick"
    )
    parser.add_argument(
        "--keep",
        required=True,
        metavar="CONDITION",
        help="such as 'vision >= before - 0.01': a task or group of the report, >= or <=, and a number or before, after, original with or "
        "without + or - a number; several joined by `and`",
    )
    parser.add_argument("--output_dir", required=True, help="where the front, the evaluation and model/ go")
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=[0.2, 0.4, 0.6, 0.8],
        metavar="W",
        help="shares of the VLM after; default: 0.2 0.4 0.6 0.8 (0 and 1 are scored too)",
    )
    parser.add_argument(
        "--shares",
        nargs="+",
        metavar="SHARES",
        help="uniform: one weight for all; drift: more where a layer has moved further from the original; default: both, or uniform "
        "without --original",
    )
    parser.add_argument("--most", metavar="SCORE", help="what most language is; default: KL to the original on text")
    parser.add_argument("--batch_size", type=int, default=8)
    add_loading(parser)


def run(args: Namespace) -> int:
    if wrong := below_one(args, "batch_size"):
        return bad_input(wrong)
    from ..labs.blend import blend

    try:
        front = blend(
            args.before,
            args.after,
            args.suite,
            args.keep,
            args.output_dir,
            original=args.original,
            weights=args.weights,
            shares=args.shares,
            most=args.most,
            batch_size=args.batch_size,
            **loading(args),
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return failed(error)
    return DONE if front["chosen"] else DOES_NOT_FIT


COMMAND = Command(
    name="blend",
    help="between two VLMs, the weights that keep what is asked and have most language",
    description="Score weights between two VLMs of one build on a suite, whose items are drawn once; write the front, and save the model "
    "that meets --keep with most language. A rerun goes on where the last one stopped. Exit code: 0 saved, 1 no weight does, 2 bad "
    "input.",
    add_arguments=add_arguments,
    run=run,
)
