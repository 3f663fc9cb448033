"""Other forms of messages, content parts and tools, translated into those of `api.protocol.schemas`.

A value of the wrong type is left as it is, for the check to explain.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, get_args

from api.errors import ServingError, invalid
from api.protocol.body import shown
from api.protocol.fields import IgnoredFields, asks_for_nothing

_BARE_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{64}")  # how an image begins that is sent without `data:`
_TEXT_TYPES = ("input_text", "output_text")
_IMAGE_TYPES = ("image", "input_image")
_IMAGE_KEYS = ("image_url", "image", "url", "base64", "data", "source")
_INNER_KEYS = ("url", "data", "base64")
Detail = Literal["auto", "low", "high", "original"]


def translate_messages(messages: Any, ignored: IgnoredFields) -> None:
    """Rewrites messages in place."""
    last_call: dict[str, str] = {}  # by the name of the function, since its result names only that
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, dict):
            continue
        _translate_function_call(message, number, last_call)
        for call in _objects(message.get("tool_calls")):
            _translate_arguments(call.get("function"))
        _translate_content(message, f"messages[{number}]", ignored)


def translate_tools(tools: Any, ignored: IgnoredFields) -> None:
    """Rewrites tools in place: functions as the Responses API has them, and built-in tools that are switched off."""
    if not isinstance(tools, list):
        return
    for number in reversed(range(len(tools))):
        tool = tools[number]
        if not isinstance(tool, dict):
            continue
        if "function" in tool:
            tool.setdefault("type", "function")
        elif tool.get("type") == "function" and isinstance(tool.get("name"), str):
            names = [name for name in ("name", "description", "parameters", "strict") if name in tool]
            tool["function"] = {name: tool.pop(name) for name in names}
        elif isinstance(options := tool.get(str(tool.get("type"))), dict) and options.get("enable") is False:
            ignored.note(f"tools[{number}]")
            del tools[number]


def _translate_function_call(message: dict[str, Any], number: int, last_call: dict[str, str]) -> None:
    """The form of calls and results before there were `tool_calls`."""
    call = message.get("function_call")
    if isinstance(call, dict) and message.get("role") == "assistant" and not message.get("tool_calls"):
        del message["function_call"]
        ident = f"call_{number}"
        last_call[str(call.get("name"))] = ident
        message["tool_calls"] = [{"id": ident, "type": "function", "function": call}]
        message.setdefault("content", None)
    elif message.get("role") == "function":
        message["role"] = "tool"
        message.setdefault("tool_call_id", last_call.get(str(message.get("name"))))


def _translate_arguments(function: Any) -> None:
    if not isinstance(function, dict) or "arguments" not in function:
        return
    arguments = function["arguments"]
    if isinstance(arguments, dict):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        function["arguments"] = "{}"


def _translate_content(message: dict[str, Any], path: str, ignored: IgnoredFields) -> None:
    content = message.get("content")
    if isinstance(refusal := message.get("refusal"), str):
        del message["refusal"]
        if content:
            ignored.note(f"{path}.refusal")
        else:
            message["content"] = refusal
    if not isinstance(content, list):
        return
    thoughts = [_thought(part) for part in content]
    if message.get("role") == "assistant" and any(thought is not None for thought in thoughts):
        content = [part for part, thought in zip(content, thoughts, strict=True) if thought is None]
        if not message.get("reasoning_content"):
            message["reasoning_content"] = "\n".join(thought for thought in thoughts if thought)
    message["content"] = [
        _translated_part(part, f"{path}.content[{number}]", ignored) for number, part in enumerate(content)
    ] or ""


def _thought(part: Any) -> str | None:
    """The text of a part that holds reasoning; None for other parts."""
    if not isinstance(part, dict) or part.get("type") not in ("thinking", "reasoning"):
        return None
    text = part.get("thinking", part.get("reasoning", part.get("text")))
    if isinstance(text, list):  # Mistral's
        return "".join(str(inner.get("text", "")) for inner in _objects(text))
    return text if isinstance(text, str) else None


def _translated_part(part: Any, path: str, ignored: IgnoredFields) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return part
    if "type" not in part and (key := next((key for key in ("text", "image_url") if key in part), None)):
        part = {"type": key, **part}
    kind = part.get("type")
    if kind in _TEXT_TYPES:
        return {**part, "type": "text"}
    if kind == "refusal":
        return {"type": "text", "text": part.get("refusal"), **_without(part, "type", "refusal")}
    if kind == "image_url":
        return _picture(part, path, ignored) if part.get("image_url") is not None else part
    if kind in _IMAGE_TYPES:
        return _picture(part, path, ignored)
    if kind == "file" and isinstance(file := part.get("file"), dict):
        data = file.get("file_data")
        if isinstance(data, str) and data.lower().startswith("data:image/"):
            return {**_without(part, "file"), "type": "image_url", "image_url": {"url": data}}
    return part


def _picture(part: dict[str, Any], path: str, ignored: IgnoredFields) -> Any:
    """A part with `image_url` from one with any of the words for it. Raises the 400 error if two of them disagree."""
    given = [key for key in _IMAGE_KEYS if part.get(key) is not None]
    if not given:
        return part
    first, *others = [key for key in given if not asks_for_nothing(part[key])] or given
    image = _image_url(part[first], f"{path}.{first}")
    for other in others:
        if _content(_image_url(part[other], f"{path}.{other}")) != _content(image):
            raise _contradiction(f"{path}.{other}", f"{path}.{first}")
    if isinstance(part.get(first), dict):
        note_detail(part[first].get("detail"), f"{path}.{first}.detail", ignored)
    note_detail(part.get("detail"), f"{path}.detail", ignored)
    return {**_without(part, *_IMAGE_KEYS, "detail"), "type": "image_url", "image_url": image}


def note_detail(detail: Any, path: str, ignored: IgnoredFields) -> None:
    """Name a `detail` that asks for anything: pictures are always read at the model's own resolution.

    So `high` and `original` hold here anyway, and `low` does not. Raises the 400 error for anything else.
    """
    if detail is not None and detail not in get_args(Detail):
        allowed = ", ".join(f"'{word}'" for word in get_args(Detail))
        raise invalid(f"`{path}` must be one of {allowed}. Given: {shown(detail)}", path)
    if detail not in (None, "auto"):
        ignored.note(path, harmless=detail != "low")


def _contradiction(path: str, other: str) -> ServingError:
    return invalid(f"`{path}` contradicts `{other}`; give one of them.", path)


def _content(image: Any) -> Any:
    """A link, or the base64 of a data: URL: its type may be written in several ways."""
    url = image.get("url") if isinstance(image, dict) else image
    return url.partition(",")[2] if isinstance(url, str) and url.startswith("data:") else url


def _image_url(given: Any, path: str) -> Any:
    """{url, detail} from a URL, bare base64, or Anthropic's source. Raises the 400 error for two pictures in one."""
    if isinstance(given, dict):
        words = [key for key in _INNER_KEYS if not asks_for_nothing(given.get(key))]
        if len(words) > 1 and any(given[word] != given[words[0]] for word in words):
            raise _contradiction(f"{path}.{words[1]}", f"{path}.{words[0]}")
    if isinstance(given, dict) and given.get("type") in ("base64", "url") and ("data" in given or "url" in given):
        media_type = given.get("media_type") or ""
        given = given["url"] if given["type"] == "url" and "url" in given else given.get("data")
        if isinstance(given, str) and not given.startswith("data:") and media_type and isinstance(media_type, str):
            given = f"data:{media_type};base64,{given}"
    if isinstance(given, str):
        given = {"url": given}
    url = given.get("url") if isinstance(given, dict) else None
    if isinstance(url, str) and _BARE_BASE64.match(url):
        return {**given, "url": f"data:;base64,{url}"}
    return given


def _objects(values: Any) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _without(part: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name not in names}
