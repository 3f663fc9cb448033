"""Draws turns: a question with its pictures, an answer that is complete, an answer that is still coming."""

from __future__ import annotations

import json
import re
import time

import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from streamlit.elements.lib.mutable_status_container import StatusContainer

from web.client import ApiError
from web.conversation import Answer, Conversation, Turn
from web.pictures import Picture, draw_boxes
from web.safe_text import without_pictures
from web.strings import TABLE, Words

USER = ":material/person:"
MODEL = ":material/visibility:"
CURSOR = " ▍"
ONLY_PLACES = re.compile(r"[\[\]\d\s,.]+")  # an answer that is nothing but rectangles
ONE_WIDTH, MANY_WIDTH = 340, 200  # of shown pictures, in CSS pixels


def show_question(turn: Turn, conversation: Conversation, words: Words) -> None:
    with st.chat_message("user", avatar=USER):
        shown = [conversation.pictures[sha] for sha in turn.pictures]
        if shown:
            width = ONE_WIDTH if len(shown) == 1 else MANY_WIDTH
            with st.container(horizontal=True):
                for picture in shown:
                    alt = words("picture.alt", name=picture.name)
                    st.image(picture.data, width=min(width, max(picture.width, 80)), alt=alt)
        st.text(turn.question)


def show_answer(turn: Turn, conversation: Conversation, words: Words) -> None:
    """An answer that will not change any more."""
    answer = turn.answer
    with st.chat_message("assistant", avatar=MODEL):
        if answer.reasoning.strip():
            with st.expander(thought_label(answer, words), type="compact"):
                st.markdown(without_pictures(answer.reasoning.strip()))
        if answer.text.strip():
            _show_text(answer, words)
        _show_boxes(answer, [conversation.pictures[sha] for sha in answer.sent], words)
        if answer.state == "stopped":
            key = "answer.stopped" if answer.text.strip() else "answer.stopped_early"
            st.caption(f":material/stop_circle: {words(key)}")
        elif answer.error is not None:
            show_error(answer.error, words)
        elif not answer.text.strip() and not answer.boxes:
            st.caption(words("answer.empty"))
        if numbers := numbers_line(answer, words):
            st.caption(numbers)


def show_error(error: ApiError, words: Words) -> None:
    key = f"error.{error.kind}"
    sentence = words(key if key in TABLE else "error.broken", detail=error.detail)
    if error.request_id:
        sentence += f"  \n:small[{words('error.request_id', id=error.request_id)}]"
    st.error(without_pictures(sentence), icon=":material/error:")


def _show_text(answer: Answer, words: Words) -> None:
    text = answer.text.strip()
    if answer.boxes and ONLY_PLACES.fullmatch(text):
        st.markdown(words("answer.marked", place=f"`{text}`"))
    elif pretty := _as_json(text):
        st.code(pretty, language="json", wrap_lines=True)
    else:
        st.markdown(without_pictures(text))


def _as_json(text: str) -> str | None:
    """Indented, if the whole text is a JSON object or list."""
    if not text.startswith(("{", "[")):
        return None
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except ValueError:
        return None


def _show_boxes(answer: Answer, sent: list[Picture], words: Words) -> None:
    for index, picture in enumerate(sent):
        boxes = tuple(box for box in answer.boxes if box.image == index)
        if boxes:
            alt = words("picture.boxes", name=picture.name)
            st.image(draw_boxes(picture.data, boxes), width=min(ONE_WIDTH, max(picture.width, 80)), alt=alt)


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
        self._drawn = ""
        self.draw()

    def draw(self) -> None:
        """Always sends something to Streamlit: that is where Stop takes effect."""
        answer = self._answer
        if answer.state == "waiting":
            self._waiting.caption(waiting_line(answer, self._words, time.monotonic()))
            return
        if not self._drawn:
            self._waiting.empty()
        self._draw_thinking()
        self._drawn = answer.text + answer.reasoning or " "
        if answer.text:
            self._text.markdown(without_pictures(answer.text.lstrip()) + CURSOR)

    def _draw_thinking(self) -> None:
        answer = self._answer
        if not answer.reasoning:
            return
        if self._status is None:
            label = f":shimmer[{self._words('live.thinking')}]"
            self._status = self._thinking.status(label, type="compact", expanded=False)
            self._thought = self._status.empty()
        if answer.state == "thinking" and self._thought is not None:
            self._thought.markdown(without_pictures(answer.reasoning.strip()))
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


def thought_label(answer: Answer, words: Words) -> str:
    return words("answer.thought", seconds=f"{max(answer.thinking_s or 0.0, 0.1):.1f}")


def numbers_line(answer: Answer, words: Words) -> str:
    """Tokens, time to the first one, speed, and why it ended: only what the API told."""
    finish = answer.finish
    if finish is None:
        return ""
    parts = []
    if finish.completion_tokens is not None:
        parts.append(words("answer.tokens", count=finish.completion_tokens))
    if finish.ttft_s is not None:
        parts.append(words("answer.ttft", seconds=_three_digits(finish.ttft_s)))
    if finish.tokens_per_s:
        parts.append(words("answer.rate", rate=_three_digits(finish.tokens_per_s)))
    if finish.reason:
        key = f"finish.{finish.reason}"
        parts.append(words(key) if key in TABLE else finish.reason)
    return " · ".join(parts)


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"
