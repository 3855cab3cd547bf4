"""Rows on their way to tokens and labels: which of them TRL reads, what is made of the others, and what has no label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset, List, Value

from .bad_rows import SOURCE_COLUMN, AnyDataset, BadRow, Row, SharedCounts, flag_of, row_name
from .columns import columns_of, first_row, names_an_image, row_number, undecoded_rows
from .config import shown
from .conversations import Conversations, no_label_within
from .row_checks import check_answer, check_columns, check_not_json_turns, check_text, may_be_media
from .turns import CONVERSATION_COLUMNS

_BAD = "__bad_row"  # why a row is left out; gone before training
_MADE_BY_TRL = ("labels", "assistant_masks", "completion_mask", "attention_mask", "seq_lengths", "position_ids")


def row_of(number: int, dataset_name: str, row: Row) -> str:
    number = row_number(number)
    named = row_name(row) if row.get(SOURCE_COLUMN) or number < 0 else f"Row {number}"
    return named if dataset_name == "train" or row.get(SOURCE_COLUMN) else f"{named} of dataset {dataset_name!r}"


def first_label(labels: list[int]) -> int | None:
    return next((place for place, label in enumerate(labels) if label != -100), None)


def within(dataset: IterableDataset, args: Any, skipped: Any, name: str, kept: slice | None = None) -> IterableDataset:
    """A stream of tokens and labels, cut to `max_length` as TRL cuts (`kept`: as packing does); a row without a label there is refused, or
    left out and counted in skipped."""
    limit = args.max_length
    if kept is None:
        kept = slice(-limit, None) if args.truncation_mode == "keep_end" else slice(limit)

    def usable(row: Row, index: int) -> bool:
        labels = labels_of(row)
        if first_label(labels[kept]) is not None:
            return True
        if isinstance(skipped, SharedCounts):
            skipped.add("no label")
        elif skipped is None:
            raise no_label(row_of(index, name, row), first_label(labels), limit)
        return False

    def cut(row: Row) -> Row:
        return {column: row[column][kept] for column in ("input_ids", *label_columns(row))}

    return dataset.filter(usable, with_indices=True).map(cut)


def label_columns(columns: Iterable[str]) -> list[str]:
    """The columns that say which tokens of a row are trained on; none where all are."""
    names = set(columns)
    return (
        ["labels"] if "labels" in names else [mask for mask in ("completion_mask", "assistant_masks") if mask in names]
    )


def labels_of(row: Row) -> list[int]:
    """A row's labels; of masks, 0 for what is trained on."""
    columns = label_columns(row)
    if columns == ["labels"]:
        return list(row["labels"])
    return [0 if all(bits) else -100 for bits in zip(*(row[column] for column in columns), strict=False)]


def no_label(name: str, first: int | None, limit: int | None) -> BadRow:
    if first is None or limit is None:
        return BadRow("no label", f"{name} has no token to train on: all of its labels are masked.")
    return no_label_within(name, first, first + 1, limit)


def formatted(dataset: AnyDataset, formatting_func: Any, name: str, args: Any) -> AnyDataset:
    """What `formatting_func` makes of each row, alone: TRL would read the conversation that it was made of in its stead."""

    def text(row: Row, index: int) -> Row:
        made = formatting_func(row)
        if not isinstance(made, str):
            raise ValueError(
                f"formatting_func gave {type(made).__name__} {shown(made)} for {row_of(index, name, row)}: expected a text."
            )
        return {args.dataset_text_field: made}

    read = {*CONVERSATION_COLUMNS, "prompt", "completion", args.dataset_text_field, "tools", "chat_template_kwargs"}
    gone = [column for column in columns_of(dataset) if column in read]
    options: Row = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
    return dataset.map(text, with_indices=True, remove_columns=gone, **options)


