"""`lingudistill score-mix`: which sources of a mixture the teacher should speak on."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..exit_codes import DONE
from .arguments import LM_ALONE, add_loading, add_pair, below_one, loading
from .command import Command
from .errors import bad_input, failed


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="datasets (file, folder, Hub id), or recipes with a `datasets:` section",
    )
    add_pair(parser, required=True, teacher=LM_ALONE)
    parser.add_argument(
        "--output_dir", required=True, help="where mix.json, rows.jsonl, datasets.yaml and the plot go"
    )
    parser.add_argument("--rows", type=int, default=64, help="of each source, drawn at random; default: 64")
    parser.add_argument("--split", default="train", help="of datasets that no recipe names; default: train")
    parser.add_argument("--max_answer_tokens", type=int, default=256, help="of each answer; default: 256")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument(
        "--max_dependence",
        type=float,
        default=0.5,
        help="nats per token that the image may be worth where the teacher speaks; default: 0.5",
    )
    parser.add_argument(
        "--min_language",
        type=float,
        default=10.0,
        help="nats per row that the teacher must leave open over the answer; default: 10",
    )
    parser.add_argument("--json", action="store_true", help="print the scores of the sources as JSON")
    add_loading(parser)


def run(args: Namespace) -> int:
    if wrong := below_one(args, "max_answer_tokens", "batch_size"):
        return bad_input(wrong)
    from ..compatibility import named_teacher
    from ..folders import check
    from ..labs.json_text import as_json
    from ..labs.score_mix import FILES, Limits, as_text, read_sources, score_mix, write_report

    try:
        options = loading(args)
        check(args.output_dir, *FILES, by="score-mix")
        teacher = args.teacher or named_teacher(args.student, trust_remote_code=args.trust_remote_code)
        report = score_mix(
            args.student,
            teacher,
            read_sources(args.data, rows=args.rows, split=args.split),
            args.output_dir,
            limits=Limits(args.max_dependence, args.min_language),
            max_answer_tokens=args.max_answer_tokens,
            batch_size=args.batch_size,
            **options,
        )
        written = write_report(report, Path(args.output_dir))
    except (ValueError, OSError) as error:
        return failed(error)
    print(f"Written: {', '.join(map(str, written))}", file=sys.stderr)
    print(as_json(report["sources"]) if args.json else as_text(report))
    return DONE


COMMAND = Command(
    name="score-mix",
    help="which sources of a mixture should the teacher speak on?",
    description="Draw rows of every source; measure what their images are worth to the student (its loss on the answer with "
    "them and with grey ones in their place) and how much language they hold (answer length, entropy of the teacher); propose `distill` flags. A rerun goes on "
    "where the last one stopped. Exit code: 0 done, 2 bad input.",
    add_arguments=add_arguments,
    run=run,
)
