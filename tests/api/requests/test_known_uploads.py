"""An image that was uploaded before is not decoded again, unless the engine has lost what it made of it."""

from __future__ import annotations

import base64
import io
import json
import threading
from typing import Any

import pytest
from fake_model import FakeImageProcessor
from PIL import Image
from served import chat_body, text_part

from api.caller import Caller
from api.images.known import KnownImage, KnownUploads
from api.requests import prompt as prompts

SIZE = (112, 84)


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The fields of the images that are decoded from now on."""
    fields, decode = [], prompts.decode
    monkeypatch.setattr(prompts, "decode", lambda image, param: (fields.append(param), decode(image, param))[1])
    return fields


def photo(seed: int = 0, size: tuple[int, int] = SIZE, orientation: int = 1) -> dict[str, Any]:
    buffer = io.BytesIO()
    image = Image.new("RGB", size, (seed, 200, 90))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(buffer, "JPEG", exif=exif)
    return part(buffer.getvalue())


def part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(data).decode()}}


def data_of(part: dict[str, Any]) -> bytes:
    return base64.b64decode(part["image_url"]["url"].partition(",")[2])


def test_a_second_turn_decodes_only_what_is_new(serve, decoded) -> None:
    served = serve(answer=lambda prompt, images: str(images))
    first = served.chat([photo(1), photo(2), text_part("?")]).json()
    assert len(decoded) == 2

    second = served.chat([photo(1), photo(2), photo(3), text_part("?")]).json()

    assert decoded[2:] == ["messages[0].content[2].image_url.url"]
    assert len(served.runner.encoded) == 3
    answers = [json.dumps(body["choices"][0]["message"]["content"]).count("(") for body in (first, second)]
    assert answers == [2, 3]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 2 * 12


def test_a_known_image_has_its_upright_size(serve, decoded) -> None:
    box = "<|begin_of_box|>[[0,250,500,1000]]<|end_of_box|>"
    served = serve(answer=lambda prompt, images: box)
    turned = [photo(5, orientation=6), text_part("where?")]

    boxes = [served.chat(turned).json()["choices"][0]["message"]["boxes"] for _ in range(2)]

    assert len(decoded) == 1 and boxes[0] == boxes[1]
    assert boxes[0][0]["bbox_pixels"] == [0, 28, 42, 112], "84 x 112 upright"


def test_an_image_that_everybody_has_forgotten_is_decoded_again(serve, decoded) -> None:
    served = serve()
    question = [photo(7), text_part("?")]
    first = served.chat(question).json()
    served.engine.command("drop-caches", 10)

    again = served.chat(question).json()

    assert len(decoded) == 2 and len(served.runner.encoded) == 2
    assert again["choices"][0]["message"] == first["choices"][0]["message"]


def test_another_sender_learns_nothing_of_it(serve, decoded) -> None:
    served = serve()
    for salt in ("a", "b", "a"):
        served.chat([photo(9), text_part("?")], cache_salt=salt)

    assert len(decoded) == 2


def test_what_was_refused_is_refused_again(serve, decoded) -> None:
    served = serve()
    whole = data_of(photo(11, (1000, 800)))
    damaged = [part(whole[: len(whole) // 2]), text_part("?")]
    good = [part(whole), text_part("?")]

    codes = [served.chat(content).status_code for content in (damaged, good, damaged, good)]

    assert codes == [400, 200, 400, 200]


def test_a_limit_holds_for_a_known_image_too(serve, decoded) -> None:
    served = serve()
    content = [photo(12), text_part("?")]
    assert served.chat(content).status_code == 200
    settings, size = served.app.state.server.prompts._settings, len(data_of(content[0]))
    for name, limit in (("max_image_pixels", SIZE[0] * SIZE[1]), ("max_image_bytes", size)):
        object.__setattr__(settings, name, limit)
        assert served.chat(content).status_code == 200
        object.__setattr__(settings, name, limit - 1)

        refused = served.chat(content)

        assert refused.status_code == 413 and f"<= {limit - 1}" in refused.json()["error"]["message"]
        object.__setattr__(settings, name, 10**9)


def test_the_same_image_twice_in_a_request_is_decoded_and_encoded_once(serve, decoded) -> None:
    served = serve()

    assert served.chat([photo(13), photo(13), text_part("?")]).status_code == 200

    assert len(decoded) == len(served.runner.encoded) == 1


def test_an_image_that_cannot_be_decoded_again_fails_its_request_alone(serve, monkeypatch) -> None:
    served = serve(slots=2)
    content = [photo(14), text_part("?")]
    served.chat(content)
    served.engine.command("drop-caches", 10)
    monkeypatch.setattr(FakeImageProcessor, "process", out_of_memory)

    assert served.chat(content).status_code == 500
    assert served.chat("text").status_code == 200


def out_of_memory(self, image):
    raise MemoryError


def test_others_are_answered_while_an_image_is_decoded_again(serve, monkeypatch) -> None:
    served = serve(slots=2)
    content = [photo(15), text_part("?")]
    served.chat(content)
    served.engine.command("drop-caches", 10)
    process, may = FakeImageProcessor.process, threading.Event()
    monkeypatch.setattr(FakeImageProcessor, "process", lambda self, image: (may.wait(20), process(self, image))[1])
    codes: list[int] = []
    asked = threading.Thread(target=lambda: codes.append(served.chat(content).status_code))
    asked.start()
    while not served.engine._scheduler.reading:
        pass

    assert served.chat("text").status_code == 200
    steps = served.engine.steps
    assert not may.wait(0.5)
    assert served.engine.steps - steps < 50, "the engine waits instead of turning round"

    may.set()
    asked.join(20)
    assert codes == [200]


def test_an_upload_counts_until_its_answer_and_its_pixels_until_they_are_encoded(serve) -> None:
    served = serve(answer=lambda prompt, images: "x" * 400, token_s=0.01)
    admission, content = served.app.state.server.admission, [photo(16), text_part("?")]
    size = len(content[0]["image_url"]["url"])
    admission.admit(Caller("ann")).take_image_bytes(admission.queue_image_bytes)

    refused = served.chat(content)

    assert refused.status_code == 503 and refused.headers["Retry-After"]
    assert f"Given: {size + 3 * SIZE[0] * SIZE[1]}" in refused.json()["error"]["message"]
    admission.image_bytes = 0
    seen = []
    with served.client.stream("POST", "/v1/chat/completions", json=chat_body(content, stream=True)) as answer:
        for line in answer.iter_lines():
            if '"content":"x' in line:
                seen.append(admission.image_bytes)
    assert set(seen[:10]) == {size} and admission.image_bytes == 0


def test_the_least_recently_used_are_forgotten() -> None:
    known = KnownUploads(limit=2)
    facts = {name: KnownImage(name, (1, 2, 2), 1, (28, 28), 100) for name in (b"a", b"b", b"c")}
    known.add(b"a", facts[b"a"])
    known.add(b"b", facts[b"b"])
    known.get(b"a")
    known.add(b"c", facts[b"c"])

    assert [known.get(name) is not None for name in facts] == [True, False, True]


def test_the_settings_of_the_processor_are_part_of_the_name() -> None:
    names = {KnownUploads.name(data, salt, key) for data in (b"1", b"2") for salt in ("", "x") for key in (b"p", b"q")}

    assert len(names) == 8
