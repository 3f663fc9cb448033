"""The model's text, sorted as it streams: reasoning, content, boxes, tool calls.

The result is the same however the text is cut into pieces. Nothing the model wrote is lost: what does
not parse comes out as content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from api.engine.detokenizer import held_back

THINK, END_THINK = "<think>", "</think>"
BOX, END_BOX = "<|begin_of_box|>", "<|end_of_box|>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
_RECTANGLE = re.compile(r"\[\s*" + r"\s*,\s*".join([r"(\d+(?:\.\d+)?)"] * 4) + r"\s*\]")
_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Boxes:
    """Rectangles as x1, y1, x2, y2 in thousandths of the picture's width and height."""

    rectangles: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON


Piece = Reasoning | Content | Boxes | Call


class OutputParser:
    """`tools` maps each tool's name to its parameter schema; without tools a tool call is plain text."""

    def __init__(self, tools: Mapping[str, dict[str, Any]] | None = None, starts_thinking: bool = False) -> None:
        self._tools = tools or {}
        self._state = "thinking" if starts_thinking else "content"
        self._buffer = ""
        self._reasoning = _Trim()
        self._content = _Trim()
        self._thoughts = ""

    @property
    def thinking(self) -> bool:
        return self._state == "thinking"

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        while (more := self._advance()) is not None:
            pieces += more
        return pieces

    def finish(self, stopped: bool) -> list[Piece]:
        """The rest. `stopped`: the model ended by itself, not at a length limit."""
        rest, self._buffer = self._buffer, ""
        if self._state != "thinking":
            return self._say(CALL + rest if self._state == "call" else rest)
        pieces = self._think(rest)
        if stopped:
            # A model that never closes its thinking part has put its answer there.
            pieces += self._say(self._thoughts)
        return pieces

    def _advance(self) -> list[Piece] | None:
        """One move: what came out of it, or None when more text is needed."""
        if self._state == "thinking":
            return self._to_tag((END_THINK,), self._think)
        if self._state == "box":
            return self._box()
        if self._state == "call":
            return self._call()
        # A closing tag alone has no meaning; it is dropped.
        tags = (THINK, END_THINK, BOX, END_BOX, *((CALL,) if self._tools else ()))
        return self._to_tag(tags, self._say)

    def _to_tag(self, tags: tuple[str, ...], emit: Any) -> list[Piece] | None:
        found = [(place, tag) for tag in tags if (place := self._buffer.find(tag)) >= 0]
        if not found:
            free = len(self._buffer) - held_back(self._buffer, tags)
            text, self._buffer = self._buffer[:free], self._buffer[free:]
            return emit(text) if text else None
        place, tag = min(found)
        text, self._buffer = self._buffer[:place], self._buffer[place + len(tag) :]
        pieces = emit(text)
        self._state = {THINK: "thinking", BOX: "box", CALL: "call"}.get(tag, "content")
        if tag == THINK:
            self._thoughts = ""
        return pieces

    def _box(self) -> list[Piece] | None:
        inside = self._buffer.lstrip()
        end = self._buffer.find(END_BOX)
        if inside and not inside.startswith("[") and not END_BOX.startswith(inside):
            self._state = "content"  # a short answer in a box, no rectangle
            return []
        if end < 0:
            return None
        text, self._buffer = self._buffer[:end], self._buffer[end + len(END_BOX) :]
        self._state = "content"
        rectangles = find_rectangles(text)
        return [*self._say(text), *([Boxes(rectangles)] if rectangles else [])]

    def _call(self) -> list[Piece] | None:
        end = self._buffer.find(END_CALL)
        if end < 0:
            return None
        text, self._buffer = self._buffer[:end], self._buffer[end + len(END_CALL) :]
        self._state = "content"
        call = self._parse_call(text)
        return [call] if call else self._say(CALL + text + END_CALL)

    def _parse_call(self, text: str) -> Call | None:
        name, tag, rest = text.partition("<arg_key>")
        name, rest = name.strip(), tag + rest
        arguments: dict[str, Any] = {}
        schema = self._tools.get(name, {})
        while rest.strip():
            match = _ARGUMENT.match(rest)
            if match is None:
                return None
            key = match[1].strip()
            arguments[key] = _typed(match[2], schema.get("properties", {}).get(key))
            rest = rest[match.end() :]
        return Call(name, json.dumps(arguments, ensure_ascii=False)) if name and "<" not in name else None

    def _think(self, text: str) -> list[Piece]:
        self._thoughts += text
        out = self._reasoning.feed(text)
        return [Reasoning(out)] if out else []

    def _say(self, text: str) -> list[Piece]:
        out = self._content.feed(text)
        return [Content(out)] if out else []


class _Trim:
    """Drops white space at both ends of a stream."""

    def __init__(self) -> None:
        self._begun = False
        self._space = ""

    def feed(self, text: str) -> str:
        text = self._space + text
        if not self._begun:
            text = text.lstrip()
        out = text.rstrip()
        self._space = text[len(out) :]
        self._begun = self._begun or bool(out)
        return out


def find_rectangles(text: str) -> tuple[tuple[int, int, int, int], ...]:
    found = []
    for match in _RECTANGLE.finditer(text):
        x1, y1, x2, y2 = (round(float(number)) for number in match.groups())
        if max(x1, y1, x2, y2) <= 1000:
            found.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return tuple(found)


def split_thinking(text: str) -> tuple[str, str]:
    """Reasoning and the rest of an answer that was kept whole, `<think>` and all."""
    bare = text.lstrip()
    if not bare.startswith(THINK) or END_THINK not in bare:
        return "", text
    thoughts, _, answer = bare.removeprefix(THINK).partition(END_THINK)
    return thoughts.strip(), answer.lstrip()


def _typed(value: str, schema: Any) -> Any:
    """A string stays a string where the schema says so; anything else is read as JSON if it is JSON."""
    if _takes_string(schema):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _takes_string(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return False
    kinds = schema.get("type")
    if kinds == "string" or (isinstance(kinds, list) and "string" in kinds):
        return True
    if isinstance(schema.get("enum"), list) and all(isinstance(item, str) for item in schema["enum"]):
        return True
    return any(_takes_string(option) for word in ("anyOf", "oneOf") for option in schema.get(word, []))
