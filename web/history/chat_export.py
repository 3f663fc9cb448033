"""A chat as a file: Markdown for people, JSON for programs. Pure functions.

Both formats hold all that the page shows, with the images embedded.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from web.history.conversation import Answer, Conversation, UrlOf
from web.i18n.strings import Texts

FORMAT = "glm-4.6v-flash-web chat"
VERSION = 1


def to_json(conversation: Conversation, url_of: UrlOf) -> str:
    turns = [
        {
            "asked_at": _time(turn.asked_at),
            "question": turn.question,
            "tool_results": [asdict(result) for result in turn.results],
            "pictures": list(turn.images),
            "answer": _answer(turn.answer),
            "earlier_answers": [_answer(answer) for answer in turn.earlier],
        }
        for turn in conversation.turns
    ]
    images = {
        sha: {"name": image.name, "width": image.width, "height": image.height, "url": url_of(image)}
        for sha, image in conversation.images.items()
    }
    document = {"format": FORMAT, "version": VERSION, "title": conversation.title, "turns": turns, "pictures": images}
    return json.dumps(document, ensure_ascii=False, indent=2)


def to_markdown(conversation: Conversation, url_of: UrlOf, texts: Texts) -> str:
    parts = [f"# {conversation.title}"]
    for turn in conversation.turns:
        parts.append(f"## {texts('export.question')} · {_time(turn.asked_at)}")
        for sha in turn.images:
            image = conversation.images[sha]
            parts.append(f"![{_without_brackets(image.name)}]({url_of(image)})")
        parts += [f"`{result.name}`\n\n{_fenced(result.text)}" for result in turn.results] or [turn.question]
        for answer in [*turn.earlier, turn.answer]:
            parts += _markdown_answer(answer, texts)
    return "\n\n".join(parts) + "\n"


def _markdown_answer(answer: Answer, texts: Texts) -> list[str]:
    parts = [f"### {texts('export.answer')}"]
    if reasoning := answer.reasoning.strip():
        parts.append("\n".join(f"> {line}".rstrip() for line in reasoning.splitlines()))
    parts += [f"`{call.name}` `{call.arguments}`" for call in answer.calls]
    if text := answer.text.strip():
        parts.append(text)
    if answer.boxes:
        rows = [f"| {n} | {box.label} | {box.image + 1} | {_corners(box.corners)} |" for n, box in enumerate(answer.boxes, 1)]
        parts.append("\n".join(["| | | | 0-1000 |", "|---|---|---|---|", *rows]))
    if answer.error is not None or not answer.has_content:
        parts.append(f"*({answer.error.kind if answer.error else answer.state})*")
    return parts


def _fenced(text: str) -> str:
    """A fenced code block with a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "state": answer.state,
        "text": answer.text,
        "reasoning": answer.reasoning,
        "thinking_s": answer.thinking_s,
        "boxes": [asdict(box) for box in answer.boxes],
        "tool_calls": [asdict(call) for call in answer.calls],
        "pictures_sent": list(answer.sent),
        "finish": asdict(answer.finish) if answer.finish else None,
        "error": asdict(answer.error) if answer.error else None,
    }


def _corners(corners: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in corners)


def _without_brackets(name: str) -> str:
    return re.sub(r"[\[\]\\\n]", " ", name)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
