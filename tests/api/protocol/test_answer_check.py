"""A schema that the grammar binds in part is checked when the answer is there."""

from __future__ import annotations

import time
from typing import Any

import pytest
from served import sse_data

from api.protocol.answer_check import unmet

SET = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}}


@pytest.mark.parametrize(
    ("schema", "answer", "found"),
    [
        (SET, '{"a": [1, 2]}', []),
        (SET, '{"a": [1, 1]}', ["$.a: uniqueItems"]),
        ({"propertyNames": {"pattern": "^a"}}, '{"b": 1}', ["$: pattern"]),
        ({"pattern": "^(?!-)[a-z]+$"}, '"-a"', ["$: pattern"]),
        ({"pattern": "^(?!-)[a-z]+$"}, '"a"', []),
        ({"type": "string", "format": "email"}, '"nobody"', ["$: format"]),
        ({"not": {"const": 1}}, "1", ["$: not"]),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "1", ["$: oneOf"]),
        ({"if": {"required": ["a"]}, "then": {"required": ["b"]}}, '{"a": 1}', ["$: required"]),
        ({"patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False}, '{"x1": 1, "y": 1}',
         ["$: additionalProperties"]),
        ({"type": "integer"}, "1 2", [": not JSON"]),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "1", []),
        ({"type": 5}, "1", []),
    ],
)  # fmt: skip
def test_what_an_answer_does_not_fit_is_named(schema: dict[str, Any], answer: str, found: list[str]) -> None:
    assert unmet(schema, answer) == found


@pytest.mark.parametrize("word", ["pattern", "patternProperties", "unevaluatedProperties"])
def test_a_pattern_that_takes_forever_is_given_up(word: str) -> None:
    endless, text = "^(a|aa)+$", "a" * 60 + "b"
    schema = {
        "pattern": {"items": {"pattern": endless}},
        "patternProperties": {"items": {"patternProperties": {endless: False}, "additionalProperties": False}},
        "unevaluatedProperties": {"items": {"patternProperties": {endless: False}, "unevaluatedProperties": False}},
    }[word]
    began = time.monotonic()

    unmet(schema, f'["{text}", {{"{text}": 1}}]')

    assert time.monotonic() - began < 5


def form(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}}


def test_the_answer_names_what_it_does_not_fit(serve) -> None:
    served = serve(answer=lambda prompt, images: '{"a":[1,1]}')

    whole = served.chat("x", **form(SET)).json()
    events = served.stream("x", **form(SET))

    assert whole["unmet"] == ["$.a: uniqueItems"] and whole["choices"][0]["message"]["content"] == '{"a":[1,1]}'
    assert events[-2]["unmet"] == ["$.a: uniqueItems"] and events[-2]["choices"][0]["finish_reason"] == "stop"


def test_an_answer_that_fits_has_no_word_of_it(serve) -> None:
    assert "unmet" not in serve(answer=lambda prompt, images: '{"a":[1,2]}').chat("x", **form(SET)).json()


def test_a_strict_schema_that_cannot_be_bound_is_refused(serve) -> None:
    answer = serve().chat("x", **form(SET, strict=True))

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_schema")
    assert "uniqueItems" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {f"q{n}": {"type": "string"} for n in range(1000)}},
        {"type": "object", "properties": {f"q{n}": {"type": "string"} for n in range(2000)}, "additionalProperties": False},
        {"$defs": {"A": {"$ref": "#/$defs/A"}}, "$ref": "#/$defs/A"},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"$ref": "#/$defs/A"}}},
    ],
    ids=["1000 properties", "2000 properties", "refers to itself", "refers to itself inside"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_no_grammar_can_hold_is_refused_with_a_reason(schema: dict[str, Any], stream: bool, serve) -> None:
    answer = serve(answer=lambda prompt, images: '{"q0":"x"}').chat("x", stream=stream, **form(schema))

    assert answer.status_code == 400, answer.text
    assert "cannot be enforced" in answer.json()["error"]["message"]


def test_the_events_of_a_stream_are_complete(serve) -> None:
    text = serve(answer=lambda prompt, images: '{"a":[1,1]}').chat("x", stream=True, **form(SET)).text

    assert sse_data(text)[-1] == "[DONE]"
