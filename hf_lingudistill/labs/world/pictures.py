"""Pictures with captions, split so that what is measured was not trained on.

    world = emoji_world()
    world.pictures(("long", "short"), SEEN)    # what training may use
    world.pictures(("test",), UNSEEN)          # unseen things by an unseen artist

A thing, or a caption, is in one split for good, whatever the seed: `long` (short questions and long answers are trained on),
`short` (short questions only) or `test` (in tests only). `caption_world` makes the same of a captioned dataset on the Hub.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from PIL import Image as PILImage
from PIL import ImageOps

from ...rgb import to_rgb
from .art import ARTISTS, SEEN, UNSEEN, Artist, art_folder, draw, fetch_art, icons, svg

Split = Literal["long", "short", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_SHARES = {"long": 0.6, "short": 0.2, "test": 0.2}

THINGS = Path(__file__).with_name("things.yaml")


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows. kind: `nature`, `food`, ... or None where nobody said; artist: None for photographs."""

    name: str
    caption: str
    kind: str | None
    artist: str | None
    split: Split
    render: Callable[[], PILImage.Image] = field(compare=False, repr=False)

    def image(self) -> PILImage.Image:
        return self.render()

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.render().save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True)
class World:
    """All pictures of one source, in a fixed order."""

    source: str
    all: tuple[Picture, ...]

    def pictures(
        self, splits: Sequence[Split] = SPLITS, artists: Sequence[str] | None = None, *, one_each: int | None = None
    ) -> list[Picture]:
        """Those of the splits and artists (None: all). one_each: a seed; then every thing comes once, by an artist that it picks.

        Raises:
            ValueError: if a split is unknown or nothing is found.
        """
        if unknown := set(splits) - set(SPLITS):
            raise ValueError(f"Unknown split {', '.join(sorted(unknown))}; expected some of {', '.join(SPLITS)}.")
        found = [one for one in self.all if one.split in splits and (artists is None or one.artist in artists)]
        if not found:
            raise ValueError(f"{self.source} has no picture in {', '.join(splits)} by {artists or 'anyone'}.")
        if one_each is None:
            return found
        rng = random.Random(one_each)
        by_name: dict[str, list[Picture]] = {}
        for one in found:
            by_name.setdefault(one.name, []).append(one)
        return [rng.choice(of_name) for of_name in by_name.values()]


def split_of(name: str) -> Split:
    """The split of a thing or a caption: by a hash of its name, so that it never depends on what else there is."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32
    for split in SPLITS:
        if (place := place - _SHARES[split]) < 0:
            return split
    return "test"


def with_article(name: str) -> str:
    """`hot-dog` -> `a hot dog`."""
    words = name.replace("-", " ")
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"


def read_things(path: Path = THINGS) -> list[tuple[str, str, str]]:
    """(name, caption, kind) of every thing, in order."""
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    captions = listed["captions"]
    return [
        (name, captions.get(name) or with_article(name), kind)
        for kind, names in listed["kinds"].items()
        for name in names.split()
    ]


def emoji_world(
    folder: Path | None = None,
    *,
    size: int = 64,
    fetch: bool = True,
    artists: Sequence[Artist] = ARTISTS,
    things: Path = THINGS,
) -> World:
    """The things, drawn by every artist who drew them: the four of `SEEN` drew all, the fifth (`UNSEEN`) most.

    Args:
        folder: where the archives lie; `art.art_folder()` if left out.
        size: pixels a side.
        fetch: bring missing archives with npm; else they must be there.

    Raises:
        ArtError: if the art is not here and cannot be fetched.
    """
    folder = folder or art_folder()
    if fetch:
        fetch_art(folder, artists=artists)
    sets = {artist.name: icons(folder / artist.archive) for artist in artists}

    @cache
    def drawing(artist: str, name: str) -> PILImage.Image:
        document = svg(sets[artist], name)
        assert document is not None
        return draw(document, size)

    found = [
        Picture(name, caption, kind, artist, split_of(name), partial(drawing, artist, name))
        for name, caption, kind in read_things(things)
        for artist in sets
        if svg(sets[artist], name) is not None
    ]
    return World("five artists", tuple(found))


def caption_world(
    dataset: str,
    *,
    n: int = 2000,
    image: str = "image",
    caption: str = "caption",
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    size: int = 64,
) -> World:
    """The first n captioned pictures of a dataset on the Hub (COCO captions, LLaVA-Instruct, ...), read as a stream.

    `image` may hold a list of images, of which the first counts. `caption` may hold a text, a list of texts (the first
    counts), or a conversation (`from`/`value` or `role`/`content`), of which the first answer's first sentence is taken.
    A caption starts small and ends without a full stop, as in "The picture shows {caption}.". Rows with the same caption share a split.

    Raises:
        ValueError: if a column is missing, or no row has a picture and a caption.
    """
    from datasets import load_dataset

    rows = load_dataset(dataset, config, split=split, revision=revision, streaming=True)
    found: list[Picture] = []
    for row in rows:
        for column in (image, caption):
            if column not in row:
                raise ValueError(f"{dataset} has no column {column!r}; it has {', '.join(sorted(row))}.")
        pixels = row[image][0] if isinstance(row[image], list) and row[image] else row[image]
        said = caption_of(row[caption])
        if isinstance(pixels, PILImage.Image) and said:
            png = _square(pixels, size)
            found.append(Picture(said, said, None, None, split_of(said), partial(_opened, png)))
        if len(found) == n:
            break
    if not found:
        raise ValueError(f"No row of {dataset} has a picture in {image!r} and a caption in {caption!r}.")
    return World(dataset, tuple(found))


def caption_of(value: Any) -> str:
    """A caption column's value as one caption; "" if there is none."""
    if isinstance(value, list):
        if value and isinstance(value[0], dict):
            answers = [turn for turn in value if (turn.get("from") or turn.get("role")) in ("gpt", "assistant")]
            value = answers[0].get("value", answers[0].get("content")) if answers else ""
            if isinstance(value, list):
                value = " ".join(part.get("text") or "" for part in value)
        else:
            value = value[0] if value else ""
    words = " ".join(str(value or "").split())
    words = re.split(r"(?<=[.!?])\s", words, maxsplit=1)[0].rstrip(".!? ")
    first, _, rest = words.partition(" ")
    # "A dog" becomes "a dog"; "NASA" and names of which only this is known stay
    return (
        f"{first.lower()} {rest}".strip() if first in ("A", "An", "The", "Two", "Three", "Some", "Several") else words
    )


def _opened(png: bytes) -> PILImage.Image:
    return PILImage.open(io.BytesIO(png))


def _square(image: PILImage.Image, size: int) -> bytes:
    buffer = io.BytesIO()
    ImageOps.pad(to_rgb(image), (size, size), color="white").save(buffer, "PNG")
    return buffer.getvalue()


__all__ = ["SEEN", "SPLITS", "UNSEEN", "Picture", "World", "caption_world", "emoji_world", "split_of"]
