"""Anthropic's messages over the fake model: blocks, thinking, tools, events, stop reasons, errors, counts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from served import image_part

ASK = [{"role": "user", "content": "hello"}]
TOOL = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}}}
CALL = "<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>it</arg_value>\n</tool_call>"


def post(served, messages: Any = ASK, path: str = "/v1/messages", **fields: Any):
    return served.client.post(path, json={"messages": messages, **fields})


def events(answer) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in answer.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        if "data" in lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def assembled(found: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The content blocks as a client puts them together."""
    blocks: list[dict[str, Any]] = []
    for name, data in found:
        if name == "content_block_start":
            assert data["index"] == len(blocks)
            blocks.append(dict(data["content_block"]))
        if name == "content_block_delta":
            delta = data["delta"]
            kind = delta["type"]
            if kind == "input_json_delta":
                blocks[-1]["input"] = json.loads(delta["partial_json"])
            else:
                key = kind.removesuffix("_delta")
                blocks[-1][key] += delta[key]
    return blocks


def image_block(url: str) -> dict[str, Any]:
    head, data = url.split(",")
    return {"type": "image", "source": {"type": "base64", "media_type": head[5:].split(";")[0], "data": data}}


def test_blocks_become_a_conversation(serve) -> None:
    served = serve(answer=lambda prompt, images: prompt)
    conversation = [
        {"role": "user", "content": [image_block(image_part()["image_url"]["url"]), {"type": "text", "text": "what?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I look.", "signature": "x"},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "it"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "is_error": True, "content": [{"type": "text", "text": "dark"}]},
                {"type": "text", "text": "and now?"},
            ],
        },
    ]

    body = post(served, conversation, max_tokens=900, tools=[TOOL], system=[{"type": "text", "text": "Be kind."}]).json()

    seen = "".join(block["text"] for block in body["content"] if block["type"] == "text")
    places = [seen.index(text) for text in ("Be kind.", "what?", "Let me look.", "dark", "and now?")]
    assert places == sorted(places) and "Error:" in seen and body["usage"]["input_tokens"] > 0


@pytest.mark.parametrize(
    ("answer", "fields", "kinds", "reason"),
    [
        ("All good.", {}, ["text"], "end_turn"),
        ("<think>Hm.</think>Good.", {"thinking": {"type": "enabled", "budget_tokens": 99}}, ["thinking", "text"], "end_turn"),
        ("A b STOP c", {"stop_sequences": ["STOP", "never"]}, ["text"], "stop_sequence"),
        ("A b c d e f g h", {"max_tokens": 3}, ["text"], "max_tokens"),
        (f"First.{CALL}", {"tools": [TOOL]}, ["text", "tool_use"], "tool_use"),
    ],
)
def test_a_stream_has_the_blocks_and_the_end_of_the_whole_answer(
    answer: str, fields: dict[str, Any], kinds: list[str], reason: str, serve
) -> None:
    served = serve(answer=lambda prompt, images: answer)
    fields = {"max_tokens": 200, **fields}

    whole = post(served, **fields).json()
    found = events(post(served, stream=True, **fields))

    assert [block["type"] for block in whole["content"]] == kinds and whole["stop_reason"] == reason
    assert whole["stop_sequence"] == ("STOP" if reason == "stop_sequence" else None)
    streamed = assembled(found)
    for block in (*whole["content"], *streamed):
        block.pop("id", None)
        block.pop("signature", None)
    assert streamed == whole["content"]
    names = [name for name, _ in found]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    assert names.count("content_block_start") == names.count("content_block_stop") == len(kinds)
    last = found[-2][1]
    assert last["delta"] == {"stop_reason": reason, "stop_sequence": whole["stop_sequence"]}
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert found[0][1]["message"]["usage"]["input_tokens"] > 0


def test_without_thinking_there_is_no_reasoning_and_an_effort_is_named(serve) -> None:
    served = serve(answer=lambda prompt, images: prompt)

    plain = post(served, max_tokens=100, output_config={"effort": "low"})
    thinking = post(served, max_tokens=100, thinking={"type": "adaptive"}, output_config={"effort": "max"})

    assert [block["type"] for block in plain.json()["content"]] == ["text"]
    assert plain.headers["x-glm-ignored"] == "output_config.effort" and "x-glm-ignored" not in thinking.headers


