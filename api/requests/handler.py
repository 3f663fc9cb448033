"""One accepted request, from its place in the queue to its last event.

However it ends, it ends once, in a completion or an error, and gives back all that it holds.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.requests import Request

from api.engine.engine import NotAccepting
from api.engine.request import Delta, Done, Event, Failed, SamplingParams
from api.engine.request import Request as EngineRequest
from api.engine.scheduler import QueueFull
from api.engine.text.grammar import MatcherGrammar
from api.errors import ServingError, failed, not_accepting, queue_full, unknown_model
from api.http.body import while_connected
from api.images.decode import is_remote
from api.parsing.output import OutputParser
from api.protocol.completion import Choice, Chunk, Completion
from api.protocol.formatter import Words
from api.protocol.schemas import ChatRequest
from api.requests import prompt as prompts
from api.requests.admission import Place
from api.requests.sampling_params import check_bias, compile_grammars, longest_answer, sampling
from api.state import Services


class Inbox:
    """Brings the events of all choices from the engine thread into the loop that made it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def deliver(self, index: int, event: Event) -> None:
        # A closed loop means that the process is ending and nobody reads any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def next(self, timeout_s: float | None = None) -> tuple[int, Event] | None:
        """The next event and its choice, or None if none came in time."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._events.get()
        except TimeoutError:
            return None


class Job:
    def __init__(self, server: Services, completion: Completion, place: Place, log: dict[str, Any]) -> None:
        self.completion = completion
        self._server = server
        self._place = place
        self._log = log
        self._inbox = Inbox()
        self._grammars: list[MatcherGrammar | None] = []
        self._wrote_at: dict[int, float] = {}  # when each choice had its last text

    def submit(self, samplings: list[SamplingParams], grammars: list[MatcherGrammar | None], salt: str) -> None:
        """Hand every choice to the engine, or none."""
        prompt = self.completion.prompt
        self._grammars = grammars
        self._log |= {"engine_request": self.completion.id, "images": len(prompt.pictures)}
        for index, wanted in enumerate(samplings):
            request = EngineRequest(
                id=self._engine_id(index),
                prompt_ids=prompt.ids,
                sampling=wanted,
                images=prompt.pictures,
                salt=salt,
                probe=self._place.caller.probe,
                deadline_s=self._server.settings.request_timeout_s,
            )
            try:
                self._server.engine.submit(request, partial(self._deliver, index))
            except NotAccepting as error:
                self.close()
                raise not_accepting(error.state, self._server.engine.stats().progress, str(error)) from None
            except QueueFull:
                self.close()
                raise queue_full(self._server.settings.queue_size) from None

        self._server.metrics.submitted(samplings[0].max_tokens, len(samplings), self._place.caller.probe)

    def _deliver(self, index: int, event: Event) -> None:
        """Called in the engine thread."""
        if isinstance(event, Delta):
            now, before = time.monotonic(), self._wrote_at.get(index)
            self._wrote_at[index] = now
            gap_s = None if before is None else now - before
            self._server.metrics.wrote(event.tokens, self._server.engine.steps, gap_s, self._place.caller.probe)
        self._inbox.deliver(index, event)

    def close(self) -> None:
        """Free what the request holds, whatever became of it."""
        for choice in self.completion.choices:
            if choice.done is None:
                self._server.engine.abort(self._engine_id(choice.index))
        self._place.close()

    async def whole(self, words: Words) -> dict[str, Any]:
        words.opening()
        async for part in self.chunks(None):
            if not isinstance(part, str):
                words.say(part)
        words.closing()
        return words.body()

    async def chunks(self, heartbeat_s: float | None) -> AsyncIterator[Chunk | str]:
        """What a stream sends: chunks, and each `heartbeat_s` without one a comment. Raises ServingError."""
        completion = self.completion
        while not completion.finished:
            received = await self._inbox.next(heartbeat_s)
            if received is None:
                yield self._comment()
                continue
            index, event = received
            if isinstance(event, Delta):
                parts = completion.feed(index, event)
            else:
                parts = completion.finish(index, self._end(index, event))
                if completion.finished:
                    self._succeed()
            for part in parts:
                yield part

    def note(self, outcome: str) -> None:
        self._log["failure"] = outcome
        self._server.metrics.failed(outcome, self._place.caller.probe)

    def _end(self, index: int, event: Done | Failed) -> Done:
        """A failure becomes the error it is, and so does a grammar that could not go on."""
        if isinstance(event, Failed):
            self.note(event.kind.value)
            raise failed(event.kind, event.message)
        grammar = self._grammars[index] if self._grammars else None
        if grammar is not None and grammar.failed:
            self.note("grammar")
            raise ServingError(500, "The form that was asked for could not be kept.", "server_error", "grammar_failed")
        return event

    def _succeed(self) -> None:
        self._place.close()  # a client that reads slowly holds no place
        completion = self.completion
        usage, timings = completion.usage(), completion.timings()
        reasons = [choice.finish_reason for choice in completion.choices]
        facts = {"usage": usage, "timings": timings, "reasons": reasons}
        pictures = len(completion.prompt.pictures)
        self._server.metrics.answered(facts, pictures, self._place.caller.probe)
        if not self._place.caller.probe:
            self._server.heartbeat.succeeded(pictures=pictures > 0)
        self._log |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        self._log |= {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"], "finish": ",".join(reasons)}
        self._log |= timings

    def _engine_id(self, index: int) -> str:
        return self.completion.id if len(self.completion.choices) == 1 else f"{self.completion.id}-{index}"

    def _comment(self) -> str:
        if self.completion.first_token_at is not None:
            return "waiting for the next token"
        places = [self._server.engine.position(self._engine_id(c.index)) or 0 for c in self.completion.choices]
        return f"queue_position={min(places)}"


async def start(request: Request, server: Services, chat: ChatRequest, place: Place, arrived_at: float) -> Job:
    """Fetch, measure, ask for room, decode, compile, submit. Raises ServingError or ClientGone."""
    model = server.model()
    if chat.model is not None and chat.model != model.id:
        raise unknown_model(chat.model, model.id)
    check_bias(chat, model)
    if chat.choices > 1:
        place.take(chat.choices - 1)
    began = time.monotonic()
    loop, pool = asyncio.get_running_loop(), server.pools.preprocess(place.caller)
    fetched = await while_connected(request, _fetch(server, chat))
    draft = await while_connected(
        request, loop.run_in_executor(pool, prompts.draft, chat, fetched, model, server.settings)
    )
    place.weigh((draft.tokens + longest_answer(chat, model, draft.tokens, server.settings)) * chat.choices)
    prompt = await while_connected(request, loop.run_in_executor(pool, prompts.finish, draft, model))
    grammars = await while_connected(request, compile_grammars(server, chat, prompt.starts_thinking))
    tools = {tool.function.name: tool.function.parameters or {} for tool in chat.active_tools}
    name = uuid.uuid4().hex
    completion = Completion(
        id=name,
        request_id=request.state.request_id,
        model=model.id,
        prompt=prompt,
        choices=[
            Choice(
                index=index,
                call_id=f"call_{name}_{index}",
                parser=OutputParser(
                    tools,
                    prompt.starts_thinking,
                    literal=chat.answer_schema is not None,
                    pictures=len(prompt.pictures),
                ),
                prompt=prompt,
                vocabulary=model.vocabulary,
                wants_logprobs=bool(chat.logprobs),
            )
            for index in range(chat.choices)
        ],
        arrived_at=arrived_at,
        preprocess_s=time.monotonic() - began,
    )
    job = Job(server, completion, place, request.state.log)
    length = len(prompt.ids)
    wanted = [sampling(chat, model, length, server.settings, i, grammar) for i, grammar in enumerate(grammars)]
    # Nothing that one key asked can be told from the timing of another's requests.
    job.submit(wanted, grammars, f"{place.caller.name}:{chat.cache_salt or ''}")
    return job


async def _fetch(server: Services, chat: ChatRequest) -> dict[str, bytes]:
    """The remote pictures of a request, each fetched once."""
    first: dict[str, str] = {}
    for param, url in prompts.picture_urls(chat, server.settings):
        if is_remote(url):
            first.setdefault(url, param)
    loop = asyncio.get_running_loop()
    work = [loop.run_in_executor(server.pools.fetch, server.fetcher.fetch, url, param) for url, param in first.items()]
    return dict(zip(first, await asyncio.gather(*work), strict=True))
