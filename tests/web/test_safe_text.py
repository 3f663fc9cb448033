"""Untrusted Markdown made safe to show."""

from __future__ import annotations

from random import Random

import pytest
from markdown_it import MarkdownIt
from streamlit.string_util import clean_text

from web.safe_text import escaped, with_link_hosts, without_images


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("See ![a](http://evil.example/?q=1).", "See [a](http://evil.example/?q=1)."),
        ("![a][ref]\n\n[ref]: http://evil.example/", "[a][ref]\n\n[ref]: http://evil.example/"),
        ("![![a](http://x/)](http://y/)", "[[a](http://x/)](http://y/)"),
        ("Hello! [link](http://x/)", "Hello! [link](http://x/)"),
        ("```\n![a](http://x/)\n```\n![b](http://y/)", "```\n![a](http://x/)\n```\n[b](http://y/)"),
        ("Wow!", "Wow!"),
        ("!![a](http://x/)", "[a](http://x/)"),
        # Code in a line may be no code; there the image is taken apart by a character that nobody sees.
        ("Write `![a](http://x/)` so.", "Write `!\u2060[a](http://x/)` so."),
        ("\\`![a](http://x/)\\`", "\\`[a](http://x/)\\`"),
        ("- list\n\n  ```\n![a](http://x/)\n  ```", "- list\n\n  ```\n!\u2060[a](http://x/)\n  ```"),
        ("<p>\n```\n</p>\n\n![a](http://x/)\n```", "<p>\n```\n</p>\n\n!\u2060[a](http://x/)\n```"),
    ],
)
def test_images_become_links_and_the_rest_stays(written: str, shown: str) -> None:
    assert without_images(written) == shown


TRAPS = ["`", "``", "```", "~~~", "\\", "\n", "\n\n", " ", "  ", "    ", "\t", "- ", "> ", "1. ", "<div>", "</div>", "<a b='", "'>", "<!--",
         "-->", "<script>", "</script>", "!", "[", "![a](http://x/)", "![a][r]", "a", "\r", "\u3000", "\ufeff", "$$", "[r]: http://x/"]  # fmt: skip


def test_no_text_hides_an_image_from_the_filter() -> None:
    """Against a parser of CommonMark, which reads the text as Streamlit hands it over."""
    parser, random = MarkdownIt("commonmark"), Random(7)
    images = 0
    for _ in range(4000):
        written = "".join(random.choices(TRAPS, k=random.randint(2, 14))) + "\n\n[r]: http://x/"
        images += has_image(parser, clean_text(written))
        shown = without_images(written)

        assert not has_image(parser, clean_text(shown)), (written, shown)
    assert images > 500


def has_image(parser: MarkdownIt, text: str) -> bool:
    return any(child.type == "image" for token in parser.parse(text.removeprefix("\ufeff")) for child in token.children or [])


def test_links_in_code_are_left_alone_and_escaped_backticks_hide_none() -> None:
    assert with_link_hosts("`[a](http://x.example/)`") == "`[a](http://x.example/)`"
    assert with_link_hosts("\\`[a](http://x.example/)\\`") == "\\`[a (x.example)](http://x.example/)\\`"


def test_a_file_name_cannot_become_markdown() -> None:
    assert escaped("a_*b*_[x](y).png") == r"a\_\*b\*\_\[x\]\(y\).png"
    assert escaped("照片 1.png") == "照片 1.png"
