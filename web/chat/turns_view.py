"""Draws turns: a question with its pictures, and an answer that will not change any more."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from itertools import cycle

import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from streamlit.elements.lib.mutable_status_container import StatusContainer

from web.api_client.answer_stream import Place
from web.api_client.client import ApiError
from web.chat import json_answer
from web.history.chat_store import MyChats
from web.history.conversation import Answer, Call, Conversation, Failure, Turn
from web.i18n.strings import TABLE, Words
from web.images.attached_image import Picture
from web.images.box_drawing import draw_places
from web.safe_text import links_named, plain, without_pictures

USER = ":material/person:"
MODEL = ":material/visibility:"
ONLY_PLACES = re.compile(r"[\[\]\d\s,.]+")  # an answer that is nothing but rectangles
ONE_WIDTH, MANY_WIDTH = 340, 200  # of shown pictures, in CSS pixels
CURSOR = " ▍"
STOP_CHECK_S = 0.5  # how soon an answer that was stopped is shown so


def show_question(turn: Turn, conversation: Conversation, mine: MyChats, words: Words) -> None:
    with st.chat_message("user", avatar=USER):
        _show_pictures([conversation.pictures[sha] for sha in turn.pictures], mine, words)
        if turn.left_out:
            st.caption(words("picture.left_out"))
        for result in turn.results:
            st.caption(words("tool.gave", name=plain(result.name)))
            st.code(result.text, language=None, wrap_lines=True)
        if not turn.results:
            st.text(turn.question)


def _show_pictures(shown: list[Picture], mine: MyChats, words: Words) -> None:
    if not shown:
        return
    width = ONE_WIDTH if len(shown) == 1 else MANY_WIDTH
    with st.container(horizontal=True):
        for picture in shown:
            if data := mine.bytes_of(picture):
                alt = words("picture.alt", name=picture.name)
                st.image(data, width=min(width, max(picture.width, 80)), alt=alt)
            else:
                key = "picture.elsewhere" if picture.url else "picture.lost"
                st.markdown(f":material/{'link' if picture.url else 'broken_image'}: "
                            f"{words(key, name=plain(picture.name))}")  # fmt: skip


def show_answer(turn: Turn, conversation: Conversation, mine: MyChats, words: Words) -> None:
    with st.chat_message("assistant", avatar=MODEL):
        for earlier in turn.earlier:
            label = words("answer.earlier_to", question=plain(earlier.question)) if earlier.question else words("answer.earlier")
            with st.expander(label, type="compact"):
                _show(earlier, conversation, mine, words)
        _show(turn.answer, conversation, mine, words)


def _show(answer: Answer, conversation: Conversation, mine: MyChats, words: Words) -> None:
    if answer.reasoning.strip():
        with st.expander(thought_label(answer, words), type="compact"):
            st.markdown(harmless(answer.reasoning.strip()))
    for call in answer.calls:
        _show_call(call, words)
    if answer.text.strip():
        _show_text(answer, words)
    _show_places(answer, conversation, mine, words)
    if answer.state == "stopped":
        key = "answer.stopped" if answer.says_something else "answer.stopped_early"
        st.caption(f":material/stop_circle: {words(key)}")
    elif answer.error is not None:
        show_error(answer.error, words)
    elif not answer.says_something:
        st.caption(words("answer.empty"))
    if numbers := numbers_line(answer, words):
        st.caption(numbers, help=numbers_help(answer, words))


def show_error(error: ApiError | Failure, words: Words) -> None:
    key = f"error.{error.kind}"
    sentence = words(key if key in TABLE else "error.broken", detail=plain(error.detail))
    small = [plain(error.detail)] if error.kind == "too_long" and error.detail else []  # the tokens asked for, the limit
    small += [words("error.request_id", id=plain(error.request_id))] if error.request_id else []
    if small:
        sentence += f"  \n:small[{' · '.join(small)}]"
    st.error(without_pictures(sentence), icon=":material/error:")


def harmless(markdown: str) -> str:
    return links_named(without_pictures(markdown))


def _show_text(answer: Answer, words: Words) -> None:
    text = answer.text.strip()
    if answer.boxes and ONLY_PLACES.fullmatch(text):
        st.markdown(words("answer.marked", place=f"`{text}`"))
        return
    read = json_answer.read(text, answer.schema)
    if read is None:
        st.markdown(harmless(text))
        return
    if read.is_json:
        st.code(json.dumps(read.value, indent=2, ensure_ascii=False), language="json", wrap_lines=True)
    else:
        st.code(text, language=None, wrap_lines=True)
    if answer.schema is not None:
        _show_fit(read, bool(answer.schema), words)


def _show_fit(read: json_answer.JsonAnswer, by_schema: bool, words: Words) -> None:
    if read.problem:
        key = "json.misfit" if read.is_json else "json.broken"
        what = words(key, where=plain(read.where), problem=plain(read.problem))
        st.warning(what, icon=":material/rule:")
    else:
        st.caption(f":material/check_circle: {words('json.fits' if by_schema else 'json.valid')}")


def _show_call(call: Call, words: Words) -> None:
    label = words("answer.call", name=plain(call.name or "?"))
    with st.status(label, type="step", state="complete", expanded=True):
        try:
            st.code(json.dumps(json.loads(call.arguments), indent=2, ensure_ascii=False), language="json")
        except ValueError:
            st.code(call.arguments, language=None)


def _show_places(answer: Answer, conversation: Conversation, mine: MyChats, words: Words) -> None:
    sent = [conversation.pictures[sha] for sha in answer.sent if sha in conversation.pictures]
    for index, picture in enumerate(sent):
        places = tuple(place for place in answer.boxes if place.image == index)
        if not places:
            continue
        drawn = None
        if data := mine.bytes_of(picture):
            drawn = draw_places(data, places)
            alt = words("picture.boxes", name=picture.name)
            st.image(drawn[0], width=min(ONE_WIDTH, max(picture.width, 80)), alt=alt)
        elif picture.url:
            st.caption(words("boxes.not_drawn"))
        _list_places(places, picture, drawn, words, key=f"{conversation.id}-{id(answer)}-{index}")
    if answer.no_places:
        st.caption(f":material/wrong_location: {words('boxes.outside', count=answer.no_places)}")


def _list_places(
    places: tuple[Place, ...], picture: Picture, drawn: tuple[bytes, str] | None, words: Words, key: str
) -> None:
    with st.expander(words("boxes.title", count=len(places), name=plain(picture.name)), type="compact"):
        head = f"| # | {words('boxes.label')} | {words('boxes.pixels')} | 0-1000 |\n|---|---|---|---|\n"
        rows = [
            f"| {n} | {plain(place.label) or '–'} | {_row(place.pixels or _pixels(place, picture))} | {_row(place.corners)} |"
            for n, place in enumerate(places, start=1)
        ]
        st.markdown(head + "\n".join(rows))
        with st.container(horizontal=True):
            if drawn is not None:
                data, mime = drawn
                name = f"boxes-{picture.name.rsplit('.', 1)[0]}.{'png' if mime == 'image/png' else 'jpg'}"
                st.download_button(
                    words("boxes.picture"), lambda: data, name, mime, on_click="ignore", icon=":material/download:", key=f"boxes-{key}"
                )
            st.download_button(
                words("boxes.json"), json.dumps([asdict(place) for place in places], indent=2), "boxes.json",
                "application/json", on_click="ignore", icon=":material/download:", key=f"boxes-json-{key}",
            )  # fmt: skip


def _pixels(place: Place, picture: Picture) -> tuple[int, ...]:
    sides = cycle((picture.width, picture.height))
    return tuple(round(v * side / 1000) for v, side in zip(place.corners, sides, strict=False)) if picture.width else ()


def _row(numbers: tuple[float, ...] | tuple[int, ...]) -> str:
    return ", ".join(f"{number:g}" for number in numbers) or "–"


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


def numbers_help(answer: Answer, words: Words) -> str | None:
    """What few people want to know: the question's tokens and the request's number."""
    finish = answer.finish
    if finish is None:
        return None
    parts = []
    if finish.prompt_tokens is not None:
        parts.append(words("answer.prompt_tokens", count=finish.prompt_tokens))
    if finish.cached_tokens:
        parts.append(words("answer.cached", count=finish.cached_tokens))
    if finish.request_id:
        parts.append(words("error.request_id", id=plain(finish.request_id)))
    return " · ".join(parts) or None


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


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
