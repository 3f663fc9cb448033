"""Starts and owns the questions to an engine behind, as `api.requests.handler` does for the engine of this process."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from api.behind.answer import AnswerReader, EngineChoice, EngineDone, EngineFailed
from api.behind.pictures import Picture, guarded
from api.behind.question import bodies
from api.behind.remote_engine import EngineModel, RemoteEngine
from api.engine.request import Done, Failed
from api.errors import unknown_model
from api.health.metrics import Metrics
from api.parsing.output import OutputParser, VerbatimParser
from api.protocol.completion import Completion, PromptFacts
from api.protocol.schemas import ChatRequest, TextPart
from api.protocol.text_completion import TextRequest
from api.requests.admission import Permit
from api.requests.handler import Post, RequestHandler, loaded_model
from api.requests.prompt import PromptBuilder, question_image
from settings import Settings

CHARACTERS_PER_TOKEN = 3  # for admission only: about, in any language


@dataclass(frozen=True)
class BehindHandlers:
    """Starts the handlers of chat requests to an engine behind, and holds what they share."""

    settings: Settings
    engine: RemoteEngine
    metrics: Metrics
    prompts: PromptBuilder
    post: Post

    def __post_init__(self) -> None:
        self.engine.after_delivery = self.post.wake

    async def start(
        self, chat: ChatRequest, permit: Permit, request_id: str, log: dict[str, Any], arrived_at: float
    ) -> RequestHandler:
        """Check the pictures, translate the fields, and ask. Returns once the engine has accepted. Raises ServingError.

        Until a handler is returned, `permit` is the caller's to release. The other parameters are those of RequestHandlers.
        """
        model = loaded_model(self.engine)
        if chat.model is not None and chat.model != model.id:
            raise unknown_model(chat.model, model.id)
        if chat.choices > 1:
            permit.take_requests(chat.choices - 1)
        began = time.monotonic()
        salt = f"{permit.caller.name}:{chat.cache_salt or ''}"
        longest = chat.requested_max_tokens or self.settings.default_max_tokens or None
        pictures = await guarded(chat, self.prompts, self.settings, permit.caller, permit)
        path, asked = bodies(chat, model.kind, model.id, model.context_tokens, [picture.url for picture in pictures], salt, longest)
        about = _tokens_about(chat, pictures, model)
        permit.take_tokens((about + (longest or model.answer.of(chat.enable_thinking))) * chat.choices)
        completion = _completion(chat, pictures, model, request_id, arrived_at, time.monotonic() - began)
        completion.checked_schema = chat.answer_schema if model.kind == "other" else None
        handler = BehindHandler(self.engine, self.metrics, self.post, completion, permit, log, chat, sum(len(p.url) for p in pictures) * 3 // 4)
        await handler.ask(path, asked, self.settings.request_timeout_s, longest or model.context_tokens)
        return handler


def _tokens_about(chat: ChatRequest, pictures: list[Picture], model: EngineModel) -> int:
    """How long the prompt is, for admission: only the engine knows."""
    if isinstance(chat, TextRequest):
        characters = max(len(prompt) if isinstance(prompt, str) else len(prompt) * CHARACTERS_PER_TOKEN for prompt in chat.prompts)
    else:
        contents = [message.content or "" for message in chat.messages]
        characters = sum(
            len(content) if isinstance(content, str) else sum(len(part.text) for part in content if isinstance(part, TextPart))
            for content in contents
        )
    return min(model.context_tokens, characters // CHARACTERS_PER_TOKEN + sum(picture.tokens for picture in pictures))


def _completion(
    chat: ChatRequest, pictures: list[Picture], model: EngineModel, request_id: str, arrived_at: float, preprocess_s: float
) -> Completion:
    name, text = uuid.uuid4().hex, isinstance(chat, TextRequest)
    facts = PromptFacts(0, tuple(picture.size for picture in pictures), None if text else question_image(chat, len(pictures)))
    tools = {tool.function.name: tool.function.parameters or {} for tool in chat.active_tools}
    choices: list[Any] = [
        EngineChoice(
            index=index,
            call_id=f"call_{name}_{index}",
            parser=VerbatimParser()
            if text
            else OutputParser(
                tools,
                model.starts_thinking and chat.enable_thinking and not chat.continue_final_message,
                bool(chat.constraints),
                images=len(pictures),
                keeps_box_tags=chat.skip_special_tokens is False,
                continues=bool(chat.continue_final_message),
            ),
            prompt=facts,
            vocabulary=None,
            with_logprobs=bool(chat.logprobs),
            reasoning_place=chat.reasoning_place,
        )
        for index in range(chat.choices)
    ]
    prompts = len(chat.prompts) if isinstance(chat, TextRequest) else 1
    return Completion(name, chat.request_id or request_id, model.id, facts, choices, arrived_at, preprocess_s, prompts)


class BehindHandler(RequestHandler):
    """One question to an engine behind. Called in the event loop only."""

    def __init__(
        self, engine: RemoteEngine, metrics: Metrics, post: Post, completion: Completion, permit: Permit, log: dict[str, Any],
        chat: ChatRequest, upload_bytes: int,
    ) -> None:  # fmt: skip
        super().__init__(engine, metrics, post, completion, permit, [None] * len(completion.choices), log, upload_bytes)
        self._remote = engine
        self._many_calls = chat.many_calls
        self._prompt_tokens: dict[int, int] = {}  # by the number of the prompt

    async def ask(self, path: str, asked: list[dict[str, Any]], deadline_s: float, longest: int) -> None:
        """Ask for all choices, or for none. Raises ServingError."""
        self._log |= {"engine_request": self.completion.id, "images": len(self.completion.prompt.image_sizes)}
        try:
            for index, body in enumerate(asked):
                reader = AnswerReader(self._many_calls, partial(self._on_prompt, index))
                await self._remote.ask(self.engine_id(index), path, body, reader, partial(self._post.put, self._inbox, index), deadline_s)
        except BaseException:
            self._release()
            raise
        self._metrics.submitted(longest, len(asked), not self._permit.caller.is_user)

    def _on_prompt(self, index: int, tokens: int) -> None:
        completion = self.completion
        self._prompt_tokens[index * completion.prompts // len(completion.choices)] = tokens
        completion.prompt = replace(completion.prompt, tokens=sum(self._prompt_tokens.values()))

    def _checked(self, index: int, event: Done | Failed) -> Done:
        if isinstance(event, EngineFailed):
            self._fail(event.error.code or "engine")
            raise event.error
        if isinstance(event, EngineDone):
            completion = self.completion
            completion.prompt = replace(completion.prompt, image_tokens=event.image_tokens)
            completion.unmet += [name for name in event.unmet if name not in completion.unmet]
            if event.reasoning_tokens is not None:
                completion.choices[index].reasoning_tokens = event.reasoning_tokens
        return super()._checked(index, event)
