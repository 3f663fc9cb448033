"""Answers as JSON, and their validation against a schema."""

from __future__ import annotations

import pytest

from web.chat import json_answer
from web.chat.presets import OBJECTS_SCHEMA


@pytest.mark.parametrize("text", ["A red circle.", "[see above] it is red", "{not json"])
def test_plain_text_is_not_json(text: str) -> None:
    assert json_answer.parse(text, None) is None


def test_json_that_fits_has_no_problem() -> None:
    read = json_answer.parse('{"objects": [{"color": "red", "shape": "star"}]}', OBJECTS_SCHEMA)

    assert read is not None
    assert (read.is_json, read.problem) == (True, "")


def test_json_in_a_code_fence_is_parsed() -> None:
    read = json_answer.parse('```json\n{"a": 1}\n```', {})

    assert read is not None
    assert read.value == {"a": 1}


def test_a_violation_of_the_schema_is_reported_with_its_path() -> None:
    read = json_answer.parse('{"objects": [{"color": "red", "shape": 7}]}', OBJECTS_SCHEMA)

    assert read is not None
    assert read.where == "$.objects[0].shape"
    assert "7 is not of type 'string'" in read.problem


def test_text_instead_of_requested_json_is_a_problem() -> None:
    read = json_answer.parse('{"objects": [', OBJECTS_SCHEMA)

    assert read is not None
    assert not read.is_json
    assert "line 1" in read.where


def test_very_deeply_nested_json_is_a_problem() -> None:
    read = json_answer.parse("[" * 100_000, {})

    assert read is not None
    assert not read.is_json


@pytest.mark.parametrize(("text", "why"), [("{", "Expecting"), ("[]", "not an object"), ('{"type": "nothing"}', "nothing")])
def test_an_invalid_schema_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        json_answer.parse_schema(text)


@pytest.mark.parametrize("text", ["{}", '["a"]', "nonsense"])
def test_invalid_tools_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        json_answer.parse_tools(text)
