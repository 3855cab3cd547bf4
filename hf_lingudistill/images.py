"""Images as people store them -> RGB, by the rule of transformers' own processors."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from datasets import Image
from PIL import Image as PILImage

from .bad_rows import BadRow
from .config import shown
from .rgb import to_rgb

IMAGE_COLUMNS = ("images", "image")
# Where a dict keeps its image: datasets' own two names first, then those of public datasets and chat formats
_KEYS = ("bytes", "path", "image", "url", "base64", "data", "image_url")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
_JPEG = "/9j/"  # how every JPEG begins in base64: not a folder
_SHORTEST_BASE64 = 60  # of the smallest image file there is; a shorter text is a file's name


def decode_image(value: Any) -> PILImage.Image:
    """An RGB image; EXIF rotation applied, transparency on white.

    Args:
        value: a PIL image, the bytes of a file, a path, a URL, a data URI, base64 text, or a dict that holds one of them
            (`{"bytes", "path"}`, as datasets stores it; `{"url"}`; ...).

    Raises:
        BadRow: if it is missing, of another type, unreadable or of zero size.
    """
    while isinstance(value, dict):
        value = next((value[key] for key in _KEYS if value.get(key)), None)
    if value is None:
        raise BadRow("image missing", "an image is missing (null)")
    try:
        if isinstance(value, str):
            value = _opened_text(value)
        if isinstance(value, bytes | bytearray) and (path := _as_path(value)):
            image: Any = PILImage.open(path)
        elif isinstance(value, bytes | bytearray):
            image = PILImage.open(io.BytesIO(value))
        elif isinstance(value, Path):
            image = PILImage.open(value)
        elif isinstance(value, PILImage.Image):
            image = value
        else:
            array = isinstance(value, list) or hasattr(value, "__array__")
            hint = "; of an array of pixels, `PIL.Image.fromarray` makes one" if array else ""
            raise BadRow("image of wrong type", f"an image was expected, found {type(value).__name__}{hint}")
        if 0 in image.size:
            raise BadRow("image of zero size", f"an image has the size {image.size[0]}x{image.size[1]}")
        return to_rgb(image)
    except BadRow:
        raise
    except PILImage.DecompressionBombError as error:
        raise BadRow("image too large", f"an image is too large to decode ({error})") from error
    except Exception as error:  # PIL raises a dozen types for a dozen formats, a URL those of its network library
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise BadRow("image unreadable", f"an image cannot be read ({why})") from error


def _as_path(value: bytes | bytearray) -> str | None:
    """The file that bytes name: Arrow makes bytes of all paths of a column in which one row has bytes. None where they are an image."""
    try:
        text = bytes(value[:4096]).decode()
    except UnicodeDecodeError:
        return None
    return text if "\0" not in text and len(value) <= 4096 and os.path.isfile(text) else None


def _opened_text(text: str) -> Any:
    """What a text stands for: a file, a URL, or base64. -> bytes, a path or a PIL image."""
    if text.startswith("data:"):
        return _from_base64(text.partition(",")[2], text)
    if text.startswith("file://"):
        return Path(url2pathname(urlsplit(text).path))  # %20 is a space
    if "://" in text[:4096]:  # a URL, inside an archive, or on the Hub: datasets knows how to open it
        try:
            return Image().decode_example({"bytes": None, "path": text})
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise BadRow(
                "image unreadable",
                f"an image cannot be read from {shown(text)} ({why}); download it, and give its path in column 'images' instead",
            ) from error
    if os.path.isfile(text):
        return Path(text)
    is_path = text.startswith(os.sep) and len(text) <= 1024 and not text.startswith(_JPEG)
    if len(text) >= _SHORTEST_BASE64 and _BASE64.fullmatch(text) and not is_path:
        return _from_base64(text, text)
    where = "" if os.path.isabs(text) else f", looked for in {os.getcwd()}"
    raise BadRow(
        "image unreadable",
        f"an image cannot be read (FileNotFoundError: {shown(text)}{where}; expected a path, a URL, a data URI, base64 text, or the "
        "bytes of an image file)",
    )


def _from_base64(text: str, whole: str) -> bytes:
    """Standard or URL-safe base64, with or without padding and line breaks."""
    compact = "".join(text.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow(
            "image unreadable",
            f"an image cannot be read (the text {shown(whole[:80])} of {len(whole):,} characters is neither a file nor base64)",
        ) from error
