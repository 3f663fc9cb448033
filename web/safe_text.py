"""Makes what others wrote harmless to show as Markdown. Knows nothing of Streamlit.

Streamlit already escapes HTML. A picture is the one thing in Markdown that a browser fetches by itself, so a
model that was talked into it could send what it saw to a stranger: pictures become links that wait for a click.
The Content-Security-Policy of the page stands behind this as the second wall.
"""

from __future__ import annotations

import re

_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
_IMAGE = re.compile(r"!(?=\[)")
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]*)\]\((?P<url>https?://(?P<host>[^/\s)?#]+)[^\s)]*)\)")


def without_images(markdown: str) -> str:
    parts = _CODE.split(markdown)
    return "".join(part if index % 2 else _IMAGE.sub("", part) for index, part in enumerate(parts))


def escaped(text: str) -> str:
    """A name that somebody else chose, to stand inside a sentence exactly as it is."""
    return "".join(f"\\{char}" if char in r"\`*_{}[]()#+!|<>~$:" else char for char in text)


def with_link_hosts(markdown: str) -> str:
    """A link tells where it leads: `[here](https://host/x)` becomes `[here (host)](https://host/x)`."""
    parts = _CODE.split(markdown)
    return "".join(part if index % 2 else _LINK.sub(_name_host, part) for index, part in enumerate(parts))


def _name_host(link: re.Match[str]) -> str:
    text, url, host = link["text"], link["url"], link["host"]
    return link[0] if host.lower() in text.lower() else f"[{text} ({host})]({url})"
