"""POST /tokenize and /detokenize: text to the ids of the model's tokens, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from api.behind import tokens as engine_tokens
from api.behind.handlers import BehindHandlers
from api.caller import Caller
from api.engine.loaded_model import Model
from api.errors import invalid, unknown_model
from api.http.connection import parse_body, read_body, while_connected
from api.protocol.fields import IgnoredFields
from api.protocol.schemas import ChatRequest, DetokenizeRequest, TokenizeRequest, parse_detokenize, parse_tokenize
from api.requests.admission import Permit
from api.requests.handler import loaded_model
from api.requests.prompt import check_characters, rendered_ids, with_image_tokens
from api.routes.chat import ignored_fields, note_ignored
from api.routes.openapi import DETOKENIZE, TOKENIZE
from api.state import ServerState

router = APIRouter()
TokenRequest = TypeVar("TokenRequest", TokenizeRequest, DetokenizeRequest)


@router.post("/tokenize", **TOKENIZE)
async def tokenize(request: Request) -> JSONResponse:
    return await _answer(request, parse_tokenize, _tokenized)


@router.post("/detokenize", **DETOKENIZE)
async def detokenize(request: Request) -> JSONResponse:
    return await _answer(request, parse_detokenize, _detokenized)


async def _answer(
    request: Request,
    parse: Callable[[bytes, IgnoredFields], TokenRequest],
    compute: Callable[[TokenRequest, Model, Sequence[int]], dict[str, Any]],
) -> JSONResponse:
    """Admitted like a chat request, and computed in a preprocessing thread, since the text may be long."""
    server: ServerState = request.app.state.server
    caller: Caller = request.state.caller
    model_id = loaded_model(server.engine).id
    server.admission.check(caller)
    with server.admission.arriving(caller) as arriving:
        body = await read_body(request, server.settings.max_body_bytes, arriving.add)
    permit = server.admission.admit(caller)
    pool = server.prompts.pool(caller)
    try:
        ignored = ignored_fields(request)
        parsed = await parse_body(lambda data: parse(data, ignored), body, pool)
        if parsed.model is not None and parsed.model != model_id:
            raise unknown_model(parsed.model, model_id)
        answer = await while_connected(request, _computed(server, parsed, compute, caller))
    finally:
        permit.release()
    names = note_ignored(request, ignored)
    return JSONResponse({**answer, **({"ignored": names} if names else {})}, headers=ignored.headers())


async def _computed(
    server: ServerState, parsed: TokenRequest, compute: Callable[[TokenRequest, Model, Sequence[int]], dict[str, Any]], caller: Caller
) -> dict[str, Any]:
    if isinstance(server.handlers, BehindHandlers):
        engine = server.handlers.engine
        if isinstance(parsed, TokenizeRequest):
            return await engine_tokens.tokenize(parsed, engine)
        return await engine_tokens.detokenize(parsed, engine)
    model = loaded_model(server.handlers.engine)
    images: list[int] = []
    if isinstance(parsed, TokenizeRequest):
        images = await server.prompts.image_tokens(parsed, model, caller)
    return await asyncio.get_running_loop().run_in_executor(server.prompts.pool(caller), compute, parsed, model, images)


async def prompt_tokens(
    request: Request, parse: Callable[[bytes, IgnoredFields], ChatRequest], **fields: str
) -> JSONResponse:
    """The number of tokens of a chat request's prompt, those of its images included; nothing is generated.

    Raises ServingError or ClientDisconnected.
    """
    server: ServerState = request.app.state.server
    caller: Caller = request.state.caller
    model_id = loaded_model(server.engine).id
    server.admission.check(caller)
    with server.admission.arriving(caller) as arriving:
        body = await read_body(request, server.settings.max_body_bytes, arriving.add)
    permit = server.admission.admit(caller)
    try:
        ignored = ignored_fields(request)
        chat = await parse_body(lambda data: parse(data, ignored), body, server.prompts.pool(caller))
        if chat.model is not None and chat.model != model_id:
            raise unknown_model(chat.model, model_id)
        tokens = await while_connected(request, _counted(server, chat, permit))
    finally:
        permit.release()
    note_ignored(request, ignored)
    return JSONResponse({**fields, "input_tokens": tokens}, headers=ignored.headers())


async def _counted(server: ServerState, chat: ChatRequest, permit: Permit) -> int:
    handlers, caller = server.handlers, permit.caller
    if isinstance(handlers, BehindHandlers):
        return await engine_tokens.count(chat, handlers.engine, server.prompts, server.settings, permit)
    return (await server.prompts.draft(chat, loaded_model(handlers.engine), caller, caller.name)).tokens


def _tokenized(request: TokenizeRequest, model: Model, images: Sequence[int]) -> dict[str, Any]:
    ids = _ids(request, model, images)
    body: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": model.context_tokens}
    if request.return_token_strs:
        body["token_strs"] = [model.vocabulary.token_bytes(token).decode(errors="replace") for token in ids]
    return body


def _detokenized(request: DetokenizeRequest, model: Model, _: Sequence[int]) -> dict[str, Any]:
    for index, token in enumerate(request.tokens):
        if token < 0 or token >= 2**31 or not model.vocabulary.has(token):
            raise invalid(f"`tokens[{index}]`: the model has no token {token}.", f"tokens[{index}]")
    return {"prompt": b"".join(map(model.vocabulary.token_bytes, request.tokens)).decode(errors="replace")}


def _ids(request: TokenizeRequest, model: Model, images: Sequence[int]) -> list[int]:
    """The ids of the text or conversation; special tokens in a text are plain text here too. `images`: tokens of each."""
    if request.prompt is not None:
        check_characters(request.prompt, "prompt", model)
        return model.vocabulary.encode(model.vocabulary.protect(request.prompt))
    assert request.messages is not None
    options = request.chat_template_kwargs
    enable_thinking = options is None or options.enable_thinking is not False
    ids = rendered_ids(request.messages, request.tools or [], enable_thinking, model)
    return with_image_tokens(ids, images, model)
