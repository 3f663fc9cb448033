"""What the engine behind is asked: a request of this API as the body of its /v1/chat/completions or /v1/completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from api.behind.kinds import TRAITS, Kind, sampling_fields
from api.protocol.schemas import ChatRequest, ImagePart, Message
from api.protocol.text_completion import TextRequest

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
_SEEDS = 2**63


def bodies(
    chat: ChatRequest, kind: Kind, model: str, context_tokens: int, images: Sequence[str], salt: str, longest: int | None
) -> tuple[str, list[dict[str, Any]]]:
    """(path, one body for each choice). `images`: data URLs in the order of the request. `longest`: tokens of the answer.

    One request a choice works with every engine, ends alone and is cancelled alone. The pictures are the same object in
    each body. Raises the 400 error that names a field which the engine does not honour.
    """
    fields = sampling_fields(chat, kind)
    options = {"include_usage": True, **({"continuous_usage_stats": True} if TRAITS[kind].counts_as_it_writes else {})}
    fields |= {"model": model, "stream": True, "stream_options": options}
    if kind in ("vllm", "glm"):
        fields["cache_salt"] = salt  # the timing of one key's requests must reveal nothing of another key's prompts
    if longest is not None and longest < context_tokens:
        fields["max_tokens"] = longest
    if isinstance(chat, TextRequest):
        prompts = [prompt if isinstance(prompt, str) else list(prompt) for prompt in chat.prompts for _ in range(chat.n or 1)]
        if chat.logprobs:
            fields["logprobs"] = fields.pop("top_logprobs", 0)
        return TEXT_PATH, [{**fields, "prompt": prompt, **_seed(chat, index % (chat.n or 1))} for index, prompt in enumerate(prompts)]
    if kind in ("vllm", "sglang", "glm"):
        fields["skip_special_tokens"] = False  # the tags around boxes: they are read here
    fields |= _tools(chat, kind)
    fields["messages"] = messages_for(chat.messages, images, kind)
    return CHAT_PATH, [{**fields, **_seed(chat, index)} for index in range(chat.choices)]


def messages_for(messages: Sequence[Message], images: Sequence[str], kind: Kind) -> list[dict[str, Any]]:
    """The messages with their pictures as data URLs."""
    remaining = iter(images)
    return [_message(message, remaining, kind) for message in messages]


def _seed(chat: ChatRequest, choice: int) -> dict[str, int]:
    """Choices with one seed must differ from each other, and be reproducible."""
    return {} if chat.seed is None else {"seed": (chat.seed + choice + _SEEDS) % (2 * _SEEDS) - _SEEDS}


def _tools(chat: ChatRequest, kind: Kind) -> Mapping[str, Any]:
    """The tools that may be called; one that is named is the only one, and must be called: every engine knows that."""
    tools = [tool.model_dump(exclude_none=True) for tool in chat.active_tools]
    if not tools:
        return {}
    fields: dict[str, Any] = {"tools": tools, "tool_choice": "required" if chat.must_call else "auto"}
    if not chat.many_calls and kind != "other":  # which would refuse it, perhaps; only the first call is read
        fields["parallel_tool_calls"] = False
    return fields


def _message(message: Message, images: Iterator[str], kind: Kind) -> dict[str, Any]:
    out: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    content: Any = message.content
    if isinstance(content, list):
        content = [
            {"type": "image_url", "image_url": {"url": next(images)}} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
            for part in content
        ]
    out["content"] = content if content is not None else ""
    reasoning = message.reasoning_content or message.reasoning
    if reasoning and message.role == "assistant":
        out["reasoning_content"] = reasoning
        if kind == "vllm":
            out["reasoning"] = reasoning  # its newer word
    if message.tool_calls:
        out["tool_calls"] = [
            {"id": call.id or f"call_{number}", "type": "function", "function": call.function.model_dump()}
            for number, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    return out
