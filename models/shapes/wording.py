"""The names of the drawn shapes, in English and Chinese.

Owns names and grammar; the questions are in `questions.py`, `comparisons.py` and `talk.py`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from models.shapes.pictures import Item, Scene

COLOR_ZH = {"red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色", "black": "黑色"}
SHAPE_ZH = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "heart": "心形", "cross": "十字形"}
SHAPE_ZH_SAID = {
    "circle": ("圆形", "圆", "圆圈"), "square": ("正方形", "方块", "方形"), "triangle": ("三角形",),
    "star": ("星形", "五角星", "星星"), "heart": ("心形", "爱心"), "cross": ("十字形", "十字"),
}  # fmt: skip
SHAPE_EN_SAID = {
    "circle": ("circle",), "square": ("square",), "triangle": ("triangle",), "star": ("star",),
    "heart": ("heart",), "cross": ("cross", "plus sign"),
}  # fmt: skip


@dataclass(frozen=True)
class Mention:
    """Words of a question and the shapes that they refer to. `said` is empty if the question as a whole refers to them."""

    items: tuple[Item, ...]
    said: str = ""


@dataclass(frozen=True)
class Question:
    """A question, its true answer, and the thought before the answer."""

    family: str
    lang: str
    text: str
    answer: str
    think: str
    mentions: tuple[Mention, ...] = ()


def name_of(lang: str, color: str | None, shape: str | None) -> str:
    """`red circle`, `red shape`, `circle`; in Chinese 红色圆形, 红色的形状, 圆形."""
    if lang == "en":
        return " ".join(word for word in (color, shape or "shape") if word)
    if shape is None:
        return f"{COLOR_ZH[color]}的形状" if color else "形状"
    return f"{COLOR_ZH[color] if color else ''}{SHAPE_ZH[shape]}"


def said_as(rng: random.Random, lang: str, color: str | None, shape: str) -> str:
    """A name as it may occur in a question."""
    if lang == "en":
        return " ".join(word for word in (color, rng.choice(SHAPE_EN_SAID[shape])) if word)
    middle = rng.choice(("", "的")) if color else ""
    return f"{COLOR_ZH[color] if color else ''}{middle}{rng.choice(SHAPE_ZH_SAID[shape])}"


def a(name: str) -> str:
    return f"an {name}" if name[0] in "aeio" else f"a {name}"


def plural(name: str, count: int) -> str:
    return name if count == 1 else f"{name}s" if not name.endswith("s") else f"{name}es"


def is_or_are(count: int) -> str:
    return "is" if count == 1 else "are"


def pick(rng: random.Random, lang: str, en: tuple[str, ...], zh: tuple[str, ...]) -> str:
    return rng.choice(en if lang == "en" else zh)


def only(items: tuple[Item, ...], **attributes: str) -> Item | None:
    """The item with these attributes, if there is exactly one."""
    matches = [i for i in items if all(getattr(i, k) == v for k, v in attributes.items())]
    return matches[0] if len(matches) == 1 else None


def matching(scene: Scene, color: str | None, shape: str | None) -> list[Item]:
    return [i for i in scene.items if color in (None, i.color) and shape in (None, i.shape)]


def counted(lang: str, count: int, color: str | None, shape: str | None) -> str:
    """`There are 2 red circles.` / `图中有2个红色圆形。`"""
    name = name_of(lang, color, shape)
    if lang == "en":
        return f"There {is_or_are(count)} {count or 'no'} {plural(name, count)}."
    return f"图中有{count}个{name}。" if count else f"图中没有{name}。"
