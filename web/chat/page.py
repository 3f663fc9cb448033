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
from streamlit.navigation.page import StreamlitPage
from streamlit.typing import ChatInputValue

from settings import Settings
from web.api_client.answer_stream import AnswerStream
from web.api_client.client import ApiClient, ApiError, Info
from web.chat import composer
from web.chat.controls import Wishes, show_language, show_wishes
from web.chat.heading import show_heading
from web.chat.turns_view import MODEL, USER, LiveAnswer, redraw_when_stopped, show_answer, show_question
from web.history.chat_list import show_chat_menu, show_chats
from web.history.chat_store import MyChats
from web.history.conversation import Answer, Conversation, ToolResult, Turn
from web.i18n.strings import Words
from web.images import attached_image
from web.images.attached_image import Picture, PictureError
from web.safe_text import plain
from web.samples import Sample, sample_named, samples

SAMPLE_WIDTH = 164  # four beside each other on a desk, two on a phone
INFO_FRESH_S = 20
MAX_TURNS = 100  # in one chat: each is drawn again at every click
AILING = ("down", "silent", "unavailable", "draining")  # failures whose cause the console shows


@dataclass
class Ask:
    """A question to send in this run. `again`: in place of the last one, or that very one where it is empty.

    `results`: not a question but what the tools gave that the last answer called.
    """

    question: str
    pictures: list[Picture] = field(default_factory=list)
    sample: str | None = None
    again: bool = False
    results: tuple[ToolResult, ...] = ()


@dataclass
class Chat:
    """What one visitor's session holds. `tray`: pictures that wait for the next question."""

    conversation: Conversation = field(default_factory=Conversation)
    tray: list[Picture] = field(default_factory=list)
    next_ask: Ask | None = None
    submitted: bool = False  # the input box brings a question in this run
    editing: bool = False  # the last question stands in a box to be changed
    notices: list[str] = field(default_factory=list)


def show(client: ApiClient, settings: Settings, words: Words, mine: MyChats, console: StreamlitPage) -> None:
    chat = _chat(mine)
    chat.conversation.settle(time.monotonic())
    info, trouble = _info(client)
    page = _Page(client, settings, words, chat, info, mine, console)
    with st.sidebar:
        show_chats(mine, chat.conversation, words, page.open_chat, page.new_chat)
        if chat.conversation.turns:
            show_chat_menu(mine, chat.conversation, words, page.new_chat)
        st.space("small")
        wishes = show_wishes(info, words)
        st.space("small")
        show_language(words)
    at_start = not (chat.conversation.turns or chat.next_ask or chat.submitted)
    chat.submitted = False
    # Each part keeps its place from run to run: what a part no longer shows vanishes at once, instead of
    # standing greyed out beneath an answer until that is complete.
    show_heading(client, info, trouble, words, at_start)
    first_input, first_steps, talk, next_steps = st.empty(), st.empty(), st.container(), st.empty()
    if at_start:
        # In the flow of the page: pinned to its bottom, it would make a phone open the page scrolled to its end.
        with first_input.container():
            composer.show_tray(chat.tray, words)
            ask = page.read_input(wishes)
            page.show_notices()
        with first_steps.container():
            page.show_beginnings()
    else:
        first_input.empty()
        first_steps.empty()
        ask = page.read_input(wishes)
    with talk:
        page.show_talk(ask)
        if not at_start:
            page.show_notices()
        if ask is not None:
            next_steps.empty()
            page.answer(ask, wishes)
    with next_steps.container():
        page.show_next_steps()


