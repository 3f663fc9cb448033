"""Every field is honoured, ignored and named, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field
from served import sse_data

from api.errors import ServingError
from api.health.metrics import MAX_LABELS
from api.protocol.fields import MAX_NAMES, FieldRules, IgnoredFields, Strict, check


class Inner(Strict):
    flag: bool = False


class Item(Strict):
    text: str


class Outer(Strict):
    items: list[Item] = Field(default_factory=list)
    inner: Inner | None = None
    size: int | None = None


RULES = FieldRules(
    {"note": "for the caller"}, {"hint": "to be faster"}, {"best_of": (1, 2)}, echoed=frozenset({"items"}), refused=frozenset({"images"})
)


def checked(strict: bool = False, **data: Any) -> tuple[Outer, list[str]]:
    ignored = IgnoredFields(strict)
    return check(Outer, data, ignored, RULES), ignored.names


def test_a_whole_number_may_be_written_with_a_point() -> None:
    outer, names = checked(size=5.0, items=[{"text": "a"}])

    assert outer.size == 5 and isinstance(outer.size, int) and names == []
    for wrong in (5.5, True, "5", 1e400):
        with pytest.raises(ServingError, match="size"):
            checked(size=wrong)


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ({"size": None, "inner": None}, []),
        ({"note": [1]}, ["note"]),
        ({"hint": 1}, ["hint"]),
        ({"best_of": 2}, ["best_of"]),
        ({"made_up": None}, ["made_up"]),
        ({"made_up": {"a": [], "b": {"c": False}}}, ["made_up"]),
        ({"items": [{"text": "a", "id": 1}, {"text": "b", "id": 2, "at": 3}]}, ["items[].id", "items[].at"]),
        ({"items": [{"text": "a", "images": []}]}, ["items[].images"]),
        ({"inner": {"flag": None, "other": None}}, ["inner.flag", "inner.other"]),
        ({"inner": {"other": False}}, ["inner.other"]),
        ({"items": [{"text": "a", "é\r\nx-a: 1": 1}]}, ["items[].???x-a:?1"]),
    ],
)
def test_what_asks_for_nothing_is_ignored_and_named(data: dict[str, Any], names: list[str]) -> None:
    assert checked(**data)[1] == names


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"made_up": 1}, "made_up"),
        ({"made_up": True}, "made_up"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": True}, "best_of"),
        ({"inner": {"other": 1}}, "inner.other"),
        ({"items": [{"text": "a", "id": 1, "images": ["x"]}]}, "items[0].images"),
        ({"items": [{"text": None}]}, "items[0].text"),
        ({"items": None}, "items"),
        ({"items": [None]}, "items[0]"),
        ({"items": [{"text": "a", "id": 1}], "size": "x"}, "size"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(data: dict[str, Any], param: str) -> None:
    with pytest.raises(ServingError) as caught:
        checked(**data)

    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("data", [{"note": 1}, {"best_of": 1}, {"made_up": None}, {"size": None}])
def test_strict_allows_what_loses_nothing(data: dict[str, Any]) -> None:
    checked(strict=True, **data)


@pytest.mark.parametrize("data", [{"hint": 1}, {"made_up": []}, {"items": [{"text": "a", "id": 1}]}, {"inner": {"other": None}}])
def test_strict_refuses_what_it_would_ignore(data: dict[str, Any]) -> None:
    with pytest.raises(ServingError) as caught:
        checked(strict=True, **data)

    assert caught.value.code == "unsupported_parameter"


def test_the_names_are_bounded() -> None:
    item = {"text": "a", **{f"k{n}": n for n in range(500)}, "x" * 10_000: 1}

    names = checked(items=[item])[1]

    assert len(names) == MAX_NAMES + 1 and names[-1] == "..." and max(map(len, names)) < 100


def test_a_body_full_of_unknown_keys_is_refused_in_time() -> None:
    with pytest.raises(ServingError) as caught:
        checked(items=[{"text": "a", **{f"k{n}": n for n in range(20_000)}}])
    assert "more than 10000 fields" in caught.value.message


def test_a_whole_answer_names_what_was_ignored(serve) -> None:
    answer = serve().chat(user="u", made_up=[])

    assert answer.headers["x-glm-ignored"] == "user, made_up"
    assert answer.json()["ignored"] == ["user", "made_up"]


def test_a_stream_names_what_was_ignored_beside_the_usage(serve) -> None:
    served = serve()
    answer = served.chat(user="u", stream=True, stream_options={"include_usage": True})
    events = sse_data(answer.text)

    assert answer.headers["x-glm-ignored"] == "user"
    assert [event["ignored"] for event in events[:-1] if "ignored" in event] == [["user"], ["user"]]
    assert "timings" in events[-3] and "usage" in events[-2]


def test_without_ignored_fields_there_is_no_word_of_them(serve) -> None:
    answer = serve().chat()

    assert "x-glm-ignored" not in answer.headers and "ignored" not in answer.json()


def test_responses_and_tokenize_name_them_too(serve) -> None:
    served = serve()

    answer = served.client.post("/v1/responses", json={"input": "hello", "user": "u"})
    tokens = served.client.post("/tokenize", json={"prompt": "hello", "add_special_tokens": False})

    assert (answer.json()["ignored"], answer.headers["x-glm-ignored"]) == (["user"], "user")
    assert (tokens.json()["ignored"], tokens.headers["x-glm-ignored"]) == (["add_special_tokens"], "add_special_tokens")


@pytest.mark.parametrize("by", ["header", "setting"])
def test_strict_is_asked_for_by_header_or_setting(by: str, serve) -> None:
    served = serve(strict_fields=by == "setting")
    headers = {"x-glm-strict": "1"} if by == "header" else {}
    message = {"role": "user", "content": "hello", "id": "m1"}

    refused = served.client.post("/v1/chat/completions", json={"messages": [message]}, headers=headers)

    assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages[0].id"
    assert served.chat(user="u").status_code == 200


def test_ignored_fields_are_counted_by_name_with_a_bound(serve) -> None:
    served = serve()
    for number in range(0, MAX_LABELS + 20, 20):
        served.chat(**{f"made_up_{n}": [] for n in range(number, number + 20)})
    served.chat(made_up_0=[])

    lines = [line for line in served.client.get("/metrics").text.splitlines() if line.startswith("glm_ignored_fields")]

    assert 'glm_ignored_fields_total{field="made_up_0"} 2.0' in lines
    assert 'glm_ignored_fields_total{field="other"} 20.0' in lines
    assert len(lines) == MAX_LABELS + 1
