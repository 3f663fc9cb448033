"""The chat page: what one run of the script does, from a click or a question to the answer on the screen.

Owns the order of things. Words are in strings.py, turns in conversation.py, their look in turns_view.py.
An answer is a plain object changed in place while it comes; session state is not touched then, because every
touch of it is a place where a stopped run ends, and what came last would be lost.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import streamlit as st
from streamlit.typing import ChatInputValue

from settings import Settings
from web import pictures
from web.answer_stream import AnswerStream
from web.client import ApiClient, ApiError, Info
from web.controls import Wishes, sidebar
from web.conversation import Conversation, Turn
from web.heading import show_heading
from web.pictures import Picture, PictureError
from web.safe_text import plain
from web.samples import Sample, sample_named, samples
from web.strings import Words
from web.turns_view import MODEL, LiveAnswer, show_answer, show_question

SAMPLE_WIDTH = 164  # four beside each other on a desk, two on a phone
INFO_FRESH_S = 20
STOP_CHECK_S = 0.5  # how soon an answer that was stopped is marked so


@dataclass
class Ask:
    """A question to send in this run."""

    question: str
    pictures: list[Picture] = field(default_factory=list)
    sample: str | None = None


@dataclass
class Chat:
    """What one visitor's session holds."""

    conversation: Conversation = field(default_factory=Conversation)
    next_ask: Ask | None = None
    submitted: bool = False  # the input box brings a question in this run
    notices: list[str] = field(default_factory=list)


def show(client: ApiClient, settings: Settings, words: Words) -> None:
    if "chat" not in st.session_state:
        st.session_state["chat"] = Chat()
    chat: Chat = st.session_state["chat"]
    chat.conversation.settle(time.monotonic())
    info, trouble = _info(client)
    page = _Page(client, settings, words, chat, info)
    wishes = sidebar(info, words, page.new_chat)
    at_start = not (chat.conversation.turns or chat.next_ask or chat.submitted)
    chat.submitted = False
    # Each part keeps its place from run to run: what a part no longer shows vanishes at once, instead of
    # standing greyed out beneath an answer until that is complete.
    show_heading(client, info, trouble, words, at_start)
    first_input, first_steps, talk, next_steps = st.empty(), st.empty(), st.container(), st.empty()
    if at_start:
        # In the flow of the page: pinned to its bottom, it would make a phone open the page scrolled to its end.
        with first_input.container():
            ask = page.read_input()
            page.show_notices()
        with first_steps.container():
            page.show_samples()
    else:
        first_input.empty()
        first_steps.empty()
        ask = page.read_input()
    with talk:
        for turn in chat.conversation.turns:
            show_question(turn, chat.conversation, words)
            show_answer(turn, chat.conversation, words)
        if not at_start:
            page.show_notices()
        if ask is not None:
            next_steps.empty()
            page.answer(ask, wishes)
    with next_steps.container():
        page.show_next_steps()


def _info(client: ApiClient) -> tuple[Info | None, ApiError | None]:
    try:
        return _fresh_info(client.base_url, client), None
    except ApiError as error:
        return None, error


@st.cache_data(ttl=INFO_FRESH_S, show_spinner=False)
def _fresh_info(base_url: str, _client: ApiClient) -> Info:
    return _client.info()


