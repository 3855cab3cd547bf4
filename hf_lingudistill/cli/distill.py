"""`lingudistill distill`: train."""

from __future__ import annotations

from .command import TrlCommand


def main(arguments: list[str]) -> int:
    from ..scripts.distill import main as distill

    return distill(arguments)


COMMAND = TrlCommand(name="distill", help="train; `lingudistill distill --help` lists the options", main=main)
