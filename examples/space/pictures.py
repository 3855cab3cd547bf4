"""The example pictures: one shape in one color on a plain background, the kind of image that even a tiny VLM can read."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 256
SMOOTH = 4  # drawn this many times larger, then scaled down
# name: (background, shape, fill, box in 64ths)
PICTURES = {
    "red circle": ("#fdf3e3", "circle", "#ff0000", (14, 12, 46, 44)),
    "blue triangle": ("#eaf6f0", "triangle", "#0000ff", (18, 14, 52, 44)),
}


def draw(name: str) -> Image.Image:
    """One of `PICTURES`, 256 pixels square."""
    background, shape, fill, box = PICTURES[name]
    scale = SIZE * SMOOTH / 64
    left, top, right, bottom = (value * scale for value in box)
    picture = Image.new("RGB", (SIZE * SMOOTH, SIZE * SMOOTH), background)
    pen = ImageDraw.Draw(picture)
    if shape == "triangle":
        pen.polygon([(left, bottom), ((left + right) / 2, top), (right, bottom)], fill=fill)
    else:
        pen.ellipse([left, top, right, bottom], fill=fill)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_all(folder: Path) -> dict[str, Path]:
    """Draw every picture into a folder. -> {name: file}."""
    files = {name: folder / f"{name.replace(' ', '-')}.png" for name in PICTURES}
    for name, file in files.items():
        draw(name).save(file)
    return files
