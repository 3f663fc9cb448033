"""Places in every bracket style of the model, and what is no place."""

from __future__ import annotations

from typing import Any

import pytest

from api.parsing.boxes import MAX_PLACES, Grounding, described, read_named, read_wrapped

Q = ((1, 2), (3, 4))


def quads(text: str) -> list[Any]:
    return [place.points for place in read_wrapped(text)]


@pytest.mark.parametrize(
    "text",
    ["[[1,2,3,4]]", "[1,2,3,4]", "(1,2,3,4)", "<1,2,3,4>", "{1,2,3,4}", "((1, 2, 3, 4))", "[ 1 , 2 , 3 , 4 ]",
     "<<1,2,3,4>>", "[3,4,1,2]", "[1.2, 2.0, 3, 3.9]", '{"bbox_2d": [1,2,3,4]}', '[{"bbox_2d": [[1,2,3,4]]}]'],
)  # fmt: skip
def test_one_box_in_any_style(text: str) -> None:
    assert quads(text) == [Q]


def test_several_boxes() -> None:
    assert quads("[[1,2,3,4],[5,6,7,8]]") == quads("(1,2,3,4), (5,6,7,8)") == [Q, ((5, 6), (7, 8))]


@pytest.mark.parametrize(
    "text",
    ["blue", "42", "[1, 2, 3]", "[1, 2]", "3, 4, 5, 6", "[a,b,c,d]", "[5,5,5,9]", '{"bbox_3d": [1,2,3,4,5,6,7,8,9]}',
     "[true,1,2,3]", "", "[[[[", '{"bbox_2d": "left"}', "[99999999999,1,2,3]"],
)  # fmt: skip
def test_what_is_no_place(text: str) -> None:
    assert read_wrapped(text) == ()


@pytest.mark.parametrize("text", ["[[1,2],[3,4]]", "((1,2),(3,4))", '{"points": [[1,2],[3,4]]}'])
def test_points(text: str) -> None:
    assert [(place.kind, place.points) for place in read_wrapped(text)] == [("point", ((1, 2),)), ("point", ((3, 4),))]


def test_labels_and_polygons() -> None:
    text = '[{"label": "cat", "bbox_2d": [1,2,3,4]}, {"label": "dog", "polygon": [[1,2],[3,4],[5,6]]}, {"point_2d": [7,8]}]'

    assert read_wrapped(text) == (
        Grounding("bbox", Q, "cat"),
        Grounding("polygon", ((1, 2), (3, 4), (5, 6)), "dog"),
        Grounding("point", ((7, 8),)),
    )


def test_in_prose_only_json_with_the_name_of_a_box_counts() -> None:
    text = 'The list [1,2,3,4] is not; {"bbox_2d": [1,2,3,4], "label": "cat"} is, and {"bbox_2d": broken} is not.'

    assert read_named(text) == (Grounding("bbox", Q, "cat"),)


def test_a_described_box_has_thousandths_pixels_and_its_picture() -> None:
    place = Grounding("bbox", ((0, 250), (500, 1000)), "cat")

    assert described(place, ((10, 10), (200, 100))) == {
        "label": "cat", "bbox_2d": [0, 250, 500, 1000], "image": 1, "bbox_pixels": [0, 25, 100, 100],
    }  # fmt: skip
    assert described(place, ()) == {"label": "cat", "bbox_2d": [0, 250, 500, 1000]}


def test_numbers_outside_the_picture_are_told_and_have_no_pixels() -> None:
    [place] = read_wrapped("[10, 20, 1500, 900]")

    assert described(place, ((100, 100),)) == {"bbox_2d": [10, 20, 1500, 900], "normalized": False, "image": 0}


def test_a_hair_outside_is_the_edge() -> None:
    assert quads("[-2, 0, 10, 10]") == [((0, 0), (10, 10))]


def test_points_and_polygons_are_described_in_their_own_words() -> None:
    sizes = ((200, 100),)

    assert described(Grounding("point", ((500, 500),)), sizes) == {
        "point_2d": [500, 500], "image": 0, "point_pixels": [100, 50],
    }  # fmt: skip
    assert described(Grounding("polygon", ((0, 0), (500, 0), (0, 500))), sizes)["polygon_pixels"] == [
        [0, 0], [100, 0], [0, 50],
    ]  # fmt: skip


def test_the_number_of_places_is_capped() -> None:
    assert len(read_wrapped(str([[1, 2, 3, 4]] * 500))) == MAX_PLACES


@pytest.mark.parametrize("text", ["[" * 30_000, "{" * 30_000, '{"bbox_2d"' * 5_000, "(1,2,3," * 8_000, "[1," * 9_000])
def test_nonsense_is_read_soon(text: str) -> None:
    read_wrapped(text)
    read_named(text)
