"""Draws turns: a question with its images, an answer while it streams, and a finished answer.

`LiveAnswer` must not touch session state: Streamlit ends a stopped run at any access to it.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from itertools import cycle

import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from streamlit.elements.lib.mutable_status_container import StatusContainer

from web.api_client.answer_stream import BoundingBox
from web.api_client.client import ApiError
from web.chat import json_answer
from web.chat.timed_fragment import repeat
from web.history.chat_store import VisitorChats
from web.history.conversation import Answer, Conversation, Failure, ToolCall, Turn
from web.i18n.strings import TABLE, Texts
from web.images.attached_image import AttachedImage
from web.images.box_drawing import draw_boxes
from web.safe_text import escaped, with_link_hosts, without_images

USER = ":material/person:"
MODEL = ":material/visibility:"
ONLY_COORDINATES = re.compile(r"[\[\]\d\s,.]+")  # an answer that consists of boxes only
ONE_WIDTH, MANY_WIDTH = 340, 200  # of shown images, in CSS pixels
CURSOR = " ▍"
STOP_CHECK_S = 0.5  # how soon a stopped answer is drawn as stopped


def show_question(turn: Turn, conversation: Conversation, chats: VisitorChats, texts: Texts) -> None:
    with st.chat_message("user", avatar=USER):
        _show_images([conversation.images[sha] for sha in turn.images], chats, texts)
        if turn.left_out:
            st.caption(texts("image.left_out"))
        for result in turn.results:
            st.caption(texts("tool.result_of", name=escaped(result.name)))
            st.code(result.text, language=None, wrap_lines=True)
        if not turn.results:
            st.text(turn.question)


def _show_images(images: list[AttachedImage], chats: VisitorChats, texts: Texts) -> None:
    if not images:
        return
    width = ONE_WIDTH if len(images) == 1 else MANY_WIDTH
    with st.container(horizontal=True):
        for image in images:
            if data := chats.bytes_of(image):
                alt = texts("image.alt", name=image.name)
                st.image(data, width=min(width, max(image.width, 80)), alt=alt)
            else:
                key = "image.elsewhere" if image.url else "image.lost"
                st.markdown(f":material/{'link' if image.url else 'broken_image'}: "
                            f"{texts(key, name=escaped(image.name))}")  # fmt: skip


def show_answer(turn: Turn, conversation: Conversation, chats: VisitorChats, texts: Texts) -> None:
    with st.chat_message("assistant", avatar=MODEL):
        for earlier in turn.earlier:
            label = texts("answer.earlier_to", question=escaped(earlier.question)) if earlier.question else texts("answer.earlier")
            with st.expander(label, type="compact"):
                _show(earlier, conversation, chats, texts)
        _show(turn.answer, conversation, chats, texts)


def _show(answer: Answer, conversation: Conversation, chats: VisitorChats, texts: Texts) -> None:
    if answer.reasoning.strip():
        with st.expander(reasoning_label(answer, texts), type="compact"):
            st.markdown(sanitized(answer.reasoning.strip()))
    for call in answer.calls:
        _show_call(call, texts)
    if answer.text.strip():
        _show_text(answer, texts)
    _show_boxes(answer, conversation, chats, texts)
    if answer.state == "stopped":
        key = "answer.stopped" if answer.has_content else "answer.stopped_early"
        st.caption(f":material/stop_circle: {texts(key)}")
    elif answer.error is not None:
        show_error(answer.error, texts)
    elif not answer.has_content:
        st.caption(texts("answer.empty"))
    if numbers := numbers_line(answer, texts):
        st.caption(numbers, help=numbers_help(answer, texts))


def show_error(error: ApiError | Failure, texts: Texts) -> None:
    key = f"error.{error.kind}"
    sentence = texts(key if key in TABLE else "error.broken", detail=escaped(error.detail))
    small = [escaped(error.detail)] if error.kind == "too_long" and error.detail else []  # has the token count and limit
    small += [texts("error.request_id", id=escaped(error.request_id))] if error.request_id else []
    if small:
        sentence += f"  \n:small[{' · '.join(small)}]"
    st.error(without_images(sentence), icon=":material/error:")


def sanitized(markdown: str) -> str:
    """Markdown of the model, without images and with the host of each link."""
    return with_link_hosts(without_images(markdown))


def _show_text(answer: Answer, texts: Texts) -> None:
    text = answer.text.strip()
    if answer.boxes and ONLY_COORDINATES.fullmatch(text):
        st.markdown(texts("answer.marked", box=f"`{text}`"))
        return
    parsed = json_answer.parse(text, answer.schema)
    if parsed is None:
        st.markdown(sanitized(text))
        return
    if parsed.is_json:
        st.code(json.dumps(parsed.value, indent=2, ensure_ascii=False), language="json", wrap_lines=True)
    else:
        st.code(text, language=None, wrap_lines=True)
    if answer.schema is not None:
        _show_validity(parsed, bool(answer.schema), texts)


def _show_validity(parsed: json_answer.JsonAnswer, by_schema: bool, texts: Texts) -> None:
    if parsed.problem:
        key = "json.misfit" if parsed.is_json else "json.broken"
        sentence = texts(key, where=escaped(parsed.where), problem=escaped(parsed.problem))
        st.warning(sentence, icon=":material/rule:")
    else:
        st.caption(f":material/check_circle: {texts('json.fits' if by_schema else 'json.valid')}")


def _show_call(call: ToolCall, texts: Texts) -> None:
    label = texts("answer.call", name=escaped(call.name or "?"))
    with st.status(label, type="step", state="complete", expanded=True):
        try:
            st.code(json.dumps(json.loads(call.arguments), indent=2, ensure_ascii=False), language="json")
        except ValueError:
            st.code(call.arguments, language=None)


def _show_boxes(answer: Answer, conversation: Conversation, chats: VisitorChats, texts: Texts) -> None:
    sent = [conversation.images[sha] for sha in answer.sent if sha in conversation.images]
    for index, image in enumerate(sent):
        boxes = tuple(box for box in answer.boxes if box.image == index)
        if not boxes:
            continue
        drawn = None
        if data := chats.bytes_of(image):
            drawn = draw_boxes(data, boxes)
            alt = texts("image.boxes", name=image.name)
            st.image(drawn[0], width=min(ONE_WIDTH, max(image.width, 80)), alt=alt)
        elif image.url:
            st.caption(texts("boxes.not_drawn"))
        _list_boxes(boxes, image, drawn, texts, key=f"{conversation.id}-{id(answer)}-{index}")
    if answer.invalid_boxes:
        st.caption(f":material/wrong_location: {texts('boxes.outside', count=answer.invalid_boxes)}")


def _list_boxes(
    boxes: tuple[BoundingBox, ...], image: AttachedImage, drawn: tuple[bytes, str] | None, texts: Texts, key: str
) -> None:
    with st.expander(texts("boxes.title", count=len(boxes), name=escaped(image.name)), type="compact"):
        head = f"| # | {texts('boxes.label')} | {texts('boxes.pixels')} | 0-1000 |\n|---|---|---|---|\n"
        rows = [
            f"| {n} | {escaped(box.label) or '–'} | {_numbers(box.pixels or _pixels(box, image))} | {_numbers(box.corners)} |"
            for n, box in enumerate(boxes, start=1)
        ]
        st.markdown(head + "\n".join(rows))
        with st.container(horizontal=True):
            if drawn is not None:
                data, mime = drawn
                name = f"boxes-{image.name.rsplit('.', 1)[0]}.{'png' if mime == 'image/png' else 'jpg'}"
                st.download_button(
                    texts("boxes.image"), lambda: data, name, mime, on_click="ignore", icon=":material/download:", key=f"boxes-{key}"
                )
            st.download_button(
                texts("boxes.json"), json.dumps([asdict(box) for box in boxes], indent=2), "boxes.json",
                "application/json", on_click="ignore", icon=":material/download:", key=f"boxes-json-{key}",
            )  # fmt: skip


def _pixels(box: BoundingBox, image: AttachedImage) -> tuple[int, ...]:
    """The corners in pixels; empty if the size of the image is unknown."""
    sides = cycle((image.width, image.height))
    return tuple(round(v * side / 1000) for v, side in zip(box.corners, sides, strict=False)) if image.width else ()


def _numbers(numbers: tuple[float, ...] | tuple[int, ...]) -> str:
    return ", ".join(f"{number:g}" for number in numbers) or "–"


def reasoning_label(answer: Answer, texts: Texts) -> str:
    return texts("answer.thought", seconds=f"{max(answer.thinking_s or 0.0, 0.1):.1f}")


def numbers_line(answer: Answer, texts: Texts) -> str:
    """Completion tokens, time to first token, tokens per second and finish reason, as far as the API reports them."""
    finish = answer.finish
    if finish is None:
        return ""
    parts = []
    if finish.completion_tokens is not None:
        parts.append(texts("answer.tokens", count=finish.completion_tokens))
    if finish.ttft_s is not None:
        parts.append(texts("answer.ttft", seconds=_three_digits(finish.ttft_s)))
    if finish.tokens_per_s:
        parts.append(texts("answer.rate", rate=_three_digits(finish.tokens_per_s)))
    if finish.reason:
        key = f"finish.{finish.reason}"
        parts.append(texts(key) if key in TABLE else finish.reason)
    return " · ".join(parts)


def numbers_help(answer: Answer, texts: Texts) -> str | None:
    """Prompt tokens, cached tokens and the request id."""
    finish = answer.finish
    if finish is None:
        return None
    parts = []
    if finish.prompt_tokens is not None:
        parts.append(texts("answer.prompt_tokens", count=finish.prompt_tokens))
    if finish.cached_tokens:
        parts.append(texts("answer.cached", count=finish.cached_tokens))
    if finish.request_id:
        parts.append(texts("error.request_id", id=escaped(finish.request_id)))
    return " · ".join(parts) or None


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


class LiveAnswer:
    """The elements of the page that are redrawn while an answer streams. Belongs to the script's thread."""

    def __init__(self, answer: Answer, texts: Texts) -> None:
        self._answer = answer
        self._texts = texts
        self._waiting = st.empty()
        self._thinking = st.empty()
        self._text = st.empty()
        self._status: StatusContainer | None = None
        self._reasoning: DeltaGenerator | None = None
        self._begun = False
        self.draw()

    def draw(self) -> None:
        """Always calls Streamlit, because Stop takes effect in such a call."""
        answer = self._answer
        if answer.state == "waiting":
            self._waiting.caption(waiting_line(answer, self._texts, time.monotonic()))
            return
        if not self._begun:
            self._waiting.empty()
            self._begun = True
        self._draw_thinking()
        calls = "".join(f"{self._texts('answer.call', name=escaped(call.name))}\n\n" for call in answer.calls)
        self._text.markdown(calls + sanitized(answer.text.lstrip()) + CURSOR if calls or answer.text else "")

    def _draw_thinking(self) -> None:
        answer = self._answer
        if not answer.reasoning:
            return
        if self._status is None:
            label = f":shimmer[{self._texts('live.thinking')}]"
            self._status = self._thinking.status(label, type="compact", expanded=False)
            self._reasoning = self._status.empty()
        if answer.state == "thinking" and self._reasoning is not None:
            self._reasoning.markdown(sanitized(answer.reasoning.strip()))
        elif answer.thinking_s is not None:
            self._status.update(label=reasoning_label(answer, self._texts), state="complete")


def waiting_line(answer: Answer, texts: Texts, now: float) -> str:
    seconds = int(now - answer.begun)
    if answer.loading and answer.loading_progress is not None:
        percent = f"{100 * answer.loading_progress:.0f}"
        return texts("live.loading_percent", percent=percent, seconds=seconds)
    if answer.loading:
        return texts("live.loading", seconds=seconds)
    if answer.queue_position:
        return texts("live.queued", position=answer.queue_position, seconds=seconds)
    return texts("live.sent" if answer.queue_position is None else "live.looking", seconds=seconds)


def redraw_when_stopped(answer: Answer) -> None:
    """Draw the answer once more after Stop: Streamlit starts no new run then, and the answer would keep its cursor.

    A timed call comes only between runs of the script. It therefore means that the run has ended without drawing the
    finished answer, that is, by Stop.
    """

    def check(timed: bool) -> None:
        if timed:
            answer.stop(time.monotonic())
            st.rerun()

    repeat(STOP_CHECK_S, check)
