"""The life of one accepted chat request, from its preparation to its last event.

It ends exactly once, in a completion or an error, and releases everything that it holds. It does not know the
connection: when the client disconnects, the route cancels `start` or calls `close`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi.sse import format_sse_event

from api.engine.engine import Engine, NotAccepting
from api.engine.loaded_model import Model
from api.engine.request import Delta, Done, Event, Failed
from api.engine.request import Request as EngineRequest
from api.engine.scheduler import QueueFull
from api.engine.stats import Stats
from api.engine.text.grammar import MatcherGrammar
from api.errors import ServingError, cannot_enforce, failed, internal, not_accepting, queue_full, unknown_model
from api.health.metrics import Metrics
from api.parsing.output import OutputParser, VerbatimParser
from api.protocol.answer_check import unmet
from api.protocol.completion import Choice, Chunk, Completion, ResponseFormatter
from api.protocol.schemas import ChatRequest
from api.requests.admission import Permit
from api.requests.prompt import Prompt, PromptBuilder
from api.requests.sampling_params import Grammars, check_tokens, longest_answer, sampling_params
from settings import Settings

logger = logging.getLogger(__name__)

COMMENT_S = 1.0  # a stream without an event for so long sends a comment


class Post:
    """Carries events from the engine thread to event loops: one wake-up for all that a step delivers. What it delivers is
    counted there, so that the engine does not wait for it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._letters: deque[tuple[Inbox, int, Event]] = deque()

    def put(self, inbox: Inbox, index: int, event: Event) -> None:
        """Called in any thread; the event leaves with the next `wake`."""
        self._letters.append((inbox, index, event))

    def wake(self) -> None:
        """Called in any thread."""
        at = time.monotonic()
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Inbox, int, Event]]] = {}
        while self._letters:
            try:
                letter = self._letters.popleft()
            except IndexError:  # another thread took the last
                break
            by_loop.setdefault(letter[0].loop, []).append(letter)
        for loop, letters in by_loop.items():
            # The loop is closed only when the process is ending; nothing reads the events then.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._hand_out, letters, at)

    def _hand_out(self, letters: list[tuple[Inbox, int, Event]], at: float) -> None:
        """Called in the event loop, with what was sent at a monotonic time."""
        texts = []
        for inbox, index, event in letters:
            gap_s = inbox.receive(index, event, at)
            if isinstance(event, Delta):
                texts.append((event.tokens, gap_s, inbox.probe))
        if texts:
            self._metrics.step(texts)


class Inbox:
    """The events of all choices of a request, in the event loop that created it."""

    def __init__(self, probe: bool = False) -> None:
        self.loop, self.probe = asyncio.get_running_loop(), probe
        self._events: list[tuple[int, Event]] = []
        self._arrived = asyncio.Event()
        self._text_at: dict[int, float] = {}  # the last of each choice

    def receive(self, index: int, event: Event, at: float) -> float | None:
        """Called in the event loop. Returns the seconds since the choice's last text, if this is another."""
        self._events.append((index, event))
        self._arrived.set()
        if not isinstance(event, Delta):
            return None
        before, self._text_at[index] = self._text_at.get(index), at
        return None if before is None else at - before

    async def next(self, timeout_s: float | None = None) -> list[tuple[int, Event]]:
        """The events since the last call, at least one, each with the index of its choice; none after `timeout_s`."""
        if not self._events:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                return []
        events, self._events = self._events, []
        self._arrived.clear()
        return events


