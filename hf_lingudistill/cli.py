"""The `lingudistill` command.

    lingudistill check ...             does the LM fit as a teacher? Configs and tokenizers only
    lingudistill distill ...           train; the options are those of examples/distill.py
    lingudistill evaluate ...          how much language was lost, how much came back, at what cost to vision
    lingudistill diagnose ...          how far the VLM's language model has drifted, and which kv_sharing follows
    lingudistill score-mix ...         which sources of a mixture the teacher should speak on
    lingudistill blend ...             weights between two VLMs: keep what is asked, with most language
    lingudistill plan ...              memory per device and cost of a step, from configs alone
    lingudistill publish OUT ...       model, card and report to the Hub, and a Space that shows it
    lingudistill convert-nanovlm ...   a nanoVLM checkpoint as a transformers VLM, and back
    lingudistill --version

The pair is named in one way everywhere: --student, the VLM, and --teacher, the LM that it was built from. Exit codes: `exit_codes`.

A subcommand is one function that adds its parser and one that runs it; nothing heavy is imported before it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._quiet import hush_libraries
from ._version import __version__
from .exit_codes import BAD_INPUT, DOES_NOT_FIT, DONE, FITS, NOT_PUBLISHED, SUMMARY
from .progress import calm_other_bars
from .sentences import one_sentence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand, return its exit code. Wrong usage, `--help` and `--version` raise argparse's SystemExit."""
    calm_other_bars()
    hush_libraries()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["distill"], ["plan"]):
        # TrlParser reads these itself, `--help` included: argparse must not take any of them for its own.
        return (_distill if arguments[0] == "distill" else _plan)(arguments[1:])
    args = _parser().parse_args(arguments)
    code: int = args.run(args)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lingudistill",
        description="Restore the language ability of a vision-language model from the LM that it was built from.",
        epilog=SUMMARY,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hf_lingudistill {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        _add_check,
        _add_distill,
        _add_evaluate,
        _add_diagnose,
        _add_score_mix,
        _add_blend,
        _add_plan,
        _add_publish,
        _add_convert_nanovlm,
    ):
        add(commands)
    return parser


def _add_check(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="does this language model fit as a teacher?",
        description="Compare configs and tokenizers of a student and a teacher. No weights are read. "
        "Exit code: 0 it fits, 1 it does not fit, 2 bad input.",
        allow_abbrev=False,
    )
    # Either way of naming them; `_check` sees that each is named once
    parser.add_argument("pair", metavar="VLM [LM]", nargs="*", default=[], help="the same, without their flags")
    _add_pair(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="allow configs and tokenizers to run code from their repository",
    )
    parser.add_argument("--student_revision", metavar="REVISION", help="branch, tag or commit of STUDENT")
    parser.add_argument("--teacher_revision", metavar="REVISION", help="branch, tag or commit of TEACHER")
    parser.set_defaults(run=_check)


def _add_pair(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument(
        "--student", required=required, metavar="VLM", help="the vision-language model: folder or Hub id"
    )
    parser.add_argument(
        "--teacher",
        metavar="LM",
        help="the LM that it was built from, or a VLM, for its text half; default: the one that the config or card names",
    )


def _check(args: argparse.Namespace) -> int:
    # What transformers warns about while it reads configs is in the report, or of no use here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from .compatibility import UnreadableModelError, check_compatibility, named_teacher

    named = [*args.pair, None, None]
    if len(args.pair) > 2 or (args.student and args.pair) or (args.teacher and args.pair[1:]):
        return _bad_input(
            f"Expected one VLM and one LM; {' '.join(args.pair)!r} comes beside --student or --teacher, or is too much."
        )
    student, teacher = args.student or named[0], args.teacher or named[1]
    if student is None:
        return _bad_input(
            "No student: pass --student VLM, and --teacher LM where its config or card does not name it."
        )
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
        return _bad_input(str(error))
    if args.json:
        print(json.dumps({**report.to_dict(), "teacher_guessed": guessed}, indent=2))
    else:
        print(report)
    return FITS if report.fits else DOES_NOT_FIT


def _add_distill(commands: Any) -> None:
    # For `lingudistill --help` only: `main` hands the arguments on before this parser sees them.
    commands.add_parser("distill", help="train; `lingudistill distill --help` lists the options", add_help=False)


def _distill(arguments: list[str]) -> int:
    from .scripts.distill import main as distill

    return distill(arguments)


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score models on the same items: language, vision, language about images",
        description="Score any number of models on the same items and write report.json, report.md and plots. A rerun goes "
        "on where the last one stopped. Exit code: 0 done, 2 bad input.",
        allow_abbrev=False,
    )
    parser.add_argument("--teacher", "--original", dest="original", metavar="LM", help="the LM that it was built from")
    parser.add_argument("--base", metavar="VLM", help="the VLM before it was tuned further, as a second yardstick")
    parser.add_argument("--student", "--before", dest="before", metavar="VLM", help="the VLM before distillation")
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
    _add_loading(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    models = {name: getattr(args, name) for name in ("original", "base", "before", "after") if getattr(args, name)}
    for entry in args.model:
        name, separator, path = entry.partition("=")
        if not (separator and path and re.fullmatch(r"[\w.-]+", name)) or name in models or name == "reference":
            return _bad_input(
                f"--model {entry!r}: expected NAME=PATH with a new name of letters, digits, '.', '-' and '_'."
            )
        models[name] = path
    if not models:
        return _bad_input(
            "No model to score: pass --student (the VLM before), and --teacher and --after where you have them."
        )
    if args.batch_size < 1:
        return _bad_input(f"--batch_size must be at least 1, got {args.batch_size}.")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from .labs.evaluation import evaluate_models

    try:
        evaluate_models(
            models,
            args.suite,
            args.output_dir,
            reference=args.reference,
            compare=args.compare,
            batch_size=args.batch_size,
            **_loading(args),
            training_log=args.training_log,
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return _failed(error)
    return 0


def _add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: bfloat16 on an accelerator that multiplies in it, else float32",
    )
    parser.add_argument("--device", help="such as cuda:0; default: the accelerator, if there is one")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="allow models to run code from their repository"
    )