def _chat(mine: MyChats) -> Chat:
    """The session's chat; or the one that the address names, after a reload or the browser's back button."""
    asked = st.query_params.get("chat", "")
    chat: Chat | None = st.session_state.get("chat")
    if asked and (chat is None or asked != chat.conversation.id):
        found = mine.load(asked)
        if found is not None:
            chat = Chat(found)
        else:
            del st.query_params["chat"]
    st.session_state["chat"] = chat = chat or Chat()
    if chat.conversation.turns and st.query_params.get("chat") != chat.conversation.id:
        st.query_params["chat"] = chat.conversation.id
    return chat


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

    def __init__(
        self, client: ApiClient, settings: Settings, words: Words, chat: Chat, info: Info | None, mine: MyChats,
        console: StreamlitPage,
    ) -> None:  # fmt: skip
        self._client = client
        self._words = words
        self._chat = chat
        self._info = info or Info()
        self._mine = mine
        self._console = console
        limits = self._info.limits
        self._by_link = bool(limits.get("fetch_images", True))  # another engine does not tell
        self._max_images = limits.get("max_images", settings.max_images)
        self._max_bytes = min(limits.get("max_image_bytes", settings.max_image_bytes), settings.max_image_bytes)
        self._max_pixels = min(limits.get("max_image_pixels", settings.max_image_pixels), settings.max_image_pixels)

    # What the visitor wants.

    def read_input(self, wishes: Wishes) -> Ask | None:
        """The question of this run: typed, or left by a button that was clicked."""
        words, chat = self._words, self._chat
        if (draft := st.session_state.pop("draft", None)) is not None:
            st.session_state["question"] = draft
        given = st.chat_input(
            words("ask.placeholder_next" if chat.conversation.turns else "ask.placeholder"),
            key="question",
            accept_file="multiple",
            file_type=list(attached_image.SUFFIXES),
            max_upload_size=math.ceil(self._max_bytes / 2**20),
            submit_mode="stop",
            on_submit=self._note_submit,
        )
        clicked, chat.next_ask = chat.next_ask, None
        ask = self._accept(given) if given else clicked
        if ask is not None:
            chat.notices.clear()
            self._check(ask, wishes)
        return ask

    def _accept(self, given: ChatInputValue) -> Ask:
        words = self._words
        try:
            brought = [*self._chat.tray, *(self._prepare(file.name, file.getvalue()) for file in given.files)]
        except PictureError as error:
            self._refuse(composer.picture_problem(error, words), given.text)
        usual = words("ask.default_many" if len(brought) > 1 else "ask.default")
        return Ask(given.text.strip() or usual, brought)

    def _check(self, ask: Ask, wishes: Wishes) -> None:
        """Nothing is sent that could only fail; the visitor's words and pictures stay."""
        words, conversation = self._words, self._chat.conversation
        if wishes.problems:
            self._refuse(wishes.problems[0], ask.question, ask)
        if len(conversation.turns) >= MAX_TURNS and not ask.again:
            self._refuse(words("chat.full", limit=MAX_TURNS), ask.question, ask)
        count = conversation.picture_count(new=len(ask.pictures))
        if count > self._max_images:
            self._refuse(words("picture.too_many", count=count, limit=self._max_images), ask.question)

    def _prepare(self, name: str, data: bytes) -> Picture:
        return attached_image.prepare(name, data, self._max_bytes, self._max_pixels)

    def _refuse(self, notice: str, question: str, ask: Ask | None = None) -> None:
        """Say why nothing was sent, and put the question back into the input box, its pictures into the tray."""
        self._chat.notices = [notice]
        if ask is None or not ask.again:
            st.session_state["draft"] = question
        if ask is not None:
            self._chat.tray = list(ask.pictures)
        st.rerun()

    def _note_submit(self) -> None:
        self._chat.submitted = True

    def new_chat(self) -> None:
        st.session_state["chat"] = Chat()
        st.query_params.pop("chat", None)

    def open_chat(self, id: str) -> None:
        st.query_params["chat"] = id

    def _ask_sample(self, sample: Sample, question: str) -> None:
        picture = self._prepare(sample.file, sample.path.read_bytes())
        self._chat.next_ask = Ask(question, [picture], sample.file)

    def _ask_on(self, question: str) -> None:
        self._chat.next_ask = Ask(question)

    def _give_results(self) -> None:
        calls = self._chat.conversation.turns[-1].answer.calls
        given = [str(st.session_state.get(f"result-{n}", "")).strip() for n in range(len(calls))]
        results = tuple(ToolResult(call.id, call.name, text) for call, text in zip(calls, given, strict=True))
        self._chat.next_ask = Ask("", results=results)

    def _ask_again(self) -> None:
        self._chat.next_ask = Ask("", again=True)

    def _ask_with_fewer_pictures(self) -> None:
        self._mine.leave_out_older_pictures(self._chat.conversation)
        self._ask_again()

    def _edit(self, editing: bool) -> None:
        self._chat.editing = editing

    def _ask_edited(self) -> None:
        self._chat.next_ask = Ask(str(st.session_state["edited"]).strip(), again=True)

    # What the visitor sees.

    def show_talk(self, ask: Ask | None) -> None:
        """Every turn but the one that is being answered in this run."""
        turns = self._chat.conversation.turns
        for turn in turns[:-1] if ask and ask.again else turns:
            if self._chat.editing and turn is turns[-1] and ask is None:
                self._show_edited(turn)
            else:
                show_question(turn, self._chat.conversation, self._mine, self._words)
            show_answer(turn, self._chat.conversation, self._mine, self._words)

    def _show_edited(self, turn: Turn) -> None:
        words = self._words
        with st.chat_message("user", avatar=USER):
            st.session_state.setdefault("edited", turn.question)
            st.text_area(words("edit.label"), key="edited")
            with st.container(horizontal=True):
                st.button(words("edit.send"), type="primary", key="edit-send", on_click=self._ask_edited)
                st.button(words("edit.cancel"), key="edit-cancel", on_click=self._edit, args=(False,))

    def _limits(self) -> str:
        return self._words("ask.limits", count=self._max_images, size=f"{self._max_bytes / 2**20:g}")

    def show_beginnings(self) -> None:
        """Under the empty page's input box: ways to add pictures, ready-made questions, sample pictures."""
        words = self._words
        composer.show_ways_in(self._chat.tray, self._prepare, self._limits(), words, self._by_link)
        composer.show_presets(words)
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
        if self._mine.failed and self._chat.conversation.turns:
            st.warning(self._words("chat.unsaved"), icon=":material/save:")

    def show_next_steps(self) -> None:
        """Under the last answer: again, change the question, go on; then what can be added to the next question."""
        words, conversation = self._words, self._chat.conversation
        if not conversation.turns:
            return
        last = conversation.turns[-1].answer
        with st.container(horizontal=True):
            key = "answer.again" if last.state in ("failed", "stopped") else "answer.other"
            st.button(words(key), icon=":material/refresh:", key="again", type="tertiary", on_click=self._ask_again)
            if not conversation.turns[-1].results:
                st.button(
                    words("edit.edit"), icon=":material/edit:", key="edit", type="tertiary", on_click=self._edit,
                    args=(True,),
                )  # fmt: skip
            if last.error and last.error.kind == "too_long" and conversation.with_older_pictures():
                st.button(
                    words("answer.fewer"), icon=":material/hide_image:", key="fewer", type="tertiary",
                    on_click=self._ask_with_fewer_pictures,
                )  # fmt: skip
            if last.error and last.error.kind in AILING:
                st.page_link(self._console, label=words("nav.console"), icon=":material/monitor_heart:")
            if last.was_cut_off:
                st.button(
                    words("answer.go_on"), icon=":material/resume:", key="go-on", type="tertiary",
                    on_click=self._ask_on, args=(words("answer.go_on_question"),),
                )  # fmt: skip
            if last.text.strip():
                with st.popover(words("answer.copy"), icon=":material/content_copy:", type="tertiary"):
                    st.code(last.text.strip(), language=None, wrap_lines=True)
        if last.waits_for_tools:
            self._show_results_form(last)
        elif last.state == "done":
            self._show_more_questions()
        composer.show_ways_in(self._chat.tray, self._prepare, self._limits(), words, self._by_link, presets_folded=True)
        composer.show_tray(self._chat.tray, words)

    def _show_results_form(self, answer: Answer) -> None:
        """The page runs no tool: whoever did tells here what it gave."""
        words = self._words
        with st.form("tool-results"):
            for n, call in enumerate(answer.calls):
                st.caption(words("tool.result", name=plain(call.name)))
                # The name for screen readers is taken as it stands, not as Markdown.
                st.text_area(words("tool.result", name=call.name), key=f"result-{n}", height=80, label_visibility="collapsed")
            st.form_submit_button(words("tool.send"), icon=":material/reply:", on_click=self._give_results)

    def _show_more_questions(self) -> None:
        words, conversation = self._words, self._chat.conversation
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
        conversation, mine = self._chat.conversation, self._mine
        turn = self._new_turn(ask)
        turn.answer.schema = wishes.schema
        self._chat.tray, self._chat.editing = [], False
        st.session_state.pop("edited", None)
        mine.save(conversation)
        st.query_params["chat"] = conversation.id
        show_question(turn, conversation, mine, self._words)
        with st.chat_message("assistant", avatar=MODEL):
            live = LiveAnswer(turn.answer, self._words)
            # The input box has a stop button too, but not for a click on a sample, nor in the reader's language.
            st.button(self._words("live.stop"), icon=":material/stop_circle:", key="stop")
        redraw_when_stopped(turn.answer)
        try:
            with AnswerStream(self._client, self._body(conversation, wishes)) as stream:
                for batch in stream.batches():
                    now = time.monotonic()
                    for event in batch:
                        turn.answer.take(event, now)
                    mine.save_now_and_then(conversation)
                    live.draw()
        except ApiError as error:
            turn.answer.fail(error, time.monotonic())
        finally:
            # A run that was stopped ends here, by an exception of Streamlit's: what had come is kept.
            turn.answer.stop(time.monotonic())
            mine.save(conversation)
        st.rerun()

    def _new_turn(self, ask: Ask) -> Turn:
        conversation = self._chat.conversation
        if ask.results:
            return conversation.give_results(ask.results)
        if ask.again:
            return conversation.ask_again(ask.question)
        return conversation.ask(ask.question, ask.pictures, ask.sample)

    def _body(self, conversation: Conversation, wishes: Wishes) -> dict[str, Any]:
        messages = conversation.messages(self._mine.url_of)
        if wishes.system:
            messages.insert(0, {"role": "system", "content": wishes.system})
        body: dict[str, Any] = {"messages": messages, **wishes.as_body()}
        return {"model": self._info.model, **body} if self._info.model else body
