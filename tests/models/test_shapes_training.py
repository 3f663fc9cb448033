"""The demo's training material is what serving will meet: same text, same patches, true answers."""

import json
import random

import numpy as np
import pytest
from transformers import AutoImageProcessor, AutoTokenizer

from models.shapes import talk
from models.shapes.checkpoint import FOLDER
from models.shapes.pictures import COLORS, MAX_ITEMS, draw_scene, draw_shapes
from models.shapes.questions import FAMILIES, ask, box_of
from models.shapes.training_rows import Picture, Row, RowMaker, collate, draw, grids, image_pieces, patchify, turn
from models.shapes.wording import matching


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def processor():
    return AutoImageProcessor.from_pretrained(FOLDER, backend="pil")


@pytest.mark.parametrize("thinking", [True, False])
def test_a_packed_conversation_equals_the_rendered_chat_template(tokenizer, thinking):
    picture = draw(random.Random(1), (4, 5), kind="shapes")
    question = ask(random.Random(2), "zh", picture.scene)
    row = Row()
    start = row.add(tokenizer, ["[gMASK]<sop><|user|>\n", *image_pieces(picture)])
    row.add(tokenizer, turn(question, thinking), start)

    answer = {"role": "assistant", "content": question.answer, "reasoning_content": question.think if thinking else ""}
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}, answer]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=thinking)

    assert tokenizer.decode(row.ids) == rendered.replace("<|image|>", "<|image|>" * 20) + "<|user|>"


def test_training_patches_equal_the_processors(processor):
    image, _ = draw_scene(random.Random(3), (140, 112))

    seen = processor(image, return_tensors="np")

    assert seen["image_grid_thw"].tolist() == [[1, 8, 10]]
    np.testing.assert_allclose(patchify(image), seen["pixel_values"], atol=2e-5)


def test_every_grid_is_one_that_the_processor_makes(processor):
    for rows, columns in grids():
        image, _ = draw_scene(random.Random(4), (columns * 28, rows * 28))
        assert processor(image, return_tensors="np")["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]


def test_branches_of_a_row_do_not_attend_to_each_other(tokenizer):
    row = RowMaker(tokenizer, random.Random(5), {"packed": 1.0}).row(grids())
    batch = collate([row], tokenizer.convert_tokens_to_ids("<|image|>"))
    segment = np.array(row.segment)

    mask = batch.mask[0, 0, : len(segment), : len(segment)]

    assert segment.max() >= 2
    for branch in range(1, segment.max() + 1):
        others = (segment != branch) & (segment != 0)
        assert not mask[np.ix_(segment == branch, others)].any()
        assert mask[np.ix_(segment == branch, segment == 0)].all()


def test_only_answers_are_learned(tokenizer):
    row = RowMaker(tokenizer, random.Random(6), {"packed": 1.0}).row(grids())
    batch = collate([row], tokenizer.convert_tokens_to_ids("<|image|>"))

    learned = tokenizer.decode([t for t in batch.labels[0] if t != -100])

    assert "<|image|>" not in learned and "<|assistant|>" not in learned
    assert learned.count("<|user|>") >= len(row.ends) - 1  # each branch ends at least one answer
    assert learned.endswith("<|user|>")


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("family", ["color", "shape", "count", "compare", "where", "moderate"])
def test_a_mention_has_the_last_token_and_the_shapes_of_its_words(tokenizer, family, lang):
    rng = random.Random(f"mention/{family}/{lang}")
    seen = 0
    while seen < 40:
        picture = draw(rng, (5, 5), kind="shapes")
        try:
            question = ask(rng, lang, picture.scene, family)
        except ValueError:
            continue
        row = Row()
        row.add(tokenizer, turn(question, thinking=rng.random() < 0.5))
        assert len(row.mentions) == len(question.mentions) >= 1
        for (token, meant), mention in zip(row.mentions, question.mentions, strict=True):
            assert tokenizer.decode(row.ids[: token + 1]).endswith(mention.said or question.text)
            assert meant == mention.items and set(meant) <= set(picture.scene.items)
            for color in COLORS:  # a word for a colour means things of that colour only
                if color in mention.said:
                    assert all(item.color == color for item in meant)
        seen += 1


def test_the_mention_of_a_count_has_all_counted_shapes():
    rng = random.Random(10)
    for _ in range(100):
        _, scene = draw_scene(rng, (200, 150), kind="shapes")
        question = ask(rng, "en", scene, "count")
        counted = 0 if "are no " in question.answer else int(question.answer.split()[2])
        assert len(question.mentions[0].items) == counted


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_asks_and_answers_in_both_languages(family, lang):
    rng = random.Random(f"{family}{lang}")
    asked = set()
    for _ in range(60):
        _, scene = draw_scene(rng, (168, 168), kind="word" if family == "read" else "shapes")
        try:
            asked.add(ask(rng, lang, scene, family).text)
        except ValueError:
            continue

    assert len(asked) >= 5
    assert all(any("\u4e00" <= char <= "\u9fff" for char in text) == (lang == "zh") for text in asked)


def test_counts_and_boxes_are_those_of_the_picture():
    rng = random.Random(7)
    for _ in range(200):
        _, scene = draw_scene(rng, (200, 150), kind="shapes")
        assert 1 <= len(scene.items) <= MAX_ITEMS
        for item in scene.items:
            x1, y1, x2, y2 = box_of(item)
            assert 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000
            assert item in matching(scene, item.color, item.shape)


def test_the_json_answer_lists_every_object():
    rng = random.Random(8)
    _, scene = draw_scene(rng, (200, 150), kind="shapes", count=4)

    answer = json.loads(ask(rng, "en", scene, "json").answer)

    assert [(o["color"], o["shape"]) for o in answer["objects"]] == [(i.color, i.shape) for i in scene.items]


def test_the_tool_call_has_the_format_of_the_model():
    question, reply = talk.tool_question(random.Random(9), "en", draw_scene(random.Random(9), (200, 150), kind="shapes")[1])

    assert question.answer.startswith("<tool_call>count_objects\n<arg_key>color</arg_key>\n<arg_value>")
    assert reply.split("|")[0].isdigit()


def test_a_seed_determines_a_picture():
    wanted = [("red", "circle"), ("blue", "square")]

    assert draw_shapes(wanted, seed=3).tobytes() == draw_shapes(wanted, seed=3).tobytes()
    assert draw_shapes(wanted, seed=3).tobytes() != draw_shapes(wanted, seed=4).tobytes()


def test_drawing_refuses_unknown_shapes_and_too_many():
    with pytest.raises(ValueError, match="pink circle"):
        draw_shapes([("pink", "circle")])
    with pytest.raises(ValueError, match="at most 5"):
        draw_shapes([("red", "circle")] * 6)


def test_a_picture_in_a_row_takes_as_many_tokens_as_it_has_cells(tokenizer):
    picture = Picture(draw_scene(random.Random(1), (56, 84))[1], (3, 2), np.zeros((24, 1176), np.float32))
    row = Row()
    row.add(tokenizer, image_pieces(picture))

    assert row.ids.count(tokenizer.convert_tokens_to_ids("<|image|>")) == 6
    assert row.positions[1:7] == [(1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2), (1, 3, 1), (1, 3, 2)]
    assert row.positions[7] == (4, 4, 4)
