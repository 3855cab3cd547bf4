"""Pictures that the package draws itself, so that the `quick` suite has something to show: one shape in one color, with a caption."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from PIL import Image as PILImage
from PIL import ImageDraw

SIDE = 224  # pixels
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "pink")
SHAPES = ("circle", "square", "triangle", "star")
PLACES = ("in the middle", "at the top", "at the bottom", "on the left", "on the right")
SIZES = (0.16, 0.22)  # of the radius, as a share of SIDE
COUNT = len(COLORS) * len(SHAPES) * len(PLACES) * len(SIZES)
_CENTERS = {PLACES[0]: (0.5, 0.5), PLACES[1]: (0.5, 0.25), PLACES[2]: (0.5, 0.75), PLACES[3]: (0.25, 0.5), PLACES[4]: (0.75, 0.5)}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """other_color: one that the shape does not have."""

    image: PILImage.Image
    caption: str
    shape: str
    color: str
    other_color: str


def drawings(n: int, seed: int) -> list[Drawing]:
    """n pictures, SIDE x SIDE RGB on white, no two alike. The colors, and of each color the shapes, come equally often.

    Raises:
        ValueError: for more than there are, `COUNT`: an interval over repeats would tell of items that are none.
    """
    if n > COUNT:
        raise ValueError(f"there are {COUNT} pictures that differ, not {n}")
    rng = random.Random(seed)
    found = []
    of: dict[tuple[str, str], list[tuple[str, float]]] = {}  # where and how large each is drawn, in random order
    for index in range(n):
        color, shape = COLORS[index % len(COLORS)], SHAPES[index // len(COLORS) % len(SHAPES)]
        ways = of.setdefault((color, shape), [])
        if not ways:
            ways += rng.sample(list(itertools.product(PLACES, SIZES)), len(PLACES) * len(SIZES))
        place, size = ways.pop()
        other = rng.choice([name for name in COLORS if name != color])
        caption = f"a {'small' if size < 0.2 else 'large'} {color} {shape} {place} of a white page"
        found.append(Drawing(_drawn(shape, color, _CENTERS[place], size), caption, shape, color, other))
    rng.shuffle(found)
    return found


def _drawn(shape: str, color: str, center: tuple[float, float], size: float) -> PILImage.Image:
    image = PILImage.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(image)
    x, y, r = center[0] * SIDE, center[1] * SIDE, size * SIDE
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "triangle":
        pen.polygon([(x - r, y + r), (x, y - r), (x + r, y + r)], fill=color)
    else:
        spikes = ((0, -1), (0.3, -0.3), (1, 0), (0.3, 0.3), (0, 1), (-0.3, 0.3), (-1, 0), (-0.3, -0.3))
        pen.polygon([(x + r * a, y + r * b) for a, b in spikes], fill=color)
    return image
