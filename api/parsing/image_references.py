"""Which picture a text speaks of: "the second image", "image 2", "图2", "第二张图"."""

from __future__ import annotations

import re

_ENGLISH = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_CHINESE = "一二三四五六七八九十"
_LAST = ("last", "最后")
_THING = r"(?:picture|image|photo(?:graph)?)"
_MENTION = re.compile(
    rf"\b({'|'.join(_ENGLISH)}|last)\s+{_THING}\b"
    rf"|\b(\d\d?)(?:st|nd|rd|th)\s+{_THING}\b"
    # "in the picture 3 cats" counts cats.
    rf"|(?<!\bthe )(?<!\bthis )(?<!\beach )\b{_THING}\s*(?:no\.\s*|number\s+|#\s*)?(\d\d?)\b"
    rf"|第\s*([{_CHINESE}]|\d\d?)\s*(?:张|幅|个?图)"
    rf"|图[片像]?\s*(\d\d?)(?!\d)"
    rf"|(最后)一?(?:张|幅|个?图)",
    re.IGNORECASE,
)


def mentions(text: str, pictures: int) -> list[tuple[int, int]]:
    """Where each mention of one of so many pictures ends, and which it is, from 0."""
    if pictures < 2:
        return []
    found = [
        (match.end(), _index(next(filter(None, match.groups())).lower(), pictures)) for match in _MENTION.finditer(text)
    ]
    return [(end, index) for end, index in found if 0 <= index < pictures]


def _index(word: str, pictures: int) -> int:
    if word in _LAST:
        return pictures - 1
    if word in _ENGLISH:
        return _ENGLISH.index(word)
    return _CHINESE.index(word) if word in _CHINESE else int(word) - 1