class _Page:
    """One run of the script for one visitor."""

    def __init__(self, client: ApiClient, settings: Settings, words: Words, chat: Chat, info: Info | None) -> None:
        self._client = client
        self._words = words
        self._chat = chat
        self._info = info or Info()
        limits = self._info.limits
        self._max_images = limits.get("max_images", settings.max_images)
        self._max_bytes = min(limits.get("max_image_bytes", settings.max_image_bytes), settings.max_image_bytes)
        self._max_pixels = min(limits.get("max_image_pixels", settings.max_image_pixels), settings.max_image_pixels)

    # What the visitor wants.

    def read_input(self) -> Ask | None:
        """The question of this run: typed, or left by a button that was clicked."""
        words = self._words
        if (draft := st.session_state.pop("draft", None)) is not None:
            st.session_state["question"] = draft
        key = "ask.placeholder_next" if self._chat.conversation.turns else "ask.placeholder"
        given = st.chat_input(
            words(key),
            key="question",
            accept_file="multiple",
            file_type=list(pictures.SUFFIXES),
            max_upload_size=math.ceil(self._max_bytes / 2**20),
            submit_mode="stop",
            on_submit=self._note_submit,
        )
        clicked, self._chat.next_ask = self._chat.next_ask, None
        ask = self._accept(given) if given else clicked
        if ask is not None:
            self._chat.notices.clear()
            count = self._chat.conversation.picture_count(new=len(ask.pictures))
            if count > self._max_images:
                self._refuse(words("picture.too_many", count=count, limit=self._max_images), ask.question)
        return ask

    def _accept(self, given: ChatInputValue) -> Ask:
        words = self._words
        try:
            brought = [self._prepare(file.name, file.getvalue()) for file in given.files]
        except PictureError as error:
            limit = f"{error.limit:g}"
            self._refuse(words(f"picture.{error.kind}", name=plain(error.name), limit=limit), given.text)
        usual = words("ask.default_many" if len(brought) > 1 else "ask.default")
        return Ask(given.text.strip() or usual, brought)

    def _prepare(self, name: str, data: bytes) -> Picture:
        return pictures.prepare(name, data, self._max_bytes, self._max_pixels)

    def _refuse(self, notice: str, question: str) -> None:
        """Say why nothing was sent, and put the question back into the input box."""
        self._chat.notices = [notice]
        st.session_state["draft"] = question
        st.rerun()

    def _note_submit(self) -> None:
        self._chat.submitted = True

    def new_chat(self) -> None:
        st.session_state["chat"] = Chat()

    def _ask_sample(self, sample: Sample, question: str) -> None:
        picture = self._prepare(sample.file, sample.path.read_bytes())
        self._chat.next_ask = Ask(question, [picture], sample.file)

    def _ask_on(self, question: str) -> None:
        self._chat.next_ask = Ask(question)

    def _ask_again(self) -> None:
        question, brought, sample = self._chat.conversation.take_back_last()
        self._chat.next_ask = Ask(question, brought, sample)

    # What the visitor sees.

    def show_samples(self) -> None:
        words = self._words
        st.caption(words("ask.limits", count=self._max_images, size=f"{self._max_bytes / 2**20:g}"))
        st.markdown(f"**{words('samples.title')}**")
        cards = st.container(horizontal=True)
        for sample in samples():
            question = sample.questions[words.language][0]
            with cards.container(width=SAMPLE_WIDTH):
                st.image(str(sample.path), width="stretch", alt=sample.alt[words.language])
                st.button(
                    question,
                    key=f"sample-{sample.file}",
                    width="stretch",
                    on_click=self._ask_sample,
                    args=(sample, question),
                )

    def show_notices(self) -> None:
        for notice in self._chat.notices:
            st.warning(notice, icon=":material/image_not_supported:")

    def show_next_steps(self) -> None:
        """Under the last answer: try again if it failed, or more questions about a sample picture."""
        words, conversation = self._words, self._chat.conversation
        if not conversation.turns:
            return
        last = conversation.turns[-1].answer
        if last.state in ("failed", "stopped"):
            st.button(words("answer.again"), icon=":material/refresh:", key="again", on_click=self._ask_again)
            return
        sample = sample_named(conversation.last_sample() or "")
        if sample is None:
            return
        asked = {turn.question for turn in conversation.turns}
        open_questions = [each for each in sample.questions[words.language] if each not in asked]
        if open_questions:
            st.caption(words("samples.more"))
            with st.container(horizontal=True):
                for question in open_questions:
                    st.button(question, key=f"more-{question}", on_click=self._ask_on, args=(question,))

    def answer(self, ask: Ask, wishes: Wishes) -> None:
        """Send the question and draw the answer as it comes; then run once more, to draw it at rest."""
        conversation = self._chat.conversation
        turn = conversation.ask(ask.question, ask.pictures, ask.sample)
        show_question(turn, conversation, self._words)
        with st.chat_message("assistant", avatar=MODEL):
            live = LiveAnswer(turn.answer, self._words)
            # The input box has a stop button too, but not for a click on a sample, nor in the reader's language.
            st.button(self._words("live.stop"), icon=":material/stop_circle:", key="stop")
        _notice_stop(turn, _FirstCall())
        try:
            with AnswerStream(self._client, self._body(conversation, wishes)) as stream:
                for batch in stream.batches():
                    now = time.monotonic()
                    for event in batch:
                        turn.answer.take(event, now)
                    live.draw()
        except ApiError as error:
            turn.answer.fail(error, time.monotonic())
        st.rerun()

    def _body(self, conversation: Conversation, wishes: Wishes) -> dict[str, Any]:
        body: dict[str, Any] = {"messages": conversation.messages(), **wishes.as_body()}
        return {"model": self._info.model, **body} if self._info.model else body


@dataclass
class _FirstCall:
    value: bool = True


@st.fragment(run_every=STOP_CHECK_S)
def _notice_stop(turn: Turn, first: _FirstCall) -> None:
    """Mark a stopped answer. A stopped run cannot draw any more, and nothing runs after it: only this clock,
    which does not tick while a run goes on. So if it ticks and the answer is unfinished, the run was stopped."""
    if first.value:
        first.value = False
    elif turn.answer.unfinished:
        turn.answer.stop(time.monotonic())
        st.rerun()
