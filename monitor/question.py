"""The one real question: a picture drawn for this probe, its colour asked for, the answer judged.

Colour and shape are random, so no cache and no habit can answer. Owns drawing, wording and judging;
knows nothing of HTTP.
"""

from __future__ import annotations

import base64
import io
import random
import re
from dataclasses import dataclass

from models.shapes.pictures import COLORS, SHAPES, draw_shapes

TEXT = "What color is the shape?"
MAX_TOKENS = 32


@dataclass(frozen=True)
class Question:
    """What was drawn, and the request body that asks about it."""

    color: str
    shape: str
    body: dict


def draw(rng: random.Random) -> Question:
    color, shape = rng.choice(sorted(COLORS)), rng.choice(sorted(SHAPES))
    picture = draw_shapes([(color, shape)], size=(224, 224), seed=rng.randrange(2**31))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": TEXT}]
    body = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    return Question(color, shape, body)


def is_right(question: Question, answer: str) -> bool:
    """The drawn colour is named, and no other one: an answer that lists them all has seen nothing."""
    named = {color for color in COLORS if re.search(rf"\b{color}\b", answer, re.IGNORECASE)}
    return named == {question.color}
