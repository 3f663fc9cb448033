"""`python -m web.samples.draw`: draws the page's icon and sample images. Needed only to change them."""

from __future__ import annotations

from PIL import Image, ImageDraw

from models.shapes.pictures import draw_shapes, draw_text
from web.samples import FOLDER

SIZE = (320, 240)
ICON = FOLDER.parent / "icon.png"


def main() -> None:
    images = {
        "shapes.png": draw_shapes([("red", "circle"), ("blue", "star"), ("green", "square")], SIZE, seed=24),
        "count.png": draw_shapes(
            [("red", "star"), ("yellow", "square"), ("purple", "heart"), ("red", "triangle"), ("blue", "circle")],
            SIZE,
            seed=31,
        ),
        "word.png": draw_text("CAT", SIZE, seed=47),
        "place.png": draw_shapes([("blue", "square"), ("red", "heart")], SIZE, seed=54),
    }
    for name, image in images.items():
        image.save(FOLDER / name, optimize=True)
        print(f"{name}: {(FOLDER / name).stat().st_size} bytes")
    _icon(64).save(ICON, optimize=True)


def _icon(size: int) -> Image.Image:
    """An eye; drawn at four times the size, then scaled down for smooth edges."""
    big = size * 4
    icon = Image.new("RGBA", (big, big), (0, 0, 0, 0))
    draw = ImageDraw.Draw(icon)
    draw.rounded_rectangle([0, 0, big - 1, big - 1], radius=big // 5, fill="#3b5bdb")
    draw.ellipse([big * 0.12, big * 0.27, big * 0.88, big * 0.73], fill="white")
    draw.ellipse([big * 0.34, big * 0.34, big * 0.66, big * 0.66], fill="#3b5bdb")
    draw.ellipse([big * 0.52, big * 0.39, big * 0.61, big * 0.48], fill="white")
    return icon.resize((size, size), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
