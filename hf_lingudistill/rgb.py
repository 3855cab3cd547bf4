"""The one way in which an image becomes RGB: in training, in evaluation, and in the Space, which uses this file alone."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps
from transformers.image_transforms import (
    convert_to_rgb,  # not through _internals: the Space has no other module of ours
)

_AS_ARRAY: dict[str, Any] = (
    {"return_numpy": True} if "return_numpy" in inspect.signature(convert_to_rgb).parameters else {}
)


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """RGB, upright. Transparency is composited on white, as transformers' processors do from 5.21 on; before, they turn it black.

    16-bit and 32-bit greys are scaled to 8 bits, where PIL's own conversion would clip nearly all of them to white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = image.convert("F").point(lambda p: p / 257.0 + 0.5).convert("L")
    elif image.mode in ("I", "F"):  # 32-bit has no known range: stretched
        image.load()
        if not np.isfinite(np.asarray(image)).all():
            raise ValueError("its pixels hold NaN or infinite values")
        low, high = image.getextrema()
        span = float(high - low) or 1.0  # type: ignore[operator]
        image = image.convert("F").point(lambda p: (p - low) * 255.0 / span).convert("L")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return PILImage.fromarray(np.asarray(convert_to_rgb(image, **_AS_ARRAY)))
