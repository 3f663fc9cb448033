"""The probe questions, about an image drawn for each probe and in text only, and the check of their answers.

Color, shape and number are random, so that no cache can answer.
"""

from __future__ import annotations

import base64
import io
import random
import re
from dataclasses import dataclass
from typing import Any

from models.shapes.pictures import COLORS, draw_shapes

TEXT = "What is in the picture? Name its color and shape."
# Only shapes with an unambiguous name, because a wrong verdict costs a restart.
NAMES = {
    "circle": "circle|disc|disk|dot|ball",
    "heart": "heart",
    "square": "square",
    "star": "star",
    "triangle": "triangle",
}
MAX_TOKENS = 32


@dataclass(frozen=True)
class Question:
    """A request body and what its answer must name. `kind`: text or picture."""

    kind: str
    expected: str
    body: dict[str, Any]

    def is_right(self, answer: str) -> bool:
        """Any text answers a text question, because a small model may know no facts."""
        if self.kind == "text":
            return bool(answer.strip())
        color, shape = self.expected.split()
        colors = {name for name in COLORS if _mentions(answer, name)}
        shapes = {name for name, words in NAMES.items() if _mentions(answer, words)}
        return colors == {color} and shapes == {shape}  # a list of every color and shape is wrong


def image_question(rng: random.Random) -> Question:
    color, shape = rng.choice(sorted(COLORS)), rng.choice(sorted(NAMES))
    picture = draw_shapes([(color, shape)], size=(224, 224), seed=rng.randrange(2**31))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": TEXT}]
    return Question("picture", f"{color} {shape}", _body(content, MAX_TOKENS))


def text_question(rng: random.Random) -> Question:
    number = rng.randrange(1000, 10000)
    return Question("text", "any answer", _body(f"Hello, this is check {number}. What can you do?", 4))


def _mentions(answer: str, words: str) -> bool:
    return re.search(rf"\b({words})s?\b", answer, re.IGNORECASE) is not None


def _body(content: object, max_tokens: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "chat_template_kwargs": {"enable_thinking": False},
    }
