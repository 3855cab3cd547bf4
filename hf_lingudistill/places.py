"""The images of a row and their places in its turns: in a column, in the parts of a turn, or named by a word in a text."""

from __future__ import annotations

import os
from typing import Any

from .bad_rows import BadRow, Row
from .config import shown
from .images import decode_image
from .turns import CONVERSATION_COLUMNS, parts_of, texts_of

PLACEHOLDER = "<image>"


def column_images(row: Row, name: str, *, of_conversation: bool = False) -> list[Any] | None:
    """The images of a row's own columns; None without such a column. Sets that were joined have both: a row fills one of them.

    of_conversation: whether the row is a conversation, in which an image's place is named.

    Raises:
        BadRow: if `images` holds no list, or the two columns hold different images.
    """
    several, value = _plain_paths(row.get("images")), _plain_paths(row.get("image"))
    if several is not None and not isinstance(several, list | tuple):
        raise BadRow(
            "images not a list",
            f"{name}: column 'images' must hold a list of images, found {type(several).__name__} {shown(several)}. Rename the column to "
            "'image' if each row has one image; a CSV holds no lists, JSON lines and Parquet do.",
        )
    ones = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    if several and ones and not _same_images(list(several), ones):
        raise BadRow(
            "images and placeholders differ",
            f"{name} has {len(several)} images in column 'images' and others in column 'image' ({len(ones)}): keep one of the two.",
        )
    if several:
        return list(several)
    if "images" in row or ones:
        return ones
    if "image" not in row:
        return None
    if isinstance(value, list | tuple):
        return []
    # LLaVA's texts have no image, and say so by not naming one; elsewhere an empty place is a lost image
    if value is None and of_conversation and not _mentions_image(row):
        return []
    return [value]


def _plain_paths(value: Any) -> Any:
    """`pathlib.Path`s, one or in a list, as texts: Arrow does not know them."""
    if isinstance(value, list | tuple):
        return [_plain_paths(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _mentions_image(row: Row) -> bool:
    text = repr([row.get(key) for key in CONVERSATION_COLUMNS])
    return PLACEHOLDER in text or "'type': 'image" in text


def placed(
    turns: list[Row], images: list[Any] | None, name: str, image_token: str | None
) -> tuple[list[Row], list[Any] | None]:
    """Turns whose images are places only, and the images in the order of their places."""
    places = [part for turn in turns for part in parts_of(turn) if part["type"] == "image"]
    if not places and images:
        turns = _marked(turns, images) or _before_first_question(turns, images, name)
        places = [part for turn in turns for part in parts_of(turn) if part["type"] == "image"]
    if not places and not images and any(turn["role"] == "user" and _names_a_lost_image(turn) for turn in turns):
        raise differ(name, 1, images)
    own = [_plain_paths(part["image"]) for part in places if "image" in part]
    if own and len(own) == len(places) and images:  # the cookbooks' rows name each image twice
        if not _same_images(own, images):
            raise BadRow(
                "images and placeholders differ",
                f"{name} has {len(own)} images in its turns and others in its image column ({len(images)}): keep one of the two.",
            )
        images = []
    images = _in_named_order(places, images)
    if len(places) - len(own) != len(images or []):
        raise differ(name, len(places) - len(own), images)
    if typed := sum(text.count(image_token) for turn in turns for text in texts_of(turn)) if image_token else 0:
        # The processor would read its own placeholder, typed in a text, as one more image
        raise BadRow(
            "images and placeholders differ",
            f"{name}: its text names {typed} images ({image_token!r}) beside {len(places)} with places of their own. Give each image "
            "one place and put it into column 'images' beside 'messages' (or 'prompt'), or remove the word from the text.",
        )
    if own:
        rest = iter(images or [])
        images = [_plain_paths(part["image"]) if "image" in part else next(rest) for part in places]
    if any(len(part) > 1 for part in places):
        turns = [
            {**turn, "content": [{"type": "image"} if part["type"] == "image" else part for part in parts]}
            if (parts := parts_of(turn))
            else turn
            for turn in turns
        ]
    return turns, images


def _marked(turns: list[Row], images: list[Any]) -> list[Row] | None:
    """Turns with a place for each `<image>` in their texts; None where no question has one. An assistant that speaks of the word shows nothing,
    unless there are images for its words as well."""
    asked = sum(text.count(PLACEHOLDER) for turn in turns for text in texts_of(turn) if turn["role"] != "assistant")
    if not asked:
        return None
    return [turn if turn["role"] == "assistant" and asked == len(images) else _split_turn(turn) for turn in turns]


def _in_named_order(places: list[Row], images: list[Any] | None) -> list[Any] | None:
    """The images as their places number them (`index`): in another order, or one of them in several places. As they are where not every
    place has a number, or the numbers leave an image out: then they count something else, such as the images of each turn."""
    numbers = [part.get("index") for part in places if "image" not in part]
    if not images or set(numbers) != set(range(len(images))):
        return images
    return [images[number] for number in numbers if number is not None]


def _names_a_lost_image(turn: Row) -> bool:
    """Whether a text begins or ends with LLaVA's word on a line of its own: a place, where no image is left, and not talk of a word."""
    return any(
        text.strip() == PLACEHOLDER
        or text.lstrip().startswith(f"{PLACEHOLDER}\n")
        or text.rstrip().endswith(f"\n{PLACEHOLDER}")
        for text in texts_of(turn)
    )


def differ(name: str, places: int, images: list[Any] | None) -> BadRow:
    return BadRow(
        "images and placeholders differ",
        f"{name} has {places} places for images ({PLACEHOLDER!r} in a text, or a part of type image) and "
        f"{len(images or [])} images: give each image one place.",
    )


def _before_first_question(turns: list[Row], images: list[Any], name: str) -> list[Row]:
    """Where no place is named, TRL shows the images before the first question."""
    for index, turn in enumerate(turns):
        if turn["role"] == "user":
            shown_first = [*({"type": "image"} for _ in images), *_as_parts(turn)]
            return [*turns[:index], {**turn, "content": shown_first}, *turns[index + 1 :]]
    raise differ(name, 0, images)


def _as_parts(turn: Row) -> list[Row]:
    """The parts of a turn, or its text as one."""
    return parts_of(turn) if isinstance(turn["content"], list) else [{"type": "text", "text": turn["content"]}]


def _split_turn(turn: Row) -> Row:
    """A turn with a place for each `<image>` in its text; the blanks and line breaks that set it apart go with it."""
    if not any(PLACEHOLDER in text for text in texts_of(turn)):
        return turn
    parts: list[Row] = []
    for part in _as_parts(turn):
        pieces = part["text"].split(PLACEHOLDER)
        for number, piece in enumerate(pieces):
            if number:
                piece = piece.lstrip()
                parts.append({"type": "image"})
            if number < len(pieces) - 1:
                piece = piece.rstrip()
            if piece:
                parts.append({"type": "text", "text": piece})
    return {**turn, "content": parts}


def _same_images(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(
        a is b or decode_image(a).tobytes() == decode_image(b).tobytes() for a, b in zip(some, others, strict=True)
    )
