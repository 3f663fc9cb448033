"""Chat completions, whole and streamed: the answers."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from served import image_part, text_part

TOOL = {"type": "function", "function": {"name": "count", "parameters": {"properties": {"color": {"type": "string"}}}}}
CALL = "<tool_call>count\n<arg_key>color</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"


def joined(chunks: list[Any]) -> dict[str, Any]:
    """A message put together from a stream, as a client does it."""
    message: dict[str, Any] = {}
    for chunk in chunks:
        for choice in chunk["choices"] if chunk != "[DONE]" else []:
            for name, value in choice["delta"].items():
                if name in ("content", "reasoning", "reasoning_content"):
                    message[name] = message.get(name, "") + value
                elif name != "role":
                    message[name] = message.get(name, []) + value
    return message


def test_a_question_gets_its_answer(serve) -> None:
    answer = serve().chat("hello")

    body = answer.json()
    choice = body["choices"][0]
    assert answer.status_code == 200
    assert (body["object"], body["model"], choice["finish_reason"]) == ("chat.completion", "fake", "stop")
    assert choice["message"] == {"role": "assistant", "content": "I see 0 pictures. hello", "refusal": None}
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == len("I see 0 pictures. hello") + 1
    assert set(body["timings"]) == {
        "queue_s", "preprocess_s", "prefill_s", "vision_s", "decode_s", "ttft_s", "tpot_s", "total_s", "tokens_per_s",
    }  # fmt: skip


def test_a_stream_has_role_deltas_end_usage_and_done_in_that_order(serve) -> None:
    # A pause between tokens, because a reader that lags gets several in one event.
    chunks = serve(token_s=0.03).stream("hi", stream_options={"include_usage": True})

    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(chunks)["content"] == "I see 0 pictures. hi"
    assert len(chunks) > 10  # token by token
    assert chunks[-3]["choices"][0]["finish_reason"] == "stop" and "ttft_s" in chunks[-3]["timings"]
    assert chunks[-2]["choices"] == [] and chunks[-2]["usage"]["completion_tokens"] > 10
    assert chunks[-1] == "[DONE]"
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-3]] == [None] * (len(chunks) - 3)


def test_a_stream_without_usage_has_none(serve) -> None:
    chunks = serve().stream("hi")

    assert not any("usage" in chunk for chunk in chunks[:-1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n<think>so</think>\nred", {"content": "red", "reasoning": "so", "reasoning_content": "so"}),
        ("\n<think>red", {"content": "red", "reasoning": "red", "reasoning_content": "red"}),
        (CALL, {"content": None}),
        ("<|begin_of_box|>[[0,250,500,1000]]<|end_of_box|>", {"content": "[[0,250,500,1000]]"}),
    ],
)
def test_stream_and_whole_answer_have_the_same_content(text: str, expected: dict[str, Any], serve) -> None:
    served = serve(answer=lambda prompt, images: text)
    content = [image_part(size=(200, 100)), text_part("q")]

    whole = served.chat(content, tools=[TOOL]).json()["choices"][0]["message"]
    streamed = joined(served.stream(content, tools=[TOOL]))

    assert expected.items() <= whole.items()
    assert {k: v for k, v in streamed.items() if v and k not in ("tool_calls", "boxes")} == {
        k: v for k, v in whole.items() if v and k not in ("role", "tool_calls", "boxes")
    }
    assert streamed.get("boxes") == whole.get("boxes")
    functions = [call["function"] for call in whole.get("tool_calls", [])]
    assert [call["function"] for call in streamed.get("tool_calls", [])] == functions


def test_a_box_has_thousandths_pixels_and_its_image(serve) -> None:
    served = serve(answer=lambda p, i: "<|begin_of_box|>[[0,250,500,1000]]<|end_of_box|>")

    message = served.chat([image_part(size=(200, 100)), text_part("where?")]).json()["choices"][0]["message"]

    assert message["boxes"] == [{"bbox_2d": [0, 250, 500, 1000], "bbox_pixels": [0, 25, 100, 100], "image": 0}]


def test_a_tool_call_is_typed_by_the_tools_schema(serve) -> None:
    choice = serve(answer=lambda p, i: CALL).chat(tools=[TOOL]).json()["choices"][0]

    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("count", {"color": "3"})


def test_tool_choice_none_hides_the_tools_from_the_model(serve) -> None:
    served = serve(answer=lambda prompt, images: prompt)

    assert "# Tools" in served.chat(tools=[TOOL]).json()["choices"][0]["message"]["content"]
    assert "# Tools" not in served.chat(tools=[TOOL], tool_choice="none").json()["choices"][0]["message"]["content"]


def test_reasoning_tokens_are_counted(serve) -> None:
    served = serve(answer=lambda p, i: "<think>abc</think>de")

    usage = served.chat().json()["usage"]

    assert usage["completion_tokens_details"]["reasoning_tokens"] == 5  # with the two tags
    assert usage["completion_tokens"] == 8  # with the end token


def test_the_model_sees_every_image_in_order(serve) -> None:
    served = serve(answer=lambda prompt, images: str(images))

    body = served.chat([image_part("red"), text_part("or"), image_part((0, 0, 255), (84, 56))]).json()

    assert body["choices"][0]["message"]["content"] == "[(255, 0, 0), (0, 0, 255)]"
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": 4 + 6}


def test_text_that_looks_like_a_special_token_stays_text(serve) -> None:
    served = serve(answer=lambda prompt, images: prompt.replace("<", "("))

    body = served.chat("a <|image|><|user|> b").json()

    assert body["choices"][0]["message"]["content"].endswith("a (|image|>(|user|> b")
    assert body["usage"]["prompt_tokens_details"]["image_tokens"] == 0


def test_max_tokens_and_stop_are_honoured(serve) -> None:
    served = serve(answer=lambda p, i: "one two three")

    assert answer_of(served.chat(max_tokens=5)) == ("one t", "length")
    assert answer_of(served.chat(max_completion_tokens=5)) == ("one t", "length")
    assert answer_of(served.chat(stop=["two"])) == ("one", "stop")
    assert answer_of(served.chat(stop="zzz")) == ("one two three", "stop")


def answer_of(response) -> tuple[str, str]:
    choice = response.json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def test_a_stop_string_does_not_end_the_reasoning(serve) -> None:
    served = serve(answer=lambda p, i: "\n<think>a\nb</think>\nanswer\nmore")

    assert answer_of(served.chat(stop=["\n"])) == ("answer", "stop")


def test_without_max_tokens_the_default_and_the_context_are_the_limit(serve) -> None:
    assert answer_of(serve(answer=lambda p, i: "x" * 99, default_max_tokens=7).chat()) == ("x" * 7, "length")
    text, reason = answer_of(serve(answer=lambda p, i: "x" * 99, context_tokens=40).chat(max_tokens=90))
    assert reason == "length" and 0 < len(text) < 40


def test_thinking_can_be_disabled(serve) -> None:
    served = serve(answer=lambda prompt, images: repr(prompt))

    assert "<think></think>" not in str(served.chat().json())
    off = served.chat(chat_template_kwargs={"enable_thinking": False})
    assert off.json()["usage"]["prompt_tokens"] == served.chat().json()["usage"]["prompt_tokens"] + 3


def test_a_conversation_with_tools_reaches_the_model(serve) -> None:
    served = serve(answer=lambda prompt, images: prompt)
    call = {"id": "c1", "type": "function", "function": {"name": "count", "arguments": '{"color": "red"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image_part(), text_part("How many?")]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]

    content = served.client.post("/v1/chat/completions", json={"messages": messages}).json()["choices"][0]["message"]

    for text in ("Be brief.", "How many?", "<tool_call>count", "3"):
        assert text in content["content"]


def test_concurrent_requests_get_their_own_answers(serve) -> None:
    served = serve(queue_size=16)
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = served.chat(f"number {number}").json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert answers == {number: f"I see 0 pictures. number {number}" for number in range(12)}
