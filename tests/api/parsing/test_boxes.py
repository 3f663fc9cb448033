"""Regions in every notation of the model, and text that is none."""

from __future__ import annotations

from typing import Any

import pytest

from api.parsing.boxes import MAX_REGIONS, Region, read_tagged, read_untagged, region_entry

Q = ((1, 2), (3, 4))


def quads(text: str) -> list[Any]:
    return [region.points for region in read_tagged(text)]


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
def test_text_without_a_region(text: str) -> None:
    assert read_tagged(text) == ()


@pytest.mark.parametrize("text", ["[[1,2],[3,4]]", "((1,2),(3,4))", '{"points": [[1,2],[3,4]]}'])
def test_points(text: str) -> None:
    assert [(region.kind, region.points) for region in read_tagged(text)] == [
        ("point", ((1, 2),)),
        ("point", ((3, 4),)),
    ]


def test_labels_and_polygons() -> None:
    text = '[{"label": "cat", "bbox_2d": [1,2,3,4]}, {"label": "dog", "polygon": [[1,2],[3,4],[5,6]]}, {"point_2d": [7,8]}]'

    assert read_tagged(text) == (
        Region("bbox", Q, "cat"),
        Region("polygon", ((1, 2), (3, 4), (5, 6)), "dog"),
        Region("point", ((7, 8),)),
    )


def test_in_prose_only_json_with_the_key_of_a_box_counts() -> None:
    text = 'The list [1,2,3,4] is not; {"bbox_2d": [1,2,3,4], "label": "cat"} is, and {"bbox_2d": broken} is not.'

    assert read_untagged(text) == (Region("bbox", Q, "cat"),)


def test_an_entry_has_thousandths_pixels_and_its_image() -> None:
    region = Region("bbox", ((0, 250), (500, 1000)), "cat")

    assert region_entry(region, ((10, 10), (200, 100))) == {
        "label": "cat", "bbox_2d": [0, 250, 500, 1000], "image": 1, "bbox_pixels": [0, 25, 100, 100],
    }  # fmt: skip
    assert region_entry(region, ()) == {"label": "cat", "bbox_2d": [0, 250, 500, 1000]}


def test_numbers_outside_the_image_are_marked_and_have_no_pixels() -> None:
    [region] = read_tagged("[10, 20, 1500, 900]")

    assert region_entry(region, ((100, 100),)) == {"bbox_2d": [10, 20, 1500, 900], "normalized": False, "image": 0}


def test_slightly_outside_counts_as_the_edge() -> None:
    assert quads("[-2, 0, 10, 10]") == [((0, 0), (10, 10))]


def test_points_and_polygons_have_keys_of_their_own() -> None:
    sizes = ((200, 100),)

    assert region_entry(Region("point", ((500, 500),)), sizes) == {
        "point_2d": [500, 500], "image": 0, "point_pixels": [100, 50],
    }  # fmt: skip
    assert region_entry(Region("polygon", ((0, 0), (500, 0), (0, 500))), sizes)["polygon_pixels"] == [
        [0, 0], [100, 0], [0, 50],
    ]  # fmt: skip


def test_the_number_of_regions_is_capped() -> None:
    assert len(read_tagged(str([[1, 2, 3, 4]] * 500))) == MAX_REGIONS


@pytest.mark.parametrize("text", ["[" * 30_000, "{" * 30_000, '{"bbox_2d"' * 5_000, "(1,2,3," * 8_000, "[1," * 9_000])
def test_malformed_text_is_read_quickly(text: str) -> None:
    read_tagged(text)
    read_untagged(text)
