"""The pictures of a request on their way to the engine behind: fetched, limited and decoded here, sent on as data URLs.

No address that a caller gives reaches the engine, so that it fetches nothing. What engines read alike (a PNG or JPEG in
RGB, upright) is sent as it came; everything else as a PNG of the pixels that were decoded here.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from api.caller import Caller
from api.images.decode import decode, is_remote, open_image, read_data_url
from api.protocol.schemas import ChatRequest
from api.requests.admission import Permit
from api.requests.prompt import PromptBuilder, image_urls
from settings import Settings

ORIENTATION = 0x0112
PATCH_PIXELS = 28 * 28  # about one token


@dataclass(frozen=True)
class Picture:
    url: str  # data:
    size: tuple[int, int]  # width and height in pixels, upright

    @property
    def tokens(self) -> int:
        """About: only the engine knows."""
        return max(1, self.size[0] * self.size[1] // PATCH_PIXELS)


async def guarded(chat: ChatRequest, prompts: PromptBuilder, settings: Settings, caller: Caller, permit: Permit) -> list[Picture]:
    """The pictures of a request in order. Raises ServingError. One at a time, so that those of others come in between."""
    listed = image_urls(chat, settings)
    fetched = await prompts.fetch(chat)
    loop, pool = asyncio.get_running_loop(), prompts.image_pool(caller)
    made: list[Picture] = []
    uploaded = 0
    for param, url in listed:
        opened, data = await loop.run_in_executor(pool, _open, url, param, fetched, settings)
        uploaded += len(data)
        permit.take_image_bytes(len(data) + 3 * opened.size[0] * opened.size[1])
        made.append(await loop.run_in_executor(pool, _picture, opened, data, param))
    permit.keep_image_bytes(uploaded)
    return made


def _open(url: str, param: str, fetched: Mapping[str, bytes], settings: Settings) -> tuple[Image.Image, bytes]:
    data = fetched[url] if is_remote(url) else read_data_url(url, param, settings)
    return open_image(data, param, settings), data


def _picture(opened: Image.Image, data: bytes, param: str) -> Picture:
    plain = opened.format in ("PNG", "JPEG") and opened.mode == "RGB" and not opened.has_transparency_data and _is_upright(opened)
    kind = f"image/{(opened.format or '').lower()}"
    upright = decode(opened, param)
    opened.close()
    if not plain:
        buffer = BytesIO()
        upright.save(buffer, "PNG", compress_level=1)
        data, kind = buffer.getvalue(), "image/png"
    return Picture(f"data:{kind};base64,{base64.b64encode(data).decode()}", upright.size)


def _is_upright(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ORIENTATION, 1) == 1
    except Exception:  # of a broken tag, with which others may do anything
        return False
