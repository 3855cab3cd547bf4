"""What a visitor may ask: every check that needs no model. A refusal is one sentence to the visitor."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from rgb import to_rgb

MAX_CHARACTERS = 2000
MAX_MEGAPIXELS = 25  # decoded, 75 MB; a telephone's usual photograph has 12
MIN_SIDE = 8
MAX_ASPECT = 20  # beyond it, the short side is nothing once a processor has scaled the long one down
MAX_SIDE = 1024  # larger ones cost time and show the models nothing more


class BadInput(ValueError):
    """Cannot be answered. The message is shown to the visitor as it stands."""


def check_question(text: str | None, control_tokens: Iterable[str] = ()) -> str:
    """The question without surrounding blanks.

    Raises:
        BadInput: if it is empty, too long, not text, or holds one of the models' control tokens.
    """
    text = text or ""
    if len(text) > MAX_CHARACTERS:
        raise BadInput(
            f"Your question has {len(text):,} characters, and {MAX_CHARACTERS:,} is the most that fits here; "
            "please shorten it."
        )
    if not any(_visible(character) for character in text):
        raise BadInput("There is no question yet: type one, or pick an example.")
    if any(unicodedata.category(character) == "Cs" for character in text):
        raise BadInput("Your question holds half a character (a lone surrogate); please type it again.")
    # The longest one: where "<|im_end|>" was typed, "<|im_end" may be a token as well.
    for token in sorted(control_tokens, key=len, reverse=True):
        if token.strip() and token in text:
            raise BadInput(
                f"Your question contains {token}, which these models read as a command and not as text; "
                "please take it out or put a space inside it."
            )
    return text.strip()


def _visible(character: str) -> bool:
    # Cf, Cc: format and control characters, such as the zero-width space, which str.strip leaves in place
    return not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf")


def check_length(tokens: object, most: int) -> int:
    """The longest answer in tokens, between 1 and `most`.

    Raises:
        BadInput: if it is no number.
    """
    try:
        return min(max(int(tokens), 1), most)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        raise BadInput(f"The longest answer must be a number of tokens, up to {most}.") from None


def open_picture(path: str | Path) -> Image.Image:
    """The picture in RGB, upright, on white where it is transparent, with no side above `MAX_SIDE`.

    Its size is read from the header first: a picture that is too large is refused before a pixel of it is decoded.

    Raises:
        BadInput: if the file is no picture, is damaged, or has too many or too few pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is stricter
            with Image.open(path) as picture:
                _check_size(*picture.size)
                picture.draft("RGB", (MAX_SIDE, MAX_SIDE))  # a large JPEG is decoded at a fraction of its size
                picture = to_rgb(picture)
                picture.thumbnail((MAX_SIDE, MAX_SIDE))
                return picture
    except BadInput:
        raise
    except UnidentifiedImageError:
        raise BadInput("This file is not a picture that can be read; PNG, JPEG, WebP and GIF can.") from None
    except Image.DecompressionBombError:
        raise BadInput(
            f"This picture has far more than {MAX_MEGAPIXELS} megapixels; please make it smaller."
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError):
        raise BadInput(
            "This picture is damaged: its file ends early or does not decode; please try another."
        ) from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise BadInput(
            f"This picture has {width * height / 1e6:.0f} megapixels ({width:,} × {height:,}), and {MAX_MEGAPIXELS} "
            "is the most that fits here; please make it smaller."
        )
    if min(width, height) < MIN_SIDE:
        raise BadInput(f"This picture is {width:,} × {height:,} pixels; each side needs at least {MIN_SIDE}.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadInput(
            f"This picture is {width:,} × {height:,} pixels, a mere line to the models; "
            f"please crop it to at most {MAX_ASPECT} times as long as it is wide."
        )
