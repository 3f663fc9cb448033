"""Images are prepared one at a time: not for a client that has left, and not before the texts of others."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from typing import Any

import pytest
from fake_model import fake_model
from PIL import Image

from api.caller import Caller
from api.images.fetch import Fetcher
from api.protocol.schemas import ChatRequest
from api.requests import prompt as prompts
from api.requests.prompt import IMAGE_THREADS, PromptBuilder
from settings import Settings

USER = Caller("user")
IMAGES = 4


@pytest.fixture
def builder():
    settings = Settings()
    built = PromptBuilder(settings, Fetcher.of(settings))
    yield built
    built.close()


class HeldDecoding:
    """Decoding that goes on only once it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go = threading.Semaphore(0), threading.Event()
        self.count = 0
        decode = prompts.decode

        def held(image: Image.Image, param: str) -> Image.Image:
            self.count += 1
            self.began.release()
            assert self.go.wait(30)
            return decode(image, param)

        monkeypatch.setattr(prompts, "decode", held)

    async def under_way(self, images: int) -> None:
        for _ in range(images):
            assert await asyncio.to_thread(self.began.acquire, timeout=30)


def chat(*content: dict[str, Any]) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": [*content, {"type": "text", "text": "?"}]}]})


def pictures(first: int) -> list[dict[str, Any]]:
    out = []
    for number in range(first, first + IMAGES):
        buffer = io.BytesIO()
        Image.new("RGB", (56, 56), (number, 0, 0)).save(buffer, "PNG")
        out.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"}})
    return out


async def prepare(builder: PromptBuilder, request: ChatRequest, model: Any) -> prompts.Prompt:
    return await builder.finish(await builder.draft(request, model, USER, "salt"), model, USER)


def test_images_of_a_client_that_has_left_are_not_decoded(builder, monkeypatch) -> None:
    decoding, model = HeldDecoding(monkeypatch), fake_model()

    async def leave() -> None:
        work = [asyncio.create_task(prepare(builder, chat(*pictures(IMAGES * n)), model)) for n in range(3)]
        await decoding.under_way(IMAGE_THREADS)
        for each in work:
            each.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        decoding.go.set()
        left = await prepare(builder, chat(), model)
        assert not left.images
        await asyncio.get_running_loop().run_in_executor(builder.image_pool(USER), lambda: None)  # behind whatever waits

    asyncio.run(leave())

    assert decoding.count == IMAGE_THREADS, "those in progress, and none of the other ten"


def test_a_text_does_not_wait_for_images(builder, monkeypatch) -> None:
    decoding, model = HeldDecoding(monkeypatch), fake_model()

    async def ask() -> None:
        others = [asyncio.create_task(prepare(builder, chat(*pictures(IMAGES * n)), model)) for n in range(3)]
        await decoding.under_way(IMAGE_THREADS)
        text = await asyncio.wait_for(prepare(builder, chat(), model), 20)
        assert text.ids and not decoding.go.is_set()
        decoding.go.set()
        assert [len(made.images) for made in await asyncio.gather(*others)] == [IMAGES] * 3

    asyncio.run(ask())


def test_images_of_several_requests_take_turns(builder, monkeypatch) -> None:
    decoding, model = HeldDecoding(monkeypatch), fake_model()
    ended: list[str] = []

    async def ask() -> None:
        async def answer(name: str, images: list[dict[str, Any]]) -> None:
            await prepare(builder, chat(*images), model)
            ended.append(name)

        many = [asyncio.create_task(answer("many", pictures(IMAGES * n))) for n in range(3)]
        await decoding.under_way(IMAGE_THREADS)
        one = asyncio.create_task(answer("one", pictures(100)[:1]))
        await asyncio.sleep(0.1)  # its image waits behind those of the others that wait now
        decoding.go.set()
        await asyncio.gather(*many, one)

    asyncio.run(ask())

    assert ended[0] == "one"
