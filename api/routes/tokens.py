"""POST /tokenize and /detokenize: text to the model's tokens and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import Request

from api.engine.loaded_model import Model
from api.errors import invalid, unknown_model
from api.http.body import parsed, read_body, while_connected
from api.protocol.tokens import DetokenizeRequest, TokenizeRequest, parse_detokenize, parse_tokenize
from api.requests import prompt as prompts
from api.routes.openapi import DETOKENIZE, TOKENIZE
from api.state import caller, services

router = APIRouter()
Wanted = TypeVar("Wanted", TokenizeRequest, DetokenizeRequest)


@router.post("/tokenize", **TOKENIZE)
async def tokenize(request: Request) -> dict[str, Any]:
    return await _answered(request, parse_tokenize, _tokenized)


@router.post("/detokenize", **DETOKENIZE)
async def detokenize(request: Request) -> dict[str, Any]:
    return await _answered(request, parse_detokenize, _detokenized)


async def _answered(
    request: Request, parse: Callable[[bytes], Wanted], answer: Callable[[Wanted, Model], dict[str, Any]]
) -> dict[str, Any]:
    """Admitted as a question is, and worked out beside the event loop: a text may be long."""
    server = services(request)
    model = server.model()
    server.admission.check(caller(request))
    body = await read_body(request, server)
    place = server.admission.enter(caller(request))
    pool = server.pools.preprocess(place.caller)
    try:
        wanted = await parsed(parse, body, pool)
        if wanted.model is not None and wanted.model != model.id:
            raise unknown_model(wanted.model, model.id)
        work = asyncio.get_running_loop().run_in_executor(pool, answer, wanted, model)
        return await while_connected(request, work)
    finally:
        place.close()


def _tokenized(wanted: TokenizeRequest, model: Model) -> dict[str, Any]:
    ids = _ids(wanted, model)
    body: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": model.context_tokens}
    if wanted.return_token_strs:
        body["token_strs"] = [model.vocabulary.token_bytes(token).decode(errors="replace") for token in ids]
    return body


def _detokenized(wanted: DetokenizeRequest, model: Model) -> dict[str, Any]:
    for place, token in enumerate(wanted.tokens):
        if token < 0 or token >= 2**31 or not model.vocabulary.has(token):
            raise invalid(f"`tokens[{place}]`: the model has no token {token}.", f"tokens[{place}]")
    return {"prompt": b"".join(map(model.vocabulary.token_bytes, wanted.tokens)).decode(errors="replace")}


def _ids(wanted: TokenizeRequest, model: Model) -> list[int]:
    """Special tokens in a plain text are text here as everywhere."""
    if wanted.prompt is not None:
        prompts.check_characters(wanted.prompt, "prompt", model)
        return model.vocabulary.encode(model.vocabulary.protect(wanted.prompt))
    assert wanted.messages is not None
    return prompts.rendered_ids(wanted.messages, wanted.tools or [], _thinks(wanted), model)


def _thinks(wanted: TokenizeRequest) -> bool:
    options = wanted.chat_template_kwargs
    return options is None or options.enable_thinking is not False
