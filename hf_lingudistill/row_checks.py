"""What a row must not be, whatever its format: empty where it answers, another thing than a text, or with media that nobody reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from PIL import Image as PILImage

from .bad_rows import BadRow, Row
from .config import shown
from .images import IMAGE_COLUMNS
from .turns import CONVERSATION_COLUMNS, ROLES, read_turns

_MEDIA = re.compile(r"(video|audio)s?(_?(path|url|file)s?)?", re.IGNORECASE)

_PICTURES = re.compile(
    r"(img|image|picture|photo)s?(_?(path|url|file|name|src)s?)?|jpe?g|png|webp|file_?names?|media(_?(path|url|file)s?)?",
    re.IGNORECASE,
)

_PICTURE_FILE = re.compile(r"data:image/|.*\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)


def check_columns(row: Row, name: str, *, shown_images: bool = False) -> None:
    """Raise BadRow where a column holds a video, a sound, or an image under a name that nobody reads: what the row is about would be lost
    without a word. shown_images: whether the row has images that are read; then another picture is a matter of the data's own."""
    for key, value in row.items():
        if key in IMAGE_COLUMNS or key in CONVERSATION_COLUMNS or is_empty(value):
            continue
        if _MEDIA.fullmatch(key) and not isinstance(value, bool | int | float):
            raise BadRow(
                "column not read",
                f"{name} has a column {key!r} ({shown(value)}), and of media only images are read. Leave such rows out, or drop the column to "
                "train on the rest.",
            )
        if not shown_images and _is_picture(key, value):
            raise BadRow(
                "column not read",
                f"{name} has an image in its column {key!r}, and images are read from 'images' and 'image' alone. Rename the column to 'image', "
                "or drop it to train on the text alone.",
            )


def may_be_media(column: str) -> bool:
    """Whether a column's name says that it may hold what `check_columns` refuses."""
    return bool(_MEDIA.fullmatch(column) or _PICTURES.fullmatch(column)) and column not in IMAGE_COLUMNS


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | list | tuple | dict) and not value)


def _is_picture(key: str, value: Any) -> bool:
    """Whether a value is an image whatever its name, or by its name and how it ends."""
    if isinstance(value, list | tuple):  # of one kind: its first tells
        return _is_picture(key, next((one for one in value if one is not None), None))
    if isinstance(value, PILImage.Image) or (isinstance(value, Mapping) and set(value) == {"bytes", "path"}):
        return True
    if not _PICTURES.fullmatch(key) or not isinstance(value, str | bytes):
        return False
    if isinstance(value, bytes) or _PICTURE_FILE.match(value.split("?")[0]):
        return True
    return value.startswith(("http://", "https://")) and not key.lower().startswith("file")


def check_answer(row: Row, name: str) -> None:
    """Raise BadRow where a completion, or an assistant's turn of a conversation, is empty or no text: a student would learn to say nothing
    there. Nor is a turn trained on that says that it is not to be. Running text has no answer."""
    kinds = ("messages", "completion")
    kind = next((key for key in kinds if row.get(key) is not None), None)
    if kind == "completion" and not isinstance(row[kind], str | list | tuple | Mapping):
        raise not_text(name, kind, row[kind])
    if kind is None and row.get("text") is None:
        kind = next((key for key in kinds if key in row), None)
    if kind is None:
        return
    answer: Any = row[kind]
    if kind == "messages":
        turns = answer or []
        answer = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "assistant"]
        if turns and not answer:  # a conversation under other names
            return
    said = [turn for turn in answer if isinstance(turn, dict)] if isinstance(answer, list) else []
    for number, turn in enumerate(said):
        if not isinstance(content := turn.get("content", ""), str | list | tuple | Mapping | None):
            raise BadRow(
                "not a conversation",
                f"{name}: answer {number} in its {kind} is {shown(content)}, expected a text or a list of parts. Convert it to text.",
            )
    roles = [ROLES.get(str(turn.get("role", turn.get("from"))).lower()) for turn in said]
    asking = next((role for role in ("user", "system") if role in roles), None)
    if kind == "completion" and asking:
        raise BadRow(
            "not a conversation",
            f"{name} has a turn of the {asking} in its completion, which is trained on whole. Put all turns but the answer into the prompt, or "
            "give the row as 'messages'.",
        )
    calls = any(turn.get("tool_calls") for turn in said)  # an assistant that calls a tool says nothing
    if not calls and not (_text_of(answer) or "").strip():
        what = "completion" if kind == "completion" else "answer in its messages"
        raise BadRow("empty answer", f"{name} has an empty {what}. Give it an answer, or pass --skip_bad_rows.")
    for number, turn in enumerate(turn for turn in said if turn.get("role") == "assistant"):
        if _says_nothing(turn):
            raise BadRow(
                "empty answer",
                f"{name}: answer {number} in its {kind} is empty (they are counted from 0). Give it a text, leave the turn out, or pass "
                "--skip_bad_rows.",
            )
        if mark := next((f"{key}: {turn[key]}" for key in _NOT_TRAINED if _is_off(turn.get(key))), None):
            raise BadRow(
                "not a conversation",
                f"{name}: answer {number} in its {kind} is marked as not to be trained on ({mark}), and all answers of a row are. Split the "
                "conversation into rows of prompt and completion, or remove the mark.",
            )


