"""`lingudistill diagnose`: how far the VLM's language model has drifted, and which kv_sharing follows."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..exit_codes import DONE
from .arguments import add_loading, add_pair, below_one, loading
from .command import Command
from .errors import bad_input, failed


def add_arguments(parser: ArgumentParser) -> None:
    add_pair(parser, required=True)
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--texts", metavar="FILE", help=".txt (passages between blank lines) or .jsonl (rows as in a dataset)"
    )
    data.add_argument(
        "--dataset",
        help="file, folder or Hub id, in any format that `distill` takes (docs/data.md)",
    )
    parser.add_argument("--dataset_config", metavar="NAME", help="the configuration of --dataset, if it has several")
    parser.add_argument("--split", help="of --dataset; default: train")
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="PATH",
        help="images or folders to put before texts that have none; `drawn`: pictures drawn on the spot",
    )
    parser.add_argument("--max_rows", type=int, default=48, help="rows of --dataset or --texts to read; default: 48")
    parser.add_argument("--max_answer_tokens", type=int, default=128, help="of each answer; default: 128")
    parser.add_argument("--output_dir", help="where drift.json, drift.txt, drift.png and drift.svg go")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_loading(parser)


def run(args: Namespace) -> int:
    if wrong := below_one(args, "max_answer_tokens"):
        return bad_input(wrong)
    if given := [name for name in ("split", "dataset_config") if getattr(args, name) and not args.dataset]:
        return bad_input(f"--{given[0]} is of --dataset, which is not given: name a dataset, or leave it out.")
    from ..compatibility import named_teacher
    from ..folders import check
    from ..labs.diagnose import FILES, as_text, diagnose, load_prompts, write_report
    from ..labs.json_text import as_json
    from ..sentences import install

    try:
        options = loading(args)
        if args.output_dir:
            check(args.output_dir, *FILES, by="diagnose")
        teacher = args.teacher or named_teacher(args.student, trust_remote_code=args.trust_remote_code)
        prompts = load_prompts(
            texts=args.texts,
            dataset=args.dataset,
            dataset_config=args.dataset_config,
            split=args.split or "train",
            images=args.images,
            max_rows=args.max_rows,
        )
        report = diagnose(
            args.student,
            teacher,
            prompts=prompts,
            max_answer_tokens=args.max_answer_tokens,
            **options,
        )
        if args.output_dir:
            written = write_report(report, Path(args.output_dir))
            print("Written: " + ", ".join(map(str, written)), file=sys.stderr)
            if len(written) == 2:
                print(f"No plot: it needs matplotlib; run {install('eval')}.", file=sys.stderr)
    except (ValueError, OSError) as error:
        return failed(error)
    print(as_json(report) if args.json else as_text(report))
    return DONE


COMMAND = Command(
    name="diagnose",
    help="how far has the VLM's language model drifted, and which kv_sharing follows?",
    description="Compare the VLM's language model with the original, layer by layer; read answers with the original under each "
    "sharing mode; recommend one. A minute on a CPU for 135M parameters. Exit code: 0 done, 2 bad input.",
    add_arguments=add_arguments,
    run=run,
)
