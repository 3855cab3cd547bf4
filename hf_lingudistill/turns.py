"""The turns of a conversation, in any form that people write them in, as TRL takes them: role, and content as a text or in parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from .bad_rows import BadRow, Row
from .config import shown

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image", "image_pil")
PAYLOADS = ("image", "image_url", "url", "path", "base64", "data", "bytes", "image_pil")


def read_turns(value: Any, where: str) -> list[Row]:
    """A conversation as a list of {"role", "content", ...} without empty fields; an image's place is {"type": "image"}, with the image
    in it under "image" if the part held one, or "index", the number of its image, where the part says it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow(
                "not a conversation", f"{where}: expected a list of turns, found the text {shown(value)}."
            ) from None
    if isinstance(value, Mapping) and value and all(isinstance(v, list | tuple | np.ndarray) for v in value.values()):
        # how datasets hands out a sequence of structs
        if len({len(column) for column in value.values()}) > 1:
            lengths = ", ".join(f"{name!r} {len(column)}" for name, column in value.items())
            raise BadRow("not a conversation", f"{where}: its lists of fields differ in length ({lengths}).")
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise BadRow(
            "not a conversation", f"{where}: expected a list of turns, found {type(value).__name__} {shown(value)}."
        )
    turns = [part for turn in value for part in _both(turn)]
    return [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns)]


def _both(turn: Any) -> list[Any]:
    """A turn; two where it holds a question and its answer under `user` and `assistant`, three with what the `system` says."""
    if isinstance(turn, Mapping) and {"user", "assistant"} <= turn.keys() and not {"role", "from"} & turn.keys():
        said = {"system": turn.get("system") or None, "user": turn["user"], "assistant": turn["assistant"]}
        return [{"role": role, "content": text} for role, text in said.items() if role != "system" or text is not None]
    return [turn]


def _turn(turn: Any, where: str) -> Row:
    if not isinstance(turn, Mapping):
        raise BadRow(
            "not a conversation",
            f"{where}: expected {{'role', 'content'}} (or 'from' and 'value'), found {shown(turn)}.",
        )
    turn = {k: v for k, v in turn.items() if v is not None}
    role = turn.pop("role", None) or turn.pop("from", None)
    turn.pop("from", None)
    content = turn.pop("content", turn.pop("value", None))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow(
            "not a conversation",
            f"{where}: expected a 'role' (or 'from') among {', '.join(ROLES)}; found {shown(role)}"
            + ("" if role is not None else f" and the fields {sorted(turn)}")
            + ".",
        )
    role = ROLES[role.lower()]
    if calls := turn.get("tool_calls"):
        turn["tool_calls"] = without_nulls(calls)
    if content is None:
        if role != "assistant" or not turn.get("tool_calls"):
            raise BadRow("not a conversation", f"{where}: the content of the {role}'s turn is missing (null).")
        return {"role": role, **turn}
    return {"role": role, "content": _content(content, where), **turn}


def without_nulls(value: Any) -> Any:
    """A value without the null fields that a common schema of all rows adds to it."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _content(content: Any, where: str) -> Any:
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list | tuple):
        raise BadRow("not a conversation", f"{where}: expected a text or a list of parts, found {shown(content)}.")
    return [part for value in content for part in _part(value, where)]


def _part(part: Any, where: str) -> list[Row]:
    """One part of a turn's content in TRL's form; none where it is empty."""
    if isinstance(part, str):
        return [{"type": "text", "text": part}]
    if not isinstance(part, Mapping):
        raise BadRow("not a conversation", f"{where}: expected a text or an image, found {shown(part)}.")
    part = {k: v for k, v in part.items() if v is not None}
    kind = part.get("type") or next((key for key in ("text", *PAYLOADS) if key in part), None)
    if kind not in (*_TEXT_PARTS, *_IMAGE_PARTS, *PAYLOADS):
        if kind is None:
            return []
        raise BadRow("not a conversation", f"{where}: expected a part of type text or image, found {shown(kind)}.")
    text = part.get("text", "")
    if not isinstance(text, str):
        raise BadRow("not a conversation", f"{where}: expected a text, found {shown(text)}.")
    # One part may hold both, whatever its type says: the image, then what is said of it
    payloads = PAYLOADS if "type" not in part or kind not in _TEXT_PARTS else _IMAGE_PARTS
    image = next((part[key] for key in payloads if key in part), None)
    shows = image is not None or kind not in _TEXT_PARTS
    rest = {key: value for key, value in part.items() if key not in payloads}
    number = {"index": part["index"]} if isinstance(part.get("index"), int) else {}
    return [
        *([{"type": "image", **number} if image is None else {"type": "image", "image": image}] if shows else []),
        *([{**rest, "type": "text", "text": text}] if text else []),
    ]


def parts_of(turn: Row) -> list[Row]:
    """The parts of a turn; none where its content is a text."""
    content = turn.get("content")
    return content if isinstance(content, list) else []


def texts_of(turn: Row) -> list[str]:
    """The texts of a turn, in order."""
    content = turn.get("content")
    return [content] if isinstance(content, str) else [part["text"] for part in parts_of(turn) if "text" in part]


def in_parts_alike(turns: list[Row]) -> list[Row]:
    """Turns whose contents are all in parts, if one of them is: TRL puts all images before the first user turn that is a text, though an
    earlier turn has their places."""
    if not any(isinstance(turn.get("content"), list) for turn in turns):
        return turns
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        if isinstance(turn.get("content"), str)
        else turn
        for turn in turns
    ]


def embeds_images(value: Any) -> bool:
    """Whether the turns of a conversation hold images, not only places for them."""
    try:
        turns = read_turns(value, "")
    except BadRow:
        return False
    return any("image" in part for turn in turns for part in parts_of(turn))


def text_alone(turn: Row) -> Any:
    """What a turn says, for a chat template that reads texts; as it is where it shows an image, which such a template cannot place."""
    parts = parts_of(turn)
    return "".join(texts_of(turn)) if parts and all(part.get("type") == "text" for part in parts) else turn["content"]
