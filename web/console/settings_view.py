"""The effective settings: the API's automatic choices with their reasons, and every GLM_ setting. Secrets are masked."""

from __future__ import annotations

from typing import Any

import streamlit as st
from pydantic import SecretStr

from settings import Settings
from web.i18n.strings import Texts
from web.safe_text import escaped


def show_settings(info: dict[str, Any], settings: Settings, texts: Texts) -> None:
    with st.expander(texts("set.title"), icon=":material/settings:"):
        choices = info.get("choices") or {}
        if choices:
            st.caption(texts("set.chosen"))
            lines = [f"| {escaped(str(name))} | {escaped(_effective(info, name))} | {escaped(str(why))} |" for name, why in choices.items()]
            st.markdown("\n".join([f"| | {texts('set.value')} | {texts('set.why')} |", "|---|---|---|", *lines]))
        _show_plan(info.get("plan") or {}, texts)
        _show_proofs(info.get("proofs") or {}, texts)
        st.caption(texts("set.given"))
        rows = [
            f"| `GLM_{name.upper()}` | {escaped(_value(getattr(settings, name)))} | {texts('set.changed') if name in settings.model_fields_set else ''} |"
            for name in sorted(type(settings).model_fields)
        ]
        st.markdown("\n".join([f"| | {texts('set.value')} | |", "|---|---|---|", *rows]))


def _show_plan(plan: dict[str, Any], texts: Texts) -> None:
    """The planned memory of the card by part; nothing without a card."""
    parts = plan.get("parts")
    if not isinstance(parts, dict):
        return
    st.caption(texts("set.plan", card=escaped(str(plan.get("card", "")))))
    lines = [f"| {escaped(str(name))} | {size / 2**30:,.2f} |" for name, size in parts.items() if isinstance(size, (int, float))]
    st.markdown("\n".join(["| | GiB |", "|---|---:|", *lines]))


def _show_proofs(proofs: dict[str, Any], texts: Texts) -> None:
    """What the start found of each fast path: used or off, with the reason or the times."""
    if not proofs:
        return
    st.caption(texts("set.proofs"))
    lines = [f"| {escaped(str(path))} | {escaped(str(found))} |" for path, found in proofs.items()]
    st.markdown("\n".join([f"| {texts('set.path')} | {texts('set.found')} |", "|---|---|", *lines]))


def _effective(info: dict[str, Any], name: str) -> str:
    value = info.get(name, info.get(f"{name}_tokens", ""))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _value(value: object) -> str:
    return "•••" if isinstance(value, SecretStr) else "–" if value in (None, "") else str(value)