def test_notes_of_clients_are_named_and_not_refused(serve) -> None:
    served = serve()
    content = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "citations": None}]
    tools = [{**TOOL, "cache_control": {"type": "ephemeral"}, "defer_loading": True}]

    answer = post(served, [{"role": "user", "content": content}], metadata={"user_id": "u"}, tools=tools)

    assert answer.status_code == 200, answer.text
    assert {"metadata", "messages[].content[].cache_control", "tools[].cache_control", "tools[].defer_loading"} <= set(
        answer.json()["ignored"]
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [*ASK, {"role": "user", "content": [{"type": "image"}]}]}, "messages[1].content[0].source"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"tools": [{**TOOL, "name": "no spaces"}]}, "tools[0].name"),
        ({"stop_sequences": ["x"] * 100}, "stop_sequences"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 7}, "top_p"),
        (
            {"messages": [*ASK, {"role": "assistant", "content": "no"}, {"role": "user", "content": [
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}]}]},
            "messages[2].content[0].source.data",
        ),
    ],
)  # fmt: skip
def test_errors_have_anthropics_form_and_this_formats_names(fields: dict[str, Any], param: str, serve) -> None:
    answer = post(serve(), **{"messages": ASK, **fields})

    body = answer.json()
    assert answer.status_code == 400, answer.text
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param, body


def test_errors_outside_of_the_fields_have_that_form_too(serve) -> None:
    served = serve()
    wrong_key = served.client.post("/v1/messages", json={"messages": ASK}, headers={"Authorization": "Bearer no"})
    wrong_model, wrong_method = post(served, model="other"), served.client.get("/v1/messages")

    kinds = [(answer.status_code, answer.json()["error"]["type"]) for answer in (wrong_key, wrong_model, wrong_method)]
    assert kinds == [(401, "authentication_error"), (404, "not_found_error"), (405, "invalid_request_error")]


def test_tokens_are_counted_as_the_answer_counts_them(serve) -> None:
    served = serve()
    content = [image_block(image_part()["image_url"]["url"]), {"type": "text", "text": "what is it?"}]
    conversation = [{"role": "user", "content": content}]

    count = post(served, conversation, "/v1/messages/count_tokens", tools=[TOOL]).json()
    usage = post(served, conversation, tools=[TOOL]).json()["usage"]

    assert count == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_an_answer_that_the_caller_has_begun_goes_on(serve) -> None:
    served = serve(answer=lambda prompt, images: prompt[-20:])

    body = post(served, [*ASK, {"role": "assistant", "content": "The star is"}]).json()

    assert body["content"][0]["text"].endswith("The star is")


def test_errors_of_pictures_name_what_was_sent(serve) -> None:
    client, broken = serve(), image_block("data:image/png;base64,AAAA")
    inner = {"type": "tool_result", "tool_use_id": "t1", "is_error": True, "content": [broken]}
    whole = image_block(image_part()["image_url"]["url"])
    link = {"type": "image", "source": {"type": "url", "url": "http://10.0.0.1/"}}
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {}}]}

    def refused(*content: Any) -> str:
        answer = post(client, [*ASK, call, {"role": "user", "content": list(content)}], tools=[TOOL])
        error = answer.json()["error"]
        assert answer.status_code == 400 and f"`{error['param']}`" in error["message"], answer.text
        return error["param"]

    assert refused(broken) == "messages[2].content[0].source.data"
    assert refused({**inner, "content": "dark"}, whole, broken) == "messages[2].content[2].source.data"
    assert refused(inner) == "messages[2].content[0].content[0].source.data"
    assert refused(link) == "messages[2].content[0].source.url"
    assert refused({**whole, "source": {**whole["source"], "url": "http://example.org/"}}) == "messages[2].content[0].source.url"
    assert refused({**link, "source": {**link["source"], "data": "AAAA"}}) == "messages[2].content[0].source.data"
