"""What an operator may ask of the checker from the console. Each act is confirmed, and written down as a row.

Exists only where an operator token is set. The token is compared here and kept nowhere: the session remembers that
it was right, for a while.
"""

from __future__ import annotations

import hmac
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from web.console import store as console_store
from web.i18n.strings import Words
from web.safe_text import plain

OPEN_FOR_S = 900.0
HOUR_S = 3600.0
HOURS = (1, 2, 4, 8, 24)


@dataclass(frozen=True)
class Act:
    """`typed`: the word that must be typed before it, because people lose answers by it."""

    kind: str
    icon: str
    target: str = ""
    typed: bool = False
    hours: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.target}" if self.kind == "restart" else self.kind


ACTS = (
    Act("probe", ":material/troubleshoot:"),
    Act("restart", ":material/restart_alt:", "api", typed=True),
    Act("restart", ":material/restart_alt:", "page", typed=True),
    Act("drain", ":material/logout:", "api", typed=True),
    Act("pause", ":material/pause_circle:", hours=True),
    Act("silence", ":material/notifications_off:", hours=True),
    Act("maintenance", ":material/engineering:", hours=True),
    Act("resume", ":material/play_circle:"),
    Act("reset", ":material/replay:", "all"),
)


def arguments_of(act: Act, hours: int, actor: str, now: float) -> dict[str, Any]:
    until = now + hours * HOUR_S
    if act.kind in ("pause", "silence"):
        return {"until": until}
    if act.kind == "maintenance":
        return {"from": now, "until": until}
    return {"reason": f"asked by {actor} on the console"} if act.kind == "reset" else {}


def show_actions(token: str, log_dir: Path, model: str, words: Words) -> None:
    """Nothing at all where no operator token is set."""
    if not token:
        return
    st.subheader(words("act.title"), anchor=False)
    if time.monotonic() > st.session_state.get("operator_until", 0.0):
        _ask_for_token(token, words)
        return
    st.caption(words("act.how"))
    with st.container(horizontal=True):
        for act in ACTS:
            if st.button(words(f"act.{act.name}"), icon=act.icon, key=f"act-{act.name}"):
                _confirm(act, log_dir, model, words)
        if st.button(words("act.leave"), icon=":material/lock:", key="act-leave", type="tertiary"):
            del st.session_state["operator_until"]
            st.rerun()


def _ask_for_token(token: str, words: Words) -> None:
    st.caption(words("act.locked"))
    with st.form("operator", border=False, clear_on_submit=True), st.container(horizontal=True, vertical_alignment="bottom"):
        given = st.text_input(words("act.token"), type="password", autocomplete="off", width=280)
        opened = st.form_submit_button(words("act.open"), icon=":material/lock_open:")
    if opened and hmac.compare_digest(given.strip().encode(), token.encode()):
        st.session_state["operator_until"] = time.monotonic() + OPEN_FOR_S
        st.rerun()
    elif opened:
        time.sleep(1)  # guessing shall be slow
        st.error(words("act.wrong"), icon=":material/key_off:")


def _confirm(act: Act, log_dir: Path, model: str, words: Words) -> None:
    @st.dialog(words(f"act.{act.name}"))
    def ask() -> None:
        st.markdown(words(f"act.{act.name}_what"))
        actor = st.text_input(words("act.actor"), key="act-actor", max_chars=60)
        hours = st.selectbox(words("act.hours"), HOURS, key="act-hours") if act.hours else 1
        wanted = model or act.kind
        typed = st.text_input(words("act.type", word=plain(wanted)), key="act-typed") if act.typed else wanted
        if not st.button(words("act.confirm"), type="primary", key="act-confirm", icon=act.icon):
            return
        if not actor.strip():
            st.warning(words("act.no_actor"))
        elif typed.strip() != wanted:
            st.warning(words("act.mistyped", word=plain(wanted)))
        else:
            _leave(act, int(hours), actor.strip(), log_dir, words)

    ask()


def _leave(act: Act, hours: int, actor: str, log_dir: Path, words: Words) -> None:
    arguments = arguments_of(act, hours, actor, time.time())
    try:
        number = console_store.ask(log_dir, f"console: {actor}", act.kind, act.target, arguments)
    except console_store.NoHistory as error:
        st.error(words("act.failed", why=plain(str(error))))
        return
    st.session_state["asked"] = words("act.asked", number=number)
    st.rerun()
