"""The table of the replicas: each with its own verdict, as the last check found it. Nothing where there is one API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

from web.i18n.strings import Texts
from web.safe_text import escaped

HEAD = ("replicas.replica", "replicas.place", "replicas.state", "replicas.since", "replicas.restarts", "replicas.why")


def show_replicas(report: dict[str, Any], texts: Texts, word: Callable[[str], str], time_of: Callable[[float], str]) -> None:
    """`word`: the name of a verdict; `time_of`: Unix seconds as a visitor reads them."""
    replicas = [each for each in report.get("replicas") or () if isinstance(each, dict)]
    if not replicas:
        return
    st.subheader(texts("replicas.title"), anchor=False)
    lines = [row(each, texts, word, time_of) for each in replicas]
    head = "| " + " | ".join(texts(name) for name in HEAD) + " |"
    st.markdown("\n".join([head, "|---" * len(HEAD) + "|", *lines]))


def row(replica: dict[str, Any], texts: Texts, word: Callable[[str], str], time_of: Callable[[float], str]) -> str:
    card, since = replica.get("card"), replica.get("since")
    place = texts("replicas.card", card=escaped(str(card)), port=replica.get("port")) if card else texts("replicas.port", port=replica.get("port"))
    cells = [
        str(replica.get("number")), place, f"**{word(str(replica.get('word')))}**", time_of(since) if isinstance(since, int | float) else "–",
        str(replica.get("restarts_last_day") or 0), escaped(str(replica.get(texts.language) or "")),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"
