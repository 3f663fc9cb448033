"""Untrusted Markdown made safe to show."""

from __future__ import annotations

import pytest

from web.safe_text import escaped, without_images


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("See ![a](http://evil.example/?q=1).", "See [a](http://evil.example/?q=1)."),
        ("![a][ref]\n\n[ref]: http://evil.example/", "[a][ref]\n\n[ref]: http://evil.example/"),
        ("![![a](http://x/)](http://y/)", "[[a](http://x/)](http://y/)"),
        ("Hello! [link](http://x/)", "Hello! [link](http://x/)"),
        ("Write `![a](http://x/)` so.", "Write `![a](http://x/)` so."),
        ("```\n![a](http://x/)\n```\n![b](http://y/)", "```\n![a](http://x/)\n```\n[b](http://y/)"),
        ("Wow!", "Wow!"),
    ],
)
def test_images_become_links_and_the_rest_stays(written: str, shown: str) -> None:
    assert without_images(written) == shown


def test_a_file_name_cannot_become_markdown() -> None:
    assert escaped("a_*b*_[x](y).png") == r"a\_\*b\*\_\[x\]\(y\).png"
    assert escaped("照片 1.png") == "照片 1.png"
