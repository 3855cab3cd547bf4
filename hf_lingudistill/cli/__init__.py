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

One module per command, of one shape: `command.Command`. A new one is a module like them and a name in `COMMANDS`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .._quiet import hush_libraries
from .._version import __version__
from ..exit_codes import BROKEN_PIPE, INTERRUPTED, SUMMARY
from ..progress import calm_other_bars
from ..sentences import at_home
from . import blend, check, convert_nanovlm, diagnose, distill, evaluate, plan, publish, score_mix
from .command import TrlCommand
from .errors import check_options

COMMANDS = tuple(
    module.COMMAND for module in (check, distill, evaluate, diagnose, score_mix, blend, plan, publish, convert_nanovlm)
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand, return its exit code. Wrong usage, `--help` and `--version` raise argparse's SystemExit."""
    calm_other_bars()
    hush_libraries()
    arguments = at_home(list(sys.argv[1:] if argv is None else argv))
    if arguments[:1] != ["distill"]:
        # What transformers warns about while a command reads models is in the command's own report, or of no use there
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for command in COMMANDS:
        if isinstance(command, TrlCommand) and arguments[:1] == [command.name]:
            return command.main(arguments[1:])  # argparse must not take any of them for its own
    parser, own = _parsers()
    if arguments and arguments[0] in own:
        check_options(own[arguments[0]], arguments[1:])
    args = parser.parse_args(arguments)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(
            "lingudistill: interrupted; the same command begins again, or goes on where it keeps what it has.",
            file=sys.stderr,
        )
        return INTERRUPTED
    return code


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """-> the parser, and those of the commands by name"""
    parser = argparse.ArgumentParser(
        prog="lingudistill",
        description="Restore the language ability of a vision-language model from the LM that it was built from.",
        epilog=SUMMARY,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hf_lingudistill {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    found: dict[str, argparse.ArgumentParser] = {}
    for command in COMMANDS:
        if isinstance(command, TrlCommand):
            commands.add_parser(command.name, help=command.help, add_help=False)  # for this help only
            continue
        own = commands.add_parser(command.name, help=command.help, description=command.description, allow_abbrev=False)
        command.add_arguments(own)
        own.set_defaults(run=command.run)
        found[command.name] = own
    return parser, found
