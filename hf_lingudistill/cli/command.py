"""What a subcommand is. Each module of this folder ends with one: its name, its help, its arguments, what it runs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand whose arguments argparse reads.

    `run` gets them parsed and returns the exit code. Whatever takes long to import is imported in there: `lingudistill --help`
    loads every module of this folder.
    """

    name: str
    help: str  # a line of `lingudistill --help`
    description: str  # the head of its own help
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


@dataclass(frozen=True)
class TrlCommand:
    """A subcommand whose options are dataclasses: TrlParser reads them inside `main`, `--help` included, which returns the exit code."""

    name: str
    help: str
    main: Callable[[list[str]], int]
