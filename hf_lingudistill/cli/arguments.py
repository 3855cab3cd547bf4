"""Arguments that several commands share: those that name the pair, and those that say how models are loaded."""

from __future__ import annotations

import argparse
from typing import Any

VLM = "the vision-language model: folder or Hub id"
NAMED = "default: the one that the config or card names"
LM = f"the LM that it was built from, or a VLM, for its text half; {NAMED}"
LM_ALONE = f"the LM that it was built from, no VLM; {NAMED}"


def add_pair(parser: argparse.ArgumentParser, *, required: bool = False, teacher: str = LM) -> None:
    """--student and --teacher, for what reads one VLM and its LM. teacher: its help."""
    parser.add_argument("--student", required=required, metavar="VLM", help=VLM)
    parser.add_argument("--teacher", metavar="LM", help=teacher)


def add_before_and_original(
    parser: argparse.ArgumentParser, *, before: str, original: str, required: bool = False, place: str = ""
) -> None:
    """The same two flags for what looks at a VLM before and after, with their help; --before and --original are other names of them.

    `place` goes before the metavars: "ORG/" where only a Hub id will do. `required` speaks of the VLM.
    """
    parser.add_argument("--student", "--before", dest="before", required=required, metavar=f"{place}VLM", help=before)
    parser.add_argument("--teacher", "--original", dest="original", metavar=f"{place}LM", help=original)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """In which precision, where, and whether with code of their own models are loaded."""
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: bfloat16 on an accelerator that multiplies in it, else float32",
    )
    parser.add_argument("--device", help="such as cuda:0; default: the accelerator, if there is one")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="allow models to run code from their repository"
    )


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_loading` as arguments of what loads models.

    Raises:
        ValueError: for a device that is not there.
    """
    import torch

    from ..machine import device_of

    if args.device is not None:
        device_of(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    return {"dtype": dtype, "device": args.device, "trust_remote_code": args.trust_remote_code}


def below_one(args: argparse.Namespace, *names: str) -> str | None:
    """A sentence about the first of these counts that is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            return f"--{name} must be at least 1, got {getattr(args, name)}."
    return None
