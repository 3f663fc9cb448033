"""Which uploads have been decoded before, and what came of it: an image of an earlier turn need not be decoded again.

An upload is known by what arrived, a data: URL as it is, and by whoever sent it, so that response times reveal nothing of another's
images. Only what has passed every check is known, and limits are checked again each time. Called in any thread.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

MAX_UPLOADS = 4096  # about 1 MB


@dataclass(frozen=True)
class KnownImage:
    """The facts of an image that a prompt is built from."""

    key: bytes  # of its content, as in ImageInput
    grid: tuple[int, int, int]
    tokens: int
    size: tuple[int, int]  # width and height in pixels, upright
    file_bytes: int


class KnownUploads:
    def __init__(self, limit: int = MAX_UPLOADS) -> None:
        self._limit = limit
        self._lock = Lock()
        self._images: OrderedDict[bytes, KnownImage] = OrderedDict()

    @staticmethod
    def name(source: str | bytes, salt: str, settings_key: bytes) -> bytes:
        """Of an upload: what arrived, the sender and what the image processor would make of it."""
        digest = hashlib.sha256(settings_key + hashlib.sha256(salt.encode()).digest())
        digest.update(source.encode(errors="surrogatepass") if isinstance(source, str) else source)
        return digest.digest()

    def get(self, name: bytes) -> KnownImage | None:
        with self._lock:
            image = self._images.get(name)
            if image is not None:
                self._images.move_to_end(name)
            return image

    def add(self, name: bytes, image: KnownImage) -> None:
        """`image` is what the upload was decoded to."""
        with self._lock:
            self._images[name] = image
            self._images.move_to_end(name)
            if len(self._images) > self._limit:
                self._images.popitem(last=False)
