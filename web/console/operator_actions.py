"""The actions that an operator may request of the checker. Each is confirmed first and becomes a row in the store.

They need an operator token, which `operator_token.py` compares: a session stays unlocked for `UNLOCKED_S`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from web.console import checker_store, operator_token
from web.i18n.strings import Texts
from web.safe_text import escaped

UNLOCKED_S = 900.0
HOUR_S = 3600.0
HOURS = (1, 2, 4, 8, 24)


@dataclass(frozen=True)
class OperatorAction:
    """`typed`: confirmed by typing the model's name, because it aborts running answers. `timed`: takes a duration."""

    kind: str
    icon: str
    target: str = ""
    typed: bool = False
    timed: bool = False

    @property
    def name(self) -> str:
        """The key of its texts."""
        target = "replica" if self.replica else self.target
        return f"{self.kind}_{target}" if self.kind == "restart" else self.kind

    @property
    def replica(self) -> str:
        """The number of the replica that it is for; empty for any other target."""
        return self.target.partition("/")[2]


ACTIONS = (
    OperatorAction("probe", ":material/troubleshoot:"),
    OperatorAction("restart", ":material/restart_alt:", "api", typed=True),
    OperatorAction("restart", ":material/restart_alt:", "page", typed=True),
    OperatorAction("drain", ":material/logout:", "api", typed=True),
    OperatorAction("pause", ":material/pause_circle:", timed=True),
    OperatorAction("silence", ":material/notifications_off:", timed=True),
    OperatorAction("maintenance", ":material/engineering:", timed=True),
    OperatorAction("resume", ":material/play_circle:"),
    OperatorAction("reset", ":material/replay:", "all"),
)


def actions_of(replicas: int) -> tuple[OperatorAction, ...]:
    """With several replicas each can be restarted by itself, and the nginx before them."""
    if replicas == 1:
        return ACTIONS
    restart = ":material/restart_alt:"
    each = [OperatorAction("restart", restart, f"api/{number}", typed=True) for number in range(replicas)]
    return (*ACTIONS[:2], *each, OperatorAction("restart", restart, "front", typed=True), *ACTIONS[2:])


def arguments_of(action: OperatorAction, hours: int, actor: str, now: float) -> dict[str, Any]:
    """The arguments of the request. `now`: Unix time in seconds."""
    until = now + hours * HOUR_S
    if action.kind in ("pause", "silence"):
        return {"until": until}
    if action.kind == "maintenance":
        return {"from": now, "until": until}
    return {"reason": f"asked by {actor} on the console"} if action.kind == "reset" else {}


def show_actions(token: str, log_dir: Path, model: str, texts: Texts, replicas: int = 1) -> None:
    """Shows nothing if no operator token is set."""
    if not token:
        return
    st.subheader(texts("act.title"), anchor=False)
    if time.monotonic() > st.session_state.get("operator_until", 0.0):
        _ask_for_token(token, log_dir, texts)
        return
    st.caption(texts("act.how"))
    with st.container(horizontal=True):
        for action in actions_of(replicas):
            key = f"act-{action.name}{action.replica}"
            if st.button(texts(f"act.{action.name}", number=action.replica), icon=action.icon, key=key):
                _confirm(action, log_dir, model, texts)
        if st.button(texts("act.leave"), icon=":material/lock:", key="act-leave", type="tertiary"):
            del st.session_state["operator_until"]
            st.rerun()


def _ask_for_token(token: str, log_dir: Path, texts: Texts) -> None:
    st.caption(texts("act.locked"))
    with st.form("operator", border=False, clear_on_submit=True), st.container(horizontal=True, vertical_alignment="bottom"):
        entered = st.text_input(texts("act.token"), type="password", autocomplete="off", width=280)
        submitted = st.form_submit_button(texts("act.open"), icon=":material/lock_open:")
    if not submitted:
        return
    address = st.context.ip_address or "127.0.0.1"  # Streamlit has none for this machine
    right, wait_s = operator_token.OF_ALL_SESSIONS.try_token(entered, token, address, log_dir, time.monotonic())
    if right:
        st.session_state["operator_until"] = time.monotonic() + UNLOCKED_S
        st.rerun()
    elif wait_s > 0:
        st.error(texts("act.slowed", seconds=math.ceil(wait_s)), icon=":material/hourglass:")
    else:
        st.error(texts("act.wrong"), icon=":material/key_off:")


def _confirm(action: OperatorAction, log_dir: Path, model: str, texts: Texts) -> None:
    @st.dialog(texts(f"act.{action.name}", number=action.replica))
    def content() -> None:
        st.markdown(texts(f"act.{action.name}_what", number=action.replica))
        actor = st.text_input(texts("act.actor"), key="act-actor", max_chars=60)
        hours = st.selectbox(texts("act.hours"), HOURS, key="act-hours") if action.timed else 1
        expected = model or action.kind
        typed = st.text_input(texts("act.type", word=escaped(expected)), key="act-typed") if action.typed else expected
        if not st.button(texts("act.confirm"), type="primary", key="act-confirm", icon=action.icon):
            return
        if not actor.strip():
            st.warning(texts("act.no_actor"))
        elif typed.strip() != expected:
            st.warning(texts("act.mistyped", word=escaped(expected)))
        else:
            _submit(action, int(hours), actor.strip(), log_dir, texts)

    content()


def _submit(action: OperatorAction, hours: int, actor: str, log_dir: Path, texts: Texts) -> None:
    arguments = arguments_of(action, hours, actor, time.time())
    try:
        number = checker_store.add_request(log_dir, f"console: {actor}", action.kind, action.target, arguments)
    except checker_store.HistoryUnavailable as error:
        st.error(texts("act.failed", why=escaped(str(error))))
        return
    st.session_state["request_notice"] = texts("act.asked", number=number)
    st.rerun()
