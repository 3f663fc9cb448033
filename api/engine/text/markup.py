"""The special tokens of GLM that mark the structure of an answer."""

from __future__ import annotations

THINK, END_THINK = "<think>", "</think>"
BOX, END_BOX = "<|begin_of_box|>", "<|end_of_box|>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
KEY, END_KEY = "<arg_key>", "</arg_key>"
VALUE, END_VALUE = "<arg_value>", "</arg_value>"

CALL_TAGS = (CALL, END_CALL, KEY, END_KEY, VALUE, END_VALUE)
MARKUP = (THINK, END_THINK, BOX, END_BOX, *CALL_TAGS)
