"""An image that goes with a question: decoded, rotated upright, scaled down, identified by its hash.

Owns limits and encoding. Re-encoding also drops the EXIF data that a camera writes, such as the location.
"""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
MAX_SENT_PIXELS = 3_200_000  # more than the vision encoder uses, small enough to resend with each question
MAX_PNG_BYTES = 1_500_000
JPEG_QUALITY = 92


class ImageError(Exception):
    """A file that cannot be attached.

    `kind`: too_big, too_many_pixels, unreadable or no_url. `limit`: in MiB or megapixels.
    """

    def __init__(self, kind: str, name: str, limit: float = 0) -> None:
        super().__init__(f"{kind}: {name}")
        self.kind = kind
        self.name = name
        self.limit = limit


@dataclass(frozen=True)
class AttachedImage:
    """An image as it is shown and sent. `sha`: the SHA-256 of `data`, whose bytes are in the store if it is empty.

    An image with a `url` is remote: the API fetches it through its guard, the page never does. Its `sha` is that of the
    URL, and its size is unknown (0).
    """

    sha: str
    name: str
    mime: str = ""
    width: int = 0
    height: int = 0
    url: str = ""
    data: bytes = field(default=b"", repr=False, compare=False)

    def without_bytes(self) -> AttachedImage:
        return replace(self, data=b"")


def data_url(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def remote_image(url: str) -> AttachedImage:
    """An image by its URL. Raises ImageError (no_url) unless it is an http or https URL with a host."""
    url = url.strip()
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or any(char.isspace() for char in url):
        raise ImageError("no_url", url[:120])
    name = PurePosixPath(parts.path).name or host
    return AttachedImage(hashlib.sha256(url.encode()).hexdigest(), f"{name} ({host})" if name != host else host, url=url)


def prepare(name: str, data: bytes, max_bytes: int, max_pixels: int) -> AttachedImage:
    """Decode, rotate upright by the EXIF data, scale down to MAX_SENT_PIXELS and encode again. Raises ImageError."""
    if len(data) > max_bytes:
        raise ImageError("too_big", name, max_bytes / 2**20)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below replaces it
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
            # The size is in the header, so that a small file that would decode to gigabytes is never decoded.
            if opened.width * opened.height > max_pixels:
                raise ImageError("too_many_pixels", name, max_pixels / 1e6)
            source_format = opened.format
            image = _flatten(ImageOps.exif_transpose(opened))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError("too_many_pixels", name, max_pixels / 1e6) from None
    except Exception:  # Pillow raises anything from SyntaxError to struct.error for damaged files
        raise ImageError("unreadable", name) from None
    image = _shrink(image)
    encoded, mime = encode(image, lossless=source_format != "JPEG")
    sha = hashlib.sha256(encoded).hexdigest()
    return AttachedImage(sha, name, mime, image.width, image.height, data=encoded)


def _flatten(image: Image.Image) -> Image.Image:
    """To RGB, on a white background."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _shrink(image: Image.Image) -> Image.Image:
    pixels = image.width * image.height
    if pixels <= MAX_SENT_PIXELS:
        return image
    scale = (MAX_SENT_PIXELS / pixels) ** 0.5
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def encode(image: Image.Image, lossless: bool) -> tuple[bytes, str]:
    """(bytes, MIME type): PNG if `lossless` and at most MAX_PNG_BYTES, else JPEG."""
    if lossless:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        if buffer.tell() <= MAX_PNG_BYTES:
            return buffer.getvalue(), "image/png"
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue(), "image/jpeg"
