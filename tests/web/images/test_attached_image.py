"""Images that go with a question: decoding, limits, encoding."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import pytest
from PIL import Image

from models.shapes.pictures import draw_shapes
from web.images import attached_image
from web.images.attached_image import ImageError, data_url, prepare, remote_image

MANY = 50_000_000
LARGE = 20 * 2**20


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_a_small_png_keeps_every_pixel() -> None:
    drawn = draw_shapes([("red", "circle")], (320, 240), seed=5)

    ready = prepare("drawn.png", encoded(drawn), LARGE, MANY)

    assert (ready.mime, ready.width, ready.height) == ("image/png", 320, 240)
    assert opened(ready.data).convert("RGB").tobytes() == drawn.convert("RGB").tobytes()


def test_the_hash_depends_on_the_image_and_not_on_its_name() -> None:
    red = encoded(draw_shapes([("red", "circle")], seed=5))
    blue = encoded(draw_shapes([("blue", "circle")], seed=5))

    assert prepare("a.png", red, LARGE, MANY).sha == prepare("b.png", red, LARGE, MANY).sha
    assert prepare("a.png", red, LARGE, MANY).sha != prepare("a.png", blue, LARGE, MANY).sha


def test_a_photo_is_rotated_upright_and_loses_its_exif_data() -> None:
    photo = Image.new("RGB", (60, 40), "white")
    photo.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    exif[0x010E] = "my secret garden"

    ready = prepare("photo.jpg", encoded(photo, "JPEG", exif=exif, quality=95), LARGE, MANY)

    assert (ready.width, ready.height, ready.mime) == (40, 60, "image/jpeg")
    red, green, _ = opened(ready.data).convert("RGB").getpixel((35, 5))  # type: ignore[misc]
    assert red > 200 and green < 60
    assert b"secret" not in ready.data


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (10, 10), (255, 0, 0, 0))

    ready = prepare("clear.png", encoded(clear), LARGE, MANY)

    assert opened(ready.data).convert("RGB").getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "I;16", "CMYK"])
def test_every_pixel_format_can_be_read(mode: str) -> None:
    image = Image.new(mode, (12, 8))
    format = "JPEG" if mode == "CMYK" else "PNG"

    ready = prepare("x", encoded(image, format), LARGE, MANY)

    assert opened(ready.data).mode == "RGB"


def test_a_large_photo_is_scaled_down_with_its_aspect_ratio() -> None:
    photo = Image.new("RGB", (4000, 2000), "green")

    ready = prepare("large.jpg", encoded(photo, "JPEG"), LARGE, MANY)

    assert ready.width * ready.height <= attached_image.MAX_SENT_PIXELS
    assert abs(ready.width / ready.height - 2) < 0.01


def test_a_noisy_image_is_sent_as_jpeg() -> None:
    noise = Image.effect_noise((1600, 1200), 90).convert("RGB")

    ready = prepare("noise.png", encoded(noise), LARGE, MANY)

    assert ready.mime == "image/jpeg"


def test_a_file_over_the_limit_is_rejected_with_the_limit() -> None:
    with pytest.raises(ImageError) as caught:
        prepare("big.png", b"x" * (2 * 2**20 + 1), 2 * 2**20, MANY)

    assert (caught.value.kind, caught.value.name, caught.value.limit) == ("too_big", "big.png", 2)


def test_a_decompression_bomb_is_rejected_by_its_header() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))

    with pytest.raises(ImageError) as caught:
        prepare("bomb.png", bomb, LARGE, MANY)

    assert (caught.value.kind, caught.value.limit) == ("too_many_pixels", 50)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"\x89PNG\r\n\x1a\n" + b"\0" * 40],
)
def test_a_file_that_is_not_an_image_is_unreadable(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        prepare("notes.png", data, LARGE, MANY)

    assert caught.value.kind == "unreadable"


def test_a_truncated_image_is_unreadable() -> None:
    whole = encoded(Image.effect_noise((200, 200), 90).convert("RGB"))

    with pytest.raises(ImageError) as caught:
        prepare("half.png", whole[: len(whole) // 2], LARGE, MANY)

    assert caught.value.kind == "unreadable"


def test_the_data_url_has_the_same_bytes() -> None:
    ready = prepare("a.png", encoded(Image.new("RGB", (4, 4), "red")), LARGE, MANY)

    head, _, body = data_url(ready.mime, ready.data).partition(",")

    assert head == "data:image/png;base64"
    assert base64.b64decode(body) == ready.data


def test_a_remote_image_is_identified_by_its_url_and_not_fetched() -> None:
    image = remote_image(" https://example.org/a/cat.jpg?size=9 ")

    assert (image.url, image.name) == ("https://example.org/a/cat.jpg?size=9", "cat.jpg (example.org)")
    assert image.data == b""


@pytest.mark.parametrize(
    "url", ["", "cat.jpg", "file:///etc/passwd", "ftp://example.org/a.png", "https://", "https://a b/c.png", "http://[::1"]
)
def test_an_invalid_url_is_rejected(url: str) -> None:
    with pytest.raises(ImageError) as caught:
        remote_image(url)

    assert caught.value.kind == "no_url"
