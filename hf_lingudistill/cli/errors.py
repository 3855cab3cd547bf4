"""How a command ends that did not do what was asked: one sentence on stderr, and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..exit_codes import BAD_INPUT, NOT_PUBLISHED
from ..sentences import did_you_mean, how_to_see_more, one_sentence


def bad_input(message: str) -> int:
    """Say what is wrong with what was given. -> the exit code."""
    print(f"lingudistill: {message}", file=sys.stderr)
    return BAD_INPUT


def failed(error: Exception) -> int:
    """One sentence for whatever was raised, or its traceback. Call it where the exception is handled."""
    if os.environ.get("LINGUDISTILL_DEBUG") == "1":
        raise error
    return bad_input(one_sentence(error) + how_to_see_more(error))


def not_published(error: Exception) -> int:
    """Say that nothing was published, and why. -> the exit code."""
    print(f"lingudistill: not published. {error}", file=sys.stderr)
    return NOT_PUBLISHED


def check_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """End with what may have been meant by an option that the parser does not know. argparse names what is missing first, and no neighbours."""
    known = parser._option_string_actions
    for word in arguments:
        name = word.partition("=")[0]
        if name.startswith("--") and len(name) > 2 and name not in known:
            parser.error(f"unrecognized arguments: {name}{did_you_mean(name, known)}")
