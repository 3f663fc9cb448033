"""Which images are accepted and which refused, and that limits are checked before the work."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from urllib.parse import quote

import pytest
from PIL import Image

from api.errors import ServingError
from api.images.decode import data_url_bytes, decode, open_image, read_data_url
from settings import Settings

SETTINGS = Settings(max_image_bytes=100_000, max_image_pixels=1_000_000)
P = "messages[0].content[0].image_url.url"


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def accept(data: bytes, settings: Settings = SETTINGS) -> Image.Image:
    return decode(open_image(read_data_url(url(data), P, settings), P, settings), P)


def refusal(address: str, settings: Settings = SETTINGS) -> ServingError:
    with pytest.raises(ServingError) as caught:
        decode(open_image(read_data_url(address, P, settings), P, settings), P)
    assert caught.value.param == P
    return caught.value


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_the_type_is_read_from_the_content(kind: str) -> None:
    image = accept(encoded(Image.new("RGB", (40, 30), (250, 0, 0)), kind))

    assert (image.mode, image.size) == ("RGB", (40, 30))
    red, green, blue = image.getpixel((20, 15))
    assert red > 200 and green < 30 and blue < 30


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image = Image.new("RGB", (40, 30), "white")
    image.paste((0, 0, 250), (0, 0, 20, 30))

    upright = accept(encoded(image, "JPEG", exif=exif))

    assert upright.size == (30, 40)
    assert upright.getpixel((15, 5))[2] > 200 and upright.getpixel((15, 5))[0] < 60


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)),
        Image.new("LA", (8, 8), (0, 0)),
    ],
)
def test_transparent_parts_become_white(image: Image.Image) -> None:
    assert accept(encoded(image)).getpixel((4, 4)) == (255, 255, 255)


def test_a_transparent_palette_becomes_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])

    assert accept(encoded(image, transparency=0)).getpixel((4, 4)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    image = Image.new("I;16", (8, 8), 0x8000)

    assert accept(encoded(image)).getpixel((4, 4)) == (128, 128, 128)


def test_cmyk_becomes_rgb() -> None:
    assert accept(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "/etc/passwd", "", "data:image/png;base64", "data:,hello"])
def test_anything_but_a_base64_data_url_is_refused(address: str) -> None:
    assert refusal(address).code == "unsupported_url"


@pytest.mark.parametrize("write", [
    lambda text: base64.encodebytes(base64.b64decode(text)).decode(),
    lambda text: text.rstrip("="),
    lambda text: text.replace("+", "-").replace("/", "_"),
    lambda text: quote(text, safe=""),
])  # fmt: skip
def test_base64_may_be_written_as_programs_write_it(write) -> None:
    data = bytes(range(256)) * 3 + b"x"

    assert read_data_url(f"data:image/png;base64,{write(base64.b64encode(data).decode())}", "url", SETTINGS) == data


def test_bad_base64_is_refused() -> None:
    assert "not valid base64" in refusal("data:image/png;base64,???").message


def test_text_after_the_padding_of_a_picture_is_refused() -> None:
    assert "not valid base64" in refusal(f"{url(encoded(Image.new('RGB', (8, 8))))}==iVBORw0KGgo=").message


def test_line_breaks_do_not_count_as_bytes_of_a_picture() -> None:
    data, settings = bytes(4950), Settings(max_image_bytes=4950)
    lines = base64.encodebytes(data).decode().replace("\n", "\r\n")

    assert read_data_url(f"data:;base64,{lines}", "url", settings) == data
    assert data_url_bytes(f"data:;base64,{lines}") == 4950
    with pytest.raises(ServingError) as caught:
        read_data_url(f"data:;base64,{lines}", "url", Settings(max_image_bytes=4949))
    assert caught.value.status == 413 and caught.value.message.endswith("Given: 4950")


def test_too_many_bytes_are_refused_with_the_numbers() -> None:
    error = refusal(url(b"x" * 100_001))

    assert (error.status, error.code) == (413, "image_too_large")
    assert "<= 100000 bytes. Given: 100001" in error.message


def test_too_many_pixels_are_refused_from_the_header_alone() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    # A header that announces 10^10 pixels without any data: decoding it would fail with another error.
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    bomb += chunk(b"IDAT", b"")

    error = refusal(url(bomb))

    assert (error.status, error.code) == (413, "image_too_large")
    assert "<= 1000000 pixels. Given: 10000000000" in error.message


def test_a_very_long_image_is_refused() -> None:
    assert "ratio <= 200. Given: 2010x10" in refusal(url(encoded(Image.new("L", (2010, 10))))).message


def test_other_data_is_refused() -> None:
    assert "must be a picture in one of PNG" in refusal(url(b"hello")).message
    assert "must be a picture in one of PNG" in refusal(url(b"<svg/>", "image/svg+xml")).message


def test_a_truncated_image_is_refused() -> None:
    whole = encoded(Image.effect_noise((60, 60), 90))

    assert refusal(url(whole[: len(whole) // 2])).code == "invalid_image"


def test_an_empty_image_is_refused() -> None:
    assert "has 0 bytes" in refusal("data:image/png;base64,").message


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_refused_with_its_number_of_frames(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (n * 80, 0, 0)) for n in range(3)]
    error = refusal(url(encoded(frames[0], kind, save_all=True, append_images=frames[1:])))

    assert error.code == "animated_image" and "Given: 3 frames" in error.message


def test_of_a_camera_image_with_two_views_the_first_is_used() -> None:
    first, second = Image.new("RGB", (16, 8), (250, 0, 0)), Image.new("RGB", (16, 8), (0, 0, 250))

    image = accept(encoded(first, "MPO", save_all=True, append_images=[second]))

    assert image.size == (16, 8) and image.getpixel((4, 4))[0] > 200


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_a_line_of_pixels_is_refused(size: tuple[int, int]) -> None:
    assert "ratio <= 200" in refusal(url(encoded(Image.new("L", size)))).message


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert accept(encoded(Image.new(mode, (8, 8)))).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_an_image_truncated_anywhere_is_decoded_or_refused(kind: str) -> None:
    whole = encoded(Image.effect_noise((40, 40), 90).convert("RGB"), kind)

    for end in range(1, len(whole), max(1, len(whole) // 60)):
        try:
            assert accept(whole[:end]).mode == "RGB"
        except ServingError as error:
            assert error.status == 400


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_an_image_with_corrupt_bytes_is_decoded_or_refused(kind: str) -> None:
    rng = random.Random(3)
    whole = encoded(Image.effect_noise((40, 40), 90).convert("RGB"), kind)

    for _ in range(60):
        broken = bytearray(whole)
        for _ in range(8):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            assert accept(bytes(broken)).mode == "RGB"
        except ServingError as error:
            assert error.status in (400, 413)


def test_a_single_pixel_is_an_image() -> None:
    assert accept(encoded(Image.new("L", (1, 1)))).size == (1, 1)
