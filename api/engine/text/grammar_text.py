"""Writes the form of an answer as a grammar: free text, JSON of a schema, tool calls in GLM's tags.

Plain data in, text in llguidance's dialect of Lark out. Thinking is part of the grammar, so that the answer is
constrained whether the model thinks first or not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llguidance.gbnf_to_lark import any_to_lark

from api.engine.text.argument_types import is_raw_string
from api.engine.text.bindable_schema import GrammarError, bindable
from api.engine.text.markup import CALL, CALL_TAGS, END_CALL, END_KEY, END_THINK, END_VALUE, KEY, THINK, VALUE

# White space in JSON: at most one space after a comma or a colon, and none elsewhere. A model that may write more can go on
# writing it, up to its token limit.
_SPACE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# Keywords that are enforced for a JSON string, but not for a raw one.
_UNENFORCED = ("pattern", "format", "minLength", "maxLength")
_TAGS = (THINK, END_THINK, *CALL_TAGS)


@dataclass(frozen=True)
class CallableTool:
    name: str
    parameters: dict[str, Any] | None = None
    strict: bool = False


@dataclass(frozen=True)
class AnswerForm:
    """`schema`: the answer is JSON of this schema. With tools, calls may replace it, or must if `must_call`.

    At most one of `schema`, `regex`, `choice` and `grammar` constrains the answer.
    """

    schema: dict[str, Any] | None = None
    tools: tuple[CallableTool, ...] = ()
    must_call: bool = False
    many_calls: bool = True
    may_think: bool = True
    starts_thinking: bool = False  # the prompt ends inside the thinking block
    regex: str | None = None  # of the whole answer
    choice: tuple[str, ...] = ()  # the answer is one of these
    grammar: str | None = None  # in llguidance's Lark or llama.cpp's GBNF
    strict: bool = False  # a schema that the grammar cannot bind as a whole is refused

    @property
    def can_be_relaxed(self) -> bool:
        return (self.schema is not None and not self.strict) or not all(tool.strict for tool in self.tools)

    @property
    def is_free(self) -> bool:
        """Whether no grammar is needed."""
        constrained = self.must_call or not self.many_calls or any(tool.strict for tool in self.tools)
        return not self.binds_text and not (self.tools and constrained)

    @property
    def binds_text(self) -> bool:
        return self.schema is not None or self.regex is not None or bool(self.choice) or self.grammar is not None


def write(form: AnswerForm, special: Mapping[str, int], relaxed: bool = False) -> str:
    """`special` gives the ids of the tags. `relaxed`: what the grammar cannot bind is left free, but for strict forms.

    Raises GrammarError.
    """
    return _Writer({tag: special[tag] for tag in _TAGS if tag in special}, relaxed).write(form)


@dataclass
class _Writer:
    tags: Mapping[str, int]
    relaxed: bool = False
    rules: list[str] = field(default_factory=list)

    def write(self, form: AnswerForm) -> str:
        head = self._head(form)
        answer = self._answer(form)
        terminals = [
            "WS: /[ \\n]{1,2}/",
            "TEXT: /(?s:.+)/",
            # The parser would take tags that are spelled out in text for tags.
            r"VALUE: /(?s:.+)/ & ~/(?s:.*)<\/?(arg|tool)_(?s:.*)/",
        ]
        return "\n".join([f"start: {head}{answer}", *self.rules, *terminals])

    def _head(self, form: AnswerForm) -> str:
        if THINK not in self.tags or END_THINK not in self.tags:
            return "WS? "
        thoughts = f"TEXT? {self._tag(END_THINK)} WS? "
        if form.starts_thinking:
            return thoughts
        return f"WS? ({self._tag(THINK)} {thoughts})? " if form.may_think else "WS? "

    def _answer(self, form: AnswerForm) -> str:
        content = "answer" if form.binds_text else "TEXT"
        if form.schema is not None:
            self.rules.append(f"answer: {self._json(form.schema, form.strict)}")
        elif form.binds_text:
            self.rules.append(f"answer: {_text_rule(form)}")
        if not form.tools:
            return content
        self._calls(form)
        if form.must_call:
            return "calls"
        return f"({content} | calls)" if form.binds_text else f"{content}? calls?"

    def _calls(self, form: AnswerForm) -> None:
        missing = [tag for tag in CALL_TAGS if tag not in self.tags]
        if missing:
            raise GrammarError(f"this model has no token for {missing[0]}")
        names = [self._tool(index, tool) for index, tool in enumerate(form.tools)]
        self.rules.append("calls: call" + (" (WS? call)*" if form.many_calls else "") + " WS?")
        self.rules.append(f"call: {self._tag(CALL)} ({' | '.join(names)}) {self._tag(END_CALL)}")

    def _tool(self, index: int, tool: CallableTool) -> str:
        parameters = tool.parameters or {}
        properties = _object(parameters.get("properties"))
        if not properties and not tool.strict and (tool.parameters is None or parameters.get("additionalProperties")):
            pairs = [f"({self._pair('KEY', 'VALUE?')})*"]
            self._once("KEY: /[^<\\n]{1,64}/")
        else:
            listed = parameters.get("required")
            required = set(listed) if isinstance(listed, list) else set()
            if missing := required - set(properties):
                raise GrammarError(f"{tool.name}: `required` names {sorted(missing)[0]!r}, which is not a property")
            pairs = [
                self._argument(f"{index}_{number}", key, schema, tool, key in required)
                for number, (key, schema) in enumerate(properties.items())
            ]
        rule = f"tool_{index}"
        self.rules.append(f"{rule}: {_literal(tool.name)} WS? {' '.join(pairs)}")
        return rule

    def _argument(self, rule: str, key: str, schema: Any, tool: CallableTool, required: bool) -> str:
        if "<" in key or not key.strip():
            raise GrammarError(f"{tool.name}: the name of a parameter must not be empty or contain '<': {key!r}")
        pair = self._pair(_literal(key), self._value(f"value_{rule}", key, schema, tool))
        return pair if required else f"({pair})?"

    def _value(self, rule: str, key: str, schema: Any, tool: CallableTool) -> str:
        root = tool.parameters or {}
        if schema in ({}, True):
            return "VALUE?"
        if not is_raw_string(schema, root):
            definitions: dict[str, Any] = {word: root[word] for word in ("$defs", "definitions") if word in root}
            self.rules.append(f"{rule}: {self._json({**definitions, **_object(schema)}, tool.strict)}")
            return rule
        listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if listed and all(isinstance(item, str) and item and "<" not in item for item in listed):
            return "(" + " | ".join(_literal(item) for item in listed) + ")"
        unenforced = next((word for word in _UNENFORCED if word in schema), None)
        if tool.strict and (unenforced or listed):
            raise GrammarError(f"{tool.name}: `{unenforced or 'enum'}` of {key!r} cannot be enforced with `strict`")
        return "VALUE?"

    def _json(self, schema: dict[str, Any], strict: bool) -> str:
        relaxed = self.relaxed and not strict
        options = {**_SPACE, "lenient": True, "coerce_one_of": True} if relaxed else _SPACE
        return f"%json {json.dumps({**bindable(schema, relaxed), 'x-guidance': options})}"

    def _pair(self, key: str, value: str) -> str:
        opened, closed = f"{self._tag(KEY)} {key} {self._tag(END_KEY)}", self._tag(END_VALUE)
        return f"{opened} WS? {self._tag(VALUE)} {value} {closed} WS?"

    def _tag(self, tag: str) -> str:
        return f"<[{self.tags[tag]}]>"

    def _once(self, rule: str) -> None:
        if rule not in self.rules:
            self.rules.append(rule)


def _object(schema: Any) -> dict[str, Any]:
    return schema if isinstance(schema, dict) else {}


def _text_rule(form: AnswerForm) -> str:
    """The rule of an answer that is no JSON. Raises GrammarError."""
    if form.choice:
        return " | ".join(_literal(text) for text in form.choice)
    if form.regex is not None:
        # The whole answer must match, so anchors say nothing; the parser does not know them.
        pattern = re.sub(r"^\^|(?<!\\)\$$", "", form.regex)
        return "/" + re.sub(r"(\\.)|/", lambda match: match[1] or r"\/", pattern, flags=re.DOTALL).replace("\n", r"\n") + "/"
    try:
        return "%lark {\n" + any_to_lark(form.grammar or "") + "\n}"
    except Exception as error:  # the converter raises many kinds
        raise GrammarError(f"it is neither Lark nor GBNF: {error}") from None


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
