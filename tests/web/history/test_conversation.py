"""The turns of a chat, and which of them are sent with the next question."""

from __future__ import annotations

from typing import Any

import pytest

from web.api_client.answer_stream import (
    BoundingBox,
    Finished,
    Loading,
    Queued,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
)
from web.api_client.client import ApiError
from web.history.conversation import Answer, Conversation, ToolCall, ToolResult, Turn
from web.images.attached_image import AttachedImage


def image(sha: str) -> AttachedImage:
    return AttachedImage(sha, f"{sha}.png", "image/png", 8, 8, data=sha.encode())


def url_of(image: AttachedImage) -> str:
    return f"url of {image.name}"


def answered(conversation: Conversation, question: str, images: list[AttachedImage], text: str) -> Turn:
    turn = conversation.ask(question, images)
    turn.answer.apply(TextDelta(text), 1.0)
    turn.answer.apply(Finished("stop"), 2.0)
    return turn


def kinds(message: dict[str, Any]) -> list[str]:
    return [part["type"] for part in message["content"]]


def test_images_are_resent_in_their_own_turn() -> None:
    conversation = Conversation()
    answered(conversation, "What is it?", [image("a")], "A circle.")

    conversation.ask("What color?", [])

    first, answer, second = conversation.messages(url_of)
    assert kinds(first) == ["image_url", "text"]
    assert first["content"][0]["image_url"]["url"] == "url of a.png"
    assert answer == {"role": "assistant", "content": "A circle."}
    assert kinds(second) == ["text"]


def test_reasoning_is_never_resent() -> None:
    conversation = Conversation()
    turn = conversation.ask("What is it?", [])
    turn.answer.apply(ReasoningDelta("secret thoughts"), 1.0)
    turn.answer.apply(TextDelta("A circle."), 2.0)
    turn.answer.apply(Finished("stop"), 3.0)

    conversation.ask("Sure?", [])

    assert "secret thoughts" not in str(conversation.messages(url_of))


def test_a_failed_question_is_omitted_but_its_image_moves_to_the_next() -> None:
    conversation = Conversation()
    conversation.ask("What is it?", [image("a")]).answer.fail(ApiError("down"), 1.0)

    turn = conversation.ask("And now?", [image("b")])

    (message,) = conversation.messages(url_of)
    assert kinds(message) == ["image_url", "image_url", "text"]
    assert message["content"][-1]["text"] == "And now?"
    assert turn.answer.sent == ("a", "b")


@pytest.mark.parametrize("kind", ["refused", "too_large", "too_long"])
def test_a_refused_image_is_not_resent(kind: str) -> None:
    conversation = Conversation()
    conversation.ask("What is it?", [image("a")]).answer.fail(ApiError(kind), 1.0)

    conversation.ask("Hello?", [])

    assert kinds(conversation.messages(url_of)[0]) == ["text"]


def test_a_stopped_answer_stays_in_the_chat() -> None:
    conversation = Conversation()
    turn = conversation.ask("Tell me", [])
    turn.answer.apply(TextDelta("Once upon"), 1.0)

    conversation.stop_unfinished(2.0)
    turn.answer.apply(TextDelta(" a time"), 3.0)
    conversation.ask("Go on", [])

    assert (turn.answer.state, turn.answer.text) == ("stopped", "Once upon")
    assert conversation.messages(url_of)[1]["content"] == "Once upon"


def test_thinking_is_timed_from_its_first_word_to_that_of_the_answer() -> None:
    answer = Conversation().ask("Why?", []).answer

    answer.apply(Queued(1), 10.0)
    answer.apply(ReasoningDelta("hm"), 11.0)
    answer.apply(ReasoningDelta("m"), 12.0)
    answer.apply(TextDelta("So."), 14.5)
    answer.apply(TextDelta(" Yes."), 20.0)

    assert answer.thinking_s == 3.5


def test_a_stop_while_thinking_ends_the_thinking() -> None:
    answer = Conversation().ask("Why?", []).answer
    answer.apply(ReasoningDelta("hm"), 1.0)

    answer.stop(3.0)

    assert (answer.state, answer.thinking_s) == ("stopped", 2.0)


def test_the_waiting_state_follows_the_last_event() -> None:
    answer = Conversation().ask("Why?", []).answer

    answer.apply(Loading(0.5), 1.0)
    assert (answer.loading, answer.loading_progress) == (True, 0.5)

    answer.apply(Queued(3), 2.0)
    assert (answer.loading, answer.queue_position, answer.state) == (False, 3, "waiting")


