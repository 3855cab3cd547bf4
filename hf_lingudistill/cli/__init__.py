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
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from .._quiet import hush_libraries
from .._version import __version__
from ..exit_codes import BROKEN_PIPE, INTERRUPTED, SUMMARY
from ..progress import calm_other_bars
from ..sentences import at_home, did_you_mean
from . import blend, check, convert_nanovlm, diagnose, distill, evaluate, plan, publish, score_mix
from .command import TrlCommand

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
    args = _parser().parse_args(arguments)
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


class _Parser(argparse.ArgumentParser):
    """One that says which option may have been meant."""

    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        known = {name for action in self._every_action() for name in action.option_strings}
        super().error(message + (did_you_mean(found.group(1), known) if found else ""))

    def _every_action(self) -> Iterator[argparse.Action]:
        """Its own, and those of the command that was typed: what a command does not know, its parent names."""
        for action in self._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                yield from (
                    one for name, parser in action.choices.items() if name in sys.argv for one in parser._actions
                )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lingudistill",
        description="Restore the language ability of a vision-language model from the LM that it was built from.",
        epilog=SUMMARY,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hf_lingudistill {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        if isinstance(command, TrlCommand):
            commands.add_parser(command.name, help=command.help, add_help=False)  # for this help only
            continue
        own = commands.add_parser(command.name, help=command.help, description=command.description, allow_abbrev=False)
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return parser
