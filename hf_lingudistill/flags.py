"""The flag column of training and evaluation sets: what it holds, and what does not go with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from datasets import IterableDataset

from .bad_rows import AnyDataset, BadRow, Row, row_name
from .columns import columns_of
from .config import JOINING, LinguDistillConfig
from .sharing import sharing

logger = logging.getLogger(__name__)


def check_distill_column(
    dataset: AnyDataset,
    column: str,
    *,
    skip_bad: bool = False,
    columns: list[str] | None = None,
    evaluated: str | None = None,
) -> tuple[bool, float | None]:
    """Whether the dataset has the flag column, and the share of marked rows (None for a stream or without the column).

    skip_bad: leave rows whose flag is not boolean out of the share; they are dropped later, and counted. columns: the dataset's, if
    they are known already. evaluated: the name of an evaluation set, which need not have a marked row.

    Raises:
        ValueError: if the column is not boolean, or marks no row at all.
    """
    if column not in (columns_of(dataset) if columns is None else columns):
        return False, None
    if isinstance(dataset, IterableDataset):
        return True, None
    values = dataset.with_format(None)[column]
    good = [value for value in values if value in (True, False)]
    if len(good) < len(values) and not (skip_bad and good):
        bad = next(value for value in values if value not in (True, False))
        raise ValueError(
            f"Column {column!r}{_of(evaluated)} must hold true or false in every row; found {bad!r} in "
            f"{len(values) - len(good)} of {len(values)}. Repair them{'' if skip_bad else ', or pass --skip_bad_rows'}."
        )
    share = sum(bool(value) for value in good) / max(len(good), 1)
    if share == 0.0 and evaluated is None:
        raise ValueError(
            f"No row is marked for distillation: column {column!r} is false in all {len(good)} rows. Mark the "
            "language-intensive rows true, or train with trl.SFTTrainer."
        )
    return True, share


def check_evaluation_flags(
    parts: Mapping[str, AnyDataset], args: Any, trained: bool | None, *, name_of: Callable[[str], str]
) -> dict[str, float | None]:
    """Check the flags of evaluation sets, and warn of sets without any where the training set has them. -> the share of marked rows of
    each set that has flags.

    args: a distilling config. trained: whether the training set has the column; None where that is not known.

    Raises:
        ValueError: if the column is not boolean.
    """
    shares = {}
    for name, part in parts.items():
        found, share = check_distill_column(
            part, args.distill_column, skip_bad=args.skip_bad_rows, evaluated=name_of(name)
        )
        if found:
            shares[name] = share
        elif trained and part.column_names is not None and args.process_index == 0:
            logger.warning(
                "%s has no column %r, which the training set has: every row of it is distilled, and its loss is not the one that is "
                "trained on. Give it that column.",
                capital(name_of(name)),
                args.distill_column,
            )
    return shares


def check_joining(
    args: LinguDistillConfig, share: float | None, *, flagged: bool, evaluated: str | None = None
) -> None:
    """Check that rows may be joined as the options ask. share, flagged: of the set's flags. evaluated: the name of an evaluation set.

    Raises:
        ValueError: where documents cannot be kept apart, or a joined row would have several flags.
    """
    joined = [name for name in JOINING if getattr(args, name)]
    if joined and not sharing(args.kv_sharing).keeps_documents_apart:
        raise ValueError(
            f"kv_sharing='{args.kv_sharing}' cannot keep packed documents apart (the teacher makes its own pass over the rows): use "
            f"'prompt' or 'full', or set {' and '.join(f'{name}=False' for name in joined)}."
        )
    if args.eval_packing and not (
        args.packing or args.padding_free
    ):  # TRL makes one collator, after what training asks
        raise ValueError(
            "eval_packing joins rows of evaluation sets, which would read each other: documents are kept apart only where training joins "
            "rows, too. Set eval_packing=False, or packing=True."
        )
    if args.padding_free and share not in (None, 0.0, 1.0):
        raise ValueError(
            f"padding_free joins rows, and column {args.distill_column!r}{_of(evaluated)} differs between them ({share:.0%} are marked): "
            "set padding_free=False, or drop the column."
        )
    if flagged and (option := packs(args, evaluated=evaluated is not None)):
        raise ValueError(
            f"{option} joins rows, so that column {args.distill_column!r}{_of(evaluated)} has no meaning: drop the column (every row is "
            f"distilled) or set {'eval_packing' if evaluated else 'packing'}=False."
        )


def packs(args: LinguDistillConfig, *, evaluated: bool) -> str | None:
    """The option by which rows of a set are packed; None where they are not. evaluated: whether it is an evaluation set."""
    if evaluated and args.eval_packing is not None:
        return "eval_packing" if args.eval_packing else None
    return "packing" if args.packing else None


def refuse_flag(column: str, option: str) -> Callable[[Row], Row]:
    """Pass the rows of a stream on that `option` packs; raise BadRow for one that has the flag."""

    def checked(row: Row) -> Row:
        if column in row:
            raise BadRow(
                "distill flag not boolean",
                f"{option} joins rows, so that column {column!r} of {row_name(row).lower()} has no meaning: drop the column (every "
                f"row is distilled) or set {option}=False.",
            )
        return row

    return checked


def _of(evaluated: str | None) -> str:
    return f" of {evaluated}" if evaluated else ""


def capital(name: str) -> str:
    """A name as a sentence begins with it."""
    return name[:1].upper() + name[1:]
