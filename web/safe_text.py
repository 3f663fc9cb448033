"""Makes untrusted text safe to show as Markdown. Knows nothing of Streamlit.

Streamlit escapes HTML. Images are the one part of Markdown that a browser fetches without a click, so that an injected
prompt could leak data through an image URL: they become plain links. The page's Content-Security-Policy is the second
line of defence.
"""

from __future__ import annotations

import re

_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
_IMAGE = re.compile(r"!(?=\[)")
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]*)\]\((?P<url>https?://(?P<host>[^/\s)?#]+)[^\s)]*)\)")


def without_images(markdown: str) -> str:
    """Turns images into links, except in code."""
    parts = _CODE.split(markdown)
    return "".join(part if index % 2 else _IMAGE.sub("", part) for index, part in enumerate(parts))


def escaped(text: str) -> str:
    """Escapes all characters that Markdown treats specially."""
    return "".join(f"\\{char}" if char in r"\`*_{}[]()#+!|<>~$:" else char for char in text)


def with_link_hosts(markdown: str) -> str:
    """Shows each link's host: `[here](https://host/x)` becomes `[here (host)](https://host/x)`."""
    parts = _CODE.split(markdown)
    return "".join(part if index % 2 else _LINK.sub(_with_host, part) for index, part in enumerate(parts))


def _with_host(link: re.Match[str]) -> str:
    text, url, host = link["text"], link["url"], link["host"]
    return link[0] if host.lower() in text.lower() else f"[{text} ({host})]({url})"
