"""Decodes the bytes of a `data:` URL or of a fetched image to an upright RGB image, within limits.

Every limit is checked before the work it limits: bytes before base64, pixels before decoding.
"""

from __future__ import annotations

import base64
import binascii
from contextlib import suppress
from io import BytesIO
from urllib.parse import unquote

from PIL import Image, ImageOps, UnidentifiedImageError

from api.errors import ServingError, invalid, too_large
from settings import Settings

# The alphabet of URLs as the usual one, and no line breaks.
_WRITTEN_OTHERWISE = str.maketrans({"-": "+", "_": "/", "\r": None, "\n": None, " ": None, "\t": None})
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_ASPECT = 200  # the processor refuses longer ones
# `max_image_pixels` is checked on every image; Pillow's own limit would only add warnings.
Image.MAX_IMAGE_PIXELS = None


def read_data_url(url: str, param: str, settings: Settings) -> bytes:
    """The bytes of a base64 `data:` URL. Raises the 400 or 413 error that names `param`."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data" or "," not in rest:
        raise invalid(f"`{param}` must be a data: URL, or http(s) where it is fetched.", param, "unsupported_url")
    header, _, payload = rest.partition(",")
    if not header.lower().endswith(";base64"):
        raise invalid(f"`{param}` must be a data: URL in base64 (data:image/png;base64,...).", param, "unsupported_url")
    plain = _plain(payload)
    check_bytes(len(plain) * 3 // 4, param, settings)
    try:
        data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"`{param}` is not valid base64.", param, "invalid_image") from None
    return data


def data_url_bytes(url: str) -> int:
    """Bytes of the file in a base64 `data:` URL, which is not decoded."""
    return len(_plain(url.partition(",")[2])) * 3 // 4


def check_bytes(count: int, param: str, settings: Settings) -> None:
    """Raises the 413 error that names `param`."""
    if count > settings.max_image_bytes:
        raise _too_many_bytes(count, param, settings)


def _plain(payload: str) -> str:
    """Base64 without line breaks and padding, in the usual alphabet: programs write all of these."""
    payload = unquote(payload) if "%" in payload else payload
    return payload.translate(_WRITTEN_OTHERWISE).rstrip("=")


def open_image(data: bytes, param: str, settings: Settings) -> Image.Image:
    """Read the header only: the format is detected from the content, and the size checked against the limits.

    Raises the 400 or 413 error that names `param`.
    """
    if not data:
        raise invalid(f"`{param}` is empty: it has 0 bytes.", param, "invalid_image")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise invalid(f"`{param}` must be a picture in one of {', '.join(FORMATS)}.", param, "invalid_image") from None
    except Exception as error:  # a decoder may raise anything on a malformed header
        raise _broken(param, error) from None
    width, height = image.size
    check_pixels(width * height, param, settings)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise invalid(f"`{param}` must have sides in a ratio <= {MAX_ASPECT}. Given: {width}x{height}", param)
    if (frames := _frames(image)) > 1:
        raise invalid(f"`{param}` must be a still picture. Given: {frames} frames", param, "animated_image")
    return image


def check_pixels(count: int, param: str, settings: Settings) -> None:
    """Raises the 413 error that names `param`."""
    if count > settings.max_image_pixels:
        message = f"`{param}` must have <= {settings.max_image_pixels} pixels. Given: {count}"
        raise too_large(message, param, "image_too_large")


def _frames(image: Image.Image) -> int:
    """How many frames an animation has. A camera's JPEG may hold a second view (MPO), which is not an animation."""
    if image.format == "MPO":
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # a decoder may raise anything; a damaged first frame is refused when it is decoded
        return 1
    finally:
        with suppress(Exception):
            image.seek(0)


def is_remote(url: str) -> bool:
    return url.partition(":")[0].lower() in ("http", "https")


def decode(image: Image.Image, param: str) -> Image.Image:
    """All pixels, upright, in RGB; transparent parts over white. Raises the 400 error for damaged data."""
    try:
        image.load()
    except Exception as error:  # a decoder may raise anything on malformed data
        raise _broken(param, error) from None
    return _flatten(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # an image with a broken orientation tag is still accepted
        return image


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: keep the high byte
        return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    coloured = image.convert("RGBA")
    white = Image.new("RGBA", coloured.size, "white")
    return Image.alpha_composite(white, coloured).convert("RGB")


def _too_many_bytes(given: int, param: str, settings: Settings) -> ServingError:
    return too_large(f"`{param}` must be <= {settings.max_image_bytes} bytes. Given: {given}", param, "image_too_large")


def _broken(param: str, error: Exception) -> ServingError:
    """The 400 error for damaged data. Raises MemoryError if `error` is a lack of memory, which is not the caller's fault."""
    if isinstance(error, MemoryError) or "out of memory" in str(error):  # Pillow's decoders raise an OSError for it
        raise MemoryError("not enough memory to decode a picture") from None
    return invalid(f"`{param}` is damaged: it cannot be decoded.", param, "invalid_image")
