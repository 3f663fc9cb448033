"""The probe questions of several kinds, each drawn for its probe, and the check of their answers.

All that an answer must name is random, so that no cache can answer. Pictures are drawn on white, so that the background has
no color of its own. Where a schema helps, it binds the answer to the known names; a server that refuses schemas is asked in
plain words, and its answer may use other names for the same things.
"""

from __future__ import annotations

import base64
import io
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

try:
    from models.shapes.pictures import COLORS, WHITE, draw_on_white, draw_text

    CANNOT_DRAW = ""
except ImportError as error:  # whoever serves another model may have deleted this one's folder
    CANNOT_DRAW = f"{error}"

PICTURE_KINDS = ("color", "shape", "count", "read", "where")
SAME_QUESTION = {"shape": "color"}  # a question about color is about shape as well
TEXT_KINDS = ("arithmetic", "copy", "absent")
# Only shapes with an unambiguous name.
NAMES = {
    "circle": "circle|disc|disk|dot|ball|圆形|圆圈|圆",
    "heart": "heart|love|爱心|心形",
    "square": "square|正方形|方块|方形",
    "star": "star|五角星|星形|星星",
    "triangle": "triangle|三角形|三角",
}
COLOR_NAMES = {
    "red": "red|crimson|scarlet|红色?",
    "orange": "orange|橙色?|橘色?",
    "yellow": "yellow|gold|golden|黄色?",
    "green": "green|绿色?",
    "blue": "blue|蓝色?",
    "purple": "purple|violet|magenta|紫色?",
    "black": "black|黑色?",
}
NUMBER_WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "一": 1, "两": 2, "二": 2, "三": 3, "四": 4, "五": 5}
MOST_COUNTED = 4
LEAST_OVERLAP = 0.5  # intersection over union of the true and the given box
WORDS = (
    "apple", "river", "stone", "cloud", "tiger", "candle", "garden", "window", "silver", "rocket", "bridge", "carpet",
    "island", "jacket", "kettle", "ladder", "market", "needle", "pepper", "saddle",
)  # fmt: skip
NO_PICTURE = re.compile(
    r"\bno (picture|image|photo)|(\bnot|n't) (see|have|find) (a|an|any|the) ?(picture|image|photo)"
    r"|\b(provide|upload|send|share|attach)\b.{0,40}\b(picture|image|photo|one)|没有(看到|收到|提供)?.{0,6}图|(上传|提供|发送?).{0,8}图",
    re.IGNORECASE,
)
MAX_TOKENS, MAX_THINKING_TOKENS = 48, 512
THOUGHT = re.compile(r"^.*</think>", re.DOTALL)
BACKGROUND = re.compile(r"\b(on|against|with|over) (a|an|the) [a-z ]{0,30}background", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """A request body and what its answer must say. `family`: text or picture.

    `check` says of each kind that this question tests whether the answer is right. `plain` is the body for a server that
    refuses the fields of `body`.
    """

    family: str
    expected: str
    body: dict[str, Any]
    check: Callable[[str], dict[str, bool]] = field(compare=False)
    plain: dict[str, Any] = field(default_factory=dict, compare=False)

    def tries(self, answer: str) -> dict[str, bool]:
        return self.check(BACKGROUND.sub("", THOUGHT.sub("", answer)))


def draw(kind: str, rng: random.Random) -> Question:
    """A new question of the kind. One about color is about shape as well."""
    return QUESTIONS[kind](rng)


def text_question(rng: random.Random) -> Question:
    """One that every model answers in a sentence, for load: no answer to it is wrong."""
    return _in_text(f"Hello, this is check {rng.randrange(1000, 10000)}. What can you do?", "any answer", lambda answer: {})


def _thing(rng: random.Random) -> Question:
    color, shape = rng.choice(sorted(COLORS)), rng.choice(sorted(NAMES))
    picture, _ = draw_on_white(rng, [(color, shape)], (224, 224))
    one = _object(color=_one_of(sorted(COLORS)), shape=_one_of(sorted(NAMES)))
    schema = _object(objects={"type": "array", "items": one, "minItems": 1, "maxItems": 1})

    def check(answer: str) -> dict[str, bool]:
        # A list of every color and shape is wrong.
        return {"color": _mentioned(answer, COLOR_NAMES) == {color}, "shape": _mentioned(answer, NAMES) == {shape}}

    return _about_picture(
        picture, "What is in the picture? Answer in JSON.", f"{color} {shape}", check, schema,
        "What is in the picture? Name the color and the shape of the one object.",
    )  # fmt: skip


def _count(rng: random.Random) -> Question:
    number = rng.randint(1, MOST_COUNTED)
    things = [(rng.choice(sorted(COLORS)), rng.choice(sorted(NAMES))) for _ in range(number)]
    picture, _ = draw_on_white(rng, things, (448, 224))

    def check(answer: str) -> dict[str, bool]:
        digits = {int(digit) for digit in re.findall(r"(?<![\w.-])\d(?![\w-]|\.\d)|\d(?=个)", answer)}
        words = {value for word, value in NUMBER_WORDS.items() if _says(answer, word)}
        return {"count": (digits or words) == {number}}

    return _about_picture(picture, "How many shapes are there?", str(number), check)


def _read(rng: random.Random) -> Question:
    number = str(rng.randrange(100, 1000))
    picture = draw_text(number, (320, 200), rng.randrange(2**31), background=WHITE)
    return _about_picture(
        picture, "What number is in the picture?", number, lambda answer: {"read": set(re.findall(r"\d+", answer)) == {number}}
    )


def _where(rng: random.Random) -> Question:
    size = rng.choice(((448, 224), (224, 448), (448, 252)))
    things = list(zip(rng.sample(sorted(COLORS), 2), rng.sample(sorted(NAMES), 2), strict=True))
    picture, items = draw_on_white(rng, things, size)
    item = rng.choice(items)
    true = [1000 * share for share in item.box]

    def check(answer: str) -> dict[str, bool]:
        boxes = re.findall(r"(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})", answer)
        return {"where": len(boxes) == 1 and overlap([float(value) for value in boxes[0]], true) > LEAST_OVERLAP}

    expected = f"{item.color} {item.shape} in [{','.join(f'{value:.0f}' for value in true)}]"
    return _about_picture(picture, f"Give the bounding box of the {item.color} {item.shape}.", expected, check)


def _arithmetic(rng: random.Random) -> Question:
    one, two = rng.randrange(11, 90), rng.randrange(11, 90)
    right = str(one + two)

    def check(answer: str) -> dict[str, bool]:
        # The model may repeat the question.
        return {"arithmetic": (re.findall(r"\d+", answer) or [""])[-1] == right}

    return _in_text(f"What is {one} + {two}? Answer with the number only.", right, check)


def _copy(rng: random.Random) -> Question:
    words = rng.sample(WORDS, 4)
    right = words[0]

    def check(answer: str) -> dict[str, bool]:
        return {"copy": {word for word in WORDS if _says(answer, word)} == {right}}

    return _in_text(f"Repeat this word: {right}", right, check, _object(word=_one_of(sorted(words))))


def _absent(rng: random.Random) -> Question:
    """About a picture that is not there. For models that neither calculate nor repeat."""
    color, shape = rng.choice(sorted(COLOR_NAMES)), rng.choice(sorted(NAMES))
    text = rng.choice((f"What color is the {shape}?", f"How many {color} {shape}s are there?", f"Where is the {color} {shape}?"))
    return _in_text(text, "no picture", lambda answer: {"absent": NO_PICTURE.search(answer) is not None})


QUESTIONS: dict[str, Callable[[random.Random], Question]] = {
    "color": _thing, "shape": _thing, "count": _count, "read": _read, "where": _where,
    "arithmetic": _arithmetic, "copy": _copy, "absent": _absent,
}  # fmt: skip


def overlap(one: list[float], two: list[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width, height = min(one[2], two[2]) - max(one[0], two[0]), min(one[3], two[3]) - max(one[1], two[1])
    shared = max(0.0, width) * max(0.0, height)
    union = sum(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, two)) - shared
    return shared / union if union > 0 else 0.0


def _mentioned(answer: str, names: Mapping[str, str]) -> set[str]:
    return {name for name, words in names.items() if _says(answer, words)}


def _says(answer: str, words: str) -> bool:
    # Chinese has no spaces between words, so \b is for Latin letters only.
    return re.search(rf"(?<![a-z])({words})s?(?![a-z])", answer, re.IGNORECASE) is not None


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _one_of(values: list[str]) -> dict[str, Any]:
    return {"type": "string", "enum": values}


def _about_picture(
    picture: Image.Image, text: str, expected: str, check: Callable[[str], dict[str, bool]],
    schema: Mapping[str, Any] | None = None, plain_text: str = "",
) -> Question:  # fmt: skip
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

    def content(words: str) -> list[dict[str, Any]]:
        return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": words}]

    return Question("picture", expected, _body(content(text), schema), check, _plain_body(content(plain_text or text)))


def _in_text(
    text: str, expected: str, check: Callable[[str], dict[str, bool]], schema: Mapping[str, Any] | None = None
) -> Question:
    return Question("text", expected, _body(text, schema), check, _plain_body(text))


def _body(content: object, schema: Mapping[str, Any] | None) -> dict[str, Any]:
    body = {**_plain_body(content), "max_tokens": MAX_TOKENS, "chat_template_kwargs": {"enable_thinking": False}}
    if schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    return body


def _plain_body(content: object) -> dict[str, Any]:
    """Without the fields that a server may refuse, and so with room for thoughts."""
    return {
        "messages": [{"role": "user", "content": content}], "max_tokens": MAX_THINKING_TOKENS, "temperature": 0, "stream": True,
    }  # fmt: skip
