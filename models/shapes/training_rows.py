"""Packs conversations about drawn pictures into training rows.

A row is a tree of segments: a shared prefix (the picture) and branches (conversations about it) that cannot attend to
each other, so that one pass over a picture teaches many answers. Owns packing, positions and masks; knows nothing of the
model. The text of a segment equals what the chat template renders for the same messages (a test compares them).
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from models.shapes import talk
from models.shapes.checkpoint import CELL_PIXELS, MAX_CELLS, MIN_CELLS
from models.shapes.pictures import MAX_ITEMS, Item, Scene, draw_scene
from models.shapes.questions import ask
from models.shapes.wording import Mention, Question

ROW_TOKENS = 176
IMAGE_OPEN, IMAGE, IMAGE_CLOSE = "<|begin_of_image|>", "<|image|>", "<|end_of_image|>"
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def grids() -> list[tuple[int, int]]:
    """All grids (rows, columns) of cells of pictures with an aspect ratio from 1:3 to 3:1."""
    sides = range(2, 12)
    return [
        (rows, columns)
        for rows in sides
        for columns in sides
        if MIN_CELLS <= rows * columns <= MAX_CELLS and max(rows, columns) <= 3 * min(rows, columns)
    ]


@dataclass
class Picture:
    """A drawn picture as the vision encoder takes it: `patches` [rows * columns * 4, 1176] float32."""

    scene: Scene
    grid: tuple[int, int]
    patches: np.ndarray


def draw(rng: random.Random, grid: tuple[int, int], **scene_options) -> Picture:
    """Draw a picture of a random size that the processor scales to `grid`."""
    rows, columns = grid
    scale = rng.choice((1.0, 1.0, rng.uniform(1.0, 2.0), rng.uniform(2.0, 3.5)))
    size = (round(columns * CELL_PIXELS * scale), round(rows * CELL_PIXELS * scale))
    image, scene = draw_scene(rng, size, **scene_options)
    if scale != 1.0:
        image = image.resize((columns * CELL_PIXELS, rows * CELL_PIXELS), Image.Resampling.BICUBIC)
    return Picture(scene, grid, patchify(image))


def patchify(image: Image.Image) -> np.ndarray:
    """The processor's patches for an RGB picture whose sides are multiples of 28: [patches, 1176] float32."""
    pixels = (np.asarray(image, dtype=np.float32) / 255 - MEAN) / STD
    height, width, _ = pixels.shape
    cells = pixels.reshape(height // 28, 2, 14, width // 28, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    frames = np.broadcast_to(cells[:, :, :, :, :, None], (*cells.shape[:5], 2, 14, 14))
    return frames.reshape(height * width // 196, 1176)


@dataclass(frozen=True)
class Asked:
    """The text from a question to the beginning of its answer, and the shapes that its words refer to."""

    question: str
    rest: str
    mentions: tuple[Mention, ...]

    def last_characters(self) -> list[tuple[int, tuple[Item, ...]]]:
        """For each mention, the index of its last character in the text, and the shapes that it refers to."""
        return [(self.question.index(m.said) + len(m.said or self.question) - 1, m.items) for m in self.mentions]


Piece = str | Picture | Asked | tuple[str]


@dataclass
class Row:
    """Token ids with M-RoPE positions, segment tree, tokens to learn and last tokens of mentions."""

    ids: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)  # one for each run of image tokens, in order
    mentions: list[tuple[int, tuple[Item, ...]]] = field(default_factory=list)  # (last token, shapes)
    ends: list[int] = field(default_factory=list)  # the next position after each segment

    def add(self, tokenizer, pieces: list[Piece], parent: int = -1) -> int:
        """Append a segment of context (strings), text to learn (tuples of one string) and pictures. Returns its number."""
        number = len(self.ends)
        position = self.ends[parent] if parent >= 0 else 0
        for piece in pieces:
            if isinstance(piece, Picture):
                rows, columns = piece.grid
                ids = [tokenizer.convert_tokens_to_ids(IMAGE)] * (rows * columns)
                self.positions += [(position, position + r, position + c) for r in range(rows) for c in range(columns)]
                position += max(rows, columns)
                self.pictures.append(piece)
            else:
                if isinstance(piece, Asked):
                    encoded = tokenizer(piece.question + piece.rest, add_special_tokens=False)
                    ids = encoded.input_ids
                    self.mentions += [(len(self.ids) + encoded.char_to_token(c), items) for c, items in piece.last_characters()]
                else:
                    ids = tokenizer.encode(piece if isinstance(piece, str) else piece[0], add_special_tokens=False)
                self.positions += [(position + i,) * 3 for i in range(len(ids))]
                position += len(ids)
            self.ids += ids
            self.segment += [number] * len(ids)
            self.parent += [parent] * len(ids)
            self.learn += [isinstance(piece, tuple)] * len(ids)
        self.ends.append(position)
        return number


def image_pieces(picture: Picture) -> list[Piece]:
    return [IMAGE_OPEN, picture, IMAGE_CLOSE]


def turn(question: Question, thinking: bool, end: str = "<|user|>") -> list[Piece]:
    """A question and the answer to learn, from the question's text to the token that ends the answer."""
    if thinking:
        asked = Asked(question.text, "<|assistant|>", question.mentions)
        return [asked, (f"\n<think>{question.think}</think>\n{question.answer}{end}",)]
    asked = Asked(question.text, "/nothink<|assistant|>\n<think></think>", question.mentions)
    return [asked, (f"\n{question.answer}{end}",)]


def past_turn(question: Question, thinking: bool) -> list[Piece]:
    """An earlier turn, without its thought."""
    if thinking:
        return [Asked(question.text, f"<|assistant|>\n<think></think>\n{question.answer}<|user|>\n", question.mentions)]
    return [*turn(question, False), "\n"]


class RowMaker:
    """Makes rows of about ROW_TOKENS tokens about pictures of the given grids."""

    def __init__(self, tokenizer, rng: random.Random, share: dict[str, float] | None = None, most_items: int = MAX_ITEMS):
        self.tokenizer = tokenizer
        self.rng = rng
        self.most_items = most_items
        self.share = share or {"packed": 0.72, "text_first": 0.07, "two": 0.12, "system": 0.03, "tools": 0.03, "text": 0.03}

    def row(self, grids_here: list[tuple[int, int]]) -> Row:
        kind = self.rng.choices(tuple(self.share), tuple(self.share.values()))[0]
        return getattr(self, f"_{kind}")(grids_here)

    def _draw(self, grids_here: list[tuple[int, int]], kind: str | None = None) -> Picture:
        return draw(self.rng, self.rng.choice(grids_here), kind=kind, most=self.most_items)

    def _lang(self) -> str:
        return self.rng.choice(("en", "zh"))

    def _fill(self, row: Row, branch, parent: int) -> Row:
        while True:
            size = len(row.ids)
            row.add(self.tokenizer, branch(), parent)
            if 2 * len(row.ids) - size > ROW_TOKENS:  # another branch like this one would not fit
                return row

    def _conversation(self, scene: Scene) -> list[Piece]:
        """One question, in a quarter of cases with a second one after it, which may be the same."""
        thinking = self.rng.random() < 0.35
        lang = self._lang()
        first = ask(self.rng, lang, scene)
        if self.rng.random() < 0.75:
            return turn(first, thinking)
        lang = lang if self.rng.random() < 0.8 else self._lang()
        second = first if self.rng.random() < 0.25 else ask(self.rng, lang, scene)
        return [*past_turn(first, thinking), *turn(second, thinking)]

    def _packed(self, grids_here, before: str = "[gMASK]<sop>") -> Row:
        picture = self._draw(grids_here)
        row = Row()
        start = row.add(self.tokenizer, [f"{before}<|user|>\n", *image_pieces(picture)])
        return self._fill(row, lambda: self._conversation(picture.scene), start)

    def _system(self, grids_here) -> Row:
        return self._packed(grids_here, f"[gMASK]<sop><|system|>\n{self.rng.choice(talk.SYSTEM_PROMPTS)}")

    def _text_first(self, grids_here) -> Row:
        picture = self._draw(grids_here)

        def conversation():
            thinking = self.rng.random() < 0.35
            question = ask(self.rng, self._lang(), picture.scene)
            asked, learned = turn(question, thinking)
            return [f"[gMASK]<sop><|user|>\n{question.text}", *image_pieces(picture), asked.rest, learned]

        return self._fill(Row(), conversation, -1)

    def _two(self, grids_here) -> Row:
        first, second = (
            self._draw(grids_here, kind=self.rng.choice(("shapes", "shapes", "shapes", "word", "number")))
            for _ in range(2)
        )
        row = Row()
        if self.rng.random() < 0.35:  # the second picture comes in a later turn, and the question is about it
            earlier = past_turn(ask(self.rng, self._lang(), first.scene), False)
            start = row.add(self.tokenizer, ["[gMASK]<sop><|user|>\n", *image_pieces(first), *earlier, *image_pieces(second)])
            return self._fill(row, lambda: turn(ask(self.rng, self._lang(), second.scene), False), start)
        start = row.add(self.tokenizer, ["[gMASK]<sop><|user|>\n", *image_pieces(first), *image_pieces(second)])

        def conversation():
            question = talk.two_pictures(self.rng, self._lang(), (first.scene, second.scene))
            return turn(question, self.rng.random() < 0.35)

        return self._fill(row, conversation, start)

    def _tools(self, grids_here) -> Row:
        tool = json.loads(json.dumps(talk.COUNT_TOOL))
        tool["function"]["description"] = self.rng.choice(talk.TOOL_DESCRIPTIONS)
        rendered = self.tokenizer.apply_chat_template([{"role": "user", "content": ""}], tools=[tool], tokenize=False)
        picture = self._draw(grids_here, kind="shapes")
        row = Row()
        start = row.add(self.tokenizer, [rendered, *image_pieces(picture)])

        def conversation():
            thinking = self.rng.random() < 0.5
            if self.rng.random() < 0.25:
                return turn(self._not_a_count(picture.scene), thinking)
            question, reply = talk.tool_question(self.rng, self._lang(), picture.scene)
            result, answer = reply.split("|")
            think = "The tool has counted." if question.lang == "en" else "工具数好了。"
            tail = (f"\n<think>{think}</think>\n{answer}<|user|>",) if thinking else (f"\n{answer}<|user|>",)
            response = f"\n<tool_response>\n{result}\n</tool_response><|assistant|>" + ("" if thinking else "\n<think></think>")
            return [*turn(question, thinking, "<|observation|>"), response, tail]

        return self._fill(row, conversation, start)

    def _not_a_count(self, scene: Scene) -> Question:
        while True:
            question = ask(self.rng, self._lang(), scene)
            if question.family != "count":
                return question

    def _text(self, grids_here) -> Row:
        row = Row()
        start = row.add(self.tokenizer, ["[gMASK]<sop><|user|>\n"])

        def conversation():
            lang = self._lang()
            kind = self.rng.choice(("greeting", "ability", "ability", "none"))
            if kind == "greeting":
                question = talk.greeting(self.rng, lang)
            elif kind == "ability":
                question = talk.off_topic(self.rng, lang)
            else:
                scene = draw_scene(self.rng, (56, 56), kind="shapes")[1]
                question = talk.without_picture(ask(self.rng, lang, scene))
            return turn(question, self.rng.random() < 0.35)

        return self._fill(row, conversation, start)


@dataclass
class Batch:
    """Arrays for one step of B rows of up to T tokens.

    ids [B, T]; positions [3, B, T]; mask [B, 1, T, T] bool, true where attention is allowed; labels [B, T], -100 where
    nothing is learned; image_slots [B, T] bool. groups: (grid, patches [n, patches, 1176], scenes) of pictures of one size;
    picture_order: (group, index) for each run of image tokens. mentions: (row, last token, shapes).
    """

    ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    image_slots: np.ndarray
    groups: list[tuple[tuple[int, int], np.ndarray, list[Scene]]]
    picture_order: list[tuple[int, int]]
    mentions: list[tuple[int, int, tuple[Item, ...]]]


def collate(rows: list[Row], image_id: int) -> Batch:
    """Pad rows on the right and collect each distinct picture once."""
    size, longest = len(rows), max(len(r.ids) for r in rows)
    longest = math.ceil(longest / 16) * 16
    ids = np.zeros((size, longest), np.int64)
    labels = np.full((size, longest), -100, np.int64)
    positions = np.zeros((3, size, longest), np.int64)
    mask = np.zeros((size, longest, longest), bool)
    causal = np.tril(np.ones((longest, longest), bool))
    by_grid: dict[tuple[int, int], list[Picture]] = {}
    index_of: dict[int, tuple[tuple[int, int], int]] = {}
    runs: list[tuple[tuple[int, int], int]] = []
    for b, row in enumerate(rows):
        n = len(row.ids)
        ids[b, :n] = row.ids
        positions[:, b, :n] = np.array(row.positions).T
        segment, parent = np.array(row.segment), np.array(row.parent)
        visible = (segment[:, None] == segment[None]) | (parent[:, None] == segment[None])
        mask[b, :n, :n] = visible & causal[:n, :n]
        mask[b, range(longest), range(longest)] = True  # padding attends to itself: no empty softmax
        learn = np.array(row.learn)
        follows = learn[1:] & (segment[1:] == segment[:-1])
        labels[b, : n - 1][follows] = ids[b, 1:n][follows]
        for picture in row.pictures:
            if id(picture) not in index_of:
                group = by_grid.setdefault(picture.grid, [])
                index_of[id(picture)] = (picture.grid, len(group))
                group.append(picture)
            runs.append(index_of[id(picture)])
    order = list(by_grid)
    groups = [(g, np.stack([p.patches for p in by_grid[g]]), [p.scene for p in by_grid[g]]) for g in order]
    picture_order = [(order.index(g), i) for g, i in runs]
    mentions = [(b, token, items) for b, row in enumerate(rows) for token, items in row.mentions]
    return Batch(ids, positions, mask[:, None], labels, ids == image_id, groups, picture_order, mentions)
