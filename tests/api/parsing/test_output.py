"""The model's text becomes reasoning, content, boxes and tool calls, the same however it is cut."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, field

import pytest

from api.parsing.output import Boxes, Call, Content, OutputParser, Piece, Reasoning, split_thinking

TOOLS = {
    "count_objects": {
        "properties": {
            "color": {"type": "string"},
            "size": {"type": ["string", "null"]},
            "limit": {"type": "integer"},
            "deep": {"type": "object"},
            "kind": {"enum": ["1", "2"]},
            "any": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        }
    }
}
BROKEN = "<tool_call>f\n<arg_key>a</arg_key></tool_call>"
TAGS = ["<think>", "</think>", "<|begin_of_box|>", "<|end_of_box|>", "<tool_call>", "</tool_call>"]


@dataclass
class Answer:
    reasoning: str = ""
    content: str = ""
    boxes: list[tuple[int, ...]] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)

    def add(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            match piece:
                case Reasoning(text):
                    self.reasoning += text
                case Content(text):
                    self.content += text
                case Boxes(regions):
                    self.boxes += [tuple(value for point in region.points for value in point) for region in regions]
                case Call(name, arguments):
                    self.calls.append((name, arguments))


def parse(pieces: list[str], stopped: bool = True, tools: dict | None = TOOLS, starts_thinking: bool = False) -> Answer:
    parser, answer = OutputParser(tools, starts_thinking), Answer()
    for piece in pieces:
        answer.add(parser.feed(piece))
    answer.add(parser.finish(stopped))
    return answer


def call(name: str, **arguments: str) -> str:
    pairs = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in arguments.items())
    return f"<tool_call>{name}\n{pairs}</tool_call>"


def called(*calls: tuple[str, dict]) -> list[tuple[str, str]]:
    return [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]


CASES = {
    "plain": ("\nhello there", Answer(content="hello there")),
    "thinking": ("\n<think>why\nnot</think>\nyes", Answer("why\nnot", "yes")),
    "empty thinking": ("<think></think>\nyes", Answer("", "yes")),
    "never closed": ("<think> all of it \n", Answer("all of it", "all of it")),
    "thinks later": ("yes<think>hm</think> and no", Answer("hm", "yes and no")),
    "second reasoning never closed": ("<think>a</think>b<think>c", Answer("ac", "bc")),
    "stray end": ("yes</think> and no", Answer("", "yes and no")),
    "nothing": ("", Answer()),
    "box": ("at <|begin_of_box|>[[1,2,3,4]]<|end_of_box|>.", Answer("", "at [[1,2,3,4]].", [(1, 2, 3, 4)])),
    "two boxes": (
        "<|begin_of_box|>[[1,2,3,4],[5, 6,7,8]]<|end_of_box|> <|begin_of_box|>[9,9,10,10]<|end_of_box|>",
        Answer("", "[[1,2,3,4],[5, 6,7,8]] [9,9,10,10]", [(1, 2, 3, 4), (5, 6, 7, 8), (9, 9, 10, 10)]),
    ),
    "box of text": ("It is <|begin_of_box|>blue<|end_of_box|>!", Answer("", "It is blue!")),
    "empty box": ("a<|begin_of_box|><|end_of_box|>b", Answer("", "ab")),
    "open box": ("a <|begin_of_box|>[[1,2,3", Answer("", "a [[1,2,3")),
    "no rectangle": ("<|begin_of_box|>[1, 2]<|end_of_box|>", Answer("", "[1, 2]")),
    "json in a box": (
        '<|begin_of_box|>[{"bbox_2d": [1,2,3,4], "label": "<x>"}]<|end_of_box|>',
        Answer("", '[{"bbox_2d": [1,2,3,4], "label": "<x>"}]', [(1, 2, 3, 4)]),
    ),
    "round brackets": ("<|begin_of_box|>(1,2,3,4)<|end_of_box|>", Answer("", "(1,2,3,4)", [(1, 2, 3, 4)])),
    "angle brackets": ("<|begin_of_box|><1,2,3,4><|end_of_box|>", Answer("", "<1,2,3,4>", [(1, 2, 3, 4)])),
    "points": ("<|begin_of_box|>[[1,2],[3,4]]<|end_of_box|>", Answer("", "[[1,2],[3,4]]", [(1, 2), (3, 4)])),
    "json without a box": (
        'Here: ```json\n[{"label": "cat", "bbox_2d": [1,2,3,4]}]\n```',
        Answer("", 'Here: ```json\n[{"label": "cat", "bbox_2d": [1,2,3,4]}]\n```', [(1, 2, 3, 4)]),
    ),
    "numbers without a box": ("sides [1,2,3,4]", Answer("", "sides [1,2,3,4]")),
    "call": (
        "<think>t</think>\n" + call("count_objects", color="red", limit="3"),
        Answer("t", "", calls=called(("count_objects", {"color": "red", "limit": 3}))),
    ),
    "call after text": (
        "Let me see.\n" + call("count_objects"),
        Answer("", "Let me see.", calls=called(("count_objects", {}))),
    ),
    "typed": (
        call("count_objects", color="3", size="", deep='{"a": [1]}', limit="many", kind="1", any="5", new="true"),
        Answer(
            calls=called(
                (
                    "count_objects",
                    {"color": "3", "size": "", "deep": {"a": [1]}, "limit": "many", "kind": "1", "any": "5", "new": True},
                )
            )
        ),
    ),
    "two calls": (
        call("count_objects", color="红") + "\n" + call("other", x="1.5"),
        Answer(calls=called(("count_objects", {"color": "红"}), ("other", {"x": 1.5}))),
    ),
    "value of many lines": (
        call("count_objects", color="a\n<b>\n"),
        Answer(calls=called(("count_objects", {"color": "a\n<b>\n"}))),
    ),
    "broken call": (BROKEN, Answer("", BROKEN)),
    "open call": ("x <tool_call>count_obj", Answer("", "x <tool_call>count_obj")),
    "nameless call": ("<tool_call></tool_call>", Answer("", "<tool_call></tool_call>")),
    "almost tags": ("a < b <thin <|begin <tool", Answer("", "a < b <thin <|begin <tool")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_parsed(name: str) -> None:
    text, expected = CASES[name]

    assert parse([text]) == expected


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stopped", [True, False])
def test_every_cut_gives_the_same_result(name: str, stopped: bool) -> None:
    text = CASES[name][0]
    whole = parse([text], stopped)
    rng = random.Random(1)

    assert parse(list(text), stopped) == whole
    for cut in range(len(text)):
        assert parse([text[:cut], text[cut:]], stopped) == whole
    for _ in range(200):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(1, 9)))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        assert parse(pieces, stopped) == whole, pieces


def test_every_cut_of_random_tag_soup_gives_the_same_result() -> None:
    rng = random.Random(2)
    argument = ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
    atoms = [*TAGS, *argument, "<", "[[1,2,3,4]]", "[", " ", "\n", "ab", "中", "f"]
    for _ in range(1500):
        text = "".join(rng.choices(atoms, k=rng.randrange(1, 14)))
        stopped = rng.random() < 0.5
        whole = parse([text], stopped)
        assert parse(list(text), stopped) == whole, text
        cut = rng.randrange(len(text) + 1)
        assert parse([text[:cut], text[cut:]], stopped) == whole, text


def test_reasoning_cut_off_by_the_length_limit_stays_reasoning() -> None:
    assert parse(["<think>still going"], stopped=False) == Answer("still going", "")


def test_a_call_cut_off_by_the_length_limit_leaves_no_markup() -> None:
    cut = "Let me see. <tool_call>count_objects\n<arg_key>color</arg_key>\n<arg_val"

    assert parse([cut], stopped=False) == Answer("", "Let me see.")
    assert parse([call("other") + cut.removeprefix("Let me see. ")], stopped=False) == Answer(calls=called(("other", {})))
    assert parse([cut], stopped=True) == Answer("", cut), "the model itself ended like this"


def test_the_template_may_open_the_reasoning() -> None:
    assert parse(["why</think>yes"], starts_thinking=True) == Answer("why", "yes")


def test_without_tools_a_call_is_text() -> None:
    text = call("count_objects", color="red")

    assert parse([text], tools=None) == Answer("", text)


def test_text_streams_as_soon_as_it_cannot_be_a_tag() -> None:
    parser = OutputParser()

    assert parser.feed("Hello <thi") == [Content("Hello")]
    assert parser.feed("s> there") == [Content(" <this> there")]


def test_an_earlier_answer_is_split_into_reasoning_and_content() -> None:
    assert split_thinking("\n<think> a </think>\nb") == ("a", "b")
    assert split_thinking("about <think> tags") == ("", "about <think> tags")
