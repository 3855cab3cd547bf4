"""The example pictures, drawn: shapes for models that were trained on shapes, a receipt and a chart for any other."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = 256
SMOOTH = 4  # shapes are drawn this many times larger, then scaled down
# name: (background, shape, fill, box in 64ths)
SHAPES = {
    "red circle": ("#fdf3e3", "circle", "#ff0000", (14, 12, 46, 44)),
    "blue triangle": ("#eaf6f0", "triangle", "#0000ff", (18, 14, 52, 44)),
}
RECEIPT = (("Bread", "3.20"), ("Milk", "1.45"), ("Apples", "2.80"), ("Coffee", "6.50"))
SALES = (("Mon", 12), ("Tue", 18), ("Wed", 9), ("Thu", 24), ("Fri", 31))


def draw_shape(name: str) -> Image.Image:
    """One of `SHAPES`, 256 pixels square."""
    background, shape, fill, box = SHAPES[name]
    scale = SIZE * SMOOTH / 64
    left, top, right, bottom = (value * scale for value in box)
    picture = Image.new("RGB", (SIZE * SMOOTH, SIZE * SMOOTH), background)
    pen = ImageDraw.Draw(picture)
    if shape == "triangle":
        pen.polygon([(left, bottom), ((left + right) / 2, top), (right, bottom)], fill=fill)
    else:
        pen.ellipse([left, top, right, bottom], fill=fill)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_receipt() -> Image.Image:
    """A till receipt, 400 x 480 pixels: four things, and what they cost together."""
    picture = Image.new("RGB", (400, 480), "#fbfaf7")
    pen = ImageDraw.Draw(picture)
    large, plain = ImageFont.load_default(34), ImageFont.load_default(26)
    pen.text((200, 52), "Corner Shop", "#1c1917", font=large, anchor="mm")
    pen.text((200, 92), "4 June, 17:32", "#57534e", font=plain, anchor="mm")
    total = f"{sum(float(price) for _, price in RECEIPT):.2f}"
    for row, (what, price) in enumerate(RECEIPT):
        pen.text((44, 150 + 48 * row), what, "#1c1917", font=plain, anchor="lm")
        pen.text((356, 150 + 48 * row), price, "#1c1917", font=plain, anchor="rm")
    pen.line([(44, 346), (356, 346)], "#1c1917", 2)
    pen.text((44, 388), "Total", "#1c1917", font=large, anchor="lm")
    pen.text((356, 388), total, "#1c1917", font=large, anchor="rm")
    return picture


def draw_chart() -> Image.Image:
    """A bar chart, 480 x 400 pixels: one bar per weekday, the last one the tallest."""
    picture = Image.new("RGB", (480, 400), "white")
    pen = ImageDraw.Draw(picture)
    large, plain = ImageFont.load_default(28), ImageFont.load_default(22)
    pen.text((240, 36), "Cups of coffee sold", "#1c1917", font=large, anchor="mm")
    for column, (day, cups) in enumerate(SALES):
        left, top = 48 + 80 * column, 330 - 7.5 * cups
        pen.rectangle([left, top, left + 56, 330], "#0f766e")
        pen.text((left + 28, top - 16), str(cups), "#1c1917", font=plain, anchor="mm")
        pen.text((left + 28, 356), day, "#1c1917", font=plain, anchor="mm")
    pen.line([(36, 331), (444, 331)], "#1c1917", 2)
    return picture


def draw(name: str) -> Image.Image:
    """A shape by its name, "receipt" or "chart"."""
    return {"receipt": draw_receipt, "chart": draw_chart}.get(name, lambda: draw_shape(name))()


def draw_all(folder: Path) -> dict[str, Path]:
    """Draw every picture into a folder. -> {name: file}."""
    files = {name: folder / f"{name.replace(' ', '-')}.png" for name in (*SHAPES, "receipt", "chart")}
    for name, file in files.items():
        draw(name).save(file)
    return files