def test_asking_again_keeps_the_earlier_answer_and_resends_the_images() -> None:
    conversation = Conversation()
    answered(conversation, "What is it?", [image("a")], "A circle.")

    turn = conversation.ask_again()

    assert len(conversation.turns) == 1
    assert [answer.text for answer in turn.earlier] == ["A circle."]
    assert (turn.answer.state, turn.answer.text, turn.answer.sent) == ("waiting", "", ("a",))
    assert "A circle." not in str(conversation.messages(url_of))


def test_asking_again_after_a_failure_drops_the_empty_answer() -> None:
    conversation = Conversation()
    conversation.ask("What is it?", [image("a")]).answer.fail(ApiError("down"), 1.0)

    assert conversation.ask_again().earlier == []


def test_an_edited_question_replaces_the_old_one_which_stays_with_its_answer() -> None:
    conversation = Conversation()
    answered(conversation, "What is it?", [image("a")], "A circle.")

    turn = conversation.ask_again("What color is it?")

    assert turn.question == "What color is it?"
    assert turn.earlier[0].question == "What is it?"
    assert conversation.messages(url_of)[0]["content"][1]["text"] == "What color is it?"


def test_the_parts_of_tool_calls_are_joined() -> None:
    answer = Answer()

    for piece in (ToolCallDelta(0, "count", '{"col'), ToolCallDelta(1, "draw", "{}"), ToolCallDelta(0, "", 'or": "red"}')):
        answer.apply(piece, 1.0)

    assert answer.calls == [ToolCall("count", '{"color": "red"}', "call_0"), ToolCall("draw", "{}", "call_1")]


def test_a_chat_is_named_after_its_first_question() -> None:
    conversation = Conversation()

    conversation.ask("word " * 40, [])
    conversation.ask("Another question", [])

    assert conversation.title.startswith("word word")
    assert len(conversation.title) <= 60


def test_older_images_can_be_left_out() -> None:
    conversation = Conversation()
    for name in "abc":
        turn = conversation.ask(f"About {name}", [AttachedImage(name, f"{name}.png", data=b"x")] if name != "b" else [])
        turn.answer.apply(TextDelta("Yes."), 1.0)
        turn.answer.apply(Finished("stop"), 1.0)

    assert conversation.turns_with_older_images() == [0]
    conversation.turns[0].left_out = True

    assert conversation.turns_with_older_images() == []
    sent = [part["image_url"]["url"] for message in conversation.messages(lambda image: image.sha)
            if isinstance(message["content"], list) for part in message["content"] if part["type"] == "image_url"]  # fmt: skip
    assert sent == ["c"]
    assert conversation.image_count() == 1


def test_the_image_count_is_that_of_the_next_request() -> None:
    conversation = Conversation()
    answered(conversation, "One", [image("a"), image("b")], "Fine.")
    conversation.ask("Two", [image("c")]).answer.fail(ApiError("too_large"), 1.0)

    assert conversation.image_count(new=1) == 3


def test_an_image_attached_twice_is_sent_once() -> None:
    conversation = Conversation()

    turn = conversation.ask("Same?", [image("a"), image("a")])

    assert turn.images == ("a",)


def test_boxes_refer_to_the_images_in_the_order_sent() -> None:
    conversation = Conversation()
    answered(conversation, "One", [image("a")], "Fine.")
    turn = conversation.ask("Where?", [image("b")])

    turn.answer.apply(BoundingBox((1, 2, 3, 4), 1), 1.0)

    assert turn.answer.sent == ("a", "b")
    assert turn.answer.boxes == [BoundingBox((1, 2, 3, 4), 1)]


def test_a_tool_s_result_is_sent_with_its_call() -> None:
    conversation = Conversation()
    turn = conversation.ask("How many?", [image("a")])
    turn.answer.apply(ToolCallDelta(0, "count", '{"color": "red"}', "call-7"), 1.0)
    turn.answer.apply(Finished("tool_calls"), 2.0)
    assert turn.answer.awaits_tool_results

    given = conversation.ask_with_results((ToolResult("call-7", "count", "3"),))

    question, call, result = conversation.messages(url_of)
    assert kinds(question) == ["image_url", "text"]
    function = {"name": "count", "arguments": '{"color": "red"}'}
    assert call == {
        "role": "assistant", "content": None, "tool_calls": [{"id": "call-7", "type": "function", "function": function}],
    }  # fmt: skip
    assert result == {"role": "tool", "tool_call_id": "call-7", "content": "3"}
    assert given.answer.sent == ("a",)


def test_a_call_that_was_cut_off_awaits_no_result() -> None:
    turn = Conversation().ask("How many?", [])
    turn.answer.apply(ToolCallDelta(0, "count", '{"color": "re'), 1.0)
    turn.answer.apply(Finished("length"), 2.0)

    assert not turn.answer.awaits_tool_results
