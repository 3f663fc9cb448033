"""The real questions: a picture drawn for this probe, its colour asked for, and a word to be said again.

Colour, shape and word are random, so no cache and no habit can answer. Owns drawing, wording and judging;
knows nothing of HTTP.
"""

from __future__ import annotations

import base64
import io
import random
import re
from dataclasses import dataclass
from typing import Any

from models.shapes.pictures import COLORS, SHAPES, draw_shapes

TEXT = "What color is the shape?"
MAX_TOKENS = 32


@dataclass(frozen=True)
class Question:
    """What is asked and what the answer must name. `kind`: text or picture."""

    kind: str
    expected: str
    body: dict[str, Any]

    def is_right(self, answer: str) -> bool:
        """A text question is right when anything is said: a small model knows pictures, not the world."""
        if self.kind == "text":
            return bool(answer.strip())
        color = self.expected.split()[0]
        named = {name for name in COLORS if re.search(rf"\b{name}\b", answer, re.IGNORECASE)}
        return named == {color}  # an answer that lists them all has seen nothing


def about_picture(rng: random.Random) -> Question:
    color, shape = rng.choice(sorted(COLORS)), rng.choice(sorted(SHAPES))
    picture = draw_shapes([(color, shape)], size=(224, 224), seed=rng.randrange(2**31))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": TEXT}]
    return Question("picture", f"{color} {shape}", _body(content, MAX_TOKENS))


def about_text(rng: random.Random) -> Question:
    number = rng.randrange(1000, 10000)
    return Question("text", "any answer", _body(f"Hello, this is check {number}. What can you do?", 4))


def _body(content: object, max_tokens: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "chat_template_kwargs": {"enable_thinking": False},
    }