def _loading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `_add_loading` as arguments of what loads models."""
    import torch

    dtype = getattr(torch, args.dtype) if args.dtype else None
    return {"dtype": dtype, "device": args.device, "trust_remote_code": args.trust_remote_code}


def _add_diagnose(commands: Any) -> None:
    parser = commands.add_parser(
        "diagnose",
        help="how far has the VLM's language model drifted, and which kv_sharing follows?",
        description="Compare the VLM's language model with the original, layer by layer; read answers with the original under each "
        "sharing mode; recommend one. A minute on a CPU for 135M parameters. Exit code: 0 done, 2 bad input.",
        allow_abbrev=False,
    )
    _add_pair(parser, required=True)
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--texts", metavar="FILE", help=".txt (passages between blank lines) or .jsonl (rows as in a dataset)"
    )
    data.add_argument(
        "--dataset",
        help="Hub id or folder; columns messages, prompt and completion, or text, and images if there are any",
    )
    parser.add_argument("--dataset_config", metavar="NAME", help="the configuration of --dataset, if it has several")
    parser.add_argument("--split", default="train", help="of --dataset; default: train")
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="PATH",
        help="images or folders to put before texts that have none, or: drawn",
    )
    parser.add_argument("--max_rows", type=int, default=48, help="rows of --dataset or --texts to read; default: 48")
    parser.add_argument("--max_answer_tokens", type=int, default=128, help="of each answer; default: 128")
    parser.add_argument("--output_dir", help="where drift.json, drift.txt, drift.png and drift.svg go")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_loading(parser)
    parser.set_defaults(run=_diagnose)


def _diagnose(args: argparse.Namespace) -> int:
    if args.max_answer_tokens < 1:
        return _bad_input(f"--max_answer_tokens must be at least 1, got {args.max_answer_tokens}.")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from .compatibility import named_teacher
    from .folders import check
    from .labs.diagnose import FILES, as_text, diagnose, load_prompts, write_report

    try:
        if args.output_dir:
            check(args.output_dir, *FILES, by="diagnose")
        teacher = args.teacher or named_teacher(args.student, trust_remote_code=args.trust_remote_code)
        prompts = load_prompts(
            texts=args.texts,
            dataset=args.dataset,
            dataset_config=args.dataset_config,
            split=args.split,
            images=args.images,
            max_rows=args.max_rows,
        )
        report = diagnose(
            args.student,
            teacher,
            prompts=prompts,
            max_answer_tokens=args.max_answer_tokens,
            **_loading(args),
        )
        if args.output_dir:
            written = write_report(report, Path(args.output_dir))
            print("Written: " + ", ".join(map(str, written)), file=sys.stderr)
            if len(written) == 2:
                print("No plot: it needs matplotlib; run `pip install 'hf_lingudistill[eval]'`.", file=sys.stderr)
    except (ValueError, OSError) as error:
        return _failed(error)
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 0


def _add_score_mix(commands: Any) -> None:
    parser = commands.add_parser(
        "score-mix",
        help="which sources of a mixture should the teacher speak on?",
        description="Draw rows of every source; measure what their images are worth to the student (its loss on the answer with and "
        "without them) and how much language they hold (answer length, entropy of the teacher); propose `distill` flags. A rerun goes on "
        "where the last one stopped. Exit code: 0 done, 2 bad input.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="datasets (file, folder, Hub id), or recipes with a `datasets:` section",
    )
    _add_pair(parser, required=True)
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
    _add_loading(parser)
    parser.set_defaults(run=_score_mix)


def _score_mix(args: argparse.Namespace) -> int:
    for name in ("max_answer_tokens", "batch_size"):
        if getattr(args, name) < 1:
            return _bad_input(f"--{name} must be at least 1, got {getattr(args, name)}.")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from .compatibility import named_teacher
    from .folders import check
    from .labs.score_mix import FILES, Limits, as_text, read_sources, score_mix, write_report

    try:
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
            **_loading(args),
        )
        written = write_report(report, Path(args.output_dir))
    except (ValueError, OSError) as error:
        return _failed(error)
    print(f"Written: {', '.join(map(str, written))}", file=sys.stderr)
    print(json.dumps(report["sources"], indent=2) if args.json else as_text(report))
    return DONE


def _add_blend(commands: Any) -> None:
    parser = commands.add_parser(
        "blend",
        help="between two VLMs, the weights that keep what is asked and have most language",
        description="Score weights between two VLMs of one build on a suite, whose items are drawn once; write the front, and save the model "
        "that meets --keep with most language. A rerun goes on where the last one stopped. Exit code: 0 saved, 1 no weight does, 2 bad "
        "input.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--student", "--before", dest="before", required=True, metavar="VLM", help="the VLM at weight 0"
    )
    parser.add_argument(
        "--after", required=True, metavar="VLM", help="the VLM at weight 1: distilled, or any of the same build"
    )
    parser.add_argument(
        "--teacher", "--original", dest="original", metavar="LM", help="the LM that both were built from"
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
    _add_loading(parser)
    parser.set_defaults(run=_blend)


def _blend(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        return _bad_input(f"--batch_size must be at least 1, got {args.batch_size}.")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from .labs.blend import blend

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
            **_loading(args),
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return _failed(error)
    return DONE if front["chosen"] else DOES_NOT_FIT


def _add_plan(commands: Any) -> None:
    # For `lingudistill --help` only, as with `distill`
    help = "what memory does a run need per device, what does a step cost, on which set-up does it fit?"
    commands.add_parser("plan", help=help, add_help=False)


@dataclass
class PlanArguments:
    """The options of `plan` beside those of a `Setup`."""

    student: str = field(metadata={"help": "The VLM: folder or Hub id.", "metavar": "VLM"})
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "The LM that it was built from; default: the one that the config or card names.",
            "metavar": "LM",
        },
    )
    smallest: bool = field(
        default=False,
        metadata={"help": "Ignore --engine and --gpus: find the fewest devices that fit, up to 64."},
    )
    json: bool = field(default=False, metadata={"help": "Print the plan as JSON, sizes in bytes."})


def _plan(arguments: list[str]) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from trl import TrlParser

    from .labs.plan import PlanError, Setup, make_plan, read_pair, smallest_plan

    parser = TrlParser(
        (PlanArguments, Setup),  # type: ignore[arg-type]
        prog="lingudistill plan",
        description="Memory per device by what takes it, and the cost of a step over supervised fine-tuning, from the configs of "
        "student and teacher alone; docs/scale.md says how good the figures are. "
        "Exit code: 0 it fits, 1 it does not fit, 2 bad input.",
        allow_abbrev=False,
    )
    try:
        args, setup, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        from .compatibility import UnreadableModelError
    except PlanError as error:
        return _bad_input(str(error))
    try:
        student, teacher = read_pair(args.student, args.teacher)
        plan = smallest_plan(student, teacher, setup) if args.smallest else make_plan(student, teacher, setup)
    except (PlanError, UnreadableModelError) as error:
        return _bad_input(str(error))
    if plan is None:
        print(f"lingudistill: no set-up of up to 64 devices of {setup.gpu_memory:g} GiB fits.", file=sys.stderr)
        return DOES_NOT_FIT
    print(json.dumps(plan.to_dict(), indent=2) if args.json else plan)
    return FITS if plan.fits else DOES_NOT_FIT


def _add_publish(commands: Any) -> None:
    parser = commands.add_parser(
        "publish",
        help="send a saved model to the Hub, with its card",
        description="Send a saved model to the Hub: plain weights, processor, a model card rendered from the run's record and the "
        "evaluation's report, plots and recipe. Run again after a failure, it sends what is missing. The token comes from "
        "`hf auth login` or HF_TOKEN. Exit code: 0 published, 2 bad input, 3 not published.",
        allow_abbrev=False,
    )
    parser.add_argument("output_dir", metavar="OUT", help="the folder of the saved model, or OUT of an embedded demo")
    parser.add_argument("--repo_id", required=True, metavar="ORG/NAME", help="the model's repository; made if need be")
    parser.add_argument("--private", action="store_true", help="make the repository (and the Space) private")
    parser.add_argument(
        "--report", metavar="DIR", help="what `lingudistill evaluate` wrote; default: looked for in OUT"
    )
    parser.add_argument(
        "--student",
        "--before",
        dest="before",
        metavar="ORG/VLM",
        help="the VLM before; default: what the run's facts say",
    )
    parser.add_argument(
        "--teacher", "--original", dest="original", metavar="ORG/LM", help="the original LM; default: what they say"
    )
    parser.add_argument("--license", metavar="ID", help="a licence's code on the Hub; default: that of the VLM before")
    parser.add_argument("--tag", help="a name for this commit; default: lingudistill- and its first digits")
    parser.add_argument("--revision", metavar="BRANCH", help="default: main")
    parser.add_argument("--space", metavar="ORG/SPACE", help="also publish the Space that shows before and after")
    parser.add_argument("--space_files", metavar="DIR", help="the Space's app; default: examples/space of the clone")
    parser.add_argument(
        "--dry_run", action="store_true", help="list what would be sent and print the card; send nothing"
    )
    parser.set_defaults(run=_publish)


def _publish(args: argparse.Namespace) -> int:
    from .hub.manifest import PublishError, command_for, model_manifest
    from .hub.publish import publish, whole_name
    from .hub.space import space_manifest

    command = command_for(args.output_dir, args.repo_id, private=args.private)
    command += "".join(
        f" --{name} {shlex.quote(value)}"
        for name in ("report", "before", "original", "license", "tag", "revision", "space", "space_files")
        if (value := getattr(args, name))
    )
    try:
        repo_id = args.repo_id if args.dry_run else whole_name(args.repo_id, command)
    except PublishError as error:
        return _not_published(error)
    try:
        manifest = model_manifest(
            args.output_dir,
            repo_id,
            private=args.private,
            report=args.report,
            base_model=args.before,
            teacher=args.original,
            license=args.license,
            revision=args.revision,
            tag=args.tag,
            command=command,
            space=args.space,
        )
        manifests = [manifest]
        if args.space:
            manifests.append(
                space_manifest(
                    manifest, args.space, before=args.before, original=args.original, files=args.space_files
                )
            )
    except PublishError as error:
        return _bad_input(str(error))
    print("\n\n".join(map(str, manifests)))
    if args.dry_run:
        print(f"\n{manifest.text('README.md')}")
        return 0
    try:
        for manifest in manifests:
            done = publish(manifest)
            print(f"{done.url}: {len(done.sent)} of {len(manifest.items)} files sent, {done.tag or done.commit[:8]}")
            if done.kept:
                print(f"  kept as edited on the Hub, in README.md: {', '.join(done.kept)}")
    except PublishError as error:
        return _not_published(error)
    return 0


def _add_convert_nanovlm(commands: Any) -> None:
    parser = commands.add_parser(
        "convert-nanovlm",
        help="a nanoVLM checkpoint as a transformers VLM, and back",
        description="Write a nanoVLM checkpoint as a VLM that AutoModelForImageTextToText and AutoProcessor load without further "
        "code; docs/nanovlm.md says what is equal and what is not. Nothing is overwritten. Exit code: 0 done, 2 bad input.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="folder or Hub id with config.json and model.safetensors")
    parser.add_argument("destination", metavar="DST", help="a folder that does not exist or is empty")
    parser.add_argument("--reverse", action="store_true", help="write a converted model back for nanoVLM's own tools")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="the tokenizer before nanoVLM's own tokens, folder or Hub id; default: the one that the config names",
    )
    parser.add_argument("--revision", help="branch, tag or commit of SRC")
    parser.set_defaults(run=_convert_nanovlm)


def _convert_nanovlm(args: argparse.Namespace) -> int:
    if args.reverse and args.tokenizer:
        return _bad_input("--tokenizer has no use with --reverse: nanoVLM's checkpoints hold none.")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from .labs.nanovlm import NanoVLMError, from_nanovlm, to_nanovlm

    try:
        if args.reverse:
            done = to_nanovlm(args.source, args.destination, revision=args.revision)
        else:
            done = from_nanovlm(args.source, args.destination, tokenizer=args.tokenizer, revision=args.revision)
    except NanoVLMError as error:
        return _bad_input(" ".join(str(error).split()))
    except OSError as error:
        return _failed(error)
    print(done)
    return DONE


def _not_published(error: Exception) -> int:
    print(f"lingudistill: not published. {error}", file=sys.stderr)
    return NOT_PUBLISHED


def _failed(error: Exception) -> int:
    """One sentence for whatever was raised, or its traceback. Call it where the exception is handled."""
    if os.environ.get("LINGUDISTILL_DEBUG") == "1":
        raise error
    return _bad_input(one_sentence(error) + " (LINGUDISTILL_DEBUG=1 shows the traceback)")


def _bad_input(message: str) -> int:
    print(f"lingudistill: {message}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    raise SystemExit(main())
