"""The page's texts: complete in both languages, with the same placeholders, and all used."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from web.i18n.strings import LANGUAGES, TABLE, Texts, language_for

WEB = Path(__file__).resolve().parents[3] / "web"
# Keys that the code composes: error.<kind>, image.<kind>, finish.<reason>, preset.<name> and so on.
COMPOSED = ("question.", 
    "error.", "image.", "finish.", "preset.", "state.", "word.", "target.", "figure.uptime_", "trend.", "span.", "timeline.",
    "request.", "act.", "size.", "unit.",
)  # fmt: skip


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_text_exists_in_every_language_with_the_same_placeholders() -> None:
    for key, texts in TABLE.items():
        assert set(texts) == set(LANGUAGES), key
        assert all(text.strip() for text in texts.values()), key
        assert len({frozenset(placeholders(text)) for text in texts.values()}) == 1, key


def test_chinese_texts_are_chinese_and_english_ones_are_not() -> None:
    chinese = re.compile(r"[\u4e00-\u9fff]")

    assert [key for key, texts in TABLE.items() if not chinese.search(texts["zh"])] == []
    assert [key for key, texts in TABLE.items() if chinese.search(texts["en"])] == []


def test_every_text_is_used_and_every_used_text_exists() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in WEB.rglob("*.py") if not path.name.startswith("strings"))
    quoted = set(re.findall(r"[\"']([a-z]+(?:\.[a-z_0-9]+)?)[\"']", code))

    unused = {key for key in TABLE if key not in quoted and not key.startswith(COMPOSED)}
    requested = set(re.findall(r"texts\(\s*[\"']([a-z_.]+)[\"']", code))

    assert unused == set()
    assert requested <= set(TABLE)


def test_every_kind_of_api_error_has_a_sentence() -> None:
    code = "".join((WEB / "api_client" / f"{name}.py").read_text(encoding="utf-8") for name in ("client", "answer_stream"))
    kinds = set(re.findall(r"ApiError\(\"([a-z_]+)\"", code)) | {
        "bad_key", "too_large", "too_long", "refused", "queue_full", "key_limit", "loading", "draining", "unavailable", "broken",
        "silent", "lost",
    }  # fmt: skip

    assert {f"error.{kind}" for kind in kinds} <= set(TABLE)


def test_a_text_is_in_the_chosen_language() -> None:
    assert Texts("zh")("side.new") == "新对话"
    assert Texts("en")("answer.tokens", count=3) == "3 tokens"
    assert Texts("xx").language == "en"


@pytest.mark.parametrize(
    ("locale", "language"),
    [("zh-CN", "zh"), ("zh", "zh"), ("ZH-tw", "zh"), ("en-GB", "en"), ("de", "en"), (None, "en")],
)
def test_the_browser_s_locale_chooses_the_language(locale: str | None, language: str) -> None:
    assert language_for(locale) == language
