"""Legacy text completions over the fake model: prompts as they are, several at a time, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest
from served import sse_data


def post(served, prompt: Any = "One two", **fields: Any):
    return served.client.post("/v1/completions", json={"prompt": prompt, **fields})


def texts(answer) -> list[str]:
    return [choice["text"] for choice in answer.json()["choices"]]


def test_a_text_goes_on_without_a_template_and_without_a_parser(serve) -> None:
    written = "\n <think>a</think> {b} <tool_call>c"
    served = serve(answer=lambda prompt, images: written)

    answer = post(served, "One two", max_tokens=200)

    assert texts(answer) == [written]
    plain = len(served.client.post("/tokenize", json={"prompt": "One two"}).json()["tokens"])
    assert answer.json()["usage"]["prompt_tokens"] <= plain + 2, "the text and what every text begins with"


def test_a_text_cannot_forge_a_special_token(serve) -> None:
    served = serve(answer=lambda prompt, images: "x")
    ids = served.client.post("/tokenize", json={"prompt": "One <|user|> two"}).json()["tokens"]

    assert post(served, "One <|user|> two").json()["usage"]["prompt_tokens"] >= len(ids) > 3


def test_prompts_and_choices_are_numbered_and_counted_together(serve) -> None:
    served = serve(answer=lambda prompt, images: prompt)

    body = post(served, ["One", "Two and more"], n=2, max_tokens=50).json()

    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "One"), (1, "One"), (2, "Two and more"), (3, "Two and more"),
    ]  # fmt: skip
    alone = [post(served, prompt).json()["usage"]["prompt_tokens"] for prompt in ("One", "Two and more")]
    assert body["usage"]["prompt_tokens"] == sum(alone)


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"echo": True}, {"stop": "\n"}, {"max_tokens": 2}])
def test_a_stream_has_the_text_of_the_whole_answer(fields: dict[str, Any], serve) -> None:
    served = serve(answer=lambda prompt, images: "three four\nfive")
    fields = {"max_tokens": 50, **fields}

    whole = post(served, **fields).json()["choices"]
    answer = post(served, stream=True, stream_options={"include_usage": True}, **fields)
    *chunks, usage, done = sse_data(answer.text)

    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] > 0
    for choice in whole:
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
    if "echo" in fields:
        assert whole[0]["text"] == "One twothree four\nfive"
    if "stop" in fields:
        assert whole[0]["text"] == "three four"


def test_a_stop_string_counts_from_the_first_character(serve) -> None:
    assert texts(post(serve(answer=lambda prompt, images: "\nanswer"), stop=["\n"])) == [""]


def test_sixteen_tokens_are_the_default(serve) -> None:
    usage = post(serve(answer=lambda prompt, images: "word " * 100)).json()["usage"]

    assert usage["completion_tokens"] == 16


def test_ids_are_taken_as_they_are(serve) -> None:
    served = serve(answer=lambda prompt, images: prompt)
    ids = served.client.post("/tokenize", json={"prompt": "hi there"}).json()["tokens"]

    assert texts(post(served, ids)) == ["hi there"] and texts(post(served, [ids, ids])) == ["hi there"] * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x"] * 33}, "prompt"),
        ({"prompt": [10**8]}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logprobs": 21}, "logprobs"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
def test_what_a_text_cannot_have_is_refused_by_name(fields: dict[str, Any], param: str, serve) -> None:
    answer = post(serve(), **{"prompt": "x", **fields})

    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
