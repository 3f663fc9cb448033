"""What is asked of an engine's tokenizer, by kind, and log probabilities in the forms that engines write them."""

from __future__ import annotations

import pytest
from engine_stand_in import USAGE, chunk, engine
from served import image_part, text_part

CONVERSATION = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(("kind", "word"), [("vllm", "prompt"), ("sglang", "prompt"), ("llama.cpp", "content")])
def test_a_text_is_tokenized_by_the_engine_in_its_own_words(kind, word, front) -> None:
    with engine(kind) as behind:
        behind.tokenizer = {"/tokenize": {"tokens": [5, 6], "count": 2}}
        answer = front(behind).client.post("/tokenize", json={"prompt": "red circle"})

    assert answer.status_code == 200, answer.text
    assert (answer.json()["tokens"], answer.json()["count"]) == ([5, 6], 2)
    assert behind.asked[-1][1] == {"model": "some-model", word: "red circle", "add_special_tokens": False}


def test_a_conversation_is_tokenized_where_the_engine_can(front) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    body = {"messages": CONVERSATION, "tools": tools, "chat_template_kwargs": {"enable_thinking": False}, "return_token_strs": True}
    with engine("vllm") as behind:
        behind.tokenizer = {"/tokenize": {"tokens": [5], "token_strs": ["hi"]}}
        answer = front(behind).client.post("/tokenize", json=body)

    assert answer.json()["token_strs"] == ["hi"]
    asked = behind.asked[-1][1]
    assert asked["messages"] == CONVERSATION and asked["tools"][0]["function"]["name"] == "look"
    assert asked["chat_template_kwargs"] == {"enable_thinking": False} and asked["return_token_strs"] is True


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        ("sglang", {"messages": CONVERSATION}, "messages"),
        ("llama.cpp", {"prompt": "hi", "return_token_strs": True}, "return_token_strs"),
        ("vllm", {"messages": [{"role": "user", "content": [image_part(), text_part("hi")]}]}, "messages"),
    ],
)
def test_what_the_engines_tokenizer_cannot_do_is_refused_by_name(kind, body, param, front) -> None:
    with engine(kind) as behind:
        answer = front(behind).client.post("/tokenize", json=body)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert behind.asked == []


@pytest.mark.parametrize("word", ["prompt", "content", "text"])
def test_tokens_become_text_by_whatever_name_the_engine_has_for_it(word, front) -> None:
    with engine("sglang") as behind:
        behind.tokenizer = {"/detokenize": {word: "red circle"}}
        answer = front(behind).client.post("/detokenize", json={"tokens": [5, 6]})

    assert answer.json() == {"prompt": "red circle"}


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_an_engine_without_the_route_is_named(path, front) -> None:
    body = {"prompt": "hi"} if path == "/tokenize" else {"tokens": [5]}
    with engine("vllm") as behind:
        answer = front(behind).client.post(path, json=body)

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unsupported_by_engine")


def test_log_probabilities_of_a_text_completion_come_in_columns(front) -> None:
    columns = {"tokens": ["red"], "token_logprobs": [-0.5], "top_logprobs": [{"red": -0.5, "blue": -1.5}], "text_offset": [0]}

    def behave(handler, body) -> None:
        handler.open_stream()
        handler.send({"choices": [{"index": 0, "text": "red", "logprobs": columns, "finish_reason": None}]})
        handler.send({"choices": [{"index": 0, "text": "", "finish_reason": "length"}], "usage": USAGE})
        handler.send(b"[DONE]")

    with engine("vllm") as behind:
        behind.behave = behave
        answer = front(behind).client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "logprobs": 2})

    assert answer.status_code == 200, answer.text
    logprobs = answer.json()["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["token_logprobs"]) == (["red"], [-0.5])
    assert logprobs["top_logprobs"][0]["blue"] == -1.5


def test_log_probabilities_of_a_chat_keep_their_bytes(front) -> None:
    content = [{"token": "é", "logprob": float("-1e9"), "bytes": None, "top_logprobs": [{"token": "e", "logprob": None, "bytes": [101]}]}]

    def behave(handler, body) -> None:
        handler.open_stream()
        handler.send(chunk({"content": "é"}, choice={"logprobs": {"content": content}}))
        handler.send(chunk({}, "stop", usage=USAGE))
        handler.send(b"[DONE]")

    with engine("vllm") as behind:
        behind.behave = behave
        body = {"messages": CONVERSATION, "logprobs": True, "top_logprobs": 1}
        answer = front(behind).client.post("/v1/chat/completions", json=body)

    [entry] = answer.json()["choices"][0]["logprobs"]["content"]
    assert (entry["bytes"], entry["logprob"]) == ([195, 169], -9999.0)
    assert entry["top_logprobs"] == [{"token": "e", "logprob": -9999.0, "bytes": [101]}]
