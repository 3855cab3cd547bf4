"""What people's rows look like, and the one shape they are trained in.

`as_trl_row` turns a row of any accepted format (docs/data.md) into TRL's own: `messages`, or `prompt` and `completion`, or `text`; with
`images`, a list. What is TRL's already stays as it is. Whatever cannot be told for certain is refused with the row's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .bad_rows import ROW_COLUMN, SOURCE_COLUMN, BadRow, Row
from .config import shown
from .images import IMAGE_COLUMNS
from .places import column_images, differ, placed
from .row_checks import check_columns, check_not_json_turns, is_empty, not_text
from .turns import CONVERSATION_COLUMNS, in_parts_alike, parts_of, read_turns, texts_of

PAIRS_COLUMN = "texts"  # of FineVision and The Cauldron: a question and its answer in each turn
SYSTEM_COLUMNS = ("system", "system_prompt")  # of ShareGPT and others: what the system says stands beside the turns
ACCEPTED = "'messages', 'prompt' and 'completion', or 'text'"
OWN_COLUMNS = (ROW_COLUMN, SOURCE_COLUMN)


def as_trl_row(row: Row, name: str, image_token: str | None = None, *, chat: bool = True) -> Row:
    """A row of any accepted format in TRL's shape. The images stay undecoded.

    Args:
        row: `messages` or `conversations` (turns with role and content, or from and value; content a text or parts; as a list, as
            JSON text, or as a mapping of lists), or `texts` (turns of user and assistant) where there is none of the others, or `prompt`
            and `completion` (texts or turns), or `text`; images in `images`,
            `image`, or in the parts of a turn. Other columns are passed on.
        name: how messages name the row.
        image_token: the text that the student's processor takes for an image.
        chat: whether the processor has a chat template; without one, prompts that are texts stay as they are.

    Returns:
        the row with `messages`, or `prompt` and `completion`, or `text`; and `images` where it has that column or an image.

    Raises:
        BadRow: if the row has another shape, or its images and the places for them differ in number.
    """
    column = next((key for key in CONVERSATION_COLUMNS if row.get(key) is not None), None) or pairs_column(row)
    system = _system_of(row)
    read = (*CONVERSATION_COLUMNS, *IMAGE_COLUMNS, column, *(SYSTEM_COLUMNS if system else ()))
    other = {k: v for k, v in row.items() if k not in read}
    images = column_images(row, name, of_conversation=column is not None)
    if column is not None:
        turns = _with_system(read_turns(row[column], f"{name}, {column!r}"), system, name)
        turns, images = placed(turns, images, name, image_token)
        new = {**{k: v for k, v in other.items() if k not in ("prompt", "completion", "text")}, "messages": turns}
    elif other.get("prompt") is not None and other.get("completion") is not None:
        new, images = _prompt_completion(other, images, name, image_token, chat, system)
    elif isinstance(other.get("text"), str):
        if image_token and (named := other["text"].count(image_token)) != len(images or []):
            raise differ(name, named, images)
        new = {k: v for k, v in other.items() if k not in ("prompt", "completion")}
    elif other.get("text") is not None:
        raise not_text(name, "text", other["text"])
    else:
        found = sorted(key for key, value in row.items() if not (is_empty(value) or key in OWN_COLUMNS))
        raise BadRow(
            "not a conversation",
            f"{name} has the columns {', '.join(found) or 'none'}: expected {ACCEPTED}. Rename the columns, or pass a dataset of that "
            "shape.",
        )
    check_columns(row, name, shown_images=bool(images))
    return new if images is None else {**new, "images": images}


def _system_of(row: Row) -> str | None:
    """What the system says, where it stands in a column of its own."""
    found = (row.get(column) for column in SYSTEM_COLUMNS)
    return next((value for value in found if isinstance(value, str) and value.strip()), None)


def _with_system(turns: list[Row], system: str | None, name: str) -> list[Row]:
    """The turns, what the system says first. Raises BadRow where they say something else of it."""
    if system is None:
        return turns
    if not turns or turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if "".join(texts_of(turns[0])).strip() != system.strip():
        raise BadRow(
            "not a conversation",
            f"{name} has a system prompt in a column of its own ({shown(system)}) and another in its turns: keep one of the two.",
        )
    return turns


def pairs_column(row: Iterable[str]) -> str | None:
    """`texts`, where a row (or a dataset's columns) has nothing else to train on."""
    others = (*CONVERSATION_COLUMNS, "prompt", "completion", "text")
    return PAIRS_COLUMN if PAIRS_COLUMN in row and not any(name in row for name in others) else None


def as_prompt_row(row: Row, name: str, image_token: str | None = None) -> Row:
    """What a row asks, without its answer: `prompt`, a list of turns that does not end with the assistant's; and `images`, a list, where
    the row has that column or an image. Other columns are passed on.

    Args:
        row: `prompt` (a text or turns), or a conversation, whose last turns are left out if they are the assistant's; images as in
            `as_trl_row`.

    Raises:
        BadRow: if the row has another shape, its images and the places for them differ in number, or nothing is asked.
    """
    asked = row.get("prompt") is not None
    others = CONVERSATION_COLUMNS if asked else (*CONVERSATION_COLUMNS, PAIRS_COLUMN)
    conversation = any(row.get(column) is not None for column in others)
    if not (conversation or asked):
        found = sorted(key for key, value in row.items() if not (is_empty(value) or key in OWN_COLUMNS))
        raise BadRow(
            "not a conversation",
            f"{name} has the columns {', '.join(found) or 'none'}: expected 'prompt' or 'messages'. Rename the column of the questions.",
        )
    row = {key: value for key, value in row.items() if key not in ("completion", "text", *["prompt"] * conversation)}
    if not conversation:
        row["completion"] = [{"role": "assistant", "content": ""}]  # read for its shape alone
    new = as_trl_row(row, name, image_token)
    turns = list(new["messages"] if "messages" in new else new["prompt"])
    shown = len(new.get("images") or [])
    while turns and turns[-1]["role"] == "assistant":
        shown -= sum(part["type"] == "image" for part in parts_of(turns.pop()))
    if not any(text.strip() for turn in turns for text in texts_of(turn)) and not shown:
        raise BadRow(
            "not a conversation", f"{name} asks nothing: its prompt is empty. Give it one, or pass --skip_bad_rows."
        )
    turns = in_parts_alike(turns)
    other = {
        key: value for key, value in new.items() if key not in ("messages", "prompt", "completion", "text", "images")
    }
    return {**other, "prompt": turns, **({"images": list(new["images"] or [])[:shown]} if "images" in new else {})}


# --------------------------------------------------------------------------------------------------------------------
# Texts alone
# --------------------------------------------------------------------------------------------------------------------
def _prompt_completion(
    row: Row, images: list[Any] | None, name: str, image_token: str | None, chat: bool, system: str | None = None
) -> tuple[Row, list[Any] | None]:
    prompt, completion = row["prompt"], row["completion"]
    check_not_json_turns(row, name)
    for column in ("prompt", "completion"):
        if isinstance(row[column], int | float):
            raise not_text(name, column, row[column])
    if isinstance(prompt, str) and isinstance(completion, str):
        named = prompt.count(image_token) if image_token else 0
        if not chat or named or not images:  # TRL's plain texts, in which the processor's own word names an image
            if system is not None:
                raise BadRow(
                    "column not read",
                    f"{name} has a system prompt in a column of its own ({shown(system)}), and its prompt is a plain text, which no chat "
                    "template reads. Give prompt and completion as turns, or drop the column.",
                )
            if image_token and named != len(images or []):
                raise differ(name, named, images)
            return row, images
        # A text that names no image is a question about it: the chat template knows where the image goes
    asked = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else read_turns(prompt, f"{name}, 'prompt'")
    )
    answer = (
        [{"role": "assistant", "content": completion}]
        if isinstance(completion, str)
        else read_turns(completion, f"{name}, 'completion'")
    )
    if not asked:
        raise BadRow("not a conversation", f"{name} has an empty prompt.")
    asked = _with_system(asked, system, name)
    asked, images = placed(asked, images, name, image_token)
    if any(part["type"] == "image" for turn in answer for part in parts_of(turn)):
        raise BadRow(
            "images and placeholders differ", f"{name} has an image in its completion: images belong in the prompt."
        )
    answer, _ = placed(answer, None, name, image_token)
    return {**row, "prompt": asked, "completion": answer}, images
