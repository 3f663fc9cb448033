"""The model's text, separated as it streams into reasoning, content, boxes and tool calls.

The result is the same however the text is cut into pieces. Text that does not parse becomes content, so that nothing
the model wrote is dropped, except for the beginning of a tool call that the length limit cut off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from api.engine.text.argument_types import read_value
from api.engine.text.markup import (
    BOX,
    CALL,
    END_BOX,
    END_CALL,
    END_KEY,
    END_THINK,
    END_VALUE,
    KEY,
    THINK,
    VALUE,
)  # fmt: skip
from api.engine.text.output import held_back
from api.parsing.boxes import Region, image_references, read_tagged, read_untagged

_ARGUMENT = re.compile(rf"\s*{KEY}(.*?){END_KEY}\s*{VALUE}(.*?){END_VALUE}\s*", re.DOTALL)


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Boxes:
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON


Piece = Reasoning | Content | Boxes | Call


class OutputParser:
    """`tools` maps each tool's name to its parameter schema; without tools a tool call is plain text.

    `literal`: the answer proper is JSON or the like, in which nothing is markup. `images`: how many the request has, for
    the regions that the answer names. `keeps_box_tags`: the tags around boxes stay in the content. `continues`: the
    text goes on with an answer that the prompt has begun, so that white space before it counts.
    """

    def __init__(
        self,
        tools: Mapping[str, dict[str, Any]] | None = None,
        starts_thinking: bool = False,
        literal: bool = False,
        images: int = 0,
        keeps_box_tags: bool = False,
        continues: bool = False,
    ) -> None:
        self._tools = tools or {}
        self._literal = literal
        self._images = images
        self._state = "thinking" if starts_thinking else "content"
        self._buffer = ""
        self._reasoning_trim = _Trim()
        self._content_trim = _Trim(begun=continues)
        self._keeps_box_tags = keeps_box_tags
        self._reasoning_text = ""
        self._untagged = ""  # content outside of box tags

    @property
    def thinking(self) -> bool:
        return self._state == "thinking"

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are complete once `text` has been added."""
        self._buffer += text
        pieces: list[Piece] = []
        while (more := self._advance()) is not None:
            pieces += more
        return pieces

    def feed_reasoning(self, text: str) -> list[Piece]:
        """The pieces of reasoning that somebody else has separated already."""
        if self._state == "thinking":
            self._state = "content"  # the tag that would end it is not coming
        return self._reasoning_pieces(text)

    def finish(self, stopped: bool) -> list[Piece]:
        """The remaining pieces. `stopped`: the model ended the answer, instead of reaching a length limit."""
        rest, self._buffer = self._buffer, ""
        if self._state == "thinking":
            pieces = self._reasoning_pieces(rest)
            if stopped:
                # Reasoning that is never closed contains the answer.
                pieces += self._content_pieces(self._reasoning_text)
        elif self._state == "call":
            # A call that the length limit cut off is no call, and its markup is no text for people: the reason `length` says so.
            pieces = self._content_pieces(CALL + rest) if stopped else []
        else:
            pieces = self._content_pieces(rest)
        regions = read_untagged(self._untagged, self._images, self._last_image(self._reasoning_text))
        return [*pieces, *([Boxes(regions)] if regions else [])]

    def _advance(self) -> list[Piece] | None:
        """One state transition: the pieces that it yields, or None if more text is needed."""
        if self._state == "thinking":
            return self._to_tag((END_THINK,), self._reasoning_pieces)
        if self._state == "box":
            return self._box()
        if self._state == "call":
            return self._call()
        if self._state == "literal":
            text, self._buffer = self._buffer, ""
            return self._content_pieces(text) if text else None
        if self._literal:
            return self._before_literal()
        # A closing tag without an opening one is dropped.
        tags = (THINK, END_THINK, BOX, END_BOX, *((CALL,) if self._tools else ()))
        return self._to_tag(tags, self._content_pieces)

    def _before_literal(self) -> list[Piece] | None:
        """Reasoning may precede the answer, and tool calls may replace it; in the answer nothing is markup."""
        bare = self._buffer.lstrip()
        tags = (THINK, *((CALL,) if self._tools else ()))
        if bare.startswith(tags):
            return self._to_tag(tags, self._content_pieces)
        if any(tag.startswith(bare) for tag in tags):
            return None
        self._state = "literal"
        return []

    def _to_tag(self, tags: tuple[str, ...], emit: Any) -> list[Piece] | None:
        if "<" not in self._buffer:  # with which all of them begin; done for every token
            text, self._buffer = self._buffer, ""
            return emit(text) if text else None
        matches = [(start, tag) for tag in tags if (start := self._buffer.find(tag)) >= 0]
        if not matches:
            free = len(self._buffer) - held_back(self._buffer, tags)
            text, self._buffer = self._buffer[:free], self._buffer[free:]
            return emit(text) if text else None
        start, tag = min(matches)
        text, self._buffer = self._buffer[:start], self._buffer[start + len(tag) :]
        kept = self._keeps_box_tags and tag in (BOX, END_BOX)
        pieces = [*emit(text), *(self._content_pieces(tag, tagged=True) if kept else [])]
        self._state = {THINK: "thinking", BOX: "box", CALL: "call"}.get(tag, "content")
        if tag == THINK:
            self._reasoning_text = ""
        return pieces

    def _box(self) -> list[Piece] | None:
        inside = self._buffer.lstrip()
        end = self._buffer.find(END_BOX)
        if inside and inside[0] not in "[({<":
            self._state = "content"  # a short answer in words
            return []
        if end < 0:
            return None
        text, self._buffer = self._buffer[:end], self._buffer[end + len(END_BOX) :]
        self._state = "content"
        regions = read_tagged(text, self._last_image(f"{self._reasoning_text}\n{self._untagged}"))
        shown = f"{text}{END_BOX}" if self._keeps_box_tags else text
        pieces = self._content_pieces(shown, tagged=bool(regions))
        return [*pieces, *([Boxes(regions)] if regions else [])]

    def _last_image(self, text: str) -> int | None:
        """The image that a text refers to last."""
        references = image_references(text, self._images)
        return references[-1][1] if references else None

    def _call(self) -> list[Piece] | None:
        end = self._buffer.find(END_CALL)
        if end < 0:
            return None
        text, self._buffer = self._buffer[:end], self._buffer[end + len(END_CALL) :]
        self._state = "content"
        call = self._parse_call(text)
        return [call] if call else self._content_pieces(CALL + text + END_CALL)

    def _parse_call(self, text: str) -> Call | None:
        name, tag, rest = text.partition(KEY)
        name, rest = name.strip(), tag + rest
        arguments: dict[str, Any] = {}
        schema = self._tools.get(name, {})
        while rest.strip():
            match = _ARGUMENT.match(rest)
            if match is None:
                return None
            key = match[1].strip()
            properties = schema.get("properties")
            known = properties.get(key) if isinstance(properties, dict) else None
            arguments[key] = read_value(match[2], known, schema)
            rest = rest[match.end() :]
        return Call(name, json.dumps(arguments, ensure_ascii=False)) if name and "<" not in name else None

    def _reasoning_pieces(self, text: str) -> list[Piece]:
        self._reasoning_text += text
        out = self._reasoning_trim.feed(text)
        return [Reasoning(out)] if out else []

    def _content_pieces(self, text: str, tagged: bool = False) -> list[Piece]:
        if not tagged:
            self._untagged += text
        out = self._content_trim.feed(text)
        return [Content(out)] if out else []


class VerbatimParser:
    """For an answer that is not a chat's: every character is content."""

    thinking = False

    def feed(self, text: str) -> list[Piece]:
        return [Content(text)] if text else []

    def finish(self, stopped: bool) -> list[Piece]:
        return []


class _Trim:
    """Drops white space at both ends of a text that comes in pieces."""

    def __init__(self, begun: bool = False) -> None:
        self._begun = begun
        self._space = ""

    def feed(self, text: str) -> str:
        text = self._space + text
        if not self._begun:
            text = text.lstrip()
        out = text.rstrip()
        self._space = text[len(out) :]
        self._begun = self._begun or bool(out)
        return out


def split_thinking(text: str) -> tuple[str, str]:
    """Reasoning and content of an earlier answer that is sent back with its `<think>` tags."""
    bare = text.lstrip()
    if not bare.startswith(THINK) or END_THINK not in bare:
        return "", text
    reasoning, _, answer = bare.removeprefix(THINK).partition(END_THINK)
    return reasoning.strip(), answer.lstrip()
