"""A chat as a file, with all that the page shows."""

from __future__ import annotations

import json

from web.api_client.answer_stream import BoundingBox, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from web.history import chat_export
from web.history.conversation import Conversation
from web.i18n.strings import Texts
from web.images.attached_image import AttachedImage, data_url


def url_of(image: AttachedImage) -> str:
    return image.url or data_url(image.mime, image.data)


def conversation() -> Conversation:
    conversation = Conversation()
    image = AttachedImage("a", "my [cat].png", "image/png", 8, 6, data=b"cat")
    turn = conversation.ask("Where is it?", [image])
    for event in (ReasoningDelta("I look\nclosely."), TextDelta("Here."), BoundingBox((1, 2, 300, 400), 0, "cat"),
                  ToolCallDelta(0, "count", '{"n": 1}'), Finished("stop", 7)):  # fmt: skip
        turn.answer.apply(event, 5.0)
    conversation.ask_again("Where is the cat?").answer.stop(6.0)
    return conversation


def test_json_has_questions_answers_boxes_calls_and_the_image_data() -> None:
    whole = json.loads(chat_export.to_json(conversation(), url_of))

    turn = whole["turns"][0]
    first = turn["earlier_answers"][0]
    assert turn["question"] == "Where is the cat?"
    assert (first["text"], first["reasoning"]) == ("Here.", "I look\nclosely.")
    assert first["boxes"][0]["corners"] == [1, 2, 300, 400]
    assert first["tool_calls"] == [{"name": "count", "arguments": '{"n": 1}', "id": "call_0"}]
    assert turn["answer"]["state"] == "stopped"
    assert whole["pictures"]["a"]["url"] == "data:image/png;base64,Y2F0"


def test_markdown_is_readable_and_embeds_the_images() -> None:
    text = chat_export.to_markdown(conversation(), url_of, Texts("en"))

    assert text.startswith("# Where is it?\n\n## Question")
    assert "](data:image/png;base64,Y2F0)" in text
    assert "> I look\n> closely." in text
    assert "`count` `{\"n\": 1}`" in text
    assert "1, 2, 300, 400" in text
    assert text.rstrip().endswith("*(stopped)*")
