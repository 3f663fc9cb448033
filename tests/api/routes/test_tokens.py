"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import pytest
from served import image_part, text_part


def test_text_becomes_tokens_and_tokens_become_text(serve) -> None:
    client = serve().client

    there = client.post("/tokenize", json={"prompt": "héllo <|user|>", "return_token_strs": True}).json()
    back = client.post("/detokenize", json={"tokens": there["tokens"]}).json()

    assert there["count"] == len(there["tokens"]) == len("héllo <|user|>".encode())
    assert there["max_model_len"] == 4096 and len(there["token_strs"]) == there["count"]
    assert back == {"prompt": "héllo <|user|>"}


def test_a_conversation_is_counted_as_the_engine_counts_it(serve) -> None:
    served = serve()
    messages = [{"role": "user", "content": "hello"}]

    counted = served.client.post("/tokenize", json={"messages": messages}).json()["count"]
    without = served.client.post(
        "/tokenize", json={"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    ).json()["count"]

    assert counted == served.chat("hello").json()["usage"]["prompt_tokens"] and without == counted + 3


def test_pictures_are_counted_as_the_engine_counts_them(serve) -> None:
    served = serve()
    content = [image_part(), text_part("and"), image_part("blue", size=(112, 56))]
    messages = [{"role": "user", "content": content}]

    answer = served.client.post("/tokenize", json={"messages": messages}).json()
    counted = served.client.post("/v1/responses/input_tokens", json={"input": [
        {"role": "user", "content": [{"type": "input_image", "image_url": part["image_url"]["url"]}
                                     if part["type"] == "image_url" else part for part in content]}]}).json()  # fmt: skip

    usage = served.chat(content).json()["usage"]
    assert answer["count"] == len(answer["tokens"]) == usage["prompt_tokens"] == counted["input_tokens"]
    image = served.model.vocabulary.special[served.model.image_token]
    assert answer["tokens"].count(image) == usage["prompt_tokens_details"]["image_tokens"] == 12


def test_a_broken_picture_is_not_counted(serve) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

    answer = serve().client.post("/tokenize", json={"messages": [{"role": "user", "content": [part]}]})

    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ("/tokenize", {"prompt": "x" * 4_000_000}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 4_000_000}]}, "messages"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": True}, "add_special_tokens"),
        ("/detokenize", {"tokens": [99999]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [2**70]}, "tokens[0]"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"model": "other", "tokens": []}, "model"),
    ],
)
def test_an_invalid_field_is_refused_by_name(path: str, body: dict[str, Any], param: str, serve) -> None:
    answer = serve().client.post(path, json=body)

    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param
