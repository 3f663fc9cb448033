"""Makes untrusted text safe to show as Markdown. Knows nothing of Streamlit.

Streamlit escapes HTML. Images are the one part of Markdown that a browser fetches without a click, so that an injected
prompt could leak data through an image URL: they become plain links. The page's Content-Security-Policy is the second
line of defence.
"""

from __future__ import annotations

import re
import textwrap

WORD_JOINER = "\u2060"  # invisible, and never part of an image's syntax

# A fence that is code for certain: at the start of its line, so that no list item or quotation can end it.
_FENCE = re.compile(r"^(?P<mark>`{3,}|~{3,})(?P<rest>.*)$")
# What may swallow or end a fence, so that no fence after it is certain: HTML, formulas, directives, fences in a list.
_HAZARD = re.compile(r"^[ \t]*(?:<|\$|:::|[ \t](?:`{3}|~{3}))")
_SPAN = re.compile(r"(?<![\\`])(?P<run>`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)(?P=run)(?!`)", re.DOTALL)
_IMAGE = re.compile(r"!+(?=\[)")
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]*)\]\((?P<url>https?://(?P<host>[^/\s)?#]+)[^\s)]*)\)")


def without_images(markdown: str) -> str:
    """Turns images into links. Code keeps them, unless a parser might not take it for code: there they are taken apart."""
    shown = {"text": lambda part: _IMAGE.sub("", part), "code": lambda part: part, "perhaps": _apart}
    return "".join(shown[kind](part) for kind, part in _parts(markdown))


def _apart(code: str) -> str:
    """It looks the same, and is no image even if it is no code."""
    return _IMAGE.sub(lambda marks: marks[0] + WORD_JOINER, code)


def _parts(markdown: str) -> list[tuple[str, str]]:
    """The text in parts, each with its kind: `code` for certain, `perhaps` code, or `text`.

    What is code is decided by the browser's parser of Markdown, and text made for it can mislead any other.
    """
    parts: list[tuple[str, list[str]]] = [("text", [])]
    mark, certain = "", True
    # As Streamlit does before the browser sees it; the parser leaves out a byte order mark.
    bare = textwrap.dedent(markdown.replace("\r\n", "\n").replace("\r", "\n")).strip().lstrip("\ufeff").strip()
    for line in re.split(r"(?<=\n)", bare):
        fence = _FENCE.match(line.rstrip("\n"))
        if mark:
            parts[-1][1].append(line)
            if re.fullmatch(rf" {{0,3}}{mark[0]}{{{len(mark)},}}[ \t]*\n?", line):
                mark = ""
                parts.append(("text", []))
        elif fence and not (fence["mark"][0] == "`" and "`" in fence["rest"]):
            mark = fence["mark"]
            parts.append(("code" if certain else "perhaps", [line]))
        else:
            certain = certain and _HAZARD.search(line) is None
            parts[-1][1].append(line)
    return [found for kind, lines in parts for found in _spans(kind, "".join(lines))]


def _spans(kind: str, part: str) -> list[tuple[str, str]]:
    """A part of text split at what looks like code in a line."""
    if kind != "text":
        return [(kind, part)]
    found, end = [], 0
    for span in _SPAN.finditer(part):
        found += [("text", part[end : span.start()]), ("perhaps", span[0])]
        end = span.end()
    return [*found, ("text", part[end:])]


def escaped(text: str) -> str:
    """Escapes all characters that Markdown treats specially."""
    return "".join(f"\\{char}" if char in r"\`*_{}[]()#+!|<>~$:" else char for char in text)


def with_link_hosts(markdown: str) -> str:
    """Shows each link's host: `[here](https://host/x)` becomes `[here (host)](https://host/x)`."""
    return "".join(_LINK.sub(_with_host, part) if kind == "text" else part for kind, part in _parts(markdown))


def _with_host(link: re.Match[str]) -> str:
    text, url, host = link["text"], link["url"], link["host"]
    return link[0] if host.lower() in text.lower() else f"[{text} ({host})]({url})"