def check_text(row: Row, name: str, column: str = "text") -> None:
    """Raise BadRow where a row of running text has none. An empty text trains nothing, and is left alone."""
    if row.get(column) is None:
        raise BadRow(
            "not a conversation",
            f"{name} has no text: its column {column!r} is null. Remove the row, or pass --skip_bad_rows.",
        )
    if not isinstance(row[column], str):
        raise not_text(name, column, row[column])


def check_not_json_turns(row: Row, name: str) -> None:
    """Raise BadRow where a prompt or a completion is the JSON text of turns, which would be trained on as it is written."""
    for column in ("prompt", "completion"):
        value = row.get(column)
        if not isinstance(value, str) or not re.match(r'\s*\[\s*\{\s*"(role|from|content|value)"\s*:', value):
            continue
        try:
            turns = read_turns(value, "")
        except BadRow:
            continue
        if turns:
            raise BadRow(
                "not a conversation",
                f"{name}: column {column!r} holds the JSON text of turns, which would be trained on as it is written. Read it (json.loads), or "
                "give all turns as 'messages', where JSON text is read.",
            )


def not_text(name: str, column: str, value: Any) -> BadRow:
    expected = "a text" if column not in ("prompt", "completion") else "a text or turns"
    kind = "the number " if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return BadRow(
        "not a conversation",
        f"{name}: column {column!r} holds {kind}{shown(value)}, expected {expected}. Convert the column to text.",
    )


# What an assistant's turn may hold in a field of its own
BESIDE_TEXT = ("tool_calls", "reasoning_content", "thinking")

_NOT_TRAINED = ("weight", "train", "loss")  # of OpenAI's format and of other trainers'


def _is_off(mark: Any) -> bool:
    """Whether a mark says no: false or zero, maybe as a text."""
    if isinstance(mark, str):
        mark = mark.strip().lower()
        return mark in ("false", "no", "off") or bool(re.fullmatch(r"0+(\.0*)?", mark))
    return isinstance(mark, bool | int | float) and not mark


def _says_nothing(turn: Row) -> bool:
    """Whether an assistant's turn holds no text, image, call or thought. Without any content it is refused elsewhere."""
    content = turn.get("content")
    if content is None or any(turn.get(key) for key in BESIDE_TEXT):
        return False
    return not _has_content(turn)


def says_nothing_else(turn: Row) -> bool:
    """Whether an assistant's turn is a call or a thought alone."""
    return turn.get("role") == "assistant" and any(turn.get(key) for key in BESIDE_TEXT) and not _has_content(turn)


def _has_content(turn: Row) -> bool:
    """Whether a turn holds a text or an image."""
    content = turn.get("content")
    if isinstance(content, list) and any(
        isinstance(part, dict) and "image" in str(part.get("type")) for part in content
    ):
        return True
    return bool((_text_of([turn]) or "").strip())


def _text_of(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_text_of(v.get("content", v.get("text")) if isinstance(v, dict) else v) or "" for v in value)
    return None
