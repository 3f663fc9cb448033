"""The chat page: one run of the script, from a click or a question to the answer on the screen.

Owns the order of the page's parts. An answer is a plain object, changed in place while it streams. Meanwhile nothing
accesses session state: Streamlit ends a stopped run at any such access, and the last events would be lost.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from streamlit.navigation.page import StreamlitPage
from streamlit.typing import ChatInputValue

from settings import Settings
from web.api_client.answer_stream import AnswerStream
from web.api_client.client import ApiClient, ApiError, Info
from web.chat import composer
from web.chat.controls import RequestOptions, show_language, show_request_options
from web.chat.heading import show_heading
from web.chat.timed_fragment import repeat
from web.chat.turns_view import MODEL, USER, LiveAnswer, redraw_when_stopped, show_answer, show_question
from web.history.chat_list import show_chat_menu, show_chats
from web.history.chat_store import VisitorChats
from web.history.conversation import Answer, Conversation, ToolResult, Turn
from web.i18n.strings import Texts
from web.images import attached_image
from web.images.attached_image import AttachedImage, ImageError
from web.safe_text import escaped
from web.samples import Sample, sample_named, samples

SAMPLE_WIDTH = 164  # CSS pixels: four in a row on a desktop, two on a phone
INFO_CACHE_S = 20
MAX_TURNS = 100  # of one chat, because every run draws all of them
OUTAGES = ("down", "silent", "unavailable", "draining")  # kinds of ApiError whose cause the console shows


@dataclass
class Submission:
    """A question to send in this run. `again`: it replaces the last one, or repeats it if `question` is empty.

    `results`: the results of the tools that the last answer called, instead of a question.
    """

    question: str
    images: list[AttachedImage] = field(default_factory=list)
    sample: str | None = None
    again: bool = False
    results: tuple[ToolResult, ...] = ()


@dataclass
class Chat:
    """The state of one session. `pending_images`: attached to the next question, besides the input box's own."""

    conversation: Conversation = field(default_factory=Conversation)
    pending_images: list[AttachedImage] = field(default_factory=list)
    next_submission: Submission | None = None
    submitted: bool = False  # this run was caused by the input box
    editing: bool = False  # the last question is shown in an editable box
    notices: list[str] = field(default_factory=list)


def show_chat(client: ApiClient, settings: Settings, texts: Texts, chats: VisitorChats, console: StreamlitPage | None) -> None:
    chat = _chat(chats)
    chat.conversation.stop_unfinished(time.monotonic())
    info, info_error = _info(client)
    page = ChatRun(client, settings, texts, chat, info, chats, console)
    with st.sidebar:
        show_chats(chats, chat.conversation, texts, page.open_chat, page.new_chat)
        if chat.conversation.turns:
            show_chat_menu(chats, chat.conversation, texts, page.new_chat)
        st.space("small")
        options = show_request_options(info, texts)
        st.space("small")
        show_language(texts)
    at_start = not (chat.conversation.turns or chat.next_submission or chat.submitted)
    chat.submitted = False
    # Each part keeps its element from run to run, so that what it no longer shows disappears at once. Otherwise it
    # would stay, greyed out, below a streaming answer.
    show_heading(client, info, info_error, texts, at_start)
    # At the start they are containers from the first message on: an input box that is emptied and filled again loses the
    # pictures in it whenever the browser draws in between.
    start_input, start_area = (st.container() if at_start else st.empty() for _ in range(2))
    with st.container(gap=None):
        timer, turns = st.container(), st.container()
    followups = st.empty()
    if at_start:
        # Not pinned to the bottom: a phone would open the page scrolled to its end.
        with start_input:
            composer.show_pending_images(chat.pending_images, texts)
            submission = page.read_input(options)
            page.show_notices()
        with start_area:
            page.show_start()
    else:
        submission = page.read_input(options)
    with turns:
        page.show_turns(submission)
        if not at_start:
            page.show_notices()
        if submission is not None:
            followups.empty()
            page.answer(submission, options, timer)
    with timer:  # no answer is in progress; the place of `redraw_when_stopped` must be kept
        repeat(None)
    with followups.container():
        page.show_followups()