def answered(dataset: AnyDataset, name: str, args: Any) -> AnyDataset:
    """Prompts and completions, or running text, that TRL tokenises; an empty completion, what is no text, media that nobody reads, and a
    flag that is not boolean are refused with the row's name."""
    columns, text_column = columns_of(dataset), args.dataset_text_field
    column = "completion" if "completion" in columns else text_column
    if column not in columns or "input_ids" in columns:
        return dataset
    # TRL would take a column of such a name for what it makes itself
    if taken := [name for name in _MADE_BY_TRL if name in columns]:
        dataset = dataset.remove_columns(taken)
        columns = [name for name in columns if name not in taken]

    def check(row: Row, index: int) -> None:
        known_as = row_of(index, name, row)
        flag_of(row, args.distill_column, known_as)
        check_columns(row, known_as)
        if column == "completion":
            check_answer(row, known_as)
            check_not_json_turns(row, known_as)
        else:
            check_text(row, known_as, column)

    if isinstance(dataset, Dataset):
        looked_at = [
            column,
            *(["prompt"] if column == "completion" and "prompt" in columns else []),
            *(
                other
                for other in columns
                if other == SOURCE_COLUMN or may_be_media(other) or names_an_image(dataset.features[other])
            ),
        ]
        for number, row in enumerate(undecoded_rows(dataset.select_columns(looked_at))):
            check(row, number)
        return dataset

    def checked(row: Row, index: int) -> Row:
        check(row, index)
        return row

    return dataset.map(checked, with_indices=True, features=dataset.features)


def tokenised(
    dataset: AnyDataset, conversations: Conversations, name: str, args: Any, skipped: Any
) -> tuple[AnyDataset, Mapping[str, int]]:
    """Tokens and labels of every row. -> (dataset, number of rows that were left out by reason); those of a stream are counted in `skipped`
    as it is read."""
    leaves_out = args.skip_bad_rows

    def tokens(row: Row, index: int) -> Row:
        row = {("text" if key == args.dataset_text_field else key): value for key, value in row.items()}
        known_as = row_of(index, name, row)
        try:
            flag_of(row, args.distill_column, known_as)
            found = conversations.tokens(row, known_as)
        except BadRow as error:
            if not leaves_out:
                raise
            return {"input_ids": [], "labels": [], _BAD: error.reason}
        return {**found, _BAD: ""} if leaves_out else found

    state = PartialState()
    if state.is_main_process and name == "train":
        conversations.say_what_is_labelled(first_row(dataset))
    # a stream knows neither option
    options: Row = (
        {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {name} dataset"}
        if isinstance(dataset, Dataset)
        else {}
    )
    with state.main_process_first():
        dataset = dataset.map(tokens, with_indices=True, **options)
        if not leaves_out:
            return dataset, {}
        if isinstance(dataset, IterableDataset):

            def usable(reason: str) -> bool:
                if reason:
                    skipped.add(reason)
                return not reason

            return dataset.filter(usable, input_columns=[_BAD]).remove_columns(_BAD), {}
        reasons = dataset[_BAD]
        good = [number for number, reason in enumerate(reasons) if not reason]
        dropped = Counter(reason for reason in reasons if reason)
        if not good:
            raise ValueError(f"No usable row is left of {len(reasons)}: {dict(dropped)}. Repair the dataset.")
        dataset = dataset.remove_columns(_BAD)
        return (dataset.select(good) if dropped else dataset), dropped


def is_ours(dataset: AnyDataset, text_column: str, *, any_prompt: bool = False) -> bool:
    """Whether rows are conversations, or prompts and completions of mixed types or beside running text (`any_prompt`: of any): all else, TRL
    tokenises alone."""
    columns = columns_of(dataset)
    if "input_ids" in columns:
        return False
    if any(column in columns for column in CONVERSATION_COLUMNS):
        return True
    if not {"prompt", "completion"} <= set(columns):
        return False
    if text_column in columns or any_prompt:
        return True
    kinds = {_kind((dataset.features or {}).get(column)) for column in ("prompt", "completion")}
    return len(kinds) > 1 or None in kinds


def _kind(feature: Any) -> str | None:
    """`text` and `turns` as TRL takes them; None for what may be anything."""
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return "text"
    if isinstance(feature, List) and isinstance(feature.feature, dict):
        turn = feature.feature
        if set(turn) == {"role", "content"} and all(_kind(value) == "text" for value in turn.values()):
            return "turns"
    return None
