"""Grammars: the answers that they accept and reject, with and without thinking."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import END, fake_model
from tokenizers import Tokenizer

from api.engine.text.bindable_schema import GrammarError
from api.engine.text.grammar import GrammarCompiler, MatcherGrammar
from api.engine.text.grammar_text import AnswerForm, CallableTool
from api.engine.text.tokenizer import Vocabulary

SHAPES = Path(__file__).resolve().parents[4] / "models" / "shapes" / "tokenizer.json"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
COUNT = CallableTool(
    "count",
    {
        "type": "object",
        "properties": {"color": {"type": "string"}, "limit": {"type": "integer"}, "size": {"enum": ["big", "small"]}},
        "required": ["color"],
    },
)
LOOK = CallableTool("look", {"type": "object", "properties": {}})
CALL = "<tool_call>count\n<arg_key>color</arg_key>\n<arg_value>dark red</arg_value>\n</tool_call>"
LOOK_CALL = "<tool_call>look\n</tool_call>"


@pytest.fixture(scope="module", params=["shapes", "fake"])
def vocabulary(request) -> Vocabulary:
    return Vocabulary(Tokenizer.from_file(str(SHAPES))) if request.param == "shapes" else fake_model().vocabulary


@pytest.fixture(scope="module")
def compiler(vocabulary: Vocabulary) -> GrammarCompiler:
    return GrammarCompiler(vocabulary, [vocabulary.special[text] for text in END])


def allows(grammar: MatcherGrammar, token: int) -> bool:
    mask = grammar.allowed()
    return token // 32 < len(mask) and bool((int(np.uint32(mask[token // 32])) >> (token % 32)) & 1)


def takes(compiler: GrammarCompiler, vocabulary: Vocabulary, form: AnswerForm, text: str) -> bool:
    """Whether every token of the answer, and its end, is allowed and accepted."""
    grammar = compiler.compile(form)
    for token in vocabulary.encode(text):
        if not allows(grammar, token) or not grammar.accept(token):
            return False
    return allows(grammar, vocabulary.special["<|user|>"])


ASKED = AnswerForm(tools=(COUNT, LOOK), must_call=True)
GOOD: list[tuple[AnswerForm, str]] = [
    (AnswerForm(PERSON), '{"name": "Ann", "age": 7}'),
    (AnswerForm(PERSON), '\n{"name":"<b>","age":7}'),
    (AnswerForm(PERSON), '\n<think>a {b} "c" < d</think>\n{"name":"Ann", "age": 7}'),
    (AnswerForm(PERSON), '<think></think>\n{"name": "", "age": -1}'),
    (AnswerForm(PERSON, starts_thinking=True), 'so</think>\n{"name": "Ann", "age": 7}'),
    (AnswerForm(PERSON, may_think=False), '\n{"name": "Ann", "age": 7}'),
    (AnswerForm({"type": "object"}), '{"any": [1, {"b": null}]}'),
    (ASKED, "\n" + CALL),
    (ASKED, "<think>hm</think>\n" + CALL + "\n" + LOOK_CALL),
    (AnswerForm(tools=(COUNT,), must_call=True, many_calls=False), CALL),
    (AnswerForm(tools=(COUNT,), many_calls=False), "Let me see.\n" + CALL),
    (AnswerForm(tools=(COUNT,), many_calls=False), "No call at all."),
    (AnswerForm(PERSON, (LOOK,)), LOOK_CALL),
    (AnswerForm(PERSON, (LOOK,)), '{"name": "Ann", "age": 7}'),
    (
        ASKED,
        CALL.replace(
            "\n</tool_call>",
            "\n<arg_key>limit</arg_key>\n<arg_value>3</arg_value>"
            "\n<arg_key>size</arg_key>\n<arg_value>big</arg_value>\n</tool_call>",
        ),
    ),
    (AnswerForm(tools=(CallableTool("any"),), must_call=True),
     "<tool_call>any\n<arg_key>what</arg_key>\n<arg_value>{1}</arg_value>\n</tool_call>"),
]  # fmt: skip
BAD: list[tuple[AnswerForm, str]] = [
    (AnswerForm(PERSON), "Ann is 7."),
    (AnswerForm(PERSON), '{"name": "Ann"}'),
    (AnswerForm(PERSON), '{"name": "Ann", "age": "7"}'),
    (AnswerForm(PERSON), '{"name": "Ann", "age": 7, "more": 1}'),
    (AnswerForm(PERSON), '{"name": "Ann", "age": 7'),
    (AnswerForm(PERSON), "{" + " " * 100 + '"name": "Ann", "age": 7}'),
    (AnswerForm(PERSON), "<think>only thoughts</think>"),
    (AnswerForm(PERSON, may_think=False), '<think>x</think>{"name": "Ann", "age": 7}'),
    (AnswerForm(PERSON, starts_thinking=True), '{"name": "Ann", "age": 7}'),
    (ASKED, "I would rather talk."),
    (ASKED, "<tool_call>other\n</tool_call>"),
    (ASKED, "<tool_call>count\n</tool_call>"),  # the colour is required
    (ASKED, CALL.replace("color", "colour")),
    (ASKED, CALL.replace("dark red", "a</arg_value>b")),
    (ASKED, CALL.replace("\n</tool_call>", "<arg_key>limit</arg_key><arg_value>many</arg_value></tool_call>")),
    (ASKED, CALL.replace("\n</tool_call>", "<arg_key>size</arg_key><arg_value>huge</arg_value></tool_call>")),
    (AnswerForm(tools=(COUNT, LOOK), must_call=True, many_calls=False), CALL + LOOK_CALL),
]


@pytest.mark.parametrize(("form", "text"), GOOD)
def test_answers_that_match_are_accepted(form: AnswerForm, text: str, compiler, vocabulary) -> None:
    assert takes(compiler, vocabulary, form, text)


@pytest.mark.parametrize(("form", "text"), BAD)
def test_answers_that_do_not_match_are_rejected(form: AnswerForm, text: str, compiler, vocabulary) -> None:
    assert not takes(compiler, vocabulary, form, text)


def test_a_markup_token_is_not_allowed_in_a_string(compiler, vocabulary) -> None:
    grammar = compiler.compile(AnswerForm(PERSON))
    for token in vocabulary.encode('{"name": "'):
        assert grammar.accept(token)

    for tag in ("<tool_call>", "</think>", "<|begin_of_box|>", "<|image|>", "<|user|>"):
        assert not allows(grammar, vocabulary.special[tag]), tag


def test_only_end_tokens_are_allowed_after_a_complete_answer(compiler, vocabulary) -> None:
    grammar = compiler.compile(AnswerForm({"const": 1}))
    for token in vocabulary.encode("1"):
        assert grammar.accept(token)
    ends = {vocabulary.special[text] for text in END}
    size = 32 * len(grammar.allowed())

    assert {token for token in range(size) if allows(grammar, token)} == ends
    assert not grammar.finished() or not grammar.failed
    assert grammar.accept(min(ends)) and grammar.finished()


def test_a_rejected_token_fails_the_grammar_and_leaves_only_end_tokens(compiler, vocabulary) -> None:
    grammar = compiler.compile(AnswerForm(PERSON))

    assert not grammar.accept(vocabulary.encode("x")[0])
    assert grammar.failed
    assert {t for t in range(32 * len(grammar.allowed())) if allows(grammar, t)} == {
        vocabulary.special[text] for text in END
    }


@pytest.mark.parametrize("place", ["top", "property", "items", "chain"])
def test_a_reference_to_itself_alone_is_refused_wherever_it_is(place: str, compiler) -> None:
    definitions = {"x": {"$ref": "#/$defs/y"}, "y": {"$ref": "#/$defs/x" if place == "chain" else "#/$defs/y"}}
    endless = {"$ref": "#/$defs/x"}
    schema = {"property": {"type": "object", "properties": {"a": endless}, "required": ["a"]},
              "items": {"type": "array", "items": endless, "minItems": 1}}.get(place, endless)  # fmt: skip

    with pytest.raises(GrammarError, match="no text can satisfy"):
        compiler.compile(AnswerForm(schema={**schema, "$defs": definitions}, may_think=False))


def test_a_reference_that_comes_back_through_a_value_is_no_circle(compiler, vocabulary) -> None:
    tree = {"type": "object", "properties": {"inner": {"$ref": "#"}}, "additionalProperties": False}

    assert takes(compiler, vocabulary, AnswerForm(tree), '{"inner":{"inner": {}}}')


@pytest.mark.parametrize(
    "text", ['{ "a": 1}', '{"a":  1}', '{"a" : 1}', '{"a": 1 }', '{"a":\n1}', '{"a": [1,  2]}', '{"a": [ 1]}', '\n\n\n{"a": 1}']
)
def test_white_space_in_json_is_one_space_after_a_comma_or_a_colon(text: str, compiler, vocabulary) -> None:
    form = AnswerForm({"type": "object"}, may_think=False)

    assert not takes(compiler, vocabulary, form, text)
    assert takes(compiler, vocabulary, form, '{"a": [1, 2,3]}')


def test_the_fraction_of_a_second_is_bounded(compiler, vocabulary) -> None:
    form = AnswerForm({"type": "string", "format": "date-time"})

    assert takes(compiler, vocabulary, form, '"2026-01-31T23:59:59.123456789Z"')
    assert takes(compiler, vocabulary, form, '"2026-01-31T23:59:59+08:00"')
    assert not takes(compiler, vocabulary, form, '"2026-01-31T23:59:59.1234567890Z"')
    assert not takes(compiler, vocabulary, form, '"2026-13-31T23:59:59Z"')
    assert not takes(compiler, vocabulary, form, '"2026-01-31T20:00:60Z"')
    assert not takes(compiler, vocabulary, form, '"0000-01-31T20:00:00Z"') and takes(compiler, vocabulary, form, '"0001-01-31T20:00:00Z"')


UNBOUND = {
    "a set": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "[1, 1]"),
    "names": ({"type": "object", "propertyNames": {"pattern": "^a"}, "additionalProperties": {"type": "integer"}}, '{"b": 1}'),
    "lookahead": ({"type": "string", "pattern": "^(?!-)[a-z]+$"}, '"-"'),
    "unknown format": ({"type": "string", "format": "made-up"}, '"x"'),
    "zod's email": ({"type": "string", "format": "email", "pattern": "^(?!\\.)[a-z.]+@[a-z.]+$"}, '"a@b.cd"'),
    "decimal": ({"anyOf": [{"type": "number"}, {"type": "string", "pattern": "^(?!^[-+.]*$)[+-]?0*\\d*$"}]}, '"12"'),
    "not": ({"type": "string", "not": {"const": "a"}}, '"a"'),
    "one of": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "1"),
    "if": ({"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}, '{"a": 1}'),
}


@pytest.mark.parametrize("name", UNBOUND)
def test_what_cannot_be_bound_is_left_free_unless_strict(name: str, compiler, vocabulary) -> None:
    schema, text = UNBOUND[name]

    assert compiler.compile(AnswerForm(schema)).relaxed
    assert takes(compiler, vocabulary, AnswerForm(schema), text)
    with pytest.raises(GrammarError):
        compiler.compile(AnswerForm(schema, strict=True))
    assert not compiler.compile(AnswerForm(PERSON)).relaxed


def test_what_can_be_bound_stays_bound_beside_what_cannot(compiler, vocabulary) -> None:
    form = AnswerForm({"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "maxItems": 2})

    assert not takes(compiler, vocabulary, form, '["a"]') and not takes(compiler, vocabulary, form, "[1, 2, 3]")


@pytest.mark.parametrize("strict", [False, True])
def test_arguments_of_a_call_are_relaxed_alike(strict: bool, compiler, vocabulary) -> None:
    parameters = {"type": "object", "properties": {"a": UNBOUND["a set"][0]}, "required": ["a"]}
    form = AnswerForm(tools=(CallableTool("f", parameters, strict),), must_call=True)
    if strict:
        with pytest.raises(GrammarError):
            compiler.compile(form)
    else:
        text = "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>[1, 1]</arg_value>\n</tool_call>"
        assert takes(compiler, vocabulary, form, text)


TEXTS = [
    (AnswerForm(regex="^a+/b$"), "aa/b", "ab"),
    (AnswerForm(choice=("yes", 'n"o')), 'n"o', "n"),
    (AnswerForm(grammar='root ::= "a" b*\nb ::= [0-9]'), "a12", "b"),
    (AnswerForm(grammar='start: "a" NUMBER\nNUMBER: /[0-9]+/'), "a12", "b"),
    (AnswerForm(regex="[0-9]{2}", tools=(LOOK,)), "12", "123"),
]


@pytest.mark.parametrize(("form", "good", "bad"), TEXTS)
def test_text_of_a_given_form(form: AnswerForm, good: str, bad: str, compiler, vocabulary) -> None:
    assert takes(compiler, vocabulary, form, good) and not takes(compiler, vocabulary, form, bad)
    assert takes(compiler, vocabulary, form, f"<think>hm</think>\n{good}")


@pytest.mark.parametrize("form", [AnswerForm(regex="(?!a)b"), AnswerForm(regex="("), AnswerForm(grammar="???")])
def test_text_of_no_form_is_refused(form: AnswerForm, compiler) -> None:
    with pytest.raises(GrammarError):
        compiler.compile(form)


def wide(count: int) -> dict[str, Any]:
    properties = {f"q{number}": {"type": "string"} for number in range(count)}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def ambiguous() -> dict[str, Any]:
    """Objects that agree in their names, of strings that many patterns fit at once."""
    patterns = [f"^(a|b)*a(a|b){{{number % 14}}}$" for number in range(60)]
    shapes = [{f"p{n}": {"type": "string", "pattern": pattern} for n in range(12)} for pattern in patterns]
    return {"anyOf": [{"type": "object", "properties": one, "additionalProperties": False} for one in shapes]}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (AnswerForm(wide(1000)), "max is 2000"),
        (AnswerForm(wide(1000), starts_thinking=True), "max is 2000"),
        (AnswerForm(ambiguous()), "max is 2000"),
        (AnswerForm(tools=(COUNT, CallableTool("w", wide(1500))), must_call=True), "max is 2000"),
        (AnswerForm({"$ref": "#"}), "no text can satisfy"),
    ],
    ids=["wide", "wide, thinking", "ambiguous", "wide tool", "of itself"],
)
def test_a_form_that_fails_at_its_first_step_is_refused_at_once(form: AnswerForm, message: str, compiler) -> None:
    with pytest.raises(GrammarError, match=message):
        compiler.compile(form)


def test_a_schema_that_is_too_wide_further_in_tells_its_limit_when_it_fails(compiler, vocabulary) -> None:
    grammar = compiler.compile(AnswerForm({"type": "array", "items": wide(1000)}))

    assert not all(grammar.accept(token) for token in vocabulary.encode("[{"))
    assert "max is 2000" in grammar.failed and "\n" not in grammar.failed


def test_grammars_do_not_share_state(compiler, vocabulary) -> None:
    first, second = compiler.compile(AnswerForm(PERSON)), compiler.compile(AnswerForm(PERSON))
    for token in vocabulary.encode('{"name": "A'):
        first.accept(token)

    assert allows(second, vocabulary.encode("{")[0]) and second.accept(vocabulary.encode("{")[0])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (AnswerForm({"type": "strange"}), "strange"),
        (AnswerForm({"$ref": "#/$defs/none"}), "none"),
        (AnswerForm({"$ref": "http://127.0.0.1/schema.json"}), "does not fetch"),
        (AnswerForm(tools=(CallableTool("f", {"properties": {"a<b": {}}}),), must_call=True), "a<b"),
        (AnswerForm(tools=(CallableTool("f", {"required": ["x"], "properties": {"a": {}}}),), must_call=True), "'x'"),
        (
            AnswerForm(tools=(CallableTool("f", {"properties": {"a": {"type": "string", "pattern": "x"}}}, True),)),
            "pattern",
        ),
        (AnswerForm({"enum": ["x" * 300_000]}), "characters"),
    ],
)
def test_unenforceable_forms_are_refused(form: AnswerForm, message: str, compiler) -> None:
    with pytest.raises(GrammarError, match=re.escape(message)):
        compiler.compile(form)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(((a+)+)+)+b"},
        {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 100_000},
        {"anyOf": [{"type": "string", "maxLength": 100 + n} for n in range(200)]},
        deep(8),
    ],
)
def test_a_hostile_schema_is_bounded_in_time(schema: dict[str, Any], compiler, vocabulary) -> None:
    began = time.monotonic()
    try:
        grammar = compiler.compile(AnswerForm(schema))
        grammar.allowed()
    except GrammarError:
        pass

    assert time.monotonic() - began < 20


def test_free_forms_need_no_grammar() -> None:
    assert AnswerForm().is_free and AnswerForm(tools=(COUNT,)).is_free
    assert not ASKED.is_free and not AnswerForm(PERSON).is_free
    assert not AnswerForm(tools=(CallableTool("f", {}, True),)).is_free
    assert not AnswerForm(tools=(COUNT,), many_calls=False).is_free


def test_references_in_a_tools_schema_are_resolved(compiler, vocabulary) -> None:
    parameters = {
        "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
        "properties": {"at": {"$ref": "#/$defs/Point"}},
        "required": ["at"],
    }
    form = AnswerForm(tools=(CallableTool("go", parameters),), must_call=True)
    call = "<tool_call>go\n<arg_key>at</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"

    assert takes(compiler, vocabulary, form, call.replace("{}", json.dumps({"x": 1})))
    assert not takes(compiler, vocabulary, form, call)
