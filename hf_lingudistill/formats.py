"""What people's rows look like, and the one shape they are trained in.

`as_trl_row` turns a row of any accepted format (docs/data.md) into TRL's own: `messages`, or `prompt` and `completion`, or `text`; with
`images`, a list. What is TRL's already stays as it is. Whatever cannot be told for certain is refused with the row's name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from PIL import Image as PILImage

from .bad_rows import ROW_COLUMN, SOURCE_COLUMN, BadRow, Row
from .config import shown
from .images import IMAGE_COLUMNS, decode_image
from .turns import ROLES, in_parts_alike, parts_of, read_turns, texts_of

PLACEHOLDER = "<image>"
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
PAIRS_COLUMN = "texts"  # of FineVision and The Cauldron: a question and its answer in each turn
SYSTEM_COLUMNS = ("system", "system_prompt")  # of ShareGPT and others: what the system says stands beside the turns
ACCEPTED = "'messages', 'prompt' and 'completion', or 'text'"
OWN_COLUMNS = (ROW_COLUMN, SOURCE_COLUMN)
_MEDIA = re.compile(r"(video|audio)s?(_?(path|url|file)s?)?", re.IGNORECASE)
_PICTURES = re.compile(
    r"(img|image|picture|photo)s?(_?(path|url|file|name|src)s?)?|jpe?g|png|webp|file_?names?|media(_?(path|url|file)s?)?",
    re.IGNORECASE,
)
_PICTURE_FILE = re.compile(r"data:image/|.*\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)


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
        turns, images = _placed(turns, images, name, image_token)
        new = {**{k: v for k, v in other.items() if k not in ("prompt", "completion", "text")}, "messages": turns}
    elif other.get("prompt") is not None and other.get("completion") is not None:
        new, images = _prompt_completion(other, images, name, image_token, chat, system)
    elif isinstance(other.get("text"), str):
        if image_token and (named := other["text"].count(image_token)) != len(images or []):
            raise _differ(name, named, images)
        new = {k: v for k, v in other.items() if k not in ("prompt", "completion")}
    elif other.get("text") is not None:
        raise _not_text(name, "text", other["text"])
    else:
        found = sorted(key for key, value in row.items() if not (_is_empty(value) or key in OWN_COLUMNS))
        raise BadRow(
            "not a conversation",
            f"{name} has the columns {', '.join(found) or 'none'}: expected {ACCEPTED}. Rename the columns, or pass a dataset of that "
            "shape.",
        )
    check_columns(row, name, shown_images=bool(images))
    return new if images is None else {**new, "images": images}


def check_columns(row: Row, name: str, *, shown_images: bool = False) -> None:
    """Raise BadRow where a column holds a video, a sound, or an image under a name that nobody reads: what the row is about would be lost
    without a word. shown_images: whether the row has images that are read; then another picture is a matter of the data's own."""
    for key, value in row.items():
        if key in IMAGE_COLUMNS or key in CONVERSATION_COLUMNS or _is_empty(value):
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


def _is_empty(value: Any) -> bool:
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
        found = sorted(key for key, value in row.items() if not (_is_empty(value) or key in OWN_COLUMNS))
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


def check_answer(row: Row, name: str) -> None:
    """Raise BadRow where a completion, or an assistant's turn of a conversation, is empty or no text: a student would learn to say nothing
    there. Nor is a turn trained on that says that it is not to be. Running text has no answer."""
    kinds = ("messages", "completion")
    kind = next((key for key in kinds if row.get(key) is not None), None)
    if kind == "completion" and not isinstance(row[kind], str | list | tuple | Mapping):
        raise _not_text(name, kind, row[kind])
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
        raise _not_text(name, column, row[column])


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


def _not_text(name: str, column: str, value: Any) -> BadRow:
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


# --------------------------------------------------------------------------------------------------------------------
# Images and their places
# --------------------------------------------------------------------------------------------------------------------
def _placed(
    turns: list[Row], images: list[Any] | None, name: str, image_token: str | None
) -> tuple[list[Row], list[Any] | None]:
    """Turns whose images are places only, and the images in the order of their places."""
    places = [part for turn in turns for part in parts_of(turn) if part["type"] == "image"]
    if not places and images:
        turns = _marked(turns, images) or _before_first_question(turns, images, name)
        places = [part for turn in turns for part in parts_of(turn) if part["type"] == "image"]
    if not places and not images and any(turn["role"] == "user" and _names_a_lost_image(turn) for turn in turns):
        raise _differ(name, 1, images)
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
        raise _differ(name, len(places) - len(own), images)
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


def _differ(name: str, places: int, images: list[Any] | None) -> BadRow:
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
    raise _differ(name, 0, images)


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
            raise _not_text(name, column, row[column])
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
                raise _differ(name, named, images)
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
    asked, images = _placed(asked, images, name, image_token)
    if any(part["type"] == "image" for turn in answer for part in parts_of(turn)):
        raise BadRow(
            "images and placeholders differ", f"{name} has an image in its completion: images belong in the prompt."
        )
    answer, _ = _placed(answer, None, name, image_token)
    return {**row, "prompt": asked, "completion": answer}, images
