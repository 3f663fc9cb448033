"""Messages to what the model reads: template, token ids, processed pictures.

Runs in a preprocessing thread. Text from the caller cannot forge special tokens (see `Vocabulary`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from api.engine.loaded_model import Model
from api.engine.request import ImageInput
from api.engine.text.tokenizer import Vocabulary
from api.errors import ServingError, invalid
from api.images.decode import decode, is_remote, open_picture, read_data_url
from api.parsing.image_references import mentions
from api.parsing.output import THINK, split_thinking
from api.protocol.messages import ImagePart, Message, TextPart, Tool
from api.protocol.schemas import ChatRequest
from settings import Settings

SHORT_TOKEN = 8  # characters; texts of fewer for each token of the context are not looked at more closely


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    pictures: tuple[ImageInput, ...]
    picture_sizes: tuple[tuple[int, int], ...]  # width and height, upright
    starts_thinking: bool  # the template itself has opened the thinking part
    asked_picture: int | None = None  # the one, and only one, that the last question names

    @property
    def image_tokens(self) -> int:
        return sum(picture.tokens for picture in self.pictures)


@dataclass(frozen=True)
class Draft:
    """A prompt whose pictures are measured, not yet decoded: what it will cost is known."""

    ids: tuple[int, ...]  # one image token for each picture
    opened: tuple[tuple[str, Image.Image], ...]  # field, header
    tokens: int
    starts_thinking: bool
    asked_picture: int | None


def picture_urls(chat: ChatRequest, settings: Settings) -> list[tuple[str, str]]:
    """Field and URL of each picture, in order. Raises the 400 error if there are too many."""
    found = [
        (f"messages[{m}].content[{p}].image_url.url", part.image_url.url)
        for m, message in enumerate(chat.messages)
        if isinstance(message.content, list)
        for p, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]
    if len(found) > settings.max_images:
        raise invalid(f"`messages` must have <= {settings.max_images} pictures. Given: {len(found)}", "messages")
    return found


def draft(chat: ChatRequest, fetched: Mapping[str, bytes], model: Model, settings: Settings) -> Draft:
    """`fetched` has the bytes of the remote pictures, by URL. Refuses before any picture is decoded."""
    opened = []
    for param, url in picture_urls(chat, settings):
        data = fetched[url] if is_remote(url) else read_data_url(url, param, settings)
        opened.append((param, open_picture(data, param, settings)))
    expected = sum(model.image_processor.count_tokens(*image.size) for _, image in opened)
    if expected >= model.context_tokens:
        raise _too_long(expected, model, "The pictures alone take")
    ids = rendered_ids(chat.messages, chat.active_tools, chat.enable_thinking, model)
    assert ids.count(model.vocabulary.special[model.image_token]) == len(opened), "one image token for each picture"
    tokens = len(ids) - len(opened) + expected
    if tokens >= model.context_tokens:
        raise _too_long(tokens, model, "The prompt has")
    asked = {picture for _, picture in mentions(_last_question(chat.messages), len(opened))}
    return Draft(
        tuple(ids), tuple(opened), tokens, _opens_thinking(ids, model), asked.pop() if len(asked) == 1 else None
    )


def _last_question(messages: list[Message]) -> str:
    content = next((message.content for message in reversed(messages) if message.role == "user"), None)
    if isinstance(content, list):
        return "\n".join(part.text for part in content if isinstance(part, TextPart))
    return content or ""


def rendered_ids(messages: list[Message], tools: list[Tool], enable_thinking: bool, model: Model) -> list[int]:
    """The conversation in the chat template's words, one token for each picture."""
    vocabulary = model.vocabulary
    said, callables = (
        [_for_template(message) for message in messages],
        [tool.model_dump(exclude_none=True) for tool in tools],
    )
    check_characters([_without_old_thoughts(said), callables], "messages", model)
    shown, callable_tools = vocabulary.protect(said), vocabulary.protect(callables) or None
    try:
        rendered = model.template.render(shown, callable_tools, enable_thinking)
    except TemplateError as error:  # a template may refuse an order of roles
        raise invalid(f"`messages` do not fit the model's chat template: {error}", "messages") from None
    return vocabulary.encode(rendered)


def _opens_thinking(ids: list[int], model: Model) -> bool:
    """Whether the template itself has written `<think>` last, but for white space."""
    for token in reversed(ids):
        if token == model.vocabulary.special.get(THINK):
            return True
        if model.vocabulary.token_bytes(token).strip() or token in model.vocabulary.special.values():
            return False
    return False


def finish(draft: Draft, model: Model) -> Prompt:
    """Decode and process the pictures, one at a time to keep memory low, and give each its tokens."""
    pictures, sizes = [], []
    for param, image in draft.opened:
        upright = decode(image, param)
        pictures.append(_with_key(model.image_processor.process(upright), upright))
        sizes.append(upright.size)
    image_id = model.vocabulary.special[model.image_token]
    spans = iter(pictures)
    expanded = [i for token in draft.ids for i in ([token] if token != image_id else [token] * next(spans).tokens)]
    # Turned upright, a picture may round to other sides than expected.
    if len(expanded) >= model.context_tokens:
        raise _too_long(len(expanded), model, "The prompt has")
    return Prompt(tuple(expanded), tuple(pictures), tuple(sizes), draft.starts_thinking, draft.asked_picture)


def _with_key(picture: ImageInput, image: Image.Image) -> ImageInput:
    """A picture that the model's processing has not named gets its content's hash as its name."""
    if picture.key:
        return picture
    digest = sha256(f"{image.mode} {image.size} {picture.grid} ".encode())
    digest.update(image.tobytes())
    return replace(picture, key=digest.digest())


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


def check_characters(value: Any, param: str, model: Model) -> None:
    """Refuse at once what cannot fit the context even in the longest tokens; to count its tokens would take minutes."""
    count = _characters(value)
    if count <= SHORT_TOKEN * model.context_tokens:
        return
    most = longest_token(model.vocabulary) * model.context_tokens
    if count > most:
        message = (
            f"`{param}` has {count} characters; <= {most} can fit {model.context_tokens} tokens, the context length."
        )
        raise invalid(message, param, "context_length_exceeded")


def _without_old_thoughts(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A template may leave out what was thought before the last question."""
    last = max((n for n, message in enumerate(said) if message["role"] == "user"), default=0)
    return [{k: v for k, v in m.items() if n >= last or k != "reasoning_content"} for n, m in enumerate(said)]


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, items))


@lru_cache(maxsize=1)
def longest_token(vocabulary: Vocabulary) -> int:
    """Bytes of the longest token, and so the most characters that one can hold."""
    return max(map(len, json.loads(vocabulary.definition())["model"]["vocab"]))


def _too_long(tokens: int, model: Model, subject: str) -> ServingError:
    message = f"{subject} {tokens} tokens; it must be < {model.context_tokens}, the context length, to leave room."
    return invalid(message, "messages", "context_length_exceeded")