@dataclass(frozen=True)
class RequestHandlers:
    """Starts the handlers of chat requests, and holds what they share."""

    settings: Settings
    engine: Engine
    metrics: Metrics
    prompts: PromptBuilder
    grammars: Grammars
    post: Post

    def __post_init__(self) -> None:
        self.engine.after_delivery = self.post.wake

    async def start(
        self, chat: ChatRequest, permit: Permit, request_id: str, log: dict[str, Any], arrived_at: float
    ) -> RequestHandler:
        """Build the prompt, count its tokens, compile grammars, submit. Raises ServingError.

        Until a handler is returned nothing has been submitted, and `permit` is the caller's to release. `log` receives
        the fields of the request's log line. `arrived_at` is a monotonic timestamp.
        """
        model = loaded_model(self.engine)
        if chat.model is not None and chat.model != model.id:
            raise unknown_model(chat.model, model.id)
        check_tokens(chat, model)
        if chat.choices > 1:
            permit.take_requests(chat.choices - 1)
        began = time.monotonic()
        # The timing of one key's requests must reveal nothing of another key's prompts.
        salt = f"{permit.caller.name}:{chat.cache_salt or ''}"
        draft = await self.prompts.draft(chat, model, permit.caller, salt)
        permit.take_tokens((draft.tokens + longest_answer(chat, model, draft.tokens, self.settings)) * chat.choices)
        permit.take_image_bytes(draft.image_bytes)
        prompt = await self.prompts.finish(draft, model, permit.caller)
        permit.keep_image_bytes(prompt.image_bytes)
        grammars = await self.grammars.compile(chat, prompt.starts_thinking, model, permit.caller)
        completion = _completion(chat, prompt, model, request_id, arrived_at, time.monotonic() - began)
        if any(grammar is not None and grammar.relaxed for grammar in grammars):
            completion.checked_schema = chat.answer_schema
        handler = RequestHandler(self.engine, self.metrics, self.post, completion, permit, grammars, log, prompt.upload_bytes)
        handler.submit(
            self.engine,
            [
                EngineRequest(
                    id=handler.engine_id(index),
                    prompt_ids=(ids := prompt.texts[index // (chat.n or 1)] if prompt.texts else prompt.ids),
                    sampling=sampling_params(chat, model, len(ids), self.settings, index % (chat.n or 1), grammar),
                    images=prompt.images,
                    salt=salt,
                    probe=permit.caller.probe,
                    deadline_s=self.settings.request_timeout_s,
                )
                for index, grammar in enumerate(grammars)
            ],
            self.engine.queue_size(),
        )
        return handler


Served_co = TypeVar("Served_co", covariant=True)


class WithModel(Protocol[Served_co]):
    @property
    def model(self) -> Served_co | None: ...

    def stats(self) -> Stats: ...


def loaded_model(engine: WithModel[Served_co]) -> Served_co:
    """The engine's model. Raises the 503 error with the reason if it is not loaded."""
    if engine.model is None:
        stats = engine.stats()
        raise not_accepting(stats.state, stats.progress, stats.reason)
    return engine.model


def _completion(
    chat: ChatRequest, prompt: Prompt, model: Model, request_id: str, arrived_at: float, preprocess_s: float
) -> Completion:
    name, facts = uuid.uuid4().hex, prompt.facts
    tools = {tool.function.name: tool.function.parameters or {} for tool in chat.active_tools}
    literal = bool(chat.constraints)
    choices = [
        Choice(
            index=index,
            call_id=f"call_{name}_{index}",
            parser=VerbatimParser()
            if prompt.texts
            else OutputParser(
                tools,
                prompt.starts_thinking,
                literal,
                images=len(prompt.images),
                keeps_box_tags=chat.skip_special_tokens is False,
                continues=bool(chat.continue_final_message),
            ),
            prompt=facts,
            vocabulary=model.vocabulary,
            with_logprobs=bool(chat.logprobs),
            reasoning_place=chat.reasoning_place,
        )
        for index in range(chat.choices)
    ]
    prompts = max(1, len(prompt.texts))
    name_of_request = chat.request_id or request_id
    return Completion(name, name_of_request, model.id, facts, choices, arrived_at, preprocess_s, prompts)


class Answering(Protocol):
    """What a handler needs of an engine once it has submitted its request."""

    def position(self, request_id: str) -> int | None: ...

    def abort(self, request_id: str) -> None: ...


class RequestHandler:
    """One submitted request. Called in the event loop only."""

    def __init__(
        self,
        engine: Answering,
        metrics: Metrics,
        post: Post,
        completion: Completion,
        permit: Permit,
        grammars: list[MatcherGrammar | None],
        log: dict[str, Any],
        upload_bytes: int = 0,
    ) -> None:
        self.completion = completion
        self._upload_bytes = upload_bytes
        self._engine = engine
        self._metrics = metrics
        self._permit = permit
        self._grammars = grammars
        self._log = log
        self._inbox = Inbox(not permit.caller.is_user)
        self._post = post
        self._outcome_known = False

    def engine_id(self, index: int) -> str:
        return self.completion.id if len(self.completion.choices) == 1 else f"{self.completion.id}-{index}"

    def submit(self, engine: Engine, requests: list[EngineRequest], queue_size: int) -> None:
        """Submit all choices, or none. Raises the 503 error."""
        self._log |= {"engine_request": self.completion.id, "images": len(requests[0].images)}
        for index, request in enumerate(requests):
            try:
                engine.submit(request, partial(self._post.put, self._inbox, index))
            except NotAccepting as error:
                self._release()
                raise not_accepting(error.state, engine.stats().progress, str(error)) from None
            except QueueFull:
                self._release()
                raise queue_full(queue_size) from None
        self._metrics.submitted(requests[0].sampling.max_tokens, len(requests), not self._permit.caller.is_user)

    async def body(self, formatter: ResponseFormatter) -> dict[str, Any]:
        """The whole answer. Raises ServingError."""
        try:
            formatter.opening()
            async for chunks in self._chunks(None):
                for chunk in chunks:
                    formatter.format(chunk)
            formatter.closing()
            return formatter.body()
        except ServingError:
            raise
        except Exception as error:
            self._broke(error)
            raise

    async def events(self, formatter: ResponseFormatter) -> AsyncGenerator[bytes, None]:
        """The encoded events of a stream. An error becomes the last event: the status has been sent already."""
        try:
            for event in formatter.opening():
                yield event.encode()
            async for chunks in self._chunks(COMMENT_S):
                if not chunks:
                    yield format_sse_event(comment=self._progress())
                    continue
                events = [event.encode() for chunk in chunks for event in formatter.format(chunk)]
                if events:
                    yield b"".join(events)
            for event in formatter.closing():
                yield event.encode()
        except ServingError as error:
            yield formatter.failed(error).encode()
        except Exception as error:
            self._broke(error)
            logger.exception("event=stream_failed engine_request=%s", self.completion.id)
            yield formatter.failed(internal()).encode()

    def close(self) -> None:
        """Release what the request holds, and abort it if it is running: without an outcome, the client has disconnected."""
        if not self._outcome_known:
            self._fail("client_gone")
        self._release()

    async def _chunks(self, comment_s: float | None) -> AsyncIterator[list[Chunk]]:
        """The chunks as they become available, and none after each `comment_s` without one. Raises ServingError."""
        completion = self.completion
        while not completion.finished:
            received = await self._inbox.next(comment_s)
            if not received:
                yield []
                continue
            self._permit.keep_image_bytes(self._upload_bytes)  # the images are encoded
            chunks, deltas = [], list[Delta]()
            for number, (index, event) in enumerate(received):
                if isinstance(event, Delta):
                    deltas.append(event)
                    following = received[number + 1] if number + 1 < len(received) else None
                    if following is None or following[0] != index or not isinstance(following[1], Delta):
                        chunks += completion.feed(index, deltas)  # a client that lags gets several tokens at once
                        deltas = []
                    continue
                try:
                    done = self._checked(index, event)
                except ServingError:
                    if chunks:
                        yield chunks
                    raise
                chunks += completion.finish(index, done)
                if completion.finished:
                    await self._check_schema(chunks)
                    self._succeed()
            if chunks:
                yield chunks

    async def _check_schema(self, chunks: list[Chunk]) -> None:
        """Names what the answers do not fit of a schema that the grammar could bind only in part."""
        schema = self.completion.checked_schema
        if schema is None:
            return
        for choice in self.completion.choices:
            if text := choice.json_text:
                found = await asyncio.to_thread(unmet, schema, text)
                self.completion.unmet += [name for name in found if name not in self.completion.unmet]
        if self.completion.unmet:
            self._log["unmet"] = ",".join(self.completion.unmet)
            chunks[-1]["unmet"] = self.completion.unmet

    def _checked(self, index: int, event: Done | Failed) -> Done:
        """The event of a finished choice. Raises the ServingError of a failed request or a failed grammar."""
        if isinstance(event, Failed):
            self._fail(event.kind.value)
            raise failed(event.kind, event.message)
        grammar = self._grammars[index]
        if grammar is not None and grammar.failed:
            self._fail("grammar")
            raise cannot_enforce(grammar.failed)
        return event

    def _succeed(self) -> None:
        self._outcome_known = True
        self._permit.release()  # a slow reader must not hold a permit
        completion = self.completion
        usage, timings = completion.usage(), completion.timings()
        reasons = [choice.finish_reason for choice in completion.choices]
        images = len(completion.prompt.image_sizes)
        self._metrics.answered(usage, timings, reasons, images, not self._permit.caller.is_user)
        self._log |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        self._log |= {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"], "finish": ",".join(reasons)}
        self._log |= timings

    def _fail(self, reason: str) -> None:
        self._outcome_known = True
        self._log["failure"] = reason
        self._metrics.failed(reason, not self._permit.caller.is_user)

    def _broke(self, error: Exception) -> None:
        """The answer could not be written, even if the engine has finished it."""
        self._fail("memory" if isinstance(error, MemoryError) else "internal")

    def _release(self) -> None:
        for choice in self.completion.choices:
            if choice.done is None:
                self._engine.abort(self.engine_id(choice.index))
        self._permit.release()

    def _progress(self) -> str:
        """The comment for a waiting client."""
        if self.completion.first_token_at is not None:
            return "waiting for the next token"
        positions = [self._engine.position(self.engine_id(c.index)) or 0 for c in self.completion.choices]
        return f"queue_position={min(positions)}"
