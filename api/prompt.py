"""Messages to what the model reads: template, token ids, processed pictures.

Runs in a preprocessing thread. Text from the caller cannot forge special tokens (see `Vocabulary`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from api.engine.model import Model
from api.engine.request import Picture
from api.errors import ServingError, invalid
from api.media import decode, open_picture, read_data_url
from api.output import split_thinking
from api.schemas import ChatRequest, ImagePart, Message
from settings import Settings


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    pictures: tuple[Picture, ...]
    picture_sizes: tuple[tuple[int, int], ...]  # width and height, upright
    starts_thinking: bool  # the template itself has opened the thinking part

    @property
    def image_tokens(self) -> int:
        return sum(picture.tokens for picture in self.pictures)


def build(chat: ChatRequest, model: Model, settings: Settings) -> Prompt:
    # 1. Read what the pictures claim to be; refuse before any is decoded.
    opened = list(_open_pictures(chat, settings))
    expected = sum(model.pictures.count_tokens(*image.size) for _, image in opened)
    if expected >= model.context_tokens:
        raise _too_long(expected, model, "The pictures alone take")
    # 2. Render and encode the text.
    vocabulary = model.vocabulary
    messages = vocabulary.protect([_for_template(message) for message in chat.messages])
    tools = vocabulary.protect([tool.model_dump(exclude_none=True) for tool in chat.active_tools]) or None
    try:
        rendered = model.template.render(messages, tools, chat.enable_thinking)
    except TemplateError as error:  # a template may refuse an order of roles
        raise invalid(f"`messages` do not fit the model's chat template: {error}", "messages") from None
    ids = vocabulary.encode(rendered)
    image_id = vocabulary.special[model.image_token]
    assert ids.count(image_id) == len(opened), "the template must write one image token for each picture"
    if len(ids) - len(opened) + expected >= model.context_tokens:
        raise _too_long(len(ids) - len(opened) + expected, model, "The prompt has")
    # 3. Decode and process the pictures, one at a time to keep memory low.
    pictures, sizes = [], []
    for param, image in opened:
        upright = decode(image, param)
        pictures.append(model.pictures.process(upright))
        sizes.append(upright.size)
    # 4. Give every picture its tokens. Turned upright, a picture may round to other sides than expected.
    spans = iter(pictures)
    expanded = [i for token in ids for i in ([token] if token != image_id else [token] * next(spans).tokens)]
    if len(expanded) >= model.context_tokens:
        raise _too_long(len(expanded), model, "The prompt has")
    return Prompt(tuple(expanded), tuple(pictures), tuple(sizes), rendered.rstrip().endswith("<think>"))


def _open_pictures(chat: ChatRequest, settings: Settings) -> Iterator[tuple[str, Any]]:
    found = [
        (f"messages[{m}].content[{p}].image_url.url", part.image_url.url)
        for m, message in enumerate(chat.messages)
        if isinstance(message.content, list)
        for p, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]
    if len(found) > settings.max_images:
        raise invalid(f"`messages` must have <= {settings.max_images} pictures. Given: {len(found)}", "messages")
    for param, url in found:
        yield param, open_picture(read_data_url(url, param, settings), param, settings)


def _for_template(message: Message) -> dict[str, Any]:
    """A message in the words of GLM's chat template."""
    out: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    content: Any = message.content if message.content is not None else ""
    if isinstance(content, list):
        content = [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
            for part in content
        ]
    if message.role == "assistant":
        thoughts = message.reasoning_content or message.reasoning
        if isinstance(content, str) and not thoughts:
            thoughts, content = split_thinking(content)
        if thoughts:
            out["reasoning_content"] = thoughts
    out["content"] = content
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": c.function.name, "arguments": json.loads(c.function.arguments)},
            }
            for c in message.tool_calls
        ]
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    return out


def _too_long(tokens: int, model: Model, subject: str) -> ServingError:
    message = f"{subject} {tokens} tokens; it must be < {model.context_tokens}, the context length, to leave room."
    return invalid(message, "messages", "context_length_exceeded")
