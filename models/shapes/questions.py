"""Questions about the drawn pictures with their true answers, in English and Chinese.

Knows nothing of pixels, tokens or tensors. Each family is a function that takes a `random.Random`, a language and a
`Scene`, and returns a `Question`, or None where the picture does not allow one (two red circles have no single position).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from models.shapes.comparisons import compare
from models.shapes.pictures import COLORS, SHAPES, Item, Scene
from models.shapes.wording import (
    COLOR_ZH,
    SHAPE_ZH,
    Mention,
    Question,
    a,
    counted,
    matching,
    name_of,
    pick,
    plural,
    said_as,
)


def ask(rng: random.Random, lang: str, scene: Scene, family: str | None = None) -> Question:
    """A random question about this picture, sometimes one about something that it does not show.

    Raises ValueError if the picture allows no question of the given family.
    """
    if family:
        for _ in range(50):
            if question := FAMILIES[family](rng, lang, scene):
                return question
        raise ValueError(f"the picture allows no question of the family {family}")
    weights = WEIGHTS_BY_KIND[scene.kind]
    while True:
        name = rng.choices(tuple(weights), tuple(weights.values()))[0]
        if question := FAMILIES[name](rng, lang, scene):
            return question


def _color(rng: random.Random, lang: str, scene: Scene) -> Question | None:
    shape = rng.choice([i.shape for i in scene.items]) if scene.items and rng.random() < 0.88 else rng.choice(SHAPES)
    matches = [i for i in scene.items if i.shape == shape]
    if len(matches) > 1:
        return None
    said = said_as(rng, lang, None, shape)
    if len(scene.items) == 1 and rng.random() < 0.4:
        shape, said = scene.items[0].shape, ""
        matches = list(scene.items)
        text = pick(
            rng, lang,
            ("What color is it?", "What color is the shape?", "Which color do you see?", "What is the color of the shape?",
             "Name the color of the shape.", "what colour is this", "What is the color of the object?"),
            ("它是什么颜色？", "这个形状是什么颜色？", "图中的形状是什么颜色的？", "什么颜色？", "是什么颜色"),
        )  # fmt: skip
    else:
        text = pick(
            rng, lang,
            (f"What color is the {said}?", f"What colour is the {said}?", f"Which color does the {said} have?",
             f"Tell me the color of the {said}.", f"what color is the {said}", f"The {said}: which color is it?",
             f"What is the color of the {said}?", f"What color is the {said} in the picture?", f"The color of the {said}?"),
            (f"{said}是什么颜色？", f"{said}是什么颜色的？", f"图中的{said}是什么颜色？", f"请告诉我{said}的颜色。", f"{said}的颜色是什么？",
             f"{said}什么颜色", f"这个{said}是什么颜色的？", f"图片里{said}的颜色是？"),
        )  # fmt: skip
    name = name_of(lang, None, shape)
    think = f"I look for the {name} and its color." if lang == "en" else f"我找{name}，看它的颜色。"
    if not matches:
        answer = f"There is no {name} in the picture." if lang == "en" else f"图中没有{name}。"
    else:
        answer = f"The {name} is {matches[0].color}." if lang == "en" else f"{name}是{COLOR_ZH[matches[0].color]}的。"
    return Question("color", lang, text, answer, think, (Mention(tuple(matches), said),))


def _shape(rng: random.Random, lang: str, scene: Scene) -> Question | None:
    color = rng.choice([i.color for i in scene.items]) if scene.items and rng.random() < 0.88 else rng.choice(tuple(COLORS))
    matches = [i for i in scene.items if i.color == color]
    if len(matches) > 1:
        return None
    zh = COLOR_ZH[color]
    said = color if lang == "en" else zh
    if len(scene.items) == 1 and rng.random() < 0.4:
        color, matches, said = scene.items[0].color, list(scene.items), ""
        zh = COLOR_ZH[color]
        text = pick(
            rng, lang,
            ("What shape is it?", "Which shape is this?", "What shape do you see?", "What shape is in the picture?", "what shape is this"),
            ("这是什么形状？", "图中是什么形状？", "它是什么形状的？", "什么形状？"),
        )  # fmt: skip
    else:
        text = pick(
            rng, lang,
            (f"What shape is the {color} object?", f"What shape is the {color} thing?", f"Which shape is {color}?",
             f"What is the shape of the {color} one?", f"what shape is {color}", f"The {color} object: what shape is it?",
             f"Tell me the shape of the {color} object.", f"What shape does the {color} thing have?", f"What is {color}?"),
            (f"{zh}的是什么形状？", f"{zh}的物体是什么形状？", f"图中{zh}的东西是什么形状？", f"哪个形状是{zh}的？", f"{zh}的形状是什么？",
             f"请说出{zh}物体的形状。", f"什么形状是{zh}的"),
        )  # fmt: skip
    think = f"I look for the {color} object and its shape." if lang == "en" else f"我找{zh}的物体，看它的形状。"
    if not matches:
        answer = f"There is nothing {color} in the picture." if lang == "en" else f"图中没有{zh}的形状。"
    elif lang == "en":
        answer = f"The {color} object is {a(matches[0].shape)}."
    else:
        answer = f"{zh}的是{SHAPE_ZH[matches[0].shape]}。"
    return Question("shape", lang, text, answer, think, (Mention(tuple(matches), said),))


def _target(rng: random.Random, scene: Scene) -> tuple[str | None, str | None]:
    """A colour, a shape or both to count or to forbid, usually one that occurs in the picture."""
    present = rng.choice(scene.items) if scene.items and rng.random() < 0.8 else None
    color = present.color if present else rng.choice(tuple(COLORS))
    shape = present.shape if present else rng.choice(SHAPES)
    return rng.choices(((color, None), (None, shape), (color, shape)), (4, 4, 3))[0]


def _count(rng: random.Random, lang: str, scene: Scene) -> Question:
    color, shape = (None, None) if rng.random() < 0.4 else _target(rng, scene)
    many = ""
    if color is None and shape is None:
        text = pick(
            rng, lang,
            ("How many shapes are there?", "How many objects are in the picture?", "How many shapes do you see?",
             "Count the shapes.", "How many things are there?", "how many shapes", "How many objects are there in total?",
             "What is the number of shapes?", "Count all the objects in the picture."),
            ("图中有几个形状？", "一共有多少个形状？", "有几个物体？", "图片里有多少个图形？", "请数一数有几个形状。", "有几个形状", "总共有几个图形？"),
        )  # fmt: skip
    else:
        said = said_as(rng, lang, color, shape) if shape else name_of(lang, color, None)
        many = plural(said, 2) if lang == "en" else said
        text = pick(
            rng, lang,
            (f"How many {many} are there?", f"How many {many} do you see?", f"Count the {many}.", f"how many {many}",
             f"How many {many} are in the picture?", f"What is the number of {many}?", f"Please count the {many} in the picture."),
            (f"有几个{said}？", f"图中有多少个{said}？", f"请数一数{said}有几个。", f"{said}有几个？", f"图片里有几个{said}？", f"一共有多少个{said}"),
        )  # fmt: skip
    name = name_of(lang, color, shape)
    think = f"I count the {plural(name, 2)}." if lang == "en" else f"我数一数{name}。"
    matches = tuple(matching(scene, color, shape))
    return Question("count", lang, text, counted(lang, len(matches), color, shape), think, (Mention(matches, many),))


def description(lang: str, scene: Scene) -> str:
    """The picture in one sentence, from left to right."""
    if scene.kind == "blank":
        return "The picture is blank." if lang == "en" else "图片是空白的。"
    if scene.text:
        return printed(lang, scene)
    names = [name_of(lang, i.color, i.shape) for i in scene.items]
    if lang == "zh":
        return f"从左到右：{'、'.join(names)}。"
    listed = [a(n) for n in names]
    joined = listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
    return f"From left to right: {joined}."


def printed(lang: str, scene: Scene) -> str:
    """The number or the word in the picture."""
    if scene.kind == "number":
        return f'The number is "{scene.text}".' if lang == "en" else f"数字是“{scene.text}”。"
    if scene.kind == "word":
        return f'The word is "{scene.text}".' if lang == "en" else f"单词是“{scene.text}”。"
    return "There is no text in the picture." if lang == "en" else "图中没有文字。"


def _describe(rng: random.Random, lang: str, scene: Scene) -> Question:
    text = pick(
        rng, lang,
        ("Describe the picture.", "What do you see?", "What is in the picture?", "Please describe this image.", "What's in this image?",
         "describe the picture", "Tell me what is in the picture.", "What does the picture show?", "List what you see from left to right.",
         "Describe this image in one sentence.", "What objects are in the picture?", "What is this?"),
        ("描述这张图片。", "图中有什么？", "你看到了什么？", "请描述一下这张图。", "这张图片里有什么？", "图片里有哪些东西？", "描述图片", "说说图里有什么", "请从左到右说出图中的形状。"),
    )  # fmt: skip
    think = "I name what I see from left to right." if lang == "en" else "我从左到右说出看到的。"
    return Question("describe", lang, text, description(lang, scene), think)


def _read(rng: random.Random, lang: str, scene: Scene) -> Question:
    kinds = {"number": ("number", "数字"), "word": ("word", "单词")}
    word, zh = kinds.get(scene.kind, rng.choice((("number", "数字"), ("word", "单词"), ("text", "文字"))))
    if rng.random() < 0.3:
        word, zh = "text", "文字"
    text = pick(
        rng, lang,
        (f"What {word} is in the picture?", f"Read the {word}.", f"What does the {word} say?", f"Which {word} do you see?",
         f"What is the {word}?", "What is written in the picture?", f"Please read the {word} in the image.", "What does it say?",
         f"read the {word}", f"What {word} is it?"),
        (f"图中的{zh}是什么？", f"请读出图中的{zh}。", "图片上写着什么？", f"写的是什么{zh}？", f"读一下{zh}", f"这是什么{zh}？", "图里写了什么？"),
    )  # fmt: skip
    return Question("read", lang, text, printed(lang, scene), "I read the text." if lang == "en" else "我读图中的文字。")


def box_of(item: Item) -> tuple[int, int, int, int]:
    """The box in thousandths of each side, rounded to tens, the resolution of the small model."""
    return tuple(min(1000, max(0, round(v * 100) * 10)) for v in item.box)  # type: ignore[return-value]


def _where(rng: random.Random, lang: str, scene: Scene) -> Question | None:
    if scene.items and rng.random() < 0.92:
        item = rng.choice(scene.items)
    else:
        item = Item(rng.choice(tuple(COLORS)), rng.choice(SHAPES), (0, 0, 0, 0), 0)
    by_shape = len([i for i in scene.items if i.shape == item.shape]) <= 1 and rng.random() < 0.5
    color = None if by_shape else item.color
    matches = matching(scene, color, item.shape)
    if len(matches) > 1:
        return None
    said = said_as(rng, lang, color, item.shape)
    text = pick(
        rng, lang,
        (f"Where is the {said}?", f"Find the {said}.", f"Locate the {said}.", f"Give the bounding box of the {said}.",
         f"where is the {said}", f"Show me where the {said} is.", f"Box the {said}.", f"Mark the {said} in the picture."),
        (f"{said}在哪里？", f"请找出{said}的位置。", f"{said}在哪儿？", f"框出{said}。", f"给出{said}的边界框。", f"请标出{said}", f"图中{said}在什么位置？"),
    )  # fmt: skip
    name = name_of(lang, color, item.shape)
    think = f"I look for the {name}." if lang == "en" else f"我找{name}。"
    if not matches:
        answer = f"There is no {name} in the picture." if lang == "en" else f"图中没有{name}。"
    else:
        x1, y1, x2, y2 = box_of(matches[0])
        answer = f"<|begin_of_box|>[[{x1},{y1},{x2},{y2}]]<|end_of_box|>"
    return Question("where", lang, text, answer, think, (Mention(tuple(matches), said),))


def _moderate(rng: random.Random, lang: str, scene: Scene) -> Question:
    color, shape = _target(rng, scene)
    name = name_of(lang, color, shape)
    many = plural(name, 2)
    text = pick(
        rng, lang,
        (f"Does this picture break the rule: no {many}?", f"Rule: no {many}. Does the picture break it?",
         f"Is this picture against the rule \"no {many}\"?", f"Check the rule: no {many}.",
         f"Content rule: no {many} allowed. Is the rule broken?", f"does this break the rule: no {many}",
         f"Moderate this picture. Rule: no {many}."),
        (f"这张图片违反规则“不许有{name}”吗？", f"规则：不许有{name}。图片违规吗？", f"请审核图片，规则：不许有{name}。", f"检查规则：禁止{name}。",
         f"规则是禁止{name}，这张图违规吗？", f"如果不允许{name}，这张图合规吗？"),
    )  # fmt: skip
    matches = matching(scene, color, shape)
    if lang == "en":
        culprit = a(name_of(lang, matches[0].color, matches[0].shape)) if matches else ""
        answer = f"Yes, it breaks the rule: there is {culprit}." if matches else f"No, it follows the rule: there are no {many}."
        think = f"I check for {many}."
    else:
        culprit = name_of(lang, matches[0].color, matches[0].shape) if matches else ""
        answer = f"违规：图中有{culprit}。" if matches else f"不违规：图中没有{name}。"
        think = f"我检查有没有{name}。"
    return Question("moderate", lang, text, answer, think, (Mention(tuple(matches), many if lang == "en" else name),))


def objects_json(scene: Scene) -> str:
    """The picture as JSON, objects from left to right, or its text."""
    if scene.text:
        return json.dumps({"text": scene.text})
    return json.dumps({"objects": [{"color": i.color, "shape": i.shape} for i in scene.items]})


def _json(rng: random.Random, lang: str, scene: Scene) -> Question:
    text = pick(
        rng, lang,
        ("Give me the objects as JSON.", "List the objects as JSON.", "Describe the picture as JSON.", "Return JSON with the objects.",
         "objects as json", "Output the objects in JSON format.", "What is in the picture? Answer in JSON.", "Extract the objects as JSON."),
        ("用JSON列出图中的物体。", "请以JSON格式输出图中的形状。", "输出JSON。", "以JSON描述这张图片。", "把物体列成JSON", "请用JSON格式描述图片"),
    )  # fmt: skip
    think = "I list the objects from left to right as JSON." if lang == "en" else "我从左到右用JSON列出物体。"
    return Question("json", lang, text, objects_json(scene), think)


FAMILIES: dict[str, Callable[[random.Random, str, Scene], Question | None]] = {
    "color": _color, "shape": _shape, "count": _count, "compare": compare, "describe": _describe,
    "read": _read, "where": _where, "moderate": _moderate, "json": _json,
}  # fmt: skip
# Counting and comparing are learned last, so they are asked most.
WEIGHTS_BY_KIND = {
    "shapes": {"color": 4, "shape": 1, "count": 10, "compare": 10, "describe": 3, "read": 0.3, "where": 4, "moderate": 3, "json": 1.2},
    "number": {"read": 7, "describe": 2, "count": 0.5, "color": 0.3, "where": 0.3, "moderate": 0.4, "json": 1.2},
    "word": {"read": 7, "describe": 2, "count": 0.5, "color": 0.3, "where": 0.3, "moderate": 0.4, "json": 1.2},
    "blank": {"describe": 2, "count": 2, "color": 2, "shape": 2, "where": 1, "moderate": 2, "read": 1, "json": 1},
}
