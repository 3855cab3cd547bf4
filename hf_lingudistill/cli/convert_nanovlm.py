"""`lingudistill convert-nanovlm`: a nanoVLM checkpoint as a transformers VLM, and back."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..exit_codes import DONE
from .command import Command
from .errors import bad_input, failed


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder or Hub id with config.json and model.safetensors")
    parser.add_argument("destination", metavar="DST", help="a folder that does not exist or is empty")
    parser.add_argument("--reverse", action="store_true", help="write a converted model back for nanoVLM's own tools")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="the tokenizer before nanoVLM's own tokens, folder or Hub id; default: the one that the config names",
    )
    parser.add_argument("--revision", help="branch, tag or commit of SRC")


def run(args: Namespace) -> int:
    if args.reverse and args.tokenizer:
        return bad_input("--tokenizer has no use with --reverse: nanoVLM's checkpoints hold none.")
    try:
        from ..labs.nanovlm import NanoVLMError, from_nanovlm, to_nanovlm
    except ModuleNotFoundError as error:
        return failed(error)
    try:
        if args.reverse:
            done = to_nanovlm(args.source, args.destination, revision=args.revision)
        else:
            done = from_nanovlm(args.source, args.destination, tokenizer=args.tokenizer, revision=args.revision)
    except NanoVLMError as error:
        return bad_input(" ".join(str(error).split()))
    except OSError as error:
        return failed(error)
    print(done)
    return DONE


COMMAND = Command(
    name="convert-nanovlm",
    help="a nanoVLM checkpoint as a transformers VLM, and back",
    description="Write a nanoVLM checkpoint as a VLM that AutoModelForImageTextToText and AutoProcessor load without further "
    "code; docs/nanovlm.md says what is equal and what is not. Nothing is overwritten. Exit code: 0 done, 2 bad input.",
    add_arguments=add_arguments,
    run=run,
)