def _chat(chats: VisitorChats) -> Chat:
    """The session's chat, or the one in the URL after a reload or the browser's back button."""
    requested = st.query_params.get("chat", "")
    chat: Chat | None = st.session_state.get("chat")
    if requested and (chat is None or requested != chat.conversation.id):
        conversation = chats.load(requested)
        if conversation is not None:
            chat = Chat(conversation)
        else:
            del st.query_params["chat"]
    st.session_state["chat"] = chat = chat or Chat()
    if chat.conversation.turns and st.query_params.get("chat") != chat.conversation.id:
        st.query_params["chat"] = chat.conversation.id
    return chat


def _info(client: ApiClient) -> tuple[Info | None, ApiError | None]:
    try:
        return _cached_info(client.base_url, client), None
    except ApiError as error:
        return None, error


@st.cache_data(ttl=INFO_CACHE_S, show_spinner=False)
def _cached_info(base_url: str, _client: ApiClient) -> Info:
    return _client.info()


class ChatRun:
    """One run of the script for one visitor."""

    def __init__(
        self, client: ApiClient, settings: Settings, texts: Texts, chat: Chat, info: Info | None, chats: VisitorChats,
        console: StreamlitPage | None,
    ) -> None:  # fmt: skip
        self._client = client
        self._texts = texts
        self._chat = chat
        self._info = info or Info()
        self._chats = chats
        self._console = console
        limits = self._info.limits
        self._by_link = bool(limits.get("fetch_images", True))  # an external engine does not report it
        self._max_images = limits.get("max_images", settings.max_images)
        self._max_bytes = min(limits.get("max_image_bytes", settings.max_image_bytes), settings.max_image_bytes)
        self._max_pixels = min(limits.get("max_image_pixels", settings.max_image_pixels), settings.max_image_pixels)

    # Input.

    def read_input(self, options: RequestOptions) -> Submission | None:
        """The question of this run: from the input box, or from the callback of a button."""
        texts, chat = self._texts, self._chat
        if (draft := st.session_state.pop("draft", None)) is not None:
            st.session_state["question"] = draft
        submitted = st.chat_input(
            texts("ask.placeholder_next" if chat.conversation.turns else "ask.placeholder"),
            key="question",
            accept_file="multiple",
            file_type=list(attached_image.SUFFIXES),
            max_upload_size=math.ceil(self._max_bytes / 2**20),
            submit_mode="stop",
            on_submit=self._note_submit,
        )
        clicked, chat.next_submission = chat.next_submission, None
        submission = self._accept(submitted) if submitted else clicked
        if submission is not None:
            chat.notices.clear()
            self._check(submission, options)
        return submission

    def _accept(self, submitted: ChatInputValue) -> Submission:
        texts = self._texts
        try:
            images = [*self._chat.pending_images, *(self._prepare(file.name, file.getvalue()) for file in submitted.files)]
        except ImageError as error:
            self._refuse(composer.image_problem(error, texts), submitted.text)
        default = texts("ask.default_many" if len(images) > 1 else "ask.default")
        return Submission(submitted.text.strip() or default, images)

    def _check(self, submission: Submission, options: RequestOptions) -> None:
        """Refuse what is certain to fail; the question and its images stay on the page."""
        texts, conversation = self._texts, self._chat.conversation
        if options.problems:
            self._refuse(options.problems[0], submission.question, submission)
        if len(conversation.turns) >= MAX_TURNS and not submission.again:
            self._refuse(texts("chat.full", limit=MAX_TURNS), submission.question, submission)
        count = conversation.image_count(new=len(submission.images))
        if count > self._max_images:
            self._refuse(texts("image.too_many", count=count, limit=self._max_images), submission.question)

    def _prepare(self, name: str, data: bytes) -> AttachedImage:
        return attached_image.prepare(name, data, self._max_bytes, self._max_pixels)

    def _refuse(self, notice: str, question: str, submission: Submission | None = None) -> None:
        """Rerun with a notice instead of sending; the question goes back into the input box, its images above it."""
        self._chat.notices = [notice]
        if submission is None or not submission.again:
            st.session_state["draft"] = question
        if submission is not None:
            self._chat.pending_images = list(submission.images)
        st.rerun()

    def _note_submit(self) -> None:
        self._chat.submitted = True

    def new_chat(self) -> None:
        st.session_state["chat"] = Chat()
        st.query_params.pop("chat", None)

    def open_chat(self, id: str) -> None:
        st.query_params["chat"] = id

    def _ask_sample(self, sample: Sample, question: str) -> None:
        image = self._prepare(sample.file, sample.path.read_bytes())
        self._chat.next_submission = Submission(question, [image], sample.file)

    def _ask_next(self, question: str) -> None:
        self._chat.next_submission = Submission(question)

    def _submit_results(self) -> None:
        calls = self._chat.conversation.turns[-1].answer.calls
        fields = [str(st.session_state.get(f"result-{n}", "")).strip() for n in range(len(calls))]
        results = tuple(ToolResult(call.id, call.name, text) for call, text in zip(calls, fields, strict=True))
        self._chat.next_submission = Submission("", results=results)

    def _ask_again(self) -> None:
        self._chat.next_submission = Submission("", again=True)

    def _ask_with_fewer_images(self) -> None:
        self._chats.leave_out_older_images(self._chat.conversation)
        self._ask_again()

    def _edit(self, editing: bool) -> None:
        self._chat.editing = editing

    def _ask_edited(self) -> None:
        self._chat.next_submission = Submission(str(st.session_state["edited"]).strip(), again=True)

    # Output.

    def show_turns(self, submission: Submission | None) -> None:
        """Draw every turn except the one that this run answers."""
        turns = self._chat.conversation.turns
        for turn in turns[:-1] if submission and submission.again else turns:
            if self._chat.editing and turn is turns[-1] and submission is None:
                self._show_editor(turn)
            else:
                show_question(turn, self._chat.conversation, self._chats, self._texts)
            show_answer(turn, self._chat.conversation, self._chats, self._texts)

    def _show_editor(self, turn: Turn) -> None:
        texts = self._texts
        with st.chat_message("user", avatar=USER):
            st.session_state.setdefault("edited", turn.question)
            st.text_area(texts("edit.label"), key="edited")
            with st.container(horizontal=True):
                st.button(texts("edit.send"), type="primary", key="edit-send", on_click=self._ask_edited)
                st.button(texts("edit.cancel"), key="edit-cancel", on_click=self._edit, args=(False,))

    def _limits(self) -> str:
        return self._texts("ask.limits", count=self._max_images, size=f"{self._max_bytes / 2**20:g}")

    def show_start(self) -> None:
        """Below the input box of an empty chat: attaching images, ready-made questions, sample images."""
        texts = self._texts
        composer.show_attach_controls(self._chat.pending_images, self._prepare, self._limits(), texts, self._by_link)
        composer.show_presets(texts)
        st.markdown(f"**{texts('samples.title')}**")
        cards = st.container(horizontal=True)
        for sample in samples():
            question = sample.questions[texts.language][0]
            with cards.container(width=SAMPLE_WIDTH):
                st.image(str(sample.path), width="stretch", alt=sample.alt[texts.language])
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
        if self._chats.replaced:
            st.warning(self._texts("chat.replaced"), icon=":material/healing:")
        if self._chats.failed and self._chat.conversation.turns:
            st.warning(self._texts("chat.unsaved"), icon=":material/save:")

    def show_followups(self) -> None:
        """Below the last answer: retry, edit, continue; then attaching images to the next question."""
        texts, conversation = self._texts, self._chat.conversation
        if not conversation.turns:
            return
        last = conversation.turns[-1].answer
        with st.container(horizontal=True):
            key = "answer.again" if last.state in ("failed", "stopped") else "answer.other"
            st.button(texts(key), icon=":material/refresh:", key="again", type="tertiary", on_click=self._ask_again)
            if not conversation.turns[-1].results:
                st.button(
                    texts("edit.edit"), icon=":material/edit:", key="edit", type="tertiary", on_click=self._edit,
                    args=(True,),
                )  # fmt: skip
            if last.error and last.error.kind == "too_long" and conversation.turns_with_older_images():
                st.button(
                    texts("answer.fewer"), icon=":material/hide_image:", key="fewer", type="tertiary",
                    on_click=self._ask_with_fewer_images,
                )  # fmt: skip
            if self._console is not None and last.error and last.error.kind in OUTAGES:
                st.page_link(self._console, label=texts("nav.console"), icon=":material/monitor_heart:")
            if last.was_cut_off:
                st.button(
                    texts("answer.go_on"), icon=":material/resume:", key="go-on", type="tertiary",
                    on_click=self._ask_next, args=(texts("answer.go_on_question"),),
                )  # fmt: skip
            if last.text.strip():
                with st.popover(texts("answer.copy"), icon=":material/content_copy:", type="tertiary"):
                    st.code(last.text.strip(), language=None, wrap_lines=True)
        if last.awaits_tool_results:
            self._show_results_form(last)
        elif last.state == "done":
            self._show_sample_questions()
        composer.show_attach_controls(self._chat.pending_images, self._prepare, self._limits(), texts, self._by_link, presets_folded=True)
        composer.show_pending_images(self._chat.pending_images, texts)

    def _show_results_form(self, answer: Answer) -> None:
        """The page runs no tools: the visitor runs them and enters the results here."""
        texts = self._texts
        with st.form("tool-results"):
            for n, call in enumerate(answer.calls):
                st.caption(texts("tool.result", name=escaped(call.name)))
                # A hidden label is plain text, not Markdown.
                st.text_area(texts("tool.result", name=call.name), key=f"result-{n}", height=80, label_visibility="collapsed")
            st.form_submit_button(texts("tool.send"), icon=":material/reply:", on_click=self._submit_results)

    def _show_sample_questions(self) -> None:
        texts, conversation = self._texts, self._chat.conversation
        sample = sample_named(conversation.last_sample() or "")
        if sample is None:
            return
        asked = {turn.question for turn in conversation.turns}
        questions = [question for question in sample.questions[texts.language] if question not in asked]
        if questions:
            st.caption(texts("samples.more"))
            with st.container(horizontal=True):
                for question in questions:
                    st.button(question, key=f"more-{question}", on_click=self._ask_next, args=(question,))

    def answer(self, submission: Submission, options: RequestOptions, timer: DeltaGenerator) -> None:
        """Send the question, draw the answer while it streams, then rerun to draw it finished."""
        conversation, chats = self._chat.conversation, self._chats
        turn = self._new_turn(submission)
        turn.answer.schema = options.schema
        self._chat.pending_images, self._chat.editing = [], False
        st.session_state.pop("edited", None)
        if not chats.save(conversation):
            self._show_newest(submission)
        st.query_params["chat"] = conversation.id
        show_question(turn, conversation, chats, self._texts)
        with st.chat_message("assistant", avatar=MODEL):
            live = LiveAnswer(turn.answer, self._texts)
            # The input box's own stop button is missing after a click on a sample, and it is in English only.
            st.button(self._texts("live.stop"), icon=":material/stop_circle:", key="stop")
        with timer:
            redraw_when_stopped(turn.answer)
        try:
            with AnswerStream(self._client, self._body(conversation, options), conversation.id) as stream:
                for batch in stream.batches():
                    now = time.monotonic()
                    for event in batch:
                        turn.answer.apply(event, now)
                    chats.save_periodically(conversation)
                    live.draw()
        except ApiError as error:
            turn.answer.fail(error, time.monotonic())
        finally:
            # Streamlit ends a stopped run by an exception; what has arrived is saved.
            turn.answer.stop(time.monotonic())
            if not chats.save(conversation):
                self._chat.conversation = chats.save_beside(conversation)
        st.rerun()

    def _show_newest(self, submission: Submission) -> None:
        """Another tab has gone on with this chat: show what it is now, and keep the question for it."""
        newest = self._chats.load(self._chat.conversation.id)
        if newest is None:
            return  # deleted or unreadable since; the answer stays in this tab
        self._chat.conversation = newest
        entered = submission.question or "\n".join(result.text for result in submission.results)
        if entered:
            st.session_state["draft"] = entered
        self._refuse(self._texts("chat.changed"), entered, submission)

    def _new_turn(self, submission: Submission) -> Turn:
        conversation = self._chat.conversation
        if submission.results:
            return conversation.ask_with_results(submission.results)
        if submission.again:
            return conversation.ask_again(submission.question)
        return conversation.ask(submission.question, submission.images, submission.sample)

    def _body(self, conversation: Conversation, options: RequestOptions) -> dict[str, Any]:
        messages = conversation.messages(self._chats.url_of)
        if options.system:
            messages.insert(0, {"role": "system", "content": options.system})
        body: dict[str, Any] = {"messages": messages, **options.as_body()}
        return {"model": self._info.model, **body} if self._info.model else body
