"""The settings in force: what the model server chose and why, and every setting of this folder. Never a secret."""

from __future__ import annotations

from typing import Any

import streamlit as st
from pydantic import SecretStr

from settings import Settings
from web.i18n.strings import Words
from web.safe_text import plain


def show_settings(info: dict[str, Any], settings: Settings, words: Words) -> None:
    with st.expander(words("set.title"), icon=":material/settings:"):
        choices = info.get("choices") or {}
        if choices:
            st.caption(words("set.chosen"))
            lines = [f"| {plain(str(name))} | {plain(_chosen(info, name))} | {plain(str(why))} |" for name, why in choices.items()]
            st.markdown("\n".join([f"| | {words('set.value')} | {words('set.why')} |", "|---|---|---|", *lines]))
        st.caption(words("set.given"))
        rows = [
            f"| `GLM_{name.upper()}` | {plain(_value(getattr(settings, name)))} | {words('set.changed') if name in settings.model_fields_set else ''} |"
            for name in sorted(type(settings).model_fields)
        ]
        st.markdown("\n".join([f"| | {words('set.value')} | |", "|---|---|---|", *rows]))


def _chosen(info: dict[str, Any], name: str) -> str:
    value = info.get(name, info.get(f"{name}_tokens", ""))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _value(value: object) -> str:
    """Never a secret."""
    return "•••" if isinstance(value, SecretStr) else "–" if value in (None, "") else str(value)
