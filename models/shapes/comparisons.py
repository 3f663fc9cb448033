"""Questions that compare shapes: which is further left, which is largest, is A above B.

They are asked only where the difference is clearly visible.
"""

from __future__ import annotations

import random

from models.shapes.pictures import Item, Scene
from models.shapes.wording import Mention, Question, name_of, only, pick, said_as


def _unique_pair(rng: random.Random, scene: Scene) -> tuple[Item, Item] | None:
    single = [i for i in scene.items if only(scene.items, color=i.color, shape=i.shape)]
    return tuple(rng.sample(single, 2)) if len(single) >= 2 else None  # type: ignore[return-value]


SIDES = {
    "left": ("further left", "to the left of", "更靠左", "左边", "左侧"),
    "right": ("further right", "to the right of", "更靠右", "右边", "右侧"),
    "top": ("higher", "above", "更靠上", "上面", "上方"),
    "bottom": ("lower", "below", "更靠下", "下面", "下方"),
}
ENDS = {
    "left": (("on the far left", "leftmost", "furthest left"), ("最左边", "最左侧")),
    "right": (("on the far right", "rightmost", "furthest right"), ("最右边", "最右侧")),
    "top": (("at the top", "highest", "topmost"), ("最上面", "最上方")),
    "bottom": (("at the bottom", "lowest"), ("最下面", "最下方")),
}
MARGIN = 0.07  # share of the side; people disagree about smaller differences


def _along(side: str, item: Item) -> float:
    """The position of an item along an axis that points to `side`."""
    x, y = item.center
    return {"left": -x, "right": x, "top": -y, "bottom": y}[side]


def compare(rng: random.Random, lang: str, scene: Scene) -> Question | None:
    return rng.choice((_compare_two, _compare_side, _compare_end, _compare_size))(rng, lang, scene)


def _compare_two(rng: random.Random, lang: str, scene: Scene) -> Question | None:
    pair = _unique_pair(rng, scene)
    side = rng.choice(tuple(SIDES))
    if not pair or abs(_along(side, pair[0]) - _along(side, pair[1])) < MARGIN:
        return None
    one, two = (said_as(rng, lang, i.color, i.shape) for i in pair)
    winner = max(pair, key=lambda i: _along(side, i))
    name = name_of(lang, winner.color, winner.shape)
    further, _, zh, _, _ = SIDES[side]
    text = pick(
        rng, lang,
        (f"Which is {further}, the {one} or the {two}?", f"Which one is {further}: the {one} or the {two}?",
         f"Is the {one} or the {two} {further}?"),
        (f"{one}和{two}哪个{zh}？", f"哪个{zh}，{one}还是{two}？", f"{one}和{two}，谁{zh}？"),
    )  # fmt: skip
    answer = f"The {name} is {further}." if lang == "en" else f"{name}{zh}。"
    mentions = (Mention((pair[0],), one), Mention((pair[1],), two), Mention((winner,)))
    return Question("compare", lang, text, answer, _thinking(lang), mentions)


def _compare_side(rng: random.Random, lang: str, scene: Scene) -> Question | None:
    pair = _unique_pair(rng, scene)
    side = rng.choice(tuple(SIDES))
    if not pair or abs(_along(side, pair[0]) - _along(side, pair[1])) < MARGIN:
        return None
    one, two = (said_as(rng, lang, i.color, i.shape) for i in pair)
    names = [name_of(lang, i.color, i.shape) for i in pair]
    true = _along(side, pair[0]) > _along(side, pair[1])
    _, relation, _, zh, zh_other = SIDES[side]
    where = rng.choice((zh, zh_other))
    text = pick(
        rng, lang,
        (f"Is the {one} {relation} the {two}?", f"Can you see the {one} {relation} the {two}?"),
        (f"{one}在{two}的{where}吗？", f"{one}是在{two}{where}吗？"),
    )  # fmt: skip
    if lang == "en":
        answer = f"{'Yes' if true else 'No'}, the {names[0]} is {'' if true else 'not '}{relation} the {names[1]}."
    else:
        answer = f"{'是的' if true else '不是'}，{names[0]}{'' if true else '不'}在{names[1]}的{zh}。"
    mentions = (Mention((pair[0],), one), Mention((pair[1],), two), Mention((pair[0 if true else 1],)))
    return Question("compare", lang, text, answer, _thinking(lang), mentions)


def _compare_end(rng: random.Random, lang: str, scene: Scene) -> Question | None:
    side = rng.choice(tuple(ENDS))
    ranked = sorted(scene.items, key=lambda i: _along(side, i))
    if len(ranked) < 2 or _along(side, ranked[-1]) - _along(side, ranked[-2]) < (0.03 if side in ("left", "right") else MARGIN):
        return None
    en, zh = ENDS[side]
    said, said_zh = rng.choice(en), rng.choice(zh)
    text = pick(
        rng, lang,
        (f"Which shape is {said}?", f"What is {said}?", f"Which object is {said}?", f"What do you see {said}?"),
        (f"{said_zh}的是什么？", f"哪个形状在{said_zh}？", f"{said_zh}是什么形状？", f"图中{said_zh}的物体是什么？"),
    )  # fmt: skip
    name = name_of(lang, ranked[-1].color, ranked[-1].shape)
    answer = f"The {name} is {en[0]}." if lang == "en" else f"{zh[0]}的是{name}。"
    return Question("compare", lang, text, answer, _thinking(lang), (Mention((ranked[-1],)),))


def _compare_size(rng: random.Random, lang: str, scene: Scene) -> Question | None:
    big = rng.random() < 0.6
    ranked = sorted(scene.items, key=lambda i: i.size, reverse=big)
    if len(ranked) < 2 or max(ranked[0].size, ranked[1].size) < 1.25 * min(ranked[0].size, ranked[1].size):
        return None
    word, zh = ("largest", "最大") if big else ("smallest", "最小")
    said = rng.choice((word, "biggest")) if big else word
    text = pick(
        rng, lang,
        (f"Which shape is the {said}?", f"What is the {said} shape?", f"Which is the {said}?", f"What is the {said} object?", f"Name the {said} shape."),
        (f"{zh}的是什么？", f"哪个形状{zh}？", f"{zh}的形状是哪个？", f"图中{zh}的物体是什么？"),
    )  # fmt: skip
    name = name_of(lang, ranked[0].color, ranked[0].shape)
    answer = f"The {name} is the {word}." if lang == "en" else f"{zh}的是{name}。"
    think = "I compare the sizes." if lang == "en" else "我比较大小。"
    return Question("compare", lang, text, answer, think, (Mention((ranked[0],)),))


def _thinking(lang: str) -> str:
    return "I compare where the shapes are." if lang == "en" else "我比较形状的位置。"
