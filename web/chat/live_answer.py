"""Draws an answer while it comes. Touches no session state: every touch is a place where a stopped run ends."""

from __future__ import annotations

import time
from dataclasses import dataclass

import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from streamlit.elements.lib.mutable_status_container import StatusContainer

from web.chat.turns_view import harmless, thought_label
from web.history.conversation import Answer
from web.i18n.strings import Words
from web.safe_text import plain

CURSOR = " ▍"
STOP_CHECK_S = 0.5  # how soon an answer that was stopped is shown so


class LiveAnswer:
    """Places on the page that are redrawn while an answer comes."""

    def __init__(self, answer: Answer, words: Words) -> None:
        self._answer = answer
        self._words = words
        self._waiting = st.empty()
        self._thinking = st.empty()
        self._text = st.empty()
        self._status: StatusContainer | None = None
        self._thought: DeltaGenerator | None = None
        self._begun = False
        self.draw()

    def draw(self) -> None:
        """Always sends something to Streamlit: that is where Stop takes effect."""
        answer = self._answer
        if answer.state == "waiting":
            self._waiting.caption(waiting_line(answer, self._words, time.monotonic()))
            return
        if not self._begun:
            self._waiting.empty()
            self._begun = True
        self._draw_thinking()
        calls = "".join(f"{self._words('answer.call', name=plain(call.name))}\n\n" for call in answer.calls)
        self._text.markdown(calls + harmless(answer.text.lstrip()) + CURSOR if calls or answer.text else "")

    def _draw_thinking(self) -> None:
        answer = self._answer
        if not answer.reasoning:
            return
        if self._status is None:
            label = f":shimmer[{self._words('live.thinking')}]"
            self._status = self._thinking.status(label, type="compact", expanded=False)
            self._thought = self._status.empty()
        if answer.state == "thinking" and self._thought is not None:
            self._thought.markdown(harmless(answer.reasoning.strip()))
        elif answer.thinking_s is not None:
            self._status.update(label=thought_label(answer, self._words), state="complete")


def waiting_line(answer: Answer, words: Words, now: float) -> str:
    seconds = int(now - answer.begun)
    if answer.loading and answer.loading_progress is not None:
        percent = f"{100 * answer.loading_progress:.0f}"
        return words("live.loading_percent", percent=percent, seconds=seconds)
    if answer.loading:
        return words("live.loading", seconds=seconds)
    if answer.queue_position:
        return words("live.queued", position=answer.queue_position, seconds=seconds)
    return words("live.sent" if answer.queue_position is None else "live.looking", seconds=seconds)


def redraw_when_stopped(answer: Answer) -> None:
    """Draw a stopped answer at rest. A stopped run cannot draw any more, and nothing runs after it: only a clock,
    which does not tick while a run goes on. So if it ticks, the run has ended, and if it did not end by itself,
    it was stopped."""
    _tick(answer, _FirstCall())


@dataclass
class _FirstCall:
    value: bool = True


@st.fragment(run_every=STOP_CHECK_S)
def _tick(answer: Answer, first: _FirstCall) -> None:
    if first.value:
        first.value = False
    else:
        answer.stop(time.monotonic())
        st.rerun()
