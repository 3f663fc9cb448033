"""POST /v1/chat/completions, whole or streamed.

Every request that is accepted here ends in exactly one of: completion, error body, error event.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from api import prompt as prompts
from api.admission import Ticket
from api.body import ClientGone, discard_body, read_body, while_connected
from api.completion import Completion
from api.engine.engine import NotAccepting
from api.engine.events import EventStream
from api.engine.model import Model
from api.engine.request import Delta, Done, Failed, Failure, Sampling
from api.engine.request import Request as EngineRequest
from api.engine.scheduler import QueueFull
from api.errors import ServingError, internal, not_accepting, queue_full, unavailable, unknown_model
from api.output import END_THINK, THINK, OutputParser
from api.schemas import ChatRequest, parse_chat
from api.services import Services, services

logger = logging.getLogger(__name__)
router = APIRouter()

HEARTBEAT_S = 1.0


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    arrived_at = time.monotonic()
    server = services(request)
    try:
        ticket = _admit(server)
    except ServingError:
        await discard_body(request)
        raise
    try:
        chat = parse_chat(await read_body(request, server.settings.max_body_bytes))
        job = await _start(request, server, chat, ticket, arrived_at)
    except BaseException:
        ticket.close()
        raise
    if chat.stream:
        return StreamedAnswer(request, job, bool(chat.stream_options and chat.stream_options.include_usage))
    try:
        return JSONResponse(await while_connected(request, job.whole()))
    finally:
        job.close()


def _admit(server: Services) -> Ticket:
    stats = server.engine.stats()
    if stats.state in ("loading", "draining", "dead"):
        raise not_accepting(stats.state, stats.progress, stats.reason)
    return server.admission.enter()


async def _start(request: Request, server: Services, chat: ChatRequest, ticket: Ticket, arrived_at: float) -> Job:
    model = server.model()
    if chat.model is not None and chat.model != model.id:
        raise unknown_model(chat.model, model.id)
    began = time.monotonic()
    loop = asyncio.get_running_loop()
    building = loop.run_in_executor(server.pool, prompts.build, chat, model, server.settings)
    prompt = await while_connected(request, building)
    tools = {tool.function.name: tool.function.parameters or {} for tool in chat.active_tools}
    completion = Completion(
        id=uuid.uuid4().hex,
        model=model.id,
        prompt=prompt,
        parser=OutputParser(tools, prompt.starts_thinking),
        arrived_at=arrived_at,
        preprocess_s=time.monotonic() - began,
    )
    job = Job(server, completion, ticket, request.state.log)
    job.submit(_sampling(chat, model, prompt, server.settings.default_max_tokens))
    return job


def _sampling(chat: ChatRequest, model: Model, prompt: prompts.Prompt, default_max_tokens: int) -> Sampling:
    defaults = model.defaults
    room = model.context_tokens - len(prompt.ids)
    return Sampling(
        max_tokens=min(chat.asked_max_tokens or default_max_tokens, room),
        temperature=defaults.temperature if chat.temperature is None else chat.temperature,
        top_p=defaults.top_p if chat.top_p is None else chat.top_p,
        top_k=defaults.top_k if chat.top_k is None else max(chat.top_k, 0),
        repetition_penalty=chat.repetition_penalty or defaults.repetition_penalty,
        seed=chat.seed,
        stop=chat.stop_strings,
        stop_skips=(THINK, END_THINK),
    )


class Job:
    """One accepted request from its place in the queue to its last event."""

    def __init__(self, server: Services, completion: Completion, ticket: Ticket, log: dict[str, Any]) -> None:
        self.completion = completion
        self.events = EventStream()
        self._server = server
        self._ticket = ticket
        self._log = log

    def submit(self, sampling: Sampling) -> None:
        prompt = self.completion.prompt
        request = EngineRequest(self.completion.id, prompt.ids, sampling, prompt.pictures)
        try:
            self._server.engine.submit(request, self.events.deliver)
        except NotAccepting as error:
            raise not_accepting(error.state, self._server.engine.stats().progress, str(error)) from None
        except QueueFull:
            raise queue_full(self._server.settings.queue_size) from None
        self._log["engine_request"] = self.completion.id
        self._log["images"] = len(prompt.pictures)

    def close(self) -> None:
        """Free what the request holds, whatever became of it."""
        self._server.engine.abort(self.completion.id)
        self._ticket.close()

    async def whole(self) -> dict[str, Any]:
        async for event in self.events:
            if isinstance(event, Delta):
                self.completion.feed(event)
            else:
                done = self.end(event)
                self.completion.finish(done)
                return self.completion.body(done)
        raise internal()

    async def stream(self, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events. An error after the first byte becomes an error event."""
        completion = self.completion
        yield _data(completion.chunk({"role": "assistant", "content": ""}))
        while True:
            event = await self.events.next(HEARTBEAT_S)
            if event is None:
                yield self._heartbeat()
            elif isinstance(event, Delta):
                for delta in completion.feed(event):
                    yield _data(completion.chunk(delta))
            else:
                break
        done = self.end(event)
        for delta in completion.finish(done):
            yield _data(completion.chunk(delta))
        yield _data(completion.last_chunk(done))
        if include_usage:
            yield _data(completion.usage_chunk(done))
        yield "data: [DONE]\n\n"

    def end(self, event: Done | Failed) -> Done:
        """Note the outcome for the log; a failure becomes the error it is."""
        if isinstance(event, Done):
            self._log |= {"prompt_tokens": event.prompt_tokens, "completion_tokens": event.completion_tokens}
            self._log |= {"finish": event.reason.value, **self.completion.timings(event)}
            return event
        self._log["failure"] = event.kind.value
        if event.kind is Failure.ENGINE:
            raise ServingError(500, event.message, "server_error", "engine_error")
        if event.kind is Failure.MEMORY:
            raise ServingError(500, event.message, "server_error", "out_of_memory")
        if event.kind is Failure.DEADLINE:
            raise ServingError(504, event.message, "server_error", "deadline_exceeded")
        if event.kind is Failure.DEAD:
            raise unavailable(event.message, "dead", 60)
        raise unavailable(event.message, "draining", 30)

    def note(self, outcome: str) -> None:
        self._log["failure"] = outcome

    def _heartbeat(self) -> str:
        if self.completion.first_token_at is not None:
            return ": waiting for the next token\n\n"
        return f": queue_position={self._server.engine.position(self.completion.id) or 0}\n\n"


class StreamedAnswer(Response):
    """Sends a job's events; the job is closed when the client goes, even before the first byte."""

    def __init__(self, request: Request, job: Job, include_usage: bool) -> None:
        # The second header keeps nginx from holding the stream back.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._request = request
        self._job = job
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._request, self._send_all(send))
        except ClientGone:
            self._job.note("client_gone")
        finally:
            self._job.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for text in self._job.stream(self._include_usage):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        except ServingError as error:
            await send({"type": "http.response.body", "body": error.event().encode(), "more_body": True})
        except Exception:  # the stream has begun: only an event can tell the client
            logger.exception("event=stream_failed engine_request=%s", self._job.completion.id)
            await send({"type": "http.response.body", "body": internal().event().encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _data(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
